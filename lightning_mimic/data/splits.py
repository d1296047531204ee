"""Base class of data modules with disjoint splits of labelled images: noisy labels, trusted labels, and a test set."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_mimic.data.ids import WithIds, collate_with_ids
from lightning_mimic.data.noise import LabelNoise, SymmetricNoise
from lightning_mimic.errors import MimicError
from lightning_mimic.manifest import kept_subset
from lightning_mimic.random_streams import torch_generator
from lightning_mimic.trainer_package import pl

#: Part of the images to train on or to score: all images with trusted labels, three quarters of these, the remaining
#: (held-out) quarter, or the images with noisy labels.
Split = Literal["trusted", "trusted_fit", "trusted_held", "noisy"]


@dataclass
class Source:
    """Hold the images and labels of one split of a data set.

    Attributes:
        images: Sequence of images; ``images[row]`` is a transformed image.
        labels: True labels, int64, shape ``(rows,)``.
        key: Function that returns a key of the images and their transform, for a cache.
        ids: Ids, one per row; ``None``: row numbers.
    """

    images: Any
    labels: Tensor
    key: Callable[[], str]
    ids: list[str] | None = None


class LabelledRows(Dataset[tuple[Any, Tensor]]):
    """Select rows of a source, with given labels.

    Args:
        images: Images of the source, by row.
        rows: Row numbers, int64, shape ``(n,)``.
        labels: Labels of these rows, int64, shape ``(n,)``.
    """

    def __init__(self, images: Any, rows: Tensor, labels: Tensor) -> None:
        self.images = images
        self.rows = rows
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.images[int(self.rows[index])], self.labels[index]


class LabelledSplits(pl.LightningDataModule, ABC):
    """Base class of data modules of labelled images: splits, label noise, filter, order and flips.

    A subclass reads its images (:meth:`read`) and divides them (:meth:`divide`).

    Args:
        train: Part to train on: ``"trusted"``, ``"trusted_fit"``, ``"trusted_held"`` or ``"noisy"``.
        noise: Label noise for the noisy part, or for ``"trusted_held"``.
        keep: Manifest; train only on the images of the noisy part that it keeps.
        flip: Whether to flip a random half of the training images in each epoch.
        seed: Seed of the training order and of the flips.
        batch_size: Number of images per batch and process.
        num_workers: Number of loader processes.

    Raises:
        MimicError: ``train`` is not a part, ``keep`` is given for a part that is not noisy, or a number is invalid.
    """

    #: Number of classes, set by the subclass.
    num_classes: int
    #: Images per batch in validation and test.
    eval_batch_size = 500

    def __init__(
        self,
        train: Split = "noisy",
        noise: LabelNoise | None = None,
        keep: str | Path | None = None,
        flip: bool = False,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if train not in get_args(Split):
            raise MimicError(f"`train` is {train!r}; expected one of {', '.join(map(repr, get_args(Split)))}.")
        if keep is not None and train != "noisy":
            raise MimicError(f"`keep` selects among the noisy images, but `train` is {train!r}; expected 'noisy'.")
        for name, count, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise MimicError(f"`{name}` is {count!r}; expected a whole number of {least} or more.")
        self.train = train
        self.keep = keep
        self.noise = noise if noise is not None else SymmetricNoise()
        self.flip = flip
        self.seed = seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        #: Sources by name, "train", "test" and "val" as far as they exist; known after :meth:`setup`.
        self.sources: dict[str, Source] = {}

    @abstractmethod
    def read(self) -> Mapping[str, Source]:
        """Return the sources ``"train"`` and, if the data have them, ``"test"`` and ``"val"``."""

    @abstractmethod
    def divide(self, labels: Tensor) -> Mapping[str, Tensor]:
        """Assign rows to splits.

        Args:
            labels: Labels of the source ``"train"``, int64; a subclass with corrected labels changes them in place.

        Returns:
            Rows of the source ``"train"`` under ``"noisy"``, ``"trusted_fit"`` and ``"trusted_held"``, any of which
            may be empty; rows of the source ``"test"`` under ``"test"``, if it exists.
        """

    def setup(self, stage: str | None = None) -> None:
        """Divide the images and apply label noise, with the same result on every rank."""
        if self.sources:
            return
        self.sources = dict(self.read())
        labels = self.sources["train"].labels
        #: Rows of each part, by name.
        self.rows = dict(self.divide(labels))
        self.rows["trusted"] = torch.cat([self.rows["trusted_fit"], self.rows["trusted_held"]])
        #: Rows of the noisy part, with their true labels, given labels, and whether these differ.
        self.noisy_ids = self.rows["noisy"]
        self.true_labels = labels[self.noisy_ids]
        self.given_labels, self.wrong = self.noise(self.true_labels, self.num_classes, self.noisy_ids)
        if not len(self.rows[self.train]):
            raise MimicError(
                f"`train` is {self.train!r}, but that part has no images; the parts are "
                f"{', '.join(f'{name} ({len(self.rows[name])})' for name in get_args(Split))}."
            )

    def train_dataloader(self) -> DataLoader:
        rows = self.rows[self.train]
        if self.train == "noisy":
            labels = self.given_labels
        else:
            labels = self.sources["train"].labels[rows]
            if self.train == "trusted_held":
                labels, _ = self.noise(labels, self.num_classes, rows)
        samples: Any = self._samples("train", rows, labels)
        if self.keep is not None:
            samples = kept_subset(samples, self.keep)
        return DataLoader(
            samples,
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            collate_fn=collate_with_ids,
            generator=torch_generator(self.seed, "training order"),
        )

    def val_dataloader(self) -> Any:
        """Return a loader of the held-out trusted images, or else of the validation split, if there is one."""
        if len(held := self.rows["trusted_held"]):
            return self._evaluation("train", held)
        return self._evaluation("val") if "val" in self.sources else []

    def test_dataloader(self) -> Any:
        """Return a loader of the test split, otherwise of the held-out trusted images if they are not trained on.

        Without either, return no loader and warn, because noisy labels are never used for a test.
        """
        if "test" in self.sources:
            return self._evaluation("test", self.rows["test"])
        held = self.rows["trusted_held"]
        if len(held) and self.train in ("trusted_fit", "noisy"):
            return self._evaluation("train", held)
        trained = f" that `train={self.train!r}` does not train on" if len(held) else ""
        warnings.warn(
            f"the test is skipped: the data have no test split, and no held-out trusted images{trained}. Give a list "
            "of checked images as `trusted`, or switch the test off (test=false).",
            stacklevel=2,
        )
        return []

    def samples_by_id(self, ids: Sequence[int | str]) -> Iterator[tuple[int | str, Any]]:
        """Yield images of the training split before any transform; call :meth:`setup` first.

        Args:
            ids: Ids of the images; ids that the split does not have are skipped.

        Yields:
            Id and image, without transform and flips.
        """
        source = self.sources["train"]
        known = range(len(source.labels)) if source.ids is None else self._rows_by_id
        for each in ids:
            if each in known:
                yield each, self._original(known[each])  # type: ignore[index]

    def _original(self, row: int) -> Any:
        """Return an image of the training split before any transform."""
        return self.sources["train"].images[row]

    def flipped(self, ids: Any, epoch: int) -> Tensor:
        """Return which training images are flipped in an epoch, independently of the number of processes and resumes.

        Args:
            ids: Ids of a training batch.
            epoch: Number of the epoch, from 0.

        Returns:
            Whether each image is flipped, boolean, shape ``(B,)``.
        """
        source = self.sources["train"]
        generator = torch_generator(self.seed, "flips", epoch)
        flips = torch.rand(len(source.labels), generator=generator) < 0.5
        if source.ids is None:
            return flips[torch.as_tensor(ids)]
        return flips[[self._rows_by_id[each] for each in ids]]

    @cached_property
    def _rows_by_id(self) -> dict[str, int]:
        """Row numbers in the training split, by id."""
        return {each: row for row, each in enumerate(self.sources["train"].ids or ())}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.flip and self.trainer is not None and self.trainer.training:
            images = batch[0]
            flipped = self.flipped(batch.ids, self.trainer.current_epoch).to(images.device)
            batch[0] = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        return batch

    def _evaluation(self, source: str, rows: Tensor | None = None) -> DataLoader:
        labels = self.sources[source].labels
        rows = torch.arange(len(labels)) if rows is None else rows
        samples = self._samples(source, rows, labels[rows])
        return DataLoader(
            samples, batch_size=self.eval_batch_size, num_workers=self.num_workers, collate_fn=collate_with_ids
        )

    def _samples(self, name: str, rows: Tensor, labels: Tensor) -> WithIds:
        source = self.sources[name]
        ids = rows.tolist() if source.ids is None else [source.ids[row] for row in rows.tolist()]
        return WithIds(LabelledRows(source.images, rows, labels), ids)
