"""Per-sample gradients of parameters that are used outside of layer calls: class tokens, projections, fused attention.

They are found in the autograd graph, by the operation that brings the parameter and the batch together. The
known ones are linear in the parameter, so that ``⟨gᵢ, v⟩`` is the operation's output gradient times the operation
applied to v.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_mimic.gradients.graph import Graph, Terminal
from lightning_mimic.gradients.nodes import EXCHANGED, BatchAxis, is_leaf, kind_of, leaf_below, shape_of

# What the gradient of Add, Expand or Mul is summed over before it reaches the parameter is the batch; Mm and Addmm
# contract it.
_SPREAD = ("Expand", "Add", "Mul")
_MATRIX = {("Mm", 1), ("Addmm", 0), ("Addmm", 2)}
_NORM = {("NativeLayerNorm", 1), ("NativeLayerNorm", 2)}


@dataclass(frozen=True)
class FunctionalUse:
    """An operation outside of any known layer that combines a parameter with the batch.

    Attributes:
        name: The parameter's.
        terminal: The operation.
        shape: The operation's output with its axes apart, as flattened tokens are seen above it.
        axis: The batch's axis in ``shape``; 1 inside ``nn.MultiheadAttention``.
        factors: What the operation multiplies the parameter with, as autograd keeps it; none for a sum.
    """

    name: str
    terminal: Terminal
    shape: tuple[int, ...]
    axis: int
    factors: tuple[Tensor, ...] = field(repr=False)

    #: As which of the node's outputs the gradient arrives.
    output_nr: ClassVar[int] = 0

    @property
    def names(self) -> list[str]:
        """Of the parameter."""
        return [self.name]

    @property
    def node(self) -> Node:
        """Where the output's gradient arrives."""
        return self.terminal.node

    @property
    def beside(self) -> tuple[Node, ...]:
        """Where the gradients of the operation's other arguments arrive."""
        others = [child for k, (child, _) in enumerate(self.node.next_functions) if k != self.terminal.argument]
        return tuple(child for child in others if child is not None and not is_leaf(child))

    @torch.no_grad()
    def dot(self, output_gradients: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return this use's term of ``⟨gᵢ, v⟩``, shape ``(B,)``."""
        moved = vectors[self.name]
        for node in self.terminal.chain:
            moved = moved.mT if kind_of(node) in EXCHANGED else moved.reshape(shape_of(node))
        gradients = output_gradients.to(moved.dtype)
        match kind_of(self.node), self.factors:
            case _, ():
                pass
            case "NativeLayerNorm", (inputs, mean, deviation):
                gradients = (inputs - mean).mul_(deviation).to(moved.dtype).mul_(gradients)
            case "Mul", (factor,):
                moved = factor.to(moved.dtype) * moved
            case _, (factor,):
                moved = factor.to(moved.dtype) @ moved
        if moved.ndim == 1 < gradients.ndim and len(moved) > 1:  # the same for all rows: takes no memory of their size
            product, shape = gradients @ moved, (*self.shape[:-1], 1)
        else:
            product, shape = gradients * moved, self.shape
        return product.reshape(shape).movedim(self.axis, 0).flatten(1).sum(1)


def functional_use(
    name: str, terminal: Terminal, graph: Graph, samples: int, batch_axis: BatchAxis
) -> FunctionalUse | None:
    """Return the rule for a use, or ``None`` if there is none.

    Args:
        name: The parameter's.
        terminal: Where it is used.
        graph: The graph that it was found in.
        samples: B.
        batch_axis: Where the batch's axis is, of the number of axes.
    """
    node, kind = terminal.node, kind_of(terminal.node)
    shape = shape_of(node)
    operands = [child for child, _ in node.next_functions]
    if len(operands) > 1 and all(leaf_below(child) is not None for child in operands):
        return None  # of parameters alone
    exchanged = [view for view in terminal.chain if kind_of(view) in EXCHANGED]
    scaled = any(getattr(node, f"_saved_{factor}", 1) != 1 for factor in ("alpha", "beta"))
    if scaled or node._input_metadata[0].dtype.is_complex or not all(map(_swaps_two_axes, exchanged)):
        return None
    if (kind, terminal.argument) in _MATRIX:
        # Tokens are flattened before a matrix product; a view above it has their axes apart.
        for apart in graph.shapes(node):
            axis = batch_axis(len(apart))
            if apart[-1] == shape[-1] and len(apart) > axis + 1 and apart[axis] == samples:
                return FunctionalUse(name, terminal, apart, axis, _factors(terminal))
        return None
    if (kind, terminal.argument) in _NORM and len(shape) > len(_own_shape(terminal)) and shape[0] == samples:
        return FunctionalUse(name, terminal, shape, 0, _factors(terminal))
    if kind not in _SPREAD:
        return None
    own, axis = _own_shape(terminal), batch_axis(len(shape))
    place = axis - len(shape) + len(own)  # the batch's axis in the parameter's own shape
    if len(shape) <= axis or shape[axis] != samples or (place >= 0 and own[place] != 1):
        return None
    return FunctionalUse(name, terminal, shape, axis, _factors(terminal))


def _factors(terminal: Terminal) -> tuple[Tensor, ...]:
    """Read before any reverse pass: within one, an activation-checkpointed block gives them out once."""
    node: Any = terminal.node
    match kind_of(node), terminal.argument:
        case ("Mm", 1) | ("Mul", 1):
            return (node._saved_self,)
        case ("Mul", 0):
            return (node._saved_other,)
        case ("Addmm", 2):
            return (node._saved_mat1,)
        case ("NativeLayerNorm", 1):
            return node._saved_input, node._saved_result1, node._saved_result2
    return ()


def _swaps_two_axes(node: Any) -> bool:
    if len(shape_of(node)) != 2:
        return False
    match kind_of(node):
        case "Transpose":  # axes counted from the end are kept as huge numbers, of the same parity
            return bool(node._saved_dim0 % 2 != node._saved_dim1 % 2)
        case "Permute":
            return bool(node._saved_dims[0] % 2 == 1)
    return True


def _own_shape(terminal: Terminal) -> tuple[int, ...]:
    """The parameter's shape as it enters the operation."""
    if terminal.chain:
        return shape_of(terminal.chain[-1])
    leaf: Any = terminal.node.next_functions[terminal.argument][0]
    return tuple(leaf.variable.shape)
