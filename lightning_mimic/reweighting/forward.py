"""A micro-batch after its forward pass."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_mimic import distributed
from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.graph import Graph
from lightning_mimic.gradients.layer_hooks import LayerCall, LayerCalls
from lightning_mimic.gradients.nodes import grad_fn_of
from lightning_mimic.reweighting.hooks import SampleLosses


@dataclass(frozen=True)
class Forward:
    """A micro-batch after its forward pass; lives until its gradients have been prepared.

    Attributes:
        loss: The scalar that is trained on.
        losses: What ``sample_losses`` returned; ``None`` for a module without that method.
        calls: The calls of the observed layers.
        rows: Samples of this rank.
    """

    loss: Tensor
    losses: SampleLosses | None
    calls: LayerCalls
    rows: int

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
