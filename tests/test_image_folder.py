"""Your own images in folders: ids that stay, parts, a manifest, and what is refused."""

import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.data.image_folder import ImageFolderDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.data.transforms import paper_transform
from lightning_mimic.models import ImageClassifier, SmallConvNet
from lightning_mimic.scorers import Uniform
from support.image_sets import looks_like, picture, write_folder
from support.toys import trainer

IDS = [f"{name}/{number}.png" for name in "abc" for number in range(3)]


def opened(root, size=16, **options):
    module = ImageFolderDataModule(root, paper_transform(size), **options)
    module.setup()
    return module


def read(batches):
    """Images and labels by id."""
    return {
        each: (image, int(label)) for batch in batches for each, image, label in zip(batch.ids, *batch, strict=True)
    }


def test_images_are_known_by_their_paths(tmp_path):
    write_folder(tmp_path, ("train", "test", "val"))
    module = opened(tmp_path, num_workers=2, batch_size=4)
    found = read(module.train_dataloader())
    assert sorted(found) == IDS
    for row, each in enumerate(IDS):
        assert looks_like(found[each][0], "train", row)
        assert found[each][1] == row // 3
    tests, validation = read(module.test_dataloader()), read(module.val_dataloader())
    assert list(tests) == [f"{name}/{number}.png" for name in "abc" for number in range(2)]
    assert list(validation) == ["a/0.png", "b/0.png", "c/0.png"]
    assert all(looks_like(image, "test", row) for row, (image, _) in enumerate(tests.values()))
    assert (module.class_names, module.num_classes) == (["a", "b", "c"], 3)


def test_an_image_keeps_its_id_and_its_cache_notices_another(tmp_path):
    write_folder(tmp_path, classes="bcd")
    before, key = read(opened(tmp_path).train_dataloader()), opened(tmp_path).sources["train"].key()
    assert opened(tmp_path).sources["train"].key() == key
    write_folder(tmp_path, classes="a")
    after = read(opened(tmp_path).train_dataloader())
    assert all(torch.equal(after[each][0], before[each][0]) for each in before)
    assert all(after[each][1] == before[each][1] + 1 for each in before)
    assert opened(tmp_path).sources["train"].key() != key
    assert opened(tmp_path).val_dataloader() == []
    key = opened(tmp_path).sources["train"].key()
    (tmp_path / "train" / "a" / "0.png").rename(tmp_path / "train" / "a" / "00.png")
    assert opened(tmp_path).sources["train"].key() != key


def test_trusted_and_flipped_images_go_by_their_ids(tmp_path):
    write_folder(tmp_path)
    module = opened(tmp_path, trusted=0.5, noise=SymmetricNoise(1.0), flip=True)
    ids = [IDS[row] for row in module.noisy_ids.tolist()]
    assert {each[0] for each in ids} == set("abc")
    (held,) = module.val_dataloader()
    assert not set(held.ids) & set(ids)
    found = read(module.train_dataloader())
    assert sorted(found) == sorted(ids)
    assert [found[each][1] for each in ids] == module.given_labels.tolist()
    assert bool(module.wrong.all())
    flips = torch.stack([module.flipped(IDS, epoch) for epoch in range(100)])
    assert (flips.float().mean(0) - 0.5).abs().max() < 0.2
    for order in (torch.randperm(9), torch.tensor([4])):
        assert torch.equal(module.flipped([IDS[row] for row in order.tolist()], 3), flips[3][order])


def test_a_manifest_keeps_by_path_and_a_fit_records_it(tmp_path):
    write_folder(tmp_path)
    keep = {each: each not in ("a/1.png", "c/2.png") for each in IDS}
    pq.write_table(pa.table({"id": list(keep), "keep": list(keep.values())}), tmp_path / "manifest.parquet")
    module = opened(tmp_path, 8, keep=tmp_path / "manifest.parquet", flip=True)
    mimic = GradMimic(scorer=Uniform(), ledger=tmp_path / "scores")
    trainer(mimic, limit_val_batches=0).fit(ImageClassifier(SmallConvNet(4, 3), 3, (3, 8, 8)), module)
    rows = Ledger(tmp_path / "scores").table().to_pylist()
    assert {row["id"]: row["label"] for row in rows} == {each: "abc".index(each[0]) for each in IDS if keep[each]}
    assert len(rows) == 7


def test_folders_that_do_not_fit_are_refused(tmp_path):
    expected = f"expected {tmp_path}/train/CLASS/NAME.jpg and {tmp_path}/test/CLASS/NAME.jpg."
    with pytest.raises(ValueError, match=f"^{re.escape(f'`root`: {tmp_path}/train is no folder; {expected}')}$"):
        opened(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=f"^`root`: Couldn't find any class folder in .*; {re.escape(expected)}$"):
        opened(tmp_path)
    write_folder(tmp_path)
    write_folder(tmp_path, ("test",), classes="dx")
    shutil.rmtree(tmp_path / "test" / "b")
    message = (
        f"`root`: {tmp_path}/train and {tmp_path}/test must have the same classes; in one of them alone: 'b', 'd', 'x'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "test")
    write_folder(tmp_path)
    (tmp_path / "train" / "c" / "Thumbs.db").touch()
    (tmp_path / "train" / "notes.txt").touch()
    with pytest.warns(
        UserWarning, match="2 files in .*/train are no images of a class by their names, and are left out: "
    ):
        opened(tmp_path)
    (tmp_path / "train" / "notes.txt").unlink()
    (tmp_path / "train" / "c" / "Thumbs.db").rename(tmp_path / "train" / "c" / "2.png")
    with pytest.raises(ValueError, match=r"image 8 cannot be decoded: .*/train/c/2.png: cannot identify image file"):
        list(opened(tmp_path).train_dataloader())
    for number in range(3):
        (tmp_path / "train" / "c" / f"{number}.png").unlink()
    with pytest.raises(ValueError, match=f"^`root`: Found no valid file for the classes c.*; {re.escape(expected)}$"):
        opened(tmp_path)


def test_grey_and_transparent_images_become_colours(tmp_path):
    from PIL import Image

    write_folder(tmp_path)
    Image.fromarray(picture("train", 0)).convert("L").save(tmp_path / "train" / "a" / "0.png")
    Image.fromarray(picture("train", 1)).convert("RGBA").save(tmp_path / "train" / "a" / "1.png")
    found = read(opened(tmp_path).train_dataloader())
    assert all(image.shape == (3, 16, 16) for image, _ in found.values())
    assert looks_like(found["a/1.png"][0], "train", 1)
