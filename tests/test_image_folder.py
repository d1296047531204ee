"""Your own images in folders: ids that stay, parts, a manifest, and what is refused."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.data.image_folder import ImageFolderDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.data.pairs import decode_image
from lightning_mimic.data.transforms import paper_transform
from lightning_mimic.errors import MimicError
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
    expected = re.escape(f"expected {tmp_path}/CLASS/NAME.jpg, or {tmp_path}/train/CLASS/NAME.jpg")
    with pytest.raises(MimicError, match=f"^`root`: {tmp_path} has no class folders; {expected}, with at least two"):
        opened(tmp_path)
    (tmp_path / "imagse").mkdir()
    with pytest.raises(MimicError, match=r"^`root`: .*/images is not a folder \(nearest: 'imagse'\); expected "):
        opened(tmp_path / "images")
    (tmp_path / "imagse" / "cat").mkdir()
    with pytest.raises(MimicError, match=r"has one class folder, 'imagse'; .* give data.root=.*/imagse\.$"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "imagse")
    write_folder(tmp_path, ("test",))
    with pytest.raises(MimicError, match=f"^`root`: {tmp_path} has a folder 'test' but no folder 'train'; {expected}"):
        opened(tmp_path)
    write_folder(tmp_path)
    write_folder(tmp_path, ("test",), classes="dx")
    shutil.rmtree(tmp_path / "test" / "b")
    message = (
        f"`root`: {tmp_path}/train and {tmp_path}/test must have the same classes; only in one of them: 'b', 'd', 'x'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "test")
    write_folder(tmp_path)
    (tmp_path / "train" / "c" / "Thumbs.db").touch()
    (tmp_path / "train" / "notes.txt").touch()
    with pytest.warns(
        UserWarning, match=r"2 files in .*/train are not images in a class folder .* \(1 \.db, 1 \.txt\)"
    ):
        opened(tmp_path)
    (tmp_path / "train" / "notes.txt").unlink()
    (tmp_path / "train" / "c" / "Thumbs.db").rename(tmp_path / "train" / "c" / "2.png")
    with pytest.raises(ValueError, match=r"image 8 cannot be decoded: .*/train/c/2.png: cannot identify image file"):
        list(opened(tmp_path).train_dataloader())
    for number in range(3):
        (tmp_path / "train" / "c" / f"{number}.png").unlink()
    with pytest.raises(MimicError, match=r"^`root`: .*/train has class folders without an image: 'c'\. Remove"):
        opened(tmp_path)


def test_grey_and_transparent_images_become_colours(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(picture("train", 0)).convert("L").save(tmp_path / "train" / "a" / "0.png")
    Image.fromarray(picture("train", 1)).convert("RGBA").save(tmp_path / "train" / "a" / "1.png")
    found = read(opened(tmp_path).train_dataloader())
    assert all(image.shape == (3, 16, 16) for image, _ in found.values())
    assert looks_like(found["a/1.png"][0], "train", 1)


def plain(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


def images_of(root, **options):
    module = ImageFolderDataModule(root, plain, batch_size=1, **options)
    module.setup()
    return module.sources["train"].images


def test_sixteen_bits_transparency_and_orientation_are_what_they_are_in_pairs(tmp_path):
    write_folder(tmp_path, classes="ab")
    folder = tmp_path / "train" / "a"
    Image.fromarray(np.array([[0, 30000, 65535]], np.uint16)).save(folder / "0.png")
    Image.fromarray(np.array([[0, 30000, 65535]], np.uint16)).save(folder / "1.TIFF")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(np.array([[[9, 9, 9], [200, 0, 0]]], np.uint8)).save(folder / "1.png", exif=exif)
    Image.fromarray(np.array([[[1, 2, 3, 0], [4, 5, 6, 255]]], np.uint8)).save(folder / "2.png")
    images = images_of(tmp_path)
    assert [path.name for path in images.files][:4] == ["0.png", "1.TIFF", "1.png", "2.png"]
    for row in range(2):
        assert images[row][:, 0].tolist() == [[0, 117, 255]] * 3
    assert images[2].tolist() == [[[9], [200]], [[9], [0]], [[9], [0]]]
    with pytest.warns(UserWarning, match=r"2\.png is partly transparent\. Transparency is dropped"):
        assert images[3].tolist() == [[[1, 4]], [[2, 5]], [[3, 6]]]
    images[3]  # said once
    for row, file in ((0, "0.png"), (2, "1.png"), (3, "2.png")):
        assert plain(decode_image((folder / file).read_bytes(), 9)).equal(images[row])


BAD = {
    "cut": lambda image, path: path.write_bytes(path.read_bytes()[:-30]),
    "a bit": lambda image, path: path.write_bytes(path.read_bytes()[:60] + b"?" + path.read_bytes()[61:]),
    "floats": lambda image, path: Image.fromarray(np.ones((2, 2), np.float32)).save(path, "TIFF"),
    "32 bits": lambda image, path: Image.fromarray(np.ones((2, 2), np.int32)).save(path, "TIFF"),
    "a program": lambda image, path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
    "a folder": lambda image, path: (path.unlink(), path.mkdir()),
    "too big": lambda image, path: Image.new("L", (101, 100)).save(path),
}


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_right_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other libraries set it
    write_folder(tmp_path, classes="ab")
    path = tmp_path / "train" / "a" / "1.png"
    images = images_of(tmp_path, max_pixels=10_000)
    BAD[name](images[1], path)
    fix = "increase `max_pixels`" if name == "too big" else "Replace or remove it"
    with pytest.raises(MimicError, match=rf"^image 1 cannot be decoded: {re.escape(str(path))}: .+{fix}"):
        images[1]


def test_names_that_are_no_text_are_refused_before_training(tmp_path):
    write_folder(tmp_path)
    bad = os.fsencode(tmp_path / "train" / "a") + b"/caf\xe9.png"
    try:
        os.rename(tmp_path / "train" / "a" / "1.png", bad)
    except OSError:
        pytest.skip("this file system takes no such names")
    message = r"^`root`: 1 of 9 images in .*/train have names that are not UTF-8, such as 'a/caf\udce9.png', but "
    with pytest.raises(MimicError, match=message.replace("\\u", r"\\u")):
        opened(tmp_path)
    os.rename(bad, bad + b".txt")
    with pytest.warns(UserWarning, match=r"1 files in .* are skipped \(1 \.txt\), such as a/caf\\udce9\.png\.txt\."):
        opened(tmp_path)


def test_what_is_hidden_or_no_file_is_no_image(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/0.png", "a/._0.png", "b/.DS_Store"):
        (tmp_path / "train" / name).write_bytes(b"\0")
    (tmp_path / "train" / "c" / "2.png").rename(tmp_path / "train" / "c" / "2.PNG")
    (tmp_path / "train" / "c" / "folder.png").mkdir()
    with pytest.warns(UserWarning, match=r"3 files in .* are skipped .*, such as \.ipynb_checkpoints/0\.png"):
        module = opened(tmp_path)
    assert module.class_names == ["a", "b", "c"]
    assert module.sources["train"].ids == [*IDS[:-1], "c/2.PNG"]
    (tmp_path / "train" / "c" / "9.png").symlink_to(tmp_path / "nowhere.png")
    with (
        pytest.warns(UserWarning, match="are skipped"),
        pytest.raises(MimicError, match=r"^1 of 10 images do not exist, such as .*/c/9\.png"),
    ):
        opened(tmp_path)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    write_folder(tmp_path)
    inner = tmp_path / "train" / "a" / "more"
    inner.mkdir()
    scan = os.scandir

    def scandir(path):
        if Path(path) == inner:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(MimicError, match=r"^`root`: .*Permission denied.*/train/a/more"):
        opened(tmp_path)
    monkeypatch.undo()
    (inner / "round").symlink_to(tmp_path / "train" / "a")
    with pytest.raises(MimicError, match=r"^`root`: .*Too many levels of symbolic links"):
        opened(tmp_path)
