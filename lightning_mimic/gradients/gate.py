"""The gate: gradient rows scaled on their way back, inside the one backward pass."""

import torch
from torch import Tensor


def gate_rows(gradients: Tensor, scale: Tensor, masked: Tensor) -> Tensor:
    """Scales every sample's row of a gradient.

    Args:
        gradients: Shape ``(B, ...)``; may hold non-finite rows.
        scale: Factor per row, shape ``(B,)``; 1 leaves a row as it is, non-finite values included.
        masked: Boolean, shape ``(B,)``; these rows become zero whatever they hold (0 · NaN would be NaN).

    Returns:
        A new tensor of the shape and dtype of ``gradients``.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0], [float("nan")]])
        >>> gate_rows(rows, torch.tensor([0.5, 2.0, 1.0]), torch.tensor([False, False, True])).T
        tensor([[0.5000, 4.0000, 0.0000]])
    """
    per_row = (-1, *[1] * (gradients.ndim - 1))
    # Multiplied in the wider dtype: B·w can leave half precision's range before the product does.
    product = (gradients * scale.view(per_row)).to(gradients.dtype)
    return torch.where(masked.view(per_row), torch.zeros_like(product), product)
