"""Your own images in folders named after their classes."""

import errno
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from lightning_mimic.data.image_splits import ImageSplits, Transform
from lightning_mimic.data.images import MAX_PIXELS
from lightning_mimic.data.noise import LabelNoise
from lightning_mimic.data.splits import Source, Split
from lightning_mimic.errors import MimicError


class ImageFolderDataModule(ImageSplits):
    """Images as ``root/train/CLASS/NAME.jpg`` and ``root/test/CLASS/NAME.jpg``; ``root/val`` where there is one.

    With ``trusted=0`` all training images are the noisy part. Ids are paths below ``root/train``, such as
    ``"cat/0001.jpg"``, so that an image keeps its id when others come or go. What has no image's suffix, or is hidden,
    is left out, with a warning. Images are decoded as :func:`~lightning_mimic.data.images.decode_image` says: upright
    by their EXIF orientation, 16 bits scaled to 8, transparency dropped with a warning.

    Args:
        root: Folder with ``train`` and ``test``.
        transform: PIL image of mode RGB to tensor; ``None`` gives PIL images, for a zero-shot classifier.
        train: What trains: ``"trusted"``, ``"trusted_fit"``, ``"trusted_held"`` or ``"noisy"``.
        noise: Corrupts the labels of the noisy part, or of ``"trusted_held"``.
        keep: A manifest; only what it keeps of the noisy part trains.
        flip: Flip every other training image, another half in every epoch.
        trusted: Share of each class of ``root/train`` that is set apart with trusted labels: none, or at least two
            images, of which a quarter, at least one, is held out.
        split_seed: Of which these are; the same for a reference and for what it scores.
        seed: Of the order in training and of what is flipped.
        batch_size: Images per batch and process.
        num_workers: Loader processes.
        max_pixels: Most pixels of an image, by its header; a bigger one is an error, before it is decoded.

    Raises:
        MimicError: Another part, a manifest for one that is not noisy, a share outside 0 to 1, or no pixels; in
            ``setup``, folders that are not there, cannot be read, or are not of the same classes, and names that are
            not UTF-8, which no ledger could hold; on access, an image that cannot be decoded, with its path.

    Example:
        >>> ImageFolderDataModule("nowhere").setup()
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `root`: nowhere/train is no folder; expected nowhere/train/CLASS/NAME.jpg ...
    """

    def __init__(  # noqa: PLR0913
        self,
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
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(train, noise, keep, transform, trusted, split_seed, flip, seed, batch_size, num_workers)
        if max_pixels < 1:
            raise MimicError(f"`max_pixels` is {max_pixels}; expected at least 1.")
        self.max_pixels = max_pixels
        self.root = Path(root).expanduser()

    def read(self) -> Mapping[str, Source]:
        splits = ["train", "test", *(["val"] if (self.root / "val").exists() else [])]
        found = {split: self._found(split) for split in splits}
        self.class_names, _ = found["train"]
        self.num_classes = len(self.class_names)
        for split, (classes, _) in found.items():
            if differing := sorted(set(classes) ^ set(self.class_names)):
                raise MimicError(
                    f"`root`: {self.root / 'train'} and {self.root / split} must have the same classes; in one of them "
                    f"alone: {', '.join(map(repr, differing))}."
                )
        return {split: self._source(split, samples) for split, (_, samples) in found.items()}

    def _source(self, split: str, samples: list[tuple[str, int]]) -> Source:
        files = [path for path, _ in samples]
        ids = [Path(path).relative_to(self.root / split).as_posix() for path in files]
        return self.source(None, [label for _, label in samples], files, ids)

    def _found(self, split: str) -> tuple[list[str], list[tuple[str, int]]]:
        """Return the classes of a split, and path and label of its images."""
        from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

        folder = self.root / split
        expected = f"expected {self.root}/train/CLASS/NAME.jpg and {self.root}/test/CLASS/NAME.jpg"
        if not folder.is_dir():
            raise MimicError(f"`root`: {folder} is no folder; {expected}.")

        def is_image(path: str) -> bool:
            shown = not any(part.startswith(".") for part in Path(path).relative_to(folder).parts)
            return shown and path.lower().endswith(IMG_EXTENSIONS)

        try:
            files = _files_below(folder)
            classes = [name for name in find_classes(folder)[0] if not name.startswith(".")]
            samples = make_dataset(folder, {name: k for k, name in enumerate(classes)}, is_valid_file=is_image)
        except OSError as error:  # no classes, a class without images, a folder that cannot be read
            raise MimicError(f"`root`: {str(error).rstrip('.')} in {folder}; {expected}.") from error
        known = {Path(path) for path, _ in samples}
        if unwritable := sorted(path for path in known if not _is_text(str(path.relative_to(folder)))):
            raise MimicError(
                f"`root`: {len(unwritable)} of {len(known)} images in {folder} have names that are not UTF-8, such as "
                f"{str(unwritable[0].relative_to(folder))!a}; their paths are their ids in ledger and manifest. Rename "
                "them (convmv does that for whole folders)."
            )
        if others := sorted(path for path in files if path not in known):
            warnings.warn(
                f"{len(others)} files in {folder} are no images of a class by their names, and are left out: "
                f"{_shown(others[0].relative_to(folder))}{' and more' if len(others) > 1 else ''}.",
                stacklevel=2,
            )
        return classes, samples


def _files_below(folder: Path) -> list[Path]:
    """Return all files; raises ``OSError`` for a folder that cannot be read, or leads back to one above it."""

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
