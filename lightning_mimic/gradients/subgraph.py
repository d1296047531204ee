"""Per-sample gradients of parameters from which no known operation leads to the batch.

Position embeddings that are looked up once for all samples, parametrized weights, recurrent layers and biases of
attention are functions of parameters that meet the batch later, or not linearly. What holds for all of them: where each
sample's loss depends on a tensor by the sample's own row, ``⟨gᵢ, v⟩`` is row *i* of the tensor's gradient times row *i*
of the tensor's derivative along v. The small part of the graph between parameters and tensor is differentiated twice
for it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.gradients.graph import ELEMENTWISE, Graph, is_compiled, normalises_batch
from lightning_mimic.gradients.nodes import BatchAxis, is_leaf, kind_of, shape_of

# Arguments whose first axis is summed over or looked up in: it is not that of the output.
_CONTRACTED = {
    ("Mm", 1),
    ("Addmm", 2),
    ("Convolution", 1),
    ("Mv", 1),
    ("Embedding", 0),
    ("NativeLayerNorm", 1),
    ("NativeLayerNorm", 2),
    ("NativeGroupNorm", 1),
    ("NativeGroupNorm", 2),
}

# Operations in which an argument may be repeated along axes that it lacks.
_REPEATING = (*ELEMENTWISE, "Expand", "Repeat", "Addmm", "Baddbmm", "Addcmul", "Lerp")

# Operations that torch cannot differentiate twice, and what can be done about it.
_ONCE = {
    "ScaledDotProduct": "allow the slower attention that can with `math_attention=True`",
    "CudnnRnn": "run the layer within `torch.backends.cudnn.flags(enabled=False)`",
}


#: One of the tensors that an operation made: the node and the number of its output.
End = tuple[Node, int]


@dataclass(frozen=True, eq=False)
class Subgraph:
    """The part of a graph between parameters and the first tensors above them that have a row per sample.

    Attributes:
        parameters: By name.
        ends: These tensors; every path from the parameters leads through one of them.
        beside: Nodes below the part's that are no part of it.
    """

    parameters: Mapping[str, nn.Parameter]
    ends: tuple[End, ...]
    beside: tuple[Node, ...] = field(repr=False)

    def gradients(self, seeds: Mapping[End, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
        """Return ``Jᵀu``: what the parameters get if the ends get these gradients, on paths that come by no other end.

        Computes no gradient of anything else. The graph stays as it is.

        Args:
            seeds: The gradient of every end.
            create_graph: Let the result be differentiated by the seeds.

        Returns:
            By name, in the parameters' dtypes; a parameter that gets none is left out.
        """
        device = next(iter(seeds.values())).device.type
        with torch.autocast(device, enabled=False), ExitStack() as hooks:
            for node in {node for node, _ in self.ends}:
                # What comes from an end above belongs to that one.
                outputs = tuple(seeds.get((node, nr)) for nr in range(len(node._input_metadata)))
                hooks.callback(node.register_prehook(lambda gradients, outputs=outputs: outputs).remove)
            for node in self.beside:  # nothing is computed there
                hooks.callback(node.register_prehook(lambda gradients: (None,) * len(gradients)).remove)
            found = torch.autograd.grad(
                [GradientEdge(*end) for end in seeds],
                list(self.parameters.values()),
                list(seeds.values()),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        return {n: gradient for n, gradient in zip(self.parameters, found, strict=True) if gradient is not None}

    def derivatives(self, vectors: Mapping[str, Tensor]) -> dict[End, Tensor]:
        """Return the derivative of each end along v, on paths that come by no other end.

        Computed in the dtypes of the forward pass and returned in float32 or higher; takes a reverse pass over the
        subgraph and one over what that has done.

        Args:
            vectors: V by parameter name.

        Raises:
            MimicError: An operation cannot be differentiated twice.
        """
        # J v does not depend on the seeds, but Jᵀu does, linearly.
        seeds = {(node, nr): _zeros(node._input_metadata[nr]) for node, nr in self.ends}
        device = next(iter(seeds.values())).device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            sums = self.gradients(seeds, create_graph=True)
            shares = [
                (gradient.to((vector := vectors[name]).dtype) * vector).sum()
                for name, gradient in sums.items()
                if gradient.requires_grad
            ]
            if not shares:
                return seeds
            along = torch.stack(shares).sum()
            try:
                found = torch.autograd.grad(along, list(seeds.values()), materialize_grads=True)
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                raise MimicError(
                    f"`parameters`: {join_names(list(self.parameters))} cannot be scored, because an operation between "
                    f"them and the batch cannot be differentiated twice ({error}). Leave them out."
                ) from error
        dtype = torch.promote_types(along.dtype, torch.float32)
        return {end: derivative.to(dtype) for end, derivative in zip(seeds, found, strict=True)}


@dataclass(frozen=True)
class SubgraphUse:
    """A tensor with a row per sample that a subgraph ends at.

    Attributes:
        subgraph: The subgraph.
        node: Where the tensor's gradient arrives.
        output_nr: As which of the node's.
        shape: The tensor's shape, or that of a view of all its elements.
        axis: The batch's axis in ``shape``.
    """

    subgraph: Subgraph
    node: Node
    output_nr: int
    shape: tuple[int, ...]
    axis: int

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return list(self.subgraph.parameters)

    @torch.no_grad()
    def dot(self, output_gradients: Tensor, derivatives: Mapping[End, Tensor]) -> Tensor:
        """Return this tensor's term of ``⟨gᵢ, v⟩``, shape ``(B,)``.

        Args:
            output_gradients: The tensor's gradient.
            derivatives: From :meth:`Subgraph.derivatives`.
        """
        derivative = derivatives[self.node, self.output_nr]
        product = output_gradients.to(derivative.dtype) * derivative
        rows = product.reshape(self.shape).movedim(self.axis, 0)
        return rows.reshape(len(rows), -1).sum(1)


#: A tensor with a row per sample: node, number of its output, shape, and the batch's axis in it.
_Rows = tuple[Node, int, tuple[int, ...], int]


class SubgraphSearch:
    """Looks for the first tensors with a row per sample above parameters.

    Args:
        graph: The graph below the losses, or any cut.
        samples: B.
    """

    def __init__(self, graph: Graph, samples: int) -> None:
        self._graph, self.samples = graph, samples
        self._place = {node: k for k, node in enumerate(graph.order)}
        # Parameters that end at the same tensors, and the nodes on the way.
        self._found: dict[tuple[_Rows, ...], tuple[dict[str, nn.Parameter], set[Node]]] = {}
        #: Nodes whose tensor has no row per sample, whatever its length, because it is spread over rows further up.
        self.spread: set[Node] = set()
        # Those and all that are an operation's weight.
        self._without_rows: set[Node] = set()
        self._normalised: set[Node] = set()
        for node in graph.order:
            above = graph.parents[node]
            if any(parent in self._normalised or normalises_batch(parent) for parent, _ in above):
                self._normalised.add(node)
            if any(parent in self.spread or self._spreads(node, parent) for parent, _ in above):
                self.spread.add(node)
            if node in self.spread or any(p in self._without_rows or (kind_of(p), k) in _CONTRACTED for p, k in above):
                self._without_rows.add(node)

    def add(self, name: str, parameter: nn.Parameter, batch_axis: BatchAxis) -> str | None:
        """Look for the tensors above a parameter.

        Args:
            name: The parameter's.
            parameter: The parameter.
            batch_axis: Where the batch's axis is, of the number of axes.

        Returns:
            Why there are none from which the parameter could be scored, as a phrase; ``None`` if there are.
        """
        uses = self._graph.terminals(parameter)
        if not uses:
            return "no path leads from the loss to it"
        ends: list[_Rows] = []
        stack, seen = [use.node for use in uses], set[Node]()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            rows = self._rows(node, batch_axis)
            problem = _not_twice(node) or self._ambiguous(rows)
            if problem is not None:
                return problem
            if not rows and node is self._graph.root:
                used = kind_of(uses[0].node)
                return f"used by {used}, above which no tensor has a row for each of {self.samples} samples"
            ends += rows
            stack += [] if rows else [parent for parent, _ in self._graph.parents[node]]
        key = tuple(sorted(ends, key=lambda rows: (self._place[rows[0]], rows[1])))
        parameters, inside = self._found.setdefault(key, ({}, set()))
        parameters[name] = parameter
        inside |= seen.union(*(use.chain for use in uses))
        return None

    def uses(self) -> list[SubgraphUse]:
        """Return the tensors at which all parameters that were added meet the batch."""
        found: list[SubgraphUse] = []
        for ends, (parameters, inside) in self._found.items():
            below = {child for node in inside for child, _ in node.next_functions if child is not None}
            beside = tuple(node for node in below - inside if not is_leaf(node))
            subgraph = Subgraph(parameters, tuple((node, nr) for node, nr, _, _ in ends), beside)
            found += [SubgraphUse(subgraph, *end) for end in ends]
        return found

    def _rows(self, node: Node, batch_axis: BatchAxis) -> list[_Rows]:
        """Return a node's outputs that are used, if all of them have a row per sample; else nothing."""
        if node in self._without_rows:
            return []
        made = node._input_metadata
        used = {parent.next_functions[k][1] for parent, k in self._graph.parents[node]} or {0}  # or the root
        found: list[_Rows] = []
        for nr in used:
            seen = self._graph.shapes(node) if len(made) == 1 else [tuple(made[nr].shape)]
            axes = [(s, batch_axis(len(s))) for s in seen]
            fitting = [(s, axis) for s, axis in axes if len(s) > axis and s[axis] == self.samples]
            if fitting and not made[nr].dtype.is_complex:
                found.append((node, nr, *fitting[0]))
        return found if len(found) == len(used) else []

    def _ambiguous(self, rows: Sequence[_Rows]) -> str | None:
        """Return as a phrase that several axes may be the batch's where that cannot be checked."""
        for node, _, shape, _ in rows:
            # Features and channels are not.
            features = 1 if len(shape) > 3 or kind_of(node) == "Convolution" else len(shape) - 1
            axes = (*shape[:features], *shape[features + 1 :])
            if node in self._normalised and axes.count(self.samples) > 1 < self.samples:
                return (
                    f"used in a tensor of shape {shape} below a batch normalisation in training mode, where it cannot "
                    f"be checked which axis is that of the {self.samples} samples"
                )
        return None

    def _spreads(self, node: Node, parent: Node) -> bool:
        """Return whether an operation repeats a tensor for every sample."""
        if kind_of(parent) not in _REPEATING or self.samples == 1:
            return False
        own: tuple[int, ...] = tuple(node.variable.shape) if is_leaf(node) else shape_of(node)  # type: ignore[attr-defined]
        shape = shape_of(parent)
        # Windows of images, or heads, may lie along the batch's axis too.
        rows = shape[:1] != (1,) and prod(shape[:1]) % self.samples == 0 and prod(shape) > prod(own)
        fits = all(a in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False))
        return rows and fits and (len(own) < len(shape) or own[:1] == (1,))


def _zeros(made: Any) -> Tensor:
    return torch.zeros(tuple(made.shape), dtype=made.dtype, device=made.device, requires_grad=True)


def _not_twice(node: Any) -> str | None:
    """Return why a node cannot be part of a subgraph, as a phrase."""
    kind = kind_of(node)
    if normalises_batch(node):
        return "used below a batch normalisation in training mode, under which it has no row per sample"
    if getattr(node, "_saved_scale_grad_by_freq", False):
        return "looked up with `scale_grad_by_freq`, which divides its gradient by how often the batch has each row"
    for once, fix in _ONCE.items():
        if kind.startswith(once):
            return f"used below {kind}, which cannot be differentiated twice; {fix}"
    # What a function that is written in Python or C++ does backwards may be hidden from autograd.
    if is_compiled(node) or isinstance(node, BackwardCFunction) or "CppNode" in node.name():
        return f"used by {kind}, a compiled or custom function, of which it is not known how it depends on it"
    return None
