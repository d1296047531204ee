"""Writes tiny versions of the six image data sets as they lie on a disk, and folders of images."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from PIL import Image
from torch import Tensor

from lightning_mimic.data.image_splits import Transform
from lightning_mimic.data.torchvision_sets import SETS, TorchvisionDataModule
from lightning_mimic.data.transforms import paper_transform

#: Images of each class in each split.
PER_CLASS = {"train": 3, "val": 1, "test": 2}


def labels_of(name: str, split: str) -> Tensor:
    """True labels of a written split, in its order: all classes in turn, not in theirs."""
    classes = SETS[name].num_classes
    return (torch.arange(PER_CLASS[split] * classes) * 7 + 3) % classes


def picture(split: str, row: int, size: int = 16) -> np.ndarray:
    """An image that says by its colours which it is, ``(size, size, 3)``; its right half is darker."""
    blue = {"train": 40, "val": 120, "test": 200}[split]
    pixels = np.full((size, size, 3), (row % 16 * 16, row // 16 * 11, blue), dtype=np.uint8)
    pixels[:, size // 2 :, 2] -= 30
    return pixels


#: To 16 by 16 pixels.
SMALL = paper_transform(16)


def opened(name: str, root: Path, transform: Transform | None = SMALL, **options: Any) -> TorchvisionDataModule:
    """The data module of a set that is there."""
    module = TorchvisionDataModule(name, root, transform, download=False, **options)
    module.prepare_data()
    module.setup()
    return module


def write_set(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Writes all splits of a set and has torchvision take their checksums for the published ones."""
    {
        "cifar10": _write_cifar10,
        "cifar100": _write_cifar100,
        "stl10": _write_stl10,
        "dtd": _write_dtd,
        "flowers102": _write_flowers102,
        "oxford_pet": _write_pet,
    }[name](root, patch)


def looks_like(image: Tensor, split: str, row: int) -> bool:
    """Whether it is that picture, as far as a JPEG tells; from -1 to 1, as the paper's transform gives it."""
    pixels = torch.tensor(picture(split, row, image.shape[-1])).permute(2, 0, 1)
    return bool(((image + 1) * 127.5 - pixels).abs().mean() < 3)


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "test"), classes: str = "abc") -> None:
    """``root/SPLIT/CLASS/NAME.png``, three images a class in training, in their order ``picture(split, row)``."""
    for split in splits:
        row = 0
        for name in classes:
            for number in range(PER_CLASS[split]):
                _saved(root / split / name / f"{number}.png", picture(split, row))
                row += 1


def _write_cifar10(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-10-batches-py"
    pixels, labels = _rows("cifar10", "train")
    for number in range(5):
        part = slice(number * 6, (number + 1) * 6)
        _pickled(folder / f"data_batch_{number + 1}", {"labels": labels[part], "data": pixels[part]})
    pixels, labels = _rows("cifar10", "test")
    _pickled(folder / "test_batch", {"labels": labels, "data": pixels})
    _pickled(folder / "batches.meta", {"label_names": _names(10), "num_vis": 3072})
    _publish_cifar(torchvision.datasets.CIFAR10, folder, patch)


def _write_cifar100(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-100-python"
    for split in ("train", "test"):
        pixels, labels = _rows("cifar100", split)
        coarse = [label // 5 for label in labels]
        _pickled(folder / split, {"fine_labels": labels, "coarse_labels": coarse, "data": pixels})
    _pickled(folder / "meta", {"fine_label_names": _names(100), "coarse_label_names": _names(20)})
    _publish_cifar(torchvision.datasets.CIFAR100, folder, patch)


def _publish_cifar(reader: type, folder: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("train_list", "test_list"):
        patch.setattr(reader, name, [[file, _md5(folder / file)] for file, _ in getattr(reader, name)])
    patch.setattr(reader, "meta", reader.meta | {"md5": _md5(folder / reader.meta["filename"])})


def _write_stl10(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        labels = labels_of("stl10", split)
        pixels = np.stack([picture(split, row, 96) for row in range(len(labels))])
        pixels.transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")  # by channel, then by column
        (labels + 1).numpy().astype(np.uint8).tofile(folder / f"{split}_y.bin")
    (folder / "unlabeled_X.bin").write_bytes(bytes(3 * 96 * 96))
    (folder / "class_names.txt").write_text("\n".join(_names(10)) + "\n")
    reader = torchvision.datasets.STL10
    for name in ("train_list", "test_list"):
        patch.setattr(reader, name, [[file, _md5(folder / file)] for file, _ in getattr(reader, name)])


def _write_dtd(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "dtd" / "dtd"
    lists = {split: [] for split in PER_CLASS}

    def place(split: str, row: int, label: int) -> Path:
        name = f"class{label:03d}"
        lists[split].append(f"{name}/{name}_{split}{row:04d}.jpg\n")
        return folder / "images" / lists[split][-1].strip()

    _write_files("dtd", place)
    (folder / "labels").mkdir()
    for split, lines in lists.items():
        (folder / "labels" / f"{split}1.txt").write_text("".join(lines))


def _write_flowers102(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "flowers-102"
    numbers: dict[str, list[int]] = {split: [] for split in PER_CLASS}
    labels: list[int] = []

    def place(split: str, row: int, label: int) -> Path:
        labels.append(label + 1)
        numbers[split].append(len(labels))  # images are counted from 1, over all splits
        return folder / "jpg" / f"image_{len(labels):05d}.jpg"

    _write_files("flowers102", place)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    ids = {"trnid": numbers["train"], "valid": numbers["val"], "tstid": numbers["test"]}
    scipy.io.savemat(folder / "setid.mat", {name: np.array([each], dtype=np.uint16) for name, each in ids.items()})
    reader = torchvision.datasets.Flowers102
    files = {key: (file, _md5(folder / file)) for key, (file, _) in reader._file_dict.items() if key != "image"}
    patch.setattr(reader, "_file_dict", reader._file_dict | files)


def _write_pet(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    lists: dict[str, list[str]] = {"train": [], "test": []}

    def place(split: str, row: int, label: int) -> Path:
        name = f"the_breed_{chr(ord('a') + label // 26)}{chr(ord('a') + label % 26)}_{split}{row}"
        lists[split].append(f"{name} {label + 1} {label % 2 + 1} 1\n")
        return folder / "images" / f"{name}.jpg"

    _write_files("oxford_pet", place)
    (folder / "annotations").mkdir()
    for file, split in {"trainval": "train", "test": "test"}.items():
        (folder / "annotations" / f"{file}.txt").write_text("".join(lists[split]))


def _write_files(name: str, place: Callable[[str, int, int], Path]) -> None:
    for split in SETS[name].splits:
        for row, label in enumerate(labels_of(name, split).tolist()):
            _saved(place(split, row, label), picture(split, row))


def _saved(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels).save(path, **how)


def _rows(name: str, split: str) -> tuple[np.ndarray, list[int]]:
    """Pixels as CIFAR has them, by channel in one row per image, and labels."""
    labels = labels_of(name, split).tolist()
    pixels = np.stack([picture(split, row, 32) for row in range(len(labels))])
    return pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1), labels


def _pickled(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def _names(count: int) -> list[str]:
    return [f"name {number}" for number in range(count)]


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
