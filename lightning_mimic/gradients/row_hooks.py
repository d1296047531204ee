"""The gate: gradient rows scaled on their way back, inside the one backward pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle


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


def hook_gradient(edge: GradientEdge, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Calls ``change`` with a tensor's gradient in every reverse pass that goes on below it.

    Args:
        edge: Where the gradient arrives; an in-place operation on the tensor does not move it.
        change: Returns what takes the gradient's place, or ``None`` to leave it.

    Returns:
        A handle whose ``remove()`` undoes it.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> y = x * 3
        >>> handle = hook_gradient(torch.autograd.graph.get_gradient_edge(y), lambda g: 10 * g)
        >>> torch.autograd.grad(y.sum(), x)[0]
        tensor([30., 30.])
    """

    def prehook(gradients: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        gradient = gradients[edge.output_nr]
        changed = None if gradient is None else change(gradient)
        if changed is None:
            return None
        return tuple(changed if nr == edge.output_nr else g for nr, g in enumerate(gradients))

    handle: RemovableHandle = edge.node.register_prehook(prehook)
    return handle
