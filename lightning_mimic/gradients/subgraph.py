"""Per-sample gradients of parameters from which no known operation leads to the batch.

Position embeddings that are looked up once for all samples, parametrized weights, recurrent layers and biases of
attention are functions of parameters that meet the batch later, or not linearly. What holds for all of them: where each
sample's loss depends on a tensor by the sample's own row, ``⟨gᵢ, v⟩`` is row *i* of the tensor's gradient times row *i*
of the tensor's derivative along v. The small part of the graph between parameters and tensor is differentiated twice
for it.
"""

from collections.abc import Mapping
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

    def derivatives(self, vectors: Mapping[str, Tensor]) -> dict[End, Tensor]:
        """Return the derivative of each end along v, on paths that come by no other end.

        Of the dtypes of the forward pass; takes a reverse pass over the subgraph and one over what that has done.

        Args:
            vectors: V by parameter name.

        Raises:
            MimicError: An operation cannot be differentiated twice.
        """
        # J v does not depend on the seeds, but Jᵀu does, linearly.
        seeds = {(node, nr): _zeros(node._input_metadata[nr]) for node, nr in self.ends}
        device = next(iter(seeds.values())).device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False), ExitStack() as hooks:
            for node in {node for node, _ in self.ends}:
                # What comes from an end above belongs to that one.
                outputs = tuple(seeds.get((node, nr)) for nr in range(len(node._input_metadata)))
                hooks.callback(node.register_prehook(lambda gradients, outputs=outputs: outputs).remove)
            for node in self.beside:
                hooks.callback(node.register_prehook(lambda gradients: (None,) * len(gradients)).remove)
            sums = torch.autograd.grad(
                [GradientEdge(*end) for end in seeds],
                list(self.parameters.values()),
                list(seeds.values()),
                create_graph=True,
                allow_unused=True,
            )
            shares = [
                (gradient.to(vectors[name].dtype) * vectors[name]).sum()
                for name, gradient in zip(self.parameters, sums, strict=True)
                if gradient is not None and gradient.requires_grad
            ]
            if not shares:
                return seeds
            try:
                found = torch.autograd.grad(torch.stack(shares).sum(), list(seeds.values()), materialize_grads=True)
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                raise MimicError(
                    f"`parameters`: {join_names(list(self.parameters))} cannot be scored, because an operation between "
                    f"them and the batch cannot be differentiated twice ({error}). Leave them out."
                ) from error
        return dict(zip(seeds, found, strict=True))


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
    def dot(self, output_gradients: Tensor, derivatives: Mapping[End, Tensor], dtype: torch.dtype) -> Tensor:
        """Return this tensor's term of ``⟨gᵢ, v⟩``, shape ``(B,)``.

        Args:
            output_gradients: The tensor's gradient.
            derivatives: From :meth:`Subgraph.derivatives`.
            dtype: Of the product.
        """
        product = output_gradients.to(dtype) * derivatives[self.node, self.output_nr].to(dtype)
        return product.reshape(self.shape).movedim(self.axis, 0).flatten(1).sum(1)


