"""The six image data sets as they lie on a disk, read by torchvision: labels, parts, ids, and fits."""

import os
import re

import pytest
import torch
import torchvision.datasets
from PIL import Image

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.data.image_text import ImageTextDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.data.splits import Source
from lightning_mimic.data.torchvision_sets import SETS, TorchvisionDataModule
from lightning_mimic.data.transforms import paper_transform
from lightning_mimic.models import ImageClassifier, SmallConvNet
from support.cases import for_each
from support.image_sets import PER_CLASS, SMALL, labels_of, looks_like, opened, write_set
from support.toys import trainer


@pytest.fixture(scope="module", params=SETS)
def written(request, tmp_path_factory):
    """Name and root of a set."""
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        write_set(request.param, root, patch)
        yield request.param, root


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    write_set("cifar10", tmp_path / "sets", monkeypatch)
    return tmp_path / "sets"


def read(batches):
    """Ids, labels and images of a loader, joined."""
    rows = [(batch.ids, batch[1], batch[0]) for batch in batches]
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def test_a_set_is_read_as_it_was_written(written):
    name, root = written
    module = opened(name, root)
    found = {"train": module.train_dataloader(), "test": module.test_dataloader(), "val": module.val_dataloader()}
    if "val" not in SETS[name].splits:
        assert found.pop("val") == []
    assert set(found) == set(module.sources) == set(SETS[name].splits)
    for split, batches in found.items():
        ids, labels, images = read(batches)
        assert sorted(ids.tolist()) == list(range(PER_CLASS[split] * module.num_classes))
        assert torch.equal(labels, labels_of(name, split)[ids])
        assert images.dtype == torch.float32
        assert all(looks_like(image, split, row) for image, row in zip(images, ids.tolist(), strict=True))
    known = {"cifar100": "name 99", "stl10": "name 9", "dtd": "class046", "oxford_pet": "The Breed Bk"}
    last = {**known, "flowers102": "blackberry lily", "cifar10": "name 9"}[name]
    if name == "flowers102" and not hasattr(torchvision.datasets.Flowers102, "classes"):  # torchvision 0.21
        assert module.class_names == []
    else:
        assert (len(module.class_names), module.class_names[-1]) == (module.num_classes, last)
    assert torch.equal(module.noisy_ids, torch.arange(3 * module.num_classes))
    assert not len(module.rows["trusted"])


def test_labels_are_read_without_decoding_an_image(written, monkeypatch):
    name, root = written

    def refuse(*_, **__):
        raise OSError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(Image, "fromarray", refuse)
    module = opened(name, root)
    for split in module.sources:
        assert torch.equal(module.sources[split].labels, labels_of(name, split))
    where = "" if SETS[name].files is None else re.escape(str(root)) + r".*\.jpg: "
    with pytest.raises(
        ValueError, match=rf"^image 7 cannot be decoded: {where}an image was opened. Replace or remove it"
    ):
        module.sources["train"].images[7]


def test_trusted_images_are_set_apart_by_class_and_by_their_own_seed(written):
    name, root = written
    module = opened(name, root, trusted=0.5, seed=1, noise=SymmetricNoise(0.4, seed=2))
    parts = [set(module.rows[part].tolist()) for part in ("trusted_fit", "trusted_held", "noisy")]
    labels, classes = labels_of(name, "train"), list(range(module.num_classes))
    assert set.union(*parts) == set(range(len(labels)))
    for part in parts:  # of three images: a trusted one to learn from, one that is held, one that is left
        assert sorted(labels[sorted(part)].tolist()) == classes
    assert set(module.rows["trusted"].tolist()) == parts[0] | parts[1]
    assert int(module.wrong.sum()) == int(0.4 * len(classes))
    assert torch.equal(module.wrong, module.given_labels != labels[module.noisy_ids])
    ids, held, _ = read(module.val_dataloader())
    assert torch.equal(held, labels[ids])
    assert set(ids.tolist()) == parts[1]
    again, other = opened(name, root, trusted=0.5, seed=5), opened(name, root, trusted=0.5, seed=1, split_seed=1)
    for part in ("trusted_fit", "trusted_held", "noisy"):
        assert torch.equal(again.rows[part], module.rows[part])
        assert not torch.equal(other.rows[part], module.rows[part])
    if name == "cifar10":
        with pytest.raises(
            ValueError, match=re.escape("`trusted` is 0.9, but class 'name 0' has 3 training images, of which 3")
        ):
            opened(name, root, trusted=0.9)


@for_each(
    ("count", "share", "fit", "held"),
    [(10, 0.1, 1, 1), (80, 0.1, 6, 2), (100, 0.1, 8, 2), (40, 0.5, 15, 5), (9, 0, 0, 0)],
)
def test_a_quarter_of_the_trusted_images_is_held_out(count, share, fit, held):
    module = TorchvisionDataModule("stl10", "sets", trusted=share)
    module.sources = {"test": Source(None, torch.arange(7), str)}
    labels = torch.arange(10 * count + 5) % 10  # half of the classes have one more
    rows = module.divide(labels)
    assert torch.bincount(labels[rows["trusted_fit"]], minlength=10).tolist() == [fit] * 10
    assert torch.bincount(labels[rows["trusted_held"]], minlength=10).tolist() == [held] * 10
    every = torch.cat([rows["trusted_fit"], rows["trusted_held"], rows["noisy"]])
    assert torch.equal(every.sort().values, torch.arange(len(labels)))
    assert torch.equal(rows["test"], torch.arange(7))


