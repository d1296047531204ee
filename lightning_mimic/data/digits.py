"""Scikit-learn's handwritten digits: 1,797 real images that come with a package, for runs without a network."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mimic.data.noise import LabelNoise
from lightning_mimic.data.splits import LabelledSplits, Source, Split
from lightning_mimic.errors import package_of_extra
from lightning_mimic.random_streams import torch_generator


class DigitsDataModule(LabelledSplits):
    """Handwritten digits, 8 × 8 grey, 10 classes, in three parts that never overlap.

    500 test images, the same for every seed; 200 trusted ones with true labels; 1,097 others whose labels ``noise``
    may corrupt. 50 of the trusted images can validate: they do so for ``train="trusted_fit"`` and ``train="noisy"``,
    and train with the other 150 for ``train="trusted"``. These 50 can also calibrate what scores say of the noisy part
    (``train="trusted_held"``, with true labels or, corrupted by ``noise``, with wrong ones). Ids are row numbers of
    ``sklearn.datasets.load_digits``.

    Args:
        train: What trains: ``"trusted"`` (200), ``"trusted_fit"`` (150), ``"trusted_held"`` (50) or ``"noisy"``
            (1,097).
        noise: Corrupts the labels of the noisy part, or of ``"trusted_held"``.
        keep: A manifest; only what it keeps of the noisy part trains.
        augment: Shift every training batch by up to one pixel.
        split_seed: Of which images are trusted; the same for a reference and for what it scores.
        seed: Of the order in training and of the shifts.
        batch_size: Images per batch and process.
        num_workers: Loader processes.

    Raises:
        MimicError: Another part, or a manifest for one that is not noisy.

    Example:
        >>> from lightning_mimic.data.noise import SymmetricNoise
        >>> digits = DigitsDataModule(train="noisy", noise=SymmetricNoise(rate=0.4), seed=0)
        >>> digits.setup()
        >>> images, labels = batch = next(iter(digits.train_dataloader()))
        >>> images.shape, len(batch.ids), int(digits.wrong.sum())
        (torch.Size([32, 1, 8, 8]), 32, 438)
    """

    num_classes = 10
    #: Names of the classes in the order of the labels.
    class_names = tuple("0123456789")
    #: Of one image.
    image_shape = (1, 8, 8)

    def __init__(  # noqa: PLR0913
        self,
        train: Split = "noisy",
        noise: LabelNoise | None = None,
        keep: str | Path | None = None,
        augment: bool = False,
        split_seed: int = 0,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(train, noise, keep, seed=seed, batch_size=batch_size, num_workers=num_workers)
        self.augment = augment
        self.split_seed = split_seed
        self._shifts = torch_generator(seed, "shifts")

    def read(self) -> Mapping[str, Source]:
        with package_of_extra("the data set of digits", "vision"):
            from sklearn.datasets import load_digits  # which has the images

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target, dtype=torch.int64)
        source = Source(images, labels, lambda: hashlib.sha256(images.numpy().tobytes()).hexdigest())
        return {"train": source, "test": source}

    def divide(self, labels: Tensor) -> Mapping[str, Tensor]:
        # Whoever chooses settings under one seed must not see what tests them under another.
        test, others = torch.randperm(len(labels), generator=torch_generator(0, "test split")).split(
            [500, len(labels) - 500]
        )
        order = others[torch.randperm(len(others), generator=torch_generator(self.split_seed, "trusted split"))]
        parts = dict(
            zip(("trusted_fit", "trusted_held", "noisy"), order.split([150, 50, len(order) - 200]), strict=True)
        )
        return {"test": test, **parts}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.augment and self.trainer is not None and self.trainer.training:
            down, right = torch.randint(0, 3, (2,), generator=self._shifts).tolist()
            batch[0] = F.pad(batch[0], (1, 1, 1, 1))[..., down : down + 8, right : right + 8]
        return batch

    def images(self, ids: Tensor) -> Tensor:
        """Images by id, shape ``(n, 1, 8, 8)``, 0 (paper) to 1 (ink)."""
        assert self.sources, "call setup() first"
        images: Tensor = self.sources["train"].images[ids]
        return images
