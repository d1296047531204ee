"""Labelled images for a zero-shot classifier, put through the transform of image-text pairs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_mimic.data.ids import SampleWithId
from lightning_mimic.data.images import to_rgb


class LabelledImages(Dataset[tuple[Tensor, Any]]):
    """Labelled images, put through a transform for PIL images.

    Args:
        dataset: Of ``(image, label)``, or of :class:`SampleWithId` around that; images PIL, or ``(C, H, W)`` from
            0 to 1.
        transform: PIL image of mode RGB to tensor.
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
