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
    """A micro-batch after its forward pass; lives until its gradients have been prepared.

    Attributes:
        loss: The scalar that is trained on.
        losses: What ``sample_losses`` returned; ``None`` for a module without that method.
        calls: The calls of the observed layers.
        rows: Samples of this rank.
        trace: The operations of the forward pass, where they were followed.
        shows: The trace must show that the loss is a plain mean over the samples.
    """

    loss: Tensor
    losses: SampleLosses | None
    calls: LayerCalls
    rows: int
    trace: ForwardTrace | None = None
    shows: bool = False

    @property
    def of_all_ranks(self) -> bool:
        """The losses are those of all ranks' samples, in their order, with only this rank's part attached."""
        world = distributed.world_size()
        return self.losses is not None and world > 1 and len(self.losses.values) == self.rows * world

    @property
    def own(self) -> slice:
        """This rank's samples within the losses."""
        first = self.rows * distributed.rank() if self.of_all_ranks else 0
        return slice(first, first + self.rows)

    def own_rows(self, losses: Tensor) -> Tensor:
        """Return this rank's part of losses like those of ``sample_losses``, in float32 or higher."""
        return losses[self.own].to(torch.promote_types(losses.dtype, torch.float32))

    @property
    def losses_edge(self) -> GradientEdge | None:
        """Where the losses' gradient arrives."""
        return None if self.losses is None else self.losses.edge

    @cached_property
    def root(self) -> Tensor:
        """What is differentiated for the scores."""
        return self.loss if self.losses is None else self.losses.live

    @cached_property
    def graph(self) -> Graph:
        """The graph below the root, walked once a step."""
        return Graph(grad_fn_of(self.root))

    @property
    def seed(self) -> Tensor:
        """The gradient of the root under which row *i* below it is that of the unreduced loss ``ℓᵢ``."""
        return torch.full_like(self.root, self.rows if self.losses is None else 1)

    def flow(self, edge: GradientEdge) -> DataFlow | None:
        """Return the data flow from a tensor with a row per sample; ``None`` if it, or its view, was not seen in use.

        Args:
            edge: Where the tensor's gradient arrives.
        """
        node = self._seen(edge.node)
        return None if self.trace is None or node is None else DataFlow(self.trace, node)

    def check_observed(self) -> None:
        """Check the order of the rows in all observed layers and in the losses.

        Raises:
            MimicError: See :meth:`check_order`.
        """
        rows = [call.node for call in self.calls.calls if call.shape[0] == self.rows]
        self.check_order(rows if self.losses is None else [*rows, self.losses.edge.node])

    def check_order(self, nodes: Iterable[Node]) -> None:
        """Check that tensors with a row per sample hold them in the batch's order, where that is known.

        Args:
            nodes: That made the tensors; of losses of all ranks, this rank's are checked.

        Raises:
            MimicError: One does not, so that scores would be recorded under other samples' ids.
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
        """The order of the samples in every tensor of the forward pass; ``None`` where it was not followed."""
        return None if self.trace is None else SampleOrder(self.trace)

    def _seen(self, node: Node) -> Node | None:
        """Return the node of the same tensor, or its view, that the trace knows."""
        while self.trace is not None and node not in self.trace.nodes:
            parents = {parent for parent, _ in self.graph.parents.get(node, ())}
            if len(parents) != 1 or not in_same_order(*parents):
                return None
            (node,) = parents
        return node

    def sample_cuts(self, cuts: list[GradientEdge]) -> list[GradientEdge]:
        """Return those of the cuts that hold a row per sample, where the data flow is known.

        A tensor of another kind may have that size, too: two tasks' losses in a batch of two.

        Args:
            cuts: From the loss on.

        Raises:
            MimicError: The loss is not shown to be a plain mean over the rows of the lowest cut.
        """
        if self.trace is None or not self.shows:
            return cuts
        reason = "where the samples' rows are used is not seen"
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
        """Return the one call of the one target layer.

        Args:
            name: The layer's path, for the message.

        Raises:
            MimicError: There was none, or more than one.
        """
        calls = self.calls.calls
        if len(calls) != 1:
            raise MimicError(
                f"`parameters`: {name!r} was called {len(calls)} times in this step, and once in the first."
            )
        return calls[0]