def test_a_key_tells_images_and_transforms_apart(written):
    name, root = written
    sources = opened(name, root).sources
    key = sources["train"].key()
    assert key == opened(name, root, seed=3, trusted=0.4, noise=SymmetricNoise(0.2)).sources["train"].key()
    assert key != opened(name, root, paper_transform(8)).sources["train"].key()
    assert len({source.key() for source in sources.values()}) == len(sources)
    with pytest.raises(ValueError, match=r"`transform` is <function .* at 0x\w+>, which does not show its settings"):
        opened(name, root, lambda image: image).sources["train"].key()
    files = sources["train"].images.files
    if files is not None:
        state = files[5].stat()
        os.utime(files[5], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    else:
        sources["train"].images.dataset.data.flat[1000] ^= 1
    assert sources["train"].key() != key


def test_the_table_names_the_files_that_torchvision_fetches():
    sets = torchvision.datasets
    fetched = {name: (getattr(sets, SETS[name].reader).url,) for name in ("cifar10", "cifar100", "stl10")}
    fetched["dtd"] = (sets.DTD._URL,)
    files = [file for file, _ in sets.Flowers102._file_dict.values()]
    fetched["flowers102"] = tuple(sets.Flowers102._download_url_prefix + file for file in files)
    fetched["oxford_pet"] = tuple(url for url, _ in sets.OxfordIIITPet._RESOURCES)
    assert {name: spec.archives for name, spec in SETS.items()} == fetched


@pytest.mark.parametrize("workers", [0, 2])
def test_half_of_the_images_are_flipped_another_half_in_each_epoch(workers, cifar10):
    module = opened("cifar10", cifar10, paper_transform(32), flip=True, num_workers=workers, batch_size=8)
    ids = torch.arange(30)
    flips = torch.stack([module.flipped(ids, epoch) for epoch in range(200)])
    assert (flips.float().mean(0) - 0.5).abs().max() < 0.15  # 4.2 standard deviations
    assert (flips.float().mean(1) - 0.5).abs().mean() < 0.1
    order = torch.randperm(30)
    assert torch.equal(module.flipped(order, 7), flips[7][order])
    other = opened("cifar10", cifar10, seed=1, flip=True)
    assert not torch.equal(torch.stack([other.flipped(ids, epoch) for epoch in range(200)]), flips)

    class Looks(ImageClassifier):
        def training_step(self, batch, batch_idx):
            for image, row in zip(batch[0], batch.ids.tolist(), strict=True):
                shown = image.flip(-1) if flips[self.current_epoch][row] else image
                assert looks_like(shown, "train", row)
                assert not looks_like(shown.flip(-1), "train", row)
                seen.append(row)
            return super().training_step(batch, batch_idx)

        def test_step(self, batch, batch_idx):
            assert all(looks_like(image, "test", row) for image, row in zip(batch[0], batch.ids.tolist(), strict=True))

    seen: list[int] = []
    fit = trainer(epochs=2, limit_val_batches=0)
    fit.fit(Looks(SmallConvNet(4, 3, 8), 10, (3, 32, 32)), module)
    fit.test(fit.lightning_module, module, verbose=False)
    assert sorted(seen) == sorted([*range(30), *range(30)])


def test_a_fit_records_the_images_by_their_rows(cifar10, tmp_path):
    def model():
        torch.manual_seed(0)
        return ImageClassifier(SmallConvNet(8, 3), 10, (3, 8, 8), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))

    reference = model()
    trainer(epochs=40, limit_val_batches=0).fit(reference, opened("cifar10", cifar10, paper_transform(8), flip=True))
    options = {"noise": SymmetricNoise(0.4, seed=3), "trusted": 0.4, "flip": True, "seed": 1}
    data = opened("cifar10", cifar10, paper_transform(8), **options)
    mimic = GradMimic(reference, "head", ledger=tmp_path / "scores")
    trainer(mimic, epochs=2).fit(model(), data)
    rows = Ledger(tmp_path / "scores").table().to_pylist()
    given = dict(zip(data.noisy_ids.tolist(), data.given_labels.tolist(), strict=True))
    assert sorted(row["id"] for row in rows) == sorted([*given, *given])
    assert all(row["label"] == given[row["id"]] for row in rows)
    true = labels_of("cifar10", "train").tolist()
    assert sum(true[row] != label for row, label in given.items()) == 4


def test_images_without_a_transform_serve_a_zero_shot_classifier(written, tmp_path):
    name, root = written
    zero_shot = opened(name, root, None)
    (tmp_path / "0.tar").touch()
    pairs = ImageTextDataModule(
        str(tmp_path / "0.tar"),
        SMALL,
        lambda texts: torch.zeros(len(texts), 2, dtype=torch.int64),
        zero_shot=zero_shot,
    )
    pairs.setup()
    (tests,) = pairs.test_dataloader()
    images, labels = next(iter(tests))
    assert torch.equal(labels, labels_of(name, "test")[: len(labels)])
    assert all(looks_like(image, "test", row) for row, image in enumerate(images))
    assert len(pairs.val_dataloader()) == ("val" in SETS[name].splits)
    image, label = zero_shot.test_dataloader().dataset[0].sample
    assert (type(image), image.mode, int(label)) == (Image.Image, "RGB", int(labels[0]))
