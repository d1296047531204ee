"""Made-up batches."""

from collections.abc import Iterator
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def batches_of(data: Any, size: int) -> Iterator[Any]:
    """Yield batches of a collection of tensors, in their order.

    Args:
        data: Tensors whose first axis is the samples'.
        size: Of a batch.
    """
    first = 0
    while True:
        yield apply_to_collection(data, Tensor, lambda tensor, at=first: tensor[at : at + size])
        first += size
