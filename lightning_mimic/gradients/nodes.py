"""Nodes of the autograd graph: what made them, and hooks on the gradients that arrive at them."""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

# Nodes that hand on the same numbers in the same order, and those that only exchange axes.
_SAME_ORDER = ("View", "UnsafeView", "Reshape", "Unsqueeze", "Squeeze", "Alias", "ToCopy")
EXCHANGED = ("T", "Transpose", "Permute")

#: Where the batch's axis is in a tensor of so many axes.
BatchAxis = Callable[[int], int]


def grad_fn_of(tensor: Tensor) -> Node:
    """Return the node that made a tensor which has a gradient."""
    assert tensor.grad_fn is not None
    return tensor.grad_fn


def node_of_all(tensor: Tensor) -> Node | None:
    """The node at which the whole gradient of a tensor arrives, in the tensor's shape or in another.

    For a view this is the node of its base: an in-place operation on the view writes into the base, past the view's
    own node. Up to torch 2.14 the output of a linear layer with a bias on three axes is a view of a matrix.

    Returns:
        ``None`` for a view of which this is not known: its elements are not those of the base in the same order, or
        the base is one of several outputs.
    """
    node: Node | None = grad_fn_of(tensor)
    if tensor._base is None:
        return node
    while node is not None and node is not tensor._base.grad_fn:
        node = node.next_functions[0][0] if in_same_order(node) else None
    return None if node is None or len(node._input_metadata) > 1 else node


def kind_of(node: Node) -> str:
    """The operation that made the node: ``"Addmm"`` for ``AddmmBackward0``."""
    return _kind(node.name())


@cache
def _kind(name: str) -> str:
    return name.rpartition("::")[2].partition("Backward")[0]


def in_same_order(node: Any) -> bool:
    """Whether the node hands on all elements of the tensor below it in the same order."""
    if kind_of(node) == "Slice":  # the colon in ``weight[:, None]``, of which torch 2.6 makes a node
        return (node._saved_start, node._saved_end, node._saved_step) == (0, sys.maxsize, 1)
    return kind_of(node) in _SAME_ORDER


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of the tensor that the node made in the forward pass."""
    return tuple(node._input_metadata[0].shape)


def is_leaf(node: Node) -> bool:
    """Whether a gradient ends here, in a parameter or another leaf."""
    return getattr(node, "variable", None) is not None


def is_contiguous_view(node: Any, shape: tuple[int, ...]) -> bool:
    """Whether the node is what a view of a tensor of this shape becomes in place, with all elements in their order."""
    if kind_of(node) != "AsStrided" or prod(node._saved_size) != prod(shape):
        return False
    steps = [prod(node._saved_size[axis + 1 :]) for axis in range(len(node._saved_size))]
    lengths = zip(node._saved_size, node._saved_stride, steps, strict=True)
    return all(length == 1 or stride == step for length, stride, step in lengths)


def leaf_below(node: Node | None) -> Node | None:
    """The leaf that the node is, or is a view or cast of; ``None`` if it is not."""
    while node is not None and (in_same_order(node) or kind_of(node) in EXCHANGED):
        node = node.next_functions[0][0]
    return node if node is not None and is_leaf(node) else None


def gate_rows(gradients: Tensor, scale: Tensor, masked: Tensor) -> Tensor:
    """Scales every sample's row of a gradient.

    Args:
        gradients: Shape ``(B, ...)``; may hold non-finite rows.
        scale: Factor per row, shape ``(B,)``; 1 leaves a row as it is, non-finite values included.
        masked: Boolean, shape ``(B,)``; these rows become zero whatever they hold (0 · NaN would be NaN).

    Returns:
        A new tensor of the shape and dtype of ``gradients``.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0], [2.0], [float("nan")]])
        >>> gate_rows(rows, torch.tensor([0.5, 2.0, 1.0]), torch.tensor([False, False, True])).T
        tensor([[0.5000, 4.0000, 0.0000]])
    """
    per_row = (-1, *[1] * (gradients.ndim - 1))
    # Multiplied in the wider dtype: B·w can leave half precision's range before the product does.
    product = (gradients * scale.view(per_row)).to(gradients.dtype)
    return product.masked_fill_(masked.view(per_row), 0)


def hook_gradient(edge: GradientEdge, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Calls ``change`` with a tensor's gradient in every reverse pass that goes on below it.

    Args:
        edge: Where the gradient arrives; an in-place operation on the tensor does not move it.
        change: Returns what takes the gradient's place, or ``None`` to leave it.

    Returns:
        A handle whose ``remove()`` undoes it.

    Example:
        >>> import torch
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
