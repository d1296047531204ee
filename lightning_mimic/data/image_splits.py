"""Base class of data modules of image files, decoded on access, with an optional trusted subset of each class."""

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

#: Function from a PIL image of mode RGB to a tensor ``(C, H, W)``.
Transform = Callable[[Any], Tensor]


class DecodedImages:
    """Decode and transform images by row, from files or from a torchvision data set.

    Args:
        dataset: Data set that returns a PIL image and a label by row, from its array ``data``; unused if there are
            files.
        files: Paths of the images, one per row; ``None`` if the images are in ``dataset.data``.
        transform: Function from a PIL image of mode RGB to a tensor; ``None``: return PIL images.
        max_pixels: Maximum number of pixels of an image, by its file's header.
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
            MimicError: The image cannot be decoded.
        """
        try:
            image = self.dataset[row][0] if self.files is None else self._decoded(self.files[row])
        except Exception as error:  # of the operating system or of Pillow
            place = "" if self.files is None else f"{self.files[row]}: "
            why = getattr(error, "strerror", None) or error
            too_big = isinstance(error, TooManyPixelsError)
            fix = "Shrink it, or increase `max_pixels`" if too_big else "Replace or remove it"
            raise MimicError(f"image {row} cannot be decoded: {place}{why}. {fix}.") from error
        return image

    def _decoded(self, file: Path) -> Any:
        image = decode_image(file.read_bytes(), self.max_pixels, FOLDER_FORMATS)
        if TRANSPARENT in image.info and not self._warned:
            self._warned = True
            warnings.warn(
                f"{file} is partly transparent. Transparency is dropped, as by torchvision, so that transparent pixels "
                "get the colour stored for them, often black. Flatten such images onto another background colour "
                "if that is wrong. (Each process warns once.)",
                stacklevel=2,
            )
        return image

    def key(self) -> str:
        """Return a key that identifies the images and their transform.

        Files are identified by path, size and modification time, without reading them.

        Raises:
            MimicError: The ``repr`` of the transform does not describe its settings.
        """
        transform = repr(self.transform)
        if " at 0x" in transform:
            raise MimicError(
                f"`transform` is {transform}, which does not show its settings, so that a cache cannot distinguish it "
                "from another. Use one of lightning_mimic.data.transforms or of torchvision.transforms.v2, or define a "
                "`__repr__` with all settings."
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
    """Base class of data modules of image files: decoding, a transform, and trusted images of each class.

    A subclass opens the images in :meth:`read`, with :meth:`source`.

    Args:
        train: Part to train on: ``"trusted"``, ``"trusted_fit"``, ``"trusted_held"`` or ``"noisy"``.
        noise: Label noise for the noisy part, or for ``"trusted_held"``.
        keep: Manifest; train only on the images of the noisy part that it keeps.
        transform: Function from a PIL image of mode RGB to a tensor; ``None``: return PIL images, for zero-shot
            evaluation.
        trusted: Training images with trusted labels, which are never in the noisy part: a share of each class, either 0
            or at least two images per class; or the path of a list of checked images
            (:func:`~lightning_mimic.data.trusted_list.read_trusted_list`), whose labels replace those of the data. A
            quarter of each class is held out (``"trusted_held"``), at least one image if there are two.
        split_seed: Seed of the selection of trusted images. It is independent of ``seed``, so that a reference trained
            with another ``seed`` has not seen the samples that it scores.
        flip: Whether to flip a random half of the training images in each epoch.
        seed: Seed of the training order and of the flips.
        batch_size: Number of images per batch and process.
        num_workers: Number of loader processes.

    Raises:
        MimicError: ``train`` is not a part, ``keep`` is given for a part that is not noisy, or a share is outside 0 to
            1. In ``setup``: the list does not match the images.
    """

    #: Images per batch in validation and test; 100 images of 224 by 224 pixels take 60 MB, and workers hold several
    #: batches.
    eval_batch_size = 100
    #: Maximum number of pixels of an image, by its file's header.
    max_pixels = MAX_PIXELS
    #: Names of the classes, if the data set has them; known after :meth:`setup`.
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
        """Shape of an image after the transform; ``None`` if it varies between images, or without a transform."""
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
            dataset: Data set of torchvision; unused if there are files.
            labels: Class indices, one per row.
            files: Paths of the images, one per row; ``None`` if the images are in ``dataset.data``.
            ids: Ids, one per row; ``None``: row numbers.

        Raises:
            MimicError: Files do not exist, or labels are outside the classes.
        """
        paths = None if files is None else [Path(file) for file in files]
        if missing := [path for path in paths or () if not path.is_file()]:
            raise MimicError(f"{len(missing)} of {len(paths or ())} images do not exist, such as {missing[0]}")
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
            out = max(1, count // 4) if count > 1 else 0  # the reference must be trained on every class
            held.append(chosen[:out])
            fit.append(chosen[out:])
        parts = {"trusted_fit": torch.cat(fit).sort().values, "trusted_held": torch.cat(held).sort().values}
        noisy = torch.ones(len(labels), dtype=torch.bool)
        noisy[torch.cat(list(parts.values()))] = False
        test = {"test": torch.arange(len(self.sources["test"].labels))} if "test" in self.sources else {}
        return {**parts, "noisy": noisy.nonzero().flatten(), **test}

    def _trusted_by_class(self, labels: Tensor) -> list[tuple[Tensor, int]]:
        """Return, for each class, the rows among which trusted images are chosen, and the number of these."""
        if isinstance(self.trusted, str | Path):
            return [(rows, len(rows)) for rows in self._listed(self.trusted, labels)]
        return [self._share(self.trusted, labels, label) for label in range(self.num_classes if self.trusted else 0)]

    def _share(self, share: float, labels: Tensor, label: int) -> tuple[Tensor, int]:
        """Return the rows of a class, and the number of trusted images among them."""
        members = (labels == label).nonzero().flatten()
        count = max(2, round(share * len(members)))
        if count >= len(members):
            raise MimicError(
                f"`trusted` is {share}, but class {self._class_name(label)!r} has {len(members)} training images, of "
                f"which {count} would be trusted; at least one must remain to train on. Choose a smaller share, or "
                "add images of that class."
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
                f"{join_names(missing)}. A reference cannot learn a class that it has never seen, and would call all "
                "labels of that class wrong. Check a few images of every class."
            )
        others = torch.ones(len(labels), dtype=torch.bool)
        others[rows] = False
        left = torch.bincount(labels[others], minlength=self.num_classes)
        whole = [self._class_name(label) for label in (left == 0).nonzero().flatten().tolist()]
        if whole and self.train == "noisy" and len(whole) < self.num_classes:
            warnings.warn(
                f"`trusted`: {path} lists all images of {join_names(whole)}. A model trained on the other images never "
                "sees these classes.",
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
                "`transform` is None, so that images are PIL images, on which a model cannot be trained. Give a "
                "transform, such as lightning_mimic.data.transforms.paper_transform()."
            )
        return super().train_dataloader()
