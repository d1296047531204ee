"""A micro-batch after its forward pass."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_mimic import distributed
from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.forward_trace import ForwardTrace
from lightning_mimic.gradients.graph import Graph
from lightning_mimic.gradients.layer_hooks import LayerCall, LayerCalls
from lightning_mimic.gradients.nodes import grad_fn_of, in_same_order
from lightning_mimic.gradients.plain_mean import DataFlow
from lightning_mimic.gradients.sample_order import SampleOrder
from lightning_mimic.reweighting.hooks import SampleLosses
from lightning_mimic.reweighting.messages import NOT_PLAIN, REORDERED


@dataclass(frozen=True)
class Forward:
    """A micro-batch after its forward pass; kept until the backward pass has been prepared.

    Attributes:
        loss: Training loss, a scalar.
        losses: Per-sample losses returned by ``sample_losses``; ``None`` for a module without that method.
        calls: Calls of the observed layers.
        rows: Number of samples on this rank.
        trace: Operations of the forward pass; ``None`` if they were not recorded.
        shows: Whether the trace must show that the loss is a plain mean over the samples.
    """

    loss: Tensor
    losses: SampleLosses | None
    calls: LayerCalls
    rows: int
    trace: ForwardTrace | None = None
    shows: bool = False

    @property
    def of_all_ranks(self) -> bool:
        """Whether the losses cover the samples of all ranks, in rank order; only this rank's part has a graph."""
        world = distributed.world_size()
        return self.losses is not None and world > 1 and len(self.losses.values) == self.rows * world

    @property
    def own(self) -> slice:
        """Slice of this rank's samples within the losses."""
        first = self.rows * distributed.rank() if self.of_all_ranks else 0
        return slice(first, first + self.rows)

    def own_rows(self, losses: Tensor) -> Tensor:
        """Return this rank's part of losses that are ordered as those of ``sample_losses``, in float32 or higher."""
        return losses[self.own].to(torch.promote_types(losses.dtype, torch.float32))

    @property
    def losses_edge(self) -> GradientEdge | None:
        """Graph edge at which the gradient of the per-sample losses arrives; ``None`` without such losses."""
        return None if self.losses is None else self.losses.edge

    @cached_property
    def root(self) -> Tensor:
        """Tensor that is differentiated for the scores: the per-sample losses, or else the loss."""
        return self.loss if self.losses is None else self.losses.live

    @cached_property
    def graph(self) -> Graph:
        """Autograd graph of the root, traversed once per step."""
        return Graph(grad_fn_of(self.root))

    @property
    def seed(self) -> Tensor:
        """Gradient to start from at the root so that row *i* is the gradient of the unreduced loss ``ℓᵢ``."""
        return torch.full_like(self.root, self.rows if self.losses is None else 1)

    def flow(self, edge: GradientEdge) -> DataFlow | None:
        """Return the data flow from a tensor with one row per sample; ``None`` if the trace does not contain its use.

        Args:
            edge: Graph edge at which the tensor's gradient arrives.
        """
        node = self._seen(edge.node)
        return None if self.trace is None or node is None else DataFlow(self.trace, node)

    def check_observed(self) -> None:
        """Check the order of the rows in all observed layers and in the losses.

        Raises:
            MimicError: The order differs from the batch's; see :meth:`check_order`.
        """
        rows = [call.node for call in self.calls.calls if call.shape[0] == self.rows]
        self.check_order(rows if self.losses is None else [*rows, self.losses.edge.node])

    def check_order(self, nodes: Iterable[Node]) -> None:
        """Check that tensors with one row per sample have their rows in the batch's order, where the order is known.

        Args:
            nodes: Graph nodes that created the tensors. If the losses cover all ranks, this rank's rows are checked.

        Raises:
            MimicError: A tensor has another order, so that scores would be recorded under the ids of other samples.
        """
        for node in nodes:
            seen = self._seen(node)
            if self.order is None or self.trace is None or seen is None:
                continue
            own = self.own if self.losses is not None and node is self.losses.edge.node else slice(None)
            token, _ = self.trace.nodes[seen]
            if self.order.differs(token, own) or self.order.meets_other_order(token):
                raise MimicError(REORDERED)

    @cached_property
    def order(self) -> SampleOrder | None:
        """Order of the samples in every tensor of the forward pass; ``None`` if the pass was not recorded."""
        return None if self.trace is None else SampleOrder(self.trace)

    def _seen(self, node: Node) -> Node | None:
        """Return the node in the trace for a tensor, or for the tensor of which it is a view; ``None`` if none is."""
        while self.trace is not None and node not in self.trace.nodes:
            parents = {parent for parent, _ in self.graph.parents.get(node, ())}
            if len(parents) != 1 or not in_same_order(*parents):
                return None
            (node,) = parents
        return node

    def sample_cuts(self, cuts: list[GradientEdge]) -> list[GradientEdge]:
        """Return the cuts that hold one row per sample, or all of them where the data flow is not known.

        A tensor may have that size by coincidence, such as the losses of two tasks in a batch of two.

        Args:
            cuts: Cuts of the graph, starting from the loss.

        Raises:
            MimicError: The loss cannot be shown to be a plain mean over the rows of the lowest cut.
        """
        if self.trace is None or not self.shows:
            return cuts
        reason = "the operations that use the samples' rows were not recorded"
        for edge in reversed(cuts):
            flow = self.flow(edge)
            if flow is None:
                continue
            objection = flow.objection(self.loss)
            if objection is None:
                return [cut for cut in cuts if flow.has_rows(cut.node)]
            reason = objection
            if flow.misplaced is None:
                break  # a cut above it would hide what was found here
        raise MimicError(NOT_PLAIN.format(reason))

    def only_call(self, name: str) -> LayerCall:
        """Return the only call of the only target layer.

        Args:
            name: Path of the layer, for the error message.

        Raises:
            MimicError: The layer was not called exactly once.
        """
        calls = self.calls.calls
        if len(calls) != 1:
            raise MimicError(
                f"`parameters`: {name!r} was called {len(calls)} times in this step, but once in the first step."
            )
        return calls[0]
