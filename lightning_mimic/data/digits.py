"""Data module of scikit-learn's handwritten digits: 1,797 real images that need no download."""

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
    """Load handwritten digits, 8 × 8 grey, 10 classes, in three disjoint parts.

    There are 500 test images, the same for every seed; 200 trusted images with true labels; and 1,097 noisy images,
    whose labels ``noise`` may corrupt. 50 of the trusted images are held out: they are the validation set for
    ``train="trusted_fit"`` and ``train="noisy"``, and are trained on with the other 150 for ``train="trusted"``. They
    can also be scored to calibrate the quality of the noisy part (``train="trusted_held"``, with true labels or, with
    ``noise``, with wrong ones). Ids are row numbers in ``sklearn.datasets.load_digits``.

    Args:
        train: Part to train on: ``"trusted"`` (200), ``"trusted_fit"`` (150), ``"trusted_held"`` (50) or ``"noisy"``
            (1,097).
        noise: Label noise for the noisy part, or for ``"trusted_held"``.
        keep: Manifest; train only on the images of the noisy part that it keeps.
        augment: Whether to shift each training batch by up to one pixel.
        split_seed: Seed of the selection of trusted images; use the same for a reference and for the run it scores.
        seed: Seed of the training order and of the shifts.
        batch_size: Number of images per batch and process.
        num_workers: Number of loader processes.

    Raises:
        MimicError: ``train`` is not a part, or ``keep`` is given for a part that is not noisy.

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
    #: Shape of one image.
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
            from sklearn.datasets import load_digits  # includes the images

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target, dtype=torch.int64)
        source = Source(images, labels, lambda: hashlib.sha256(images.numpy().tobytes()).hexdigest())
        return {"train": source, "test": source}

    def divide(self, labels: Tensor) -> Mapping[str, Tensor]:
        # The test set is the same for all seeds, so that settings chosen with one seed are not tuned on test images.
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
        """Return images by id, shape ``(n, 1, 8, 8)``, from 0 (background) to 1 (ink)."""
        assert self.sources, "call setup() first"
        images: Tensor = self.sources["train"].images[ids]
        return images