class SubgraphSearch:
    """Looks for the first tensors with a row per sample above parameters.

    Args:
        graph: The graph below the losses, or any cut.
        samples: B.
        batch_axis: Where the batch's axis is, of the number of axes.
    """

    def __init__(self, graph: Graph, samples: int, batch_axis: BatchAxis) -> None:
        self.graph, self.samples, self._batch_axis = graph, samples, batch_axis
        self._place = {node: k for k, node in enumerate(graph.order)}
        self._ends: dict[tuple[Node, ...], dict[str, nn.Parameter]] = {}
        self._inside: dict[tuple[Node, ...], set[Node]] = {}
        self._shapes: dict[End, tuple[int, ...]] = {}
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

    def add(self, name: str, parameter: nn.Parameter) -> str | None:
        """Look for the tensors above a parameter.

        Returns:
            Why there are none from which the parameter could be scored, as a phrase; ``None`` if there are.
        """
        ends: list[Node] = []
        uses = self.graph.terminals(parameter)
        if not uses:
            return "no path leads from the loss to it"
        inside = {node for use in uses for node in use.chain}
        stack, seen = [use.node for use in uses], set[Node]()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            problem = _not_twice(node)
            if problem is not None:
                return problem
            shapes = self._rows(node)
            if shapes:
                ambiguous = [shape for shape in shapes.values() if self._ambiguous(node, shape)]
                if ambiguous and node in self._normalised:
                    return (
                        f"used in a tensor of shape {ambiguous[0]} below a batch normalisation in training mode, where "
                        f"it cannot be checked which axis is that of the {self.samples} samples"
                    )
                self._shapes |= {(node, nr): shape for nr, shape in shapes.items()}
                ends.append(node)
            elif node is self.graph.root:
                used = kind_of(uses[0].node)
                return f"used by {used}, above which no tensor has a row for each of {self.samples} samples"
            else:
                stack.extend(parent for parent, _ in self.graph.parents[node])
        key = tuple(sorted(ends, key=self._place.__getitem__))
        self._ends.setdefault(key, {})[name] = parameter
        self._inside.setdefault(key, set()).update(inside, seen)
        return None

    def uses(self) -> list[SubgraphUse]:
        """Return the tensors at which all parameters that were added meet the batch."""
        found: list[SubgraphUse] = []
        for ends, parameters in self._ends.items():
            inside = self._inside[ends]
            below = {child for node in inside for child, _ in node.next_functions if child is not None}
            beside = tuple(node for node in below - inside if not is_leaf(node))
            own = set(ends)
            shapes = {end: shape for end, shape in self._shapes.items() if end[0] in own}
            subgraph = Subgraph(parameters, tuple(shapes), beside)
            found += [SubgraphUse(subgraph, *end, shape, self._batch_axis(len(shape))) for end, shape in shapes.items()]
        return found

    def _rows(self, node: Node) -> dict[int, tuple[int, ...]]:
        """Return the shapes in which a node's outputs have a row per sample; empty if not all have that are used."""
        if node in self._without_rows:
            return {}
        made = node._input_metadata
        used = {parent.next_functions[k][1] for parent, k in self.graph.parents[node]} or {0}  # or the root
        found: dict[int, tuple[int, ...]] = {}
        for nr in used:
            seen = self.graph.shapes(node) if len(made) == 1 else [tuple(made[nr].shape)]
            fitting = [s for s in seen if len(s) > (k := self._batch_axis(len(s))) and s[k] == self.samples]
            if fitting and not made[nr].dtype.is_complex:
                found[nr] = fitting[0]
        return found if len(found) == len(used) else {}

    def _ambiguous(self, node: Node, shape: tuple[int, ...]) -> bool:
        """Return whether several axes that might be the batch's are as long; features and channels are not."""
        features = 1 if len(shape) > 3 or kind_of(node) == "Convolution" else len(shape) - 1
        return self.samples > 1 and (*shape[:features], *shape[features + 1 :]).count(self.samples) > 1

    def _spreads(self, node: Node, parent: Node) -> bool:
        """Return whether an operation repeats a tensor for every sample."""
        own: tuple[int, ...] = tuple(node.variable.shape) if is_leaf(node) else shape_of(node)  # type: ignore[attr-defined]
        shape = shape_of(parent)
        axis = self._batch_axis(len(shape))
        if kind_of(parent) not in _REPEATING or self.samples == 1 or len(shape) <= axis or prod(shape) <= prod(own):
            return False
        place = axis - len(shape) + len(own)  # the batch's axis in the tensor's own shape
        # Windows of images, or heads, may lie along the batch's axis too.
        spread = shape[axis] > 1 and shape[axis] % self.samples == 0 and (place < 0 or own[place] == 1)
        return spread and all(a in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False))


def _zeros(made: Any) -> Tensor:
    return torch.zeros(tuple(made.shape), dtype=made.dtype, device=made.device, requires_grad=True)


def _not_twice(node: Any) -> str | None:
    """Return why a node cannot be part of a subgraph, as a phrase."""
    kind = kind_of(node)
    if normalises_batch(node):
        return "used below a batch normalisation in training mode, under which it has no row per sample"
    for once, fix in _ONCE.items():
        if kind.startswith(once):
            return f"used below {kind}, which cannot be differentiated twice; {fix}"
    # What a function that is written in Python or C++ does backwards may be hidden from autograd.
    if is_compiled(node) or isinstance(node, BackwardCFunction) or "CppNode" in node.name():
        return f"used by {kind}, a compiled or custom function, of which it is not known how it depends on it"
    return None
