"""Your own images in folders named after their classes."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mimic.data.image_splits import ImageSplits, Transform
from lightning_mimic.data.noise import LabelNoise
from lightning_mimic.data.splits import Source, Split
from lightning_mimic.errors import MimicError


class ImageFolderDataModule(ImageSplits):
    """Images as ``root/train/CLASS/NAME.jpg`` and ``root/test/CLASS/NAME.jpg``; ``root/val`` where there is one.

    With ``trusted=0`` all training images are the noisy part. Ids are paths below ``root/train``, such as
    ``"cat/0001.jpg"``, so that an image keeps its id when others come or go. What has no image's suffix is left out,
    with a warning.

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

    Raises:
        MimicError: Another part, a manifest for one that is not noisy, or a share outside 0 to 1; in ``setup``, folders
            that are not there, or are not of the same classes.

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
    ) -> None:
        super().__init__(train, noise, keep, transform, trusted, split_seed, flip, seed, batch_size, num_workers)
        self.root = Path(root).expanduser()

    def read(self) -> Mapping[str, Source]:
        splits = ["train", "test", *(["val"] if (self.root / "val").exists() else [])]
        opened = {split: self._opened(split) for split in splits}
        self.class_names = opened["train"].classes
        self.num_classes = len(self.class_names)
        for split, dataset in opened.items():
            if differing := sorted(set(dataset.classes) ^ set(self.class_names)):
                raise MimicError(
                    f"`root`: {self.root / 'train'} and {self.root / split} must have the same classes; in one of them "
                    f"alone: {', '.join(map(repr, differing))}."
                )
        return {split: self._source(split, dataset) for split, dataset in opened.items()}

    def _source(self, split: str, dataset: Any) -> Source:
        files = [path for path, _ in dataset.samples]
        ids = [Path(path).relative_to(self.root / split).as_posix() for path in files]
        return self.source(dataset, dataset.targets, files, ids)

    def _opened(self, split: str) -> Any:
        from torchvision.datasets import ImageFolder

        folder = self.root / split
        expected = f"expected {self.root}/train/CLASS/NAME.jpg and {self.root}/test/CLASS/NAME.jpg"
        if not folder.is_dir():
            raise MimicError(f"`root`: {folder} is no folder; {expected}.")
        try:
            dataset = ImageFolder(folder)
        except OSError as error:  # no classes, a class without images
            raise MimicError(f"`root`: {str(error).rstrip('.')} in {folder}; {expected}.") from error
        known = {Path(path) for path, _ in dataset.samples}
        if others := sorted(path for path in folder.rglob("*") if path.is_file() and path not in known):
            warnings.warn(
                f"{len(others)} files in {folder} are no images of a class by their names, and are left out: "
                f"{others[0].relative_to(folder)}{' and more' if len(others) > 1 else ''}.",
                stacklevel=2,
            )
        return dataset
