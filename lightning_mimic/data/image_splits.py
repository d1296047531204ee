"""Splits of labelled image files, decoded on access, with an optional trusted subset of each class."""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mimic.data.images import (
    FOLDER_FORMATS,
    MAX_PIXELS,
    TRANSPARENT,
    TooManyPixelsError,
    decode_image,
)
from lightning_mimic.data.noise import LabelNoise
from lightning_mimic.data.splits import LabelledSplits, Source, Split
from lightning_mimic.data.trusted_list import find_trusted, read_trusted_list
from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.random_streams import torch_generator

#: From a PIL image of mode RGB to a tensor ``(C, H, W)``.
Transform = Callable[[Any], Tensor]


class DecodedImages:
    """The images of a torchvision data set by row, decoded and transformed.

    Args:
        dataset: Gives a PIL image and a label by row, from the array ``dataset.data``; unused if there are files.
        files: Of the images, one per row; ``None``, if they are in ``dataset.data``.
        transform: ``None`` gives PIL images of mode RGB.
        max_pixels: Most pixels of an image, by its file's header.
    """

    def __init__(
        self, dataset: Any, files: Sequence[Path] | None, transform: Transform | None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.dataset: Any = dataset if files is None else None
        self.files = files
        self.transform = transform
        self.max_pixels = max_pixels
        self._warned = False

    def __len__(self) -> int:
        return len(self.dataset) if self.files is None else len(self.files)

    def __getitem__(self, row: int) -> Any:
        image = self.original(row)
        return image if self.transform is None else self.transform(image)

    def original(self, row: int) -> Any:
        """Return an image before the transform, a PIL image of mode RGB.

        Raises:
            MimicError: It cannot be decoded.
        """
        try:
            image = self.dataset[row][0] if self.files is None else self._decoded(self.files[row])
        except Exception as error:  # of the system, of Pillow
            place = "" if self.files is None else f"{self.files[row]}: "
            why = getattr(error, "strerror", None) or error
            too_big = isinstance(error, TooManyPixelsError)
            fix = "Make it smaller, or raise `max_pixels`" if too_big else "Fetch it again"
            raise MimicError(
                f"image {row} cannot be decoded: {place}{why}. {fix}; nothing is left out in silence."
            ) from error
        return image

    def _decoded(self, file: Path) -> Any:
        image = decode_image(file.read_bytes(), self.max_pixels, FOLDER_FORMATS)
        if TRANSPARENT in image.info and not self._warned:
            self._warned = True
            warnings.warn(
                f"{file} is transparent in part. Transparency is dropped, as torchvision does, so that such pixels "
                "have the colour that is stored for them, often black. Put these images on a ground of your choice "
                "to have another one. (This is said once in each process.)",
                stacklevel=2,
            )
        return image

    def key(self) -> str:
        """Return a key that identifies the images and their transform.

        Files are identified by path, size and time of change, and not read.

        Raises:
            MimicError: A transform whose ``repr`` does not say what it does.
        """
        transform = repr(self.transform)
        if " at 0x" in transform:
            raise MimicError(
                f"`transform` is {transform}, which does not say what it does, so that a cache could not tell it from "
                "another. Take one of lightning_mimic.data.transforms or of torchvision.transforms.v2, or give yours a "
                "`__repr__` with all its settings."
            )
        digest = hashlib.sha256(transform.encode())
        if self.files is None:
            digest.update(repr(self.dataset.data.shape).encode())
            digest.update(self.dataset.data.tobytes())
        for file in self.files or ():
            state = file.stat()
            digest.update(f"\n{file.absolute()}\t{state.st_size}\t{state.st_mtime_ns}".encode())
        return digest.hexdigest()


class ImageSplits(LabelledSplits):
    """Base class of data modules of image files: decoding, a transform, and trusted images of every class.

    A subclass opens the images in :meth:`read`, with :meth:`source`.

    Args:
        train: What trains: ``"trusted"``, ``"trusted_fit"``, ``"trusted_held"`` or ``"noisy"``.
        noise: Corrupts the labels of the noisy part, or of ``"trusted_held"``.
        keep: A manifest; only what it keeps of the noisy part trains.
        transform: PIL image of mode RGB to tensor; ``None`` gives PIL images, for a zero-shot classifier.
        trusted: The training images whose labels are trusted, and which are never part of the noisy ones: a share of
            each class, at least two images; or the path of a list of images
            (:func:`~lightning_mimic.data.trusted_list.read_trusted_list`), whose labels replace those of the data. A
            quarter of each class, at least one of two images, is held out (``"trusted_held"``).
        split_seed: Seed of the draw of these images. It is not ``seed``, so that a reference trained with another seed
            has not seen what is scored.
        flip: Flip every other training image, another half in every epoch.
        seed: Of the order in training and of what is flipped.
        batch_size: Images per batch and process.
        num_workers: Loader processes.

    Raises:
        MimicError: Another part, a manifest for one that is not noisy, or a share outside 0 to 1; in ``setup``, a list
            that does not fit the images.
    """

    #: A batch of 224 by 224 pixels takes 60 MB, and each worker holds several.
    eval_batch_size = 100
    #: Most pixels of an image, by its file's header.
    max_pixels = MAX_PIXELS
    #: Names of the classes, where the set has them; known after :meth:`setup`.
    class_names: list[str]

    def __init__(  # noqa: PLR0913
        self,
        train: Split = "noisy",
        noise: LabelNoise | None = None,
        keep: str | Path | None = None,
        transform: Transform | None = None,
        trusted: float | str | Path = 0.0,
        split_seed: int = 0,
        flip: bool = False,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(train, noise, keep, flip, seed, batch_size, num_workers)
        if not isinstance(trusted, str | Path) and not 0 <= trusted < 1:
            raise MimicError(
                f"`trusted` is {trusted!r}; expected a share of the training images, from 0 to below 1, or the path of "
                "a list of checked images (.csv, .parquet or .txt)."
            )
        self.transform = transform
        self.trusted = trusted
        self.split_seed = split_seed

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """Shape of an image after the transform; ``None`` where it differs between images, or without a transform."""
        from PIL import Image

        if self.transform is None:
            return None
        wide, high = (tuple(self.transform(Image.new("RGB", size)).shape) for size in ((64, 48), (48, 80)))
        return wide if wide == high else None

    def source(
        self, dataset: Any, labels: Any, files: Sequence[str | Path] | None = None, ids: list[str] | None = None
    ) -> Source:
        """Return the source of one split.

        Args:
            dataset: One of torchvision's, where it holds the images itself.
            labels: Integers, one per row.
            files: Of the images, if they are not in ``dataset.data``.
            ids: One per row, if they are not row numbers.

        Raises:
            MimicError: Files that are not there, or labels outside the classes.
        """
        paths = None if files is None else [Path(file) for file in files]
        if missing := [path for path in paths or () if not path.is_file()]:
            raise MimicError(f"{len(missing)} of {len(paths or ())} images are not there, such as {missing[0]}")
        found = torch.as_tensor(labels, dtype=torch.int64)
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < self.num_classes:
            raise MimicError(
                f"labels run from {int(found.min())} to {int(found.max())}, outside the {self.num_classes} classes"
            )
        images = DecodedImages(dataset, paths, self.transform, self.max_pixels)
        return Source(images, found, images.key, ids)

    def divide(self, labels: Tensor) -> Mapping[str, Tensor]:
        fit, held = [torch.arange(0)], [torch.arange(0)]
        generator = torch_generator(self.split_seed, "trusted split")
        for members, count in self._trusted_by_class(labels):
            chosen = members[torch.randperm(len(members), generator=generator)[:count]]
            out = max(1, count // 4) if count > 1 else 0  # the reference must have seen every class
            held.append(chosen[:out])
            fit.append(chosen[out:])
        parts = {"trusted_fit": torch.cat(fit).sort().values, "trusted_held": torch.cat(held).sort().values}
        noisy = torch.ones(len(labels), dtype=torch.bool)
        noisy[torch.cat(list(parts.values()))] = False
        test = {"test": torch.arange(len(self.sources["test"].labels))} if "test" in self.sources else {}
        return {**parts, "noisy": noisy.nonzero().flatten(), **test}

    def _trusted_by_class(self, labels: Tensor) -> list[tuple[Tensor, int]]:
        """Return, for each class, rows from which the trusted ones are drawn, and how many these are."""
        if isinstance(self.trusted, str | Path):
            return [(rows, len(rows)) for rows in self._listed(self.trusted, labels)]
        return [self._share(self.trusted, labels, label) for label in range(self.num_classes if self.trusted else 0)]

    def _share(self, share: float, labels: Tensor, label: int) -> tuple[Tensor, int]:
        """Return the rows of a class, and how many of them are trusted."""
        members = (labels == label).nonzero().flatten()
        count = max(2, round(share * len(members)))
        if count >= len(members):
            raise MimicError(
                f"`trusted` is {share}, and class {self._class_name(label)!r} has {len(members)} training "
                f"images; {count} of them would be trusted, and at least one must be left to train on. Take a smaller "
                "share, or more images of that class."
            )
        return members, count

    def _listed(self, path: str | Path, labels: Tensor) -> list[Tensor]:
        """Return the rows of the listed images by class, and correct their labels."""
        source = self.sources["train"]
        listed = read_trusted_list(path)
        ids = source.ids if source.ids is not None else list(map(str, range(len(labels))))
        found = find_trusted(listed, ids, source.images.files, list(map(self._class_name, range(self.num_classes))))
        for row, label in found.items():
            if label is not None:
                labels[row] = label
        rows = torch.tensor(sorted(found), dtype=torch.int64)
        by_class = [rows[labels[rows] == label] for label in range(self.num_classes)]
        if missing := [self._class_name(label) for label, members in enumerate(by_class) if not len(members)]:
            raise MimicError(
                f"`trusted`: {path} lists no image of {len(missing)} of {self.num_classes} classes: "
                f"{join_names(missing)}. A reference cannot learn a class that it has never seen, and would take all "
                "its images for wrong ones. Check a few images of every class."
            )
        others = torch.ones(len(labels), dtype=torch.bool)
        others[rows] = False
        left = torch.bincount(labels[others], minlength=self.num_classes)
        whole = [self._class_name(label) for label in (left == 0).nonzero().flatten().tolist()]
        if whole and self.train == "noisy" and len(whole) < self.num_classes:
            warnings.warn(
                f"`trusted`: {path} lists all images of {join_names(whole)}. A model that is trained on the "
                "other images never sees these classes.",
                stacklevel=2,
            )
        return by_class

    def _class_name(self, label: int) -> str:
        names = getattr(self, "class_names", None)
        return str(names[label]) if names else str(label)

    def _original(self, row: int) -> Any:
        return self.sources["train"].images.original(row)

    def train_dataloader(self) -> DataLoader:
        if self.transform is None:
            raise MimicError(
                "`transform` is None, so that images stay PIL images, which a zero-shot classifier takes and training "
                "does not. Give one, such as lightning_mimic.data.transforms.paper_transform()."
            )
        return super().train_dataloader()
