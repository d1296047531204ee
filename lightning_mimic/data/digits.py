"""Scikit-learn's handwritten digits: 1,797 real images that come with a package, for runs without a network."""

from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_mimic.data.ids import WithIds, collate_with_ids
from lightning_mimic.data.kept import kept_of
from lightning_mimic.data.noise import LabelNoise, SymmetricNoise

#: Which images train (or are scored): those with trusted labels, a part of them, the other part, or the many with
#: doubtful labels.
Part = Literal["trusted", "trusted_fit", "trusted_held", "noisy"]


class DigitsDataModule(pl.LightningDataModule):
    """Handwritten digits, 8 × 8 grey, 10 classes, in three parts that never overlap.

    500 test images, 200 trusted ones with true labels, 1,097 others whose labels ``noise`` may spoil. 50 of
    the trusted images can validate: they do so for ``train="trusted_fit"`` and ``train="noisy"``, and train
    with the other 150 for ``train="trusted"``. These 50 can also calibrate what scores say of the noisy part
    (``train="trusted_held"``, with true labels or, spoilt by ``noise``, with wrong ones). Ids are row numbers of
    ``sklearn.datasets.load_digits``.

    Args:
        train: What trains: ``"trusted"`` (200), ``"trusted_fit"`` (150), ``"trusted_held"`` (50) or ``"noisy"``
            (1,097).
        noise: Spoils the labels of the noisy part, or of ``"trusted_held"``.
        keep: A manifest; only what it keeps of the noisy part trains.
        augment: Shift every training batch by up to one pixel.
        seed: Of the split, of the order in training and of the shifts.
        batch_size: Images per batch and process.
        num_workers: Loader processes.

    Raises:
        ValueError: Another part, or a manifest for one that is not noisy.

    Example:
        >>> digits = DigitsDataModule(train="noisy", noise=SymmetricNoise(rate=0.4), seed=0)
        >>> digits.setup()
        >>> images, labels = batch = next(iter(digits.train_dataloader()))
        >>> images.shape, len(batch.ids), int(digits.wrong.sum())
        (torch.Size([32, 1, 8, 8]), 32, 438)
    """

    num_classes = 10
    #: Classes, and the shape of one image.
    image_shape = (1, 8, 8)

    def __init__(
        self,
        train: Part = "noisy",
        noise: LabelNoise | None = None,
        keep: str | Path | None = None,
        augment: bool = False,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if train not in get_args(Part):
            raise ValueError(f"`train` is {train!r}; expected one of {', '.join(map(repr, get_args(Part)))}.")
        if keep is not None and train != "noisy":
            raise ValueError(f"`keep` is a choice among the noisy images, and `train` is {train!r}.")
        self.train = train
        self.keep = keep
        self.noise = noise if noise is not None else SymmetricNoise()
        self.augment = augment
        self.seed = seed
        self._shifts = torch.Generator().manual_seed(seed)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._images: Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Splits the images and spoils labels; the same for the same seeds, on every rank."""
        if self._images is not None:
            return
        from sklearn.datasets import load_digits  # owns the images; not needed by the package's core

        digits = load_digits()
        self._images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self._labels = torch.tensor(digits.target, dtype=torch.int64)
        order = torch.randperm(len(self._labels), generator=torch.Generator().manual_seed(self.seed))
        self._test, self._trusted, noisy = order.split([500, 200, len(order) - 700])
        #: Ids of the noisy part; true and given labels, and which of these differ, in the same order.
        self.noisy_ids = noisy
        self.true_labels = self._labels[noisy]
        self.given_labels, self.wrong = self.noise(self.true_labels, self.num_classes)

    def train_dataloader(self) -> DataLoader:
        if self.train == "noisy":
            ids, labels = self.noisy_ids, self.given_labels
        elif self.train == "trusted_held":
            ids = self._trusted[150:]
            labels, _ = self.noise(self._labels[ids], self.num_classes)
        else:
            ids = self._trusted if self.train == "trusted" else self._trusted[:150]
            labels = self._labels[ids]
        return self._loader(ids, labels, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self._trusted[150:], self._labels[self._trusted[150:]])

    def test_dataloader(self) -> DataLoader:
        return self._loader(self._test, self._labels[self._test])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.augment and self.trainer is not None and self.trainer.training:
            down, right = torch.randint(0, 3, (2,), generator=self._shifts).tolist()
            batch[0] = F.pad(batch[0], (1, 1, 1, 1))[..., down : down + 8, right : right + 8]
        return batch

    def images(self, ids: Tensor) -> Tensor:
        """Images by id, shape ``(n, 1, 8, 8)``, 0 (paper) to 1 (ink)."""
        assert self._images is not None, "call setup() first"
        return self._images[ids]

    def _loader(self, ids: Tensor, labels: Tensor, *, shuffle: bool = False) -> DataLoader:
        samples: Any = WithIds(TensorDataset(self.images(ids), labels), ids.tolist())
        if shuffle and self.keep is not None:
            samples = kept_of(samples, self.keep)
        return DataLoader(
            samples,
            batch_size=self.batch_size if shuffle else 500,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate_with_ids,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
        )
