"""Data module of the paper's six image data sets, which torchvision reads and downloads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning_mimic.data.image_splits import ImageSplits, Transform
from lightning_mimic.data.noise import LabelNoise
from lightning_mimic.data.splits import Source, Split
from lightning_mimic.errors import MimicError, nearest_names, package_of_extra


@dataclass(frozen=True)
class ImageSet:
    """Describe how torchvision reads a data set.

    Attributes:
        reader: Name of the class in ``torchvision.datasets``.
        num_classes: Number of classes; labels count from 0.
        splits: Arguments of the class for ``"train"``, ``"test"`` and, if it exists, ``"val"``.
        labels: Attribute with the labels, which can be read without decoding images.
        files: Attribute with the paths of the images; ``None`` if the images are in the attribute ``data``.
        archives: URLs of the files to download.
        folder: Folder for these files, relative to the root.
        unpacked: Folders of their unpacked content, relative to the root.
    """

    reader: str
    num_classes: int
    splits: Mapping[str, Mapping[str, Any]]
    labels: str
    files: str | None
    archives: tuple[str, ...]
    folder: str
    unpacked: tuple[str, ...]


def _splits(argument: str, **values: Any) -> Mapping[str, Mapping[str, Any]]:
    return MappingProxyType({name: MappingProxyType({argument: value}) for name, value in values.items()})


_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"

#: Data sets by name. The training splits are those of the paper.
SETS: Mapping[str, ImageSet] = MappingProxyType(
    {
        "cifar10": ImageSet(
            reader="CIFAR10",
            num_classes=10,
            splits=_splits("train", train=True, test=False),
            labels="targets",
            files=None,
            archives=(_TORONTO + "cifar-10-python.tar.gz",),
            folder=".",
            unpacked=("cifar-10-batches-py",),
        ),
        "cifar100": ImageSet(
            reader="CIFAR100",
            num_classes=100,
            splits=_splits("train", train=True, test=False),
            labels="targets",
            files=None,
            archives=(_TORONTO + "cifar-100-python.tar.gz",),
            folder=".",
            unpacked=("cifar-100-python",),
        ),
        "stl10": ImageSet(
            reader="STL10",
            num_classes=10,
            splits=_splits("split", train="train", test="test"),
            labels="labels",
            files=None,
            archives=("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",),
            folder=".",
            unpacked=("stl10_binary",),
        ),
        "dtd": ImageSet(
            reader="DTD",
            num_classes=47,
            splits=_splits("split", train="train", test="test", val="val"),
            labels="_labels",
            files="_image_files",
            archives=(_OXFORD + "dtd/download/dtd-r1.0.1.tar.gz",),
            folder="dtd",
            unpacked=("dtd/dtd/images", "dtd/dtd/labels"),
        ),
        "flowers102": ImageSet(
            reader="Flowers102",
            num_classes=102,
            splits=_splits("split", train="train", test="test", val="val"),
            labels="_labels",
            files="_image_files",
            archives=tuple(
                _OXFORD + "flowers/102/" + file for file in ("102flowers.tgz", "imagelabels.mat", "setid.mat")
            ),
            folder="flowers-102",
            unpacked=("flowers-102/jpg",),
        ),
        "oxford_pet": ImageSet(
            reader="OxfordIIITPet",
            num_classes=37,
            splits=_splits("split", train="trainval", test="test"),
            labels="_labels",
            files="_images",
            archives=tuple(_OXFORD + "pets/data/" + file for file in ("images.tar.gz", "annotations.tar.gz")),
            folder="oxford-iiit-pet",
            unpacked=("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"),
        ),
    }
)


class TorchvisionDataModule(ImageSplits):
    """Load CIFAR-10, CIFAR-100, STL-10, DTD (its first partition), Flowers-102 or Oxford-IIIT Pet.

    With ``trusted=0``, all training images are the noisy part. Ids are row numbers in torchvision's training split.
    Images are decoded on access; labels are read without decoding images.

    Args:
        name: ``"cifar10"``, ``"cifar100"``, ``"stl10"``, ``"dtd"``, ``"flowers102"`` or ``"oxford_pet"``.
        root: Folder to which torchvision downloads.
        transform: Function from a PIL image of mode RGB to a tensor; ``None``: return PIL images, for zero-shot
            evaluation.
        train: Part to train on: ``"trusted"``, ``"trusted_fit"``, ``"trusted_held"`` or ``"noisy"``.
        noise: Label noise for the noisy part, or for ``"trusted_held"``.
        keep: Manifest; train only on the images of the noisy part that it keeps.
        flip: Whether to flip a random half of the training images in each epoch.
        trusted: Share of each class of the training split that is set apart with trusted labels, either 0 or at least
            two images per class; a quarter of these, at least one image, is held out.
        split_seed: Seed of the selection of trusted images; use the same for a reference and for the run it scores.
        seed: Seed of the training order and of the flips.
        batch_size: Number of images per batch and process.
        num_workers: Number of loader processes.
        download: Whether to download missing files to ``root``, or to unpack archives that are already there.

    Raises:
        MimicError: ``name`` is unknown, ``train`` is not a part, ``keep`` is given for a part that is not noisy, or a
            share is outside 0 to 1. In ``prepare_data`` and ``setup``: files cannot be downloaded or read.

    Example:
        >>> TorchvisionDataModule("cifar-10", "datasets")
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `name` is 'cifar-10'; nearest: 'cifar10', 'cifar100'...
    """

    def __init__(  # noqa: PLR0913
        self,
        name: str,
        root: str | Path,
        transform: Transform | None = None,
        train: Split = "noisy",
        noise: LabelNoise | None = None,
        keep: str | Path | None = None,
        flip: bool = False,
        trusted: float = 0.0,
        split_seed: int = 0,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(train, noise, keep, transform, trusted, split_seed, flip, seed, batch_size, num_workers)
        if name not in SETS:
            raise MimicError(f"`name` is {name!r}; {nearest_names(name, SETS)}.")
        self.name = name
        self.spec = SETS[name]
        self.num_classes = self.spec.num_classes
        self.root = Path(root).expanduser()
        self.download = download

    def prepare_data(self) -> None:
        """Download missing files, in one process per machine."""
        if self.download and not self.sources:
            self._read("train", download=True)

    def read(self) -> Mapping[str, Source]:
        return {split: self._read(split) for split in self.spec.splits}

    def _read(self, split: str, download: bool = False) -> Source:
        with package_of_extra(f"the data set {self.name}", "vision"):
            return self._read_with_torchvision(split, download)

    def _read_with_torchvision(self, split: str, download: bool) -> Source:
        import torchvision.datasets

        reader = getattr(torchvision.datasets, self.spec.reader)
        try:
            # CIFAR's files are pickles, which could run code. torchvision verifies the published checksums of all files
            # before it opens any, which a test ensures.
            dataset = reader(self.root, download=download, **self.spec.splits[split])
            names = list(getattr(dataset, "classes", []))
            if names and len(names) != self.num_classes:
                raise MimicError(f"there are {len(names)} classes instead of {self.num_classes}")
            if split == "train":
                self.class_names = names
            files = None if self.spec.files is None else getattr(dataset, self.spec.files)
            return self.source(dataset, getattr(dataset, self.spec.labels), files)
        except ImportError:
            raise  # a package that torchvision needs is missing
        except Exception as error:  # of the network, an archive, the operating system or the files
            raise MimicError(self._advice(error)) from error

    def _advice(self, error: Exception) -> str:
        spec = self.spec
        return (
            f"`data`: {spec.reader} cannot be read from {self.root}: {str(error).rstrip('.')}. Set `download=True` to "
            f"download it. Without a network, copy {' and '.join(spec.archives)} to {self.root / spec.folder}; "
            f"`download=True` unpacks them to {' and '.join(str(self.root / path) for path in spec.unpacked)}. Remove "
            "incomplete files first."
        )
