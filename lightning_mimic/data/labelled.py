"""Labelled images for zero-shot evaluation, with the transform of image-text pairs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_mimic.data.ids import SampleWithId
from lightning_mimic.data.images import to_rgb


class LabelledImages(Dataset[tuple[Tensor, Any]]):
    """Apply a transform for PIL images to a data set of labelled images.

    Args:
        dataset: Data set of ``(image, label)``, or of :class:`SampleWithId` with such samples; images are PIL images,
            or tensors ``(C, H, W)`` from 0 to 1.
        transform: Function from a PIL image of mode RGB to a tensor.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Tensor]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        sample = self.dataset[index]
        image, label = sample.sample if isinstance(sample, SampleWithId) else sample
        if isinstance(image, Tensor):
            from PIL import Image

            values = (image * 255).round().clamp(0, 255).to(torch.uint8)
            image = Image.fromarray((values[0] if len(values) == 1 else values.permute(1, 2, 0)).cpu().numpy())
        return self.transform(to_rgb(image)), label
