"""Own images in two commands: from a folder and a list of checked images to a manifest with names."""

import csv
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import initialize_config_module
from PIL import Image
from sklearn.datasets import load_digits

from lightning_mimic import Ledger
from lightning_mimic.cli import follow_up
from lightning_mimic.cli.build import build
from lightning_mimic.cli.follow_up import after_scores, data_words
from lightning_mimic.cli.training import train
from lightning_mimic.curation import Posterior, curate
from lightning_mimic.data.image_folder import ImageFolderDataModule
from lightning_mimic.data.transforms import paper_transform
from lightning_mimic.errors import MimicError
from support.configs import QUIET, composed
from support.image_sets import picture, write_folder

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SMALL = paper_transform(8)


def opened(root, **options):
    module = ImageFolderDataModule(root, SMALL, **options)
    module.setup()
    return module


def ids_of(module, part):
    return [module.sources["train"].ids[row] for row in module.rows[part].tolist()]


def write_list(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def flat(root, classes="abc", count=6):
    """``root/CLASS/NAME.png``."""
    for row, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(picture("train", row * count + number)).save(root / name / f"{name}{number}.png")
    return root


def write_digits(folder, count, checked):
    """Digits as JPEG, one in five in a wrong folder; true names by id."""
    digits, draw, truth = load_digits(), np.random.default_rng(0), {}
    for row, (pixels, label) in enumerate(zip(digits.images[:count], digits.target, strict=False)):
        given = (label + draw.integers(1, 10)) % 10 if draw.random() < 0.2 else label
        file = folder / "images" / NAMES[given] / f"{row:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32)).convert("RGB").save(file)
        truth[f"{NAMES[given]}/{row:04d}.jpg"] = NAMES[label]
    write_list(folder / "trusted.csv", [("file", "label"), *list(truth.items())[:checked]])
    return truth


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_two_trainings_find_wrong_labels_and_keep_names(tmp_path, monkeypatch):
    truth = write_digits(tmp_path, 700, 200)
    monkeypatch.chdir(tmp_path)
    given = ["data.root=images", "data.trusted=trusted.csv", *QUIET, "trainer.log_every_n_steps=1"]
    reference = train(composed(tmp_path, "experiment=own_reference", *given, f"save_to={tmp_path}/reference.ckpt"))
    assert reference.lightning_module.head.out_features == 10
    assert reference.callback_metrics["test/accuracy"] > 0.8
    train(composed(tmp_path, "experiment=own_reference", *given, f"save_to={tmp_path}/reference.ckpt"))  # once more
    trainer = train(composed(tmp_path, "experiment=own_images", *given, "trainer.max_epochs=3"))
    assert trainer.callback_metrics["test/accuracy"] > 0.8
    scored = set(Ledger("scores").table()["id"].to_pylist())
    assert scored == set(list(truth)[200:])
    words = ["experiment=own_images", *given[:2]]
    assert after_scores(Path("scores"), words) == "mimic-curate ledger=scores filter=posterior out=curated"
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        assert data_words(words) == ["data=image_folder", *given[:2]]
    manifest = curate("scores", Posterior(), "curated").manifest
    manifest.to_csv(tmp_path / "curated.csv")
    with (tmp_path / "curated.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["id"]: row["label_name"] for row in rows} == {each: each.partition("/")[0] for each in scored}
    assert {row["predicted_name"] for row in rows} <= set(NAMES)
    wrong = {each for each in scored if truth[each] != each.partition("/")[0]}
    dropped = {row["id"] for row in rows if row["keep"] == "false"}
    assert len(wrong & dropped) > 0.7 * len(wrong)
    assert len(wrong & dropped) > 0.7 * len(dropped)
    kept = train(
        composed(tmp_path, "experiment=own_images", *given, "mimic=none", "trainer.max_epochs=1", "test=false",
                 "data.keep=curated/manifest.parquet")
    )  # fmt: skip
    assert len(kept.train_dataloader.dataset) == len(scored - dropped)


def test_without_a_reference_the_error_has_the_command_for_these_images(tmp_path, monkeypatch):
    given = ["experiment=own_images", "data.root=images", "data.trusted=trusted.csv"]
    monkeypatch.setattr(follow_up, "current_words", lambda: given)
    cure = "mimic-train experiment=own_reference data.root=images data.trusted=trusted.csv"
    with pytest.raises(MimicError, match=rf"reference\.ckpt\. It is made by: {cure}"):
        train(composed(tmp_path, *given, *QUIET))


LISTS = {
    "ids": lambda root: [("id",), ("a/a1.png",), ("b/b0.png",), ("c/c5.png",), ("a/a0.png",)],
    "file names": lambda root: [("filename",), ("a1.png",), ("b0.png",), ("c5.png",), ("a0.png",)],
    "with the root": lambda root: [("path",), *[(f"{root.name}/{each}",) for each in ("a/a1.png", "b/b0.png")],
                                   (str(root / "c" / "c5.png"),), (r"a\a0.png",)],
    "other columns": lambda root: [("who", "file"), ("me", "a1.png"), ("me", "b0.png"), ("me", "./c/c5.png"),
                                   ("you", "a0.png")],
}  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
def test_listed_images_are_trusted_however_they_are_named(kind, tmp_path):
    root = flat(tmp_path / "images")
    module = opened(root, trusted=write_list(tmp_path / "trusted.csv", LISTS[kind](root)))
    trusted = {"a/a0.png", "a/a1.png", "b/b0.png", "c/c5.png"}
    assert set(ids_of(module, "trusted")) == trusted
    assert set(ids_of(module, "noisy")) == set(module.sources["train"].ids) - trusted
    # Of two images one is held out; a single one must train.
    assert len(ids_of(module, "trusted_held")) == 1
    assert {each[0] for each in ids_of(module, "trusted_fit")} == set("abc")


def test_text_and_parquet_name_the_same_images(tmp_path):
    root, images = flat(tmp_path / "images"), ["a/a0.png", "b/b0.png", "c/c0.png"]
    (tmp_path / "trusted.txt").write_text("\n".join(images) + "\n\n")
    pq.write_table(pa.table({"id": images, "label_name": ["a", None, "c"], "label": [2, 1, 0]}), tmp_path / "t.parquet")
    for name in ("trusted.txt", "t.parquet"):
        module = opened(root, trusted=tmp_path / name)
        assert ids_of(module, "trusted") == images
        assert module.sources["train"].labels[module.rows["trusted"]].tolist() == [0, 1, 2]


def test_checked_labels_replace_those_of_the_folders(tmp_path):
    root = flat(tmp_path / "images")
    rows = [("file", "label"), ("a0.png", "b"), ("a1.png", ""), ("c0.png", "c"), ("c1.png", "a")]
    module = opened(root, trusted=write_list(tmp_path / "trusted.csv", rows), train="trusted")
    labels = dict(zip(ids_of(module, "trusted"), module.sources["train"].labels[module.rows["trusted"]], strict=True))
    assert {each: int(label) for each, label in labels.items()} == {
        "a/a0.png": 1, "a/a1.png": 0, "c/c0.png": 2, "c/c1.png": 0
    }  # fmt: skip
    batches = {each: int(label) for batch in module.train_dataloader() for each, label in zip(batch.ids, batch[1])}  # noqa: B905
    assert batches == {each: int(label) for each, label in labels.items()}
    others = opened(root, trusted=tmp_path / "trusted.csv")
    assert others.given_labels.tolist() == ["abc".index(each[0]) for each in ids_of(others, "noisy")]


BAD_LISTS = {
    "no image": ([("id",), ("a/a9.png",), ("b0.png",), ("nowhere.png",)],
                 r"2 of 3 entries of .*trusted.csv name no training image: 'a/a9.png', 'nowhere.png'; nearest: 'a/a"),
    "two images": ([("id",), ("0.png",)], r"1 of 1 entries of .* more than one image: '0.png' is 'a/0.png', 'b/0.p"),
    "no class": ([("id", "label"), ("a0.png", "bb")], r"1 labels of .* are not classes, such as 'bb'; nearest: 'b'"),
    "two labels": ([("id", "label"), ("a0.png", "b"), ("a/a0.png", "c")], r"two different labels of 'a/a0.png'"),
    "a missing class": ([("id",), ("a0.png",), ("b0.png",)], r"no image of 1 of 3 classes: 'c'\. A reference cannot"),
    "no column": ([("name",), ("a0.png",)], r"has the columns 'name'; expected exactly one of id, path, file, f"),
    "two columns": ([("id", "path"), ("a", "b")], r"has the columns 'id', 'path'; expected exactly one of"),
    "no path": ([("id", "label"), ("", "a")], r"has 1 rows without a path; the first is row 1"),
    "nothing": ([("id",)], r"lists no images"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_a_list_that_does_not_fit_is_refused(kind, tmp_path):
    root = flat(tmp_path / "images")
    if kind == "two images":
        for name in "ab":
            (root / name / f"{name}0.png").rename(root / name / "0.png")
    rows, message = BAD_LISTS[kind]
    with pytest.raises(MimicError, match=f"^`trusted`: .*{message}"):
        opened(root, trusted=write_list(tmp_path / "trusted.csv", rows))


def test_lists_that_are_not_there_or_no_lists_are_refused(tmp_path):
    root = flat(tmp_path / "images")
    write_list(tmp_path / "trusted.csv", [("id",), ("a0.png",)])
    with pytest.raises(MimicError, match=r"^`trusted`: there is no file .*/truested.csv; nearest: 'trusted.csv'"):
        opened(root, trusted=tmp_path / "truested.csv")
    (tmp_path / "trusted.csv").rename(tmp_path / "trusted.xlsx")
    with pytest.raises(MimicError, match=r"^`trusted`: .*trusted.xlsx is neither Parquet nor CSV"):
        opened(root, trusted=tmp_path / "trusted.xlsx")
    for share in (1.0, -0.1):
        with pytest.raises(MimicError, match=f"^`trusted` is {share}; expected a share .* or the path"):
            opened(root, trusted=share)


def test_all_images_of_a_class_may_be_checked(tmp_path):
    root = flat(tmp_path / "images", count=2)
    rows = [("id",), ("a0.png",), ("b0.png",), ("c0.png",), ("c1.png",)]
    with pytest.warns(UserWarning, match=r"lists all images of 'c'\. A model trained on the other"):
        opened(root, trusted=write_list(tmp_path / "trusted.csv", rows))
    opened(root, trusted=tmp_path / "trusted.csv", train="trusted_fit")


def test_a_folder_needs_no_splits(tmp_path):
    root = flat(tmp_path / "images", classes=("train", "test", "ab"))  # which may be names of classes
    (root / "ab" / "more").mkdir()
    Image.fromarray(picture("train", 0)).save(root / "ab" / "more" / "x.JPEG")
    module = opened(root, trusted=0.4)
    assert module.class_names == ["ab", "test", "train"]
    assert "ab/more/x.JPEG" in module.sources["train"].ids
    assert len(module.sources["train"].ids) == 19
    Image.fromarray(picture("train", 0)).save(root / "loose.png")
    write_list(root / "trusted.csv", [("id",), ("test0.png",), ("train0.png",), ("ab0.png",)])
    with pytest.warns(UserWarning, match=r"^1 files in .* are skipped \(1 \.png\), such as loose\.png"):
        opened(root, trusted=root / "trusted.csv")


def test_images_beside_the_splits_are_counted(tmp_path):
    write_folder(tmp_path, ("train",))
    (tmp_path / "scores.parquet").touch()
    Image.fromarray(picture("train", 0)).save(tmp_path / "loose.png")
    with pytest.warns(UserWarning, match=r"^1 files in .* are skipped \(1 \.png\), such as loose\.png"):
        opened(tmp_path)


def test_without_a_test_split_only_checked_images_test(tmp_path):
    root = flat(tmp_path / "images")
    for part in ("noisy", "trusted_fit"):
        module = opened(root, trusted=0.4, train=part)
        (batch,) = module.test_dataloader()
        assert sorted(batch.ids) == sorted(ids_of(module, "trusted_held"))
        assert not set(batch.ids) & {each for batch in module.train_dataloader() for each in batch.ids}
    for module in (opened(root), opened(root, trusted=0.4, train="trusted")):
        with pytest.warns(UserWarning, match="the test is skipped: the data have no test split"):
            assert module.test_dataloader() == []


def test_features_of_the_held_out_images_are_cached_for_the_test(tmp_path):
    root = flat(tmp_path / "images")
    common = [f"data.root={root}", "data=image_folder", "model/backbone=small_images", "data.trusted=0.4", *QUIET]
    common += ["mimic=none", "model.freeze_backbone=true", "trainer.max_epochs=1", "trainer.log_every_n_steps=1"]
    plain = train(composed(tmp_path, *common))
    cached = train(composed(tmp_path, *common, f"features={tmp_path / 'features'}"))
    torch.testing.assert_close(cached.callback_metrics["test/loss"], plain.callback_metrics["test/loss"])


BACKBONES = {
    "timm": (["model/backbone=timm", "model.backbone.name=test_vit"], (3, 160, 160)),
    "smaller": (["model/backbone=timm", "model.backbone.name=test_vit", "+model.backbone.img_size=96"], (3, 96, 96)),
    "torchvision": (["model/backbone=torchvision", "model.backbone.name=shufflenet_v2_x0_5"], (3, 224, 224)),
    "small": (["model/backbone=small_images"], (3, 32, 32)),
    "given": (["model/backbone=small_images", "data/transform=paper", "data.transform.size=16"], (3, 16, 16)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_size_and_classes_come_from_backbone_and_folder(kind, tmp_path):
    words, shape = BACKBONES[kind]
    config = composed(tmp_path, "data=image_folder", f"data.root={flat(tmp_path / 'images')}", *words)
    data, model = build(config)
    data.setup()
    assert (model.head.out_features, tuple(config.model.image_shape)) == (3, shape)
    image = data.sources["train"].images[0]
    assert image.shape == shape
    assert model(image[None]).shape == (1, 3)


def test_timm_and_torchvision_normalise_as_their_weights_expect(tmp_path):
    root = flat(tmp_path / "images")
    for words, mean in ((["timm", "test_vit"], 0.5), (["torchvision", "shufflenet_v2_x0_5"], (0.485, 0.456, 0.406))):
        given = [f"model/backbone={words[0]}", f"model.backbone.name={words[1]}", "data=image_folder"]
        data, _ = build(composed(tmp_path, *given, f"data.root={root}"))
        black = data.transform(Image.new("RGB", (300, 300)))[:, 0, 0]
        deviation = 0.5 if words[0] == "timm" else torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(black, (-torch.as_tensor(mean) / deviation).expand(3))


def test_settings_that_are_not_those_of_the_data_are_refused(tmp_path):
    given = ["data=image_folder", f"data.root={flat(tmp_path / 'images')}", "model/backbone=small_images"]
    with pytest.raises(MimicError, match=r"^`model\.num_classes` is 4, and that of the data is 3\. Leave"):
        build(composed(tmp_path, *given, "model.num_classes=4"))
    with pytest.raises(
        MimicError, match=r"^`model\.image_shape` is \[3, 8, 8\], and that of the data is \[3, 32, 32\]"
    ):
        build(composed(tmp_path, *given, "model.image_shape=[3,8,8]"))


def test_a_backbone_for_other_images_is_refused(tmp_path):
    given = ["data=image_folder", f"data.root={flat(tmp_path / 'images')}"]
    with pytest.raises(Exception, match=r"`backbone` cannot process an image of shape \(3, 32, 32\).*small_images"):
        build(composed(tmp_path, *given))


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    backbone = {"torchvision": "small_images", "timm": "timm"}[package]
    given = ["data=image_folder", f"data.root={flat(tmp_path / 'images')}", f"model/backbone={backbone}"]
    with pytest.raises(Exception, match=rf"needs the package {package}: pip install 'lightning-mimic\[vision\]'"):
        build(composed(tmp_path, *given))
