"""Data module of images in folders named after their classes."""

import errno
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from lightning_mimic.data.image_splits import ImageSplits, Transform
from lightning_mimic.data.images import MAX_PIXELS
from lightning_mimic.data.noise import LabelNoise
from lightning_mimic.data.splits import Source, Split
from lightning_mimic.errors import MimicError, join_names, nearest_names, package_of_extra


class ImageFolderDataModule(ImageSplits):
    """Load images from ``root/CLASS/NAME.jpg``, or from ``root/train/CLASS/NAME.jpg``, ``root/test`` and ``root/val``.

    ``root/test`` and ``root/val`` are optional. Without a test split, the held-out trusted images are the test set.
    Without trusted images, all training images are the noisy part. Class folders may have subfolders. Ids are paths
    below the folder with the class folders, such as ``"cat/0001.jpg"``, so that an image keeps its id when others are
    added or removed. Hidden files, files without the suffix of an image and files outside of class folders are skipped,
    with a warning that counts them. Images are decoded by :func:`~lightning_mimic.data.images.decode_image`, which
    applies the EXIF orientation, scales 16 bits to 8, and drops transparency with a warning.

    Args:
        root: Folder that contains the class folders, or ``train``, ``test`` and ``val``.
        transform: Function from a PIL image of mode RGB to a tensor; ``None``: return PIL images, for zero-shot
            evaluation.
        train: Part to train on: ``"trusted"``, ``"trusted_fit"``, ``"trusted_held"`` or ``"noisy"``.
        noise: Label noise for the noisy part, or for ``"trusted_held"``.
        keep: Manifest; train only on the images of the noisy part that it keeps.
        flip: Whether to flip a random half of the training images in each epoch.
        trusted: Training images with trusted labels: a share of each class, either 0 or at least two images per class;
            or the path of a list of checked images (:func:`~lightning_mimic.data.trusted_list.read_trusted_list`),
            whose labels replace those of the folders. A quarter of each class is held out, at least one image if there
            are two.
        split_seed: Seed of the selection of trusted images; use the same for a reference and for the run it scores.
        seed: Seed of the training order and of the flips.
        batch_size: Number of images per batch and process.
        num_workers: Number of loader processes.
        max_pixels: Maximum number of pixels of an image, by its header; a larger image raises an error before it is
            decoded.

    Raises:
        MimicError: ``train`` is not a part, ``keep`` is given for a part that is not noisy, a share is outside 0 to 1,
            or ``max_pixels`` is below 1. In ``setup``: folders do not exist, cannot be read or have different classes,
            there is a single class, the list does not match the images, or names are not UTF-8, which a ledger cannot
            store. On access: an image cannot be decoded.

    Example:
        >>> ImageFolderDataModule("nowhere/images").setup()
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `root`: nowhere/images is not a folder; expected nowhere/images/CLASS...
    """

    def __init__(  # noqa: PLR0913
        self,
        root: str | Path,
        transform: Transform | None = None,
        train: Split = "noisy",
        noise: LabelNoise | None = None,
        keep: str | Path | None = None,
        flip: bool = False,
        trusted: float | str | Path = 0.0,
        split_seed: int = 0,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(train, noise, keep, transform, trusted, split_seed, flip, seed, batch_size, num_workers)
        if max_pixels < 1:
            raise MimicError(f"`max_pixels` is {max_pixels}; expected at least 1.")
        self.max_pixels = max_pixels
        self.root = Path(root).expanduser()

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the class folders, in the order of the labels.

        Raises:
            MimicError: There are fewer than two class folders.
        """
        return self._classes(self._folders["train"])

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of class folders."""
        return len(self.class_names)

    def read(self) -> Mapping[str, Source]:
        for split, folder in self._folders.items():
            if differing := sorted(set(self._classes(folder)) ^ set(self.class_names)):
                raise MimicError(
                    f"`root`: {self._folders['train']} and {self.root / split} must have the same classes; only in one "
                    f"of them: {join_names(differing)}."
                )
        self._warn_of_others()
        return {split: self._source(folder) for split, folder in self._folders.items()}

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """The folder with the class folders of each split."""
        if not self.root.is_dir():
            parent = self.root.parent
            near = (
                [name for each in parent.iterdir() if each.is_dir() and not (name := each.name).startswith(".")]
                if parent.is_dir()
                else []
            )
            nearest = f" ({nearest_names(self.root.name, near)})" if near else ""
            raise MimicError(f"`root`: {self.root} is not a folder{nearest}; {self._expected}.")
        splits = {name: self.root / name for name in ("train", "test", "val") if _has_folders(self.root / name)}
        if not splits:
            return {"train": self.root}
        if "train" not in splits:
            raise MimicError(
                f"`root`: {self.root} has a folder {next(iter(splits))!r} but no folder 'train'; {self._expected}."
            )
        return splits

    @property
    def _expected(self) -> str:
        return f"expected {self.root}/CLASS/NAME.jpg, or {self.root}/train/CLASS/NAME.jpg"

    def _classes(self, folder: Path) -> list[str]:
        try:
            names = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
        except OSError as error:
            raise MimicError(f"`root`: {str(error).rstrip('.')}; {self._expected}.") from error
        if len(names) < 2:
            found = f"one class folder, {names[0]!r}" if names else "no class folders"
            inner = folder / names[0] if names else folder
            deeper = (
                f" If its subfolders are the classes, give data.root={inner}." if names and _has_folders(inner) else ""
            )
            raise MimicError(f"`root`: {folder} has {found}; {self._expected}, with at least two classes.{deeper}")
        return names

    def _source(self, folder: Path) -> Source:
        with package_of_extra("a folder of images", "vision"):
            from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        def is_image(path: str) -> bool:
            return _is_image(Path(path).relative_to(folder))

        classes = {name: label for label, name in enumerate(self.class_names)}
        try:
            files = _files_below(folder)
            samples = make_dataset(folder, classes, is_valid_file=is_image, allow_empty=True)
        except OSError as error:  # a folder that cannot be read
            raise MimicError(f"`root`: {str(error).rstrip('.')} in {folder}; {self._expected}.") from error
        filled = {label for _, label in samples}
        if empty := [name for name, label in classes.items() if label not in filled]:
            raise MimicError(
                f"`root`: {folder} has class folders without an image: {join_names(empty)}. Remove these folders, or "
                f"add images whose names end in {', '.join(IMG_EXTENSIONS)}."
            )
        known = {Path(path) for path, _ in samples}
        if unwritable := sorted(path for path in known if not _is_text(str(path.relative_to(folder)))):
            raise MimicError(
                f"`root`: {len(unwritable)} of {len(known)} images in {folder} have names that are not UTF-8, such as "
                f"{str(unwritable[0].relative_to(folder))!a}, but paths are the ids in ledger and manifest. Rename "
                "them, for example with convmv."
            )
        self._warn_left_out(folder, [path for path in files if path not in known])
        ids = [Path(path).relative_to(folder).as_posix() for path, _ in samples]
        return self.source(None, [label for _, label in samples], [path for path, _ in samples], ids)

    def _warn_of_others(self) -> None:
        """Warn of images in ``root`` outside of ``train``, ``test`` and ``val``."""
        if self._folders["train"] == self.root:
            return
        beside = [each for each in self.root.iterdir() if each.name not in self._folders]
        files = [path for each in beside for path in (_files_below(each) if each.is_dir() else [each])]
        self._warn_left_out(self.root, [path for path in files if _is_image(path.relative_to(self.root))])

    def _warn_left_out(self, folder: Path, files: list[Path]) -> None:
        """Warn of files that are not images in a class folder, except for the list of trusted images."""
        trusted = Path(self.trusted).expanduser().absolute() if isinstance(self.trusted, str | Path) else None
        others = sorted(path for path in files if path.absolute() != trusted)
        if not others:
            return
        suffixes = Counter(path.suffix.lower() or "without a suffix" for path in others)
        counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
        warnings.warn(
            f"{len(others)} files in {folder} are not images in a class folder and are skipped ({counts}), such as "
            f"{_shown(others[0].relative_to(folder))}.",
            stacklevel=2,
        )


def _is_image(path: Path) -> bool:
    """Return whether a path below the folder with the class folders is that of an image, by its name."""
    with package_of_extra("a folder of images", "vision"):
        from torchvision.datasets.folder import IMG_EXTENSIONS

    return path.name.lower().endswith(IMG_EXTENSIONS) and not any(part.startswith(".") for part in path.parts)


def _has_folders(path: Path) -> bool:
    """Return whether a folder has subfolders that are not hidden."""
    return path.is_dir() and any(each.is_dir() and not each.name.startswith(".") for each in path.iterdir())


def _files_below(folder: Path) -> list[Path]:
    """Return all files below a folder.

    Raises:
        OSError: A folder cannot be read, or is a symbolic link to one of its parent folders.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        found += [Path(path, name) for name in names]
        for each in (Path(path, name) for name in folders):
            if each.is_symlink() and Path(path).resolve().is_relative_to(each.resolve()):
                refuse(OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(each)))
    return found


def _is_text(name: str) -> bool:
    return name.isascii() or _shown(Path(name)) == name


def _shown(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()
