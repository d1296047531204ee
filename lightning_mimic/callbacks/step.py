"""A micro-batch after its forward pass, and the ways in which its samples can be scored."""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_mimic.callbacks.hooks import LossTap
from lightning_mimic.callbacks.support import world_size
from lightning_mimic.gradients.graph import Graph
from lightning_mimic.gradients.nodes import made_by


class Way(Enum):
    """Where the products with the per-sample gradients come from."""

    IN_PASS = "one layer's output gradient, inside the one backward pass"
    REVERSE = "a reverse pass over the layers, before the backward pass"
    DOUBLE = "the losses, differentiated twice"
    NONE = "no gradient is needed"


@dataclass(frozen=True)
class Step:
    """A micro-batch after its forward pass.

    Attributes:
        loss: The scalar that training_step returned.
        losses: What ``sample_losses`` returned, ``None`` without that method.
        losses_edge: Where their gradient arrives.
        rows: Samples of this rank.
        world: Ranks.
    """

    loss: Tensor
    losses: Tensor | None
    losses_edge: GradientEdge | None
    rows: int
    world: int

    @property
    def of_all_ranks(self) -> bool:
        """The losses are those of all ranks' samples, in their order, with only this rank's part attached."""
        return self.losses is not None and self.world > 1 and len(self.losses) == self.rows * self.world

    @property
    def own(self) -> slice:
        """This rank's samples within ``losses``."""
        first = self.rows * torch.distributed.get_rank() if self.of_all_ranks else 0
        return slice(first, first + self.rows)

    @property
    def root(self) -> Tensor:
        """What is differentiated for the scores."""
        return self.loss if self.losses is None else self.losses

    @cached_property
    def graph(self) -> Graph:
        """The graph below the root, walked once a step."""
        return Graph(made_by(self.root))

    @property
    def seed(self) -> Tensor:
        """The gradient of the root under which row *i* below it is that of the unreduced loss ``ℓᵢ``."""
        return torch.full_like(self.root, self.rows if self.losses is None else 1)


def taken(loss: Tensor, losses: LossTap | None, rows: int | None) -> Step:
    """The step as it stands after the forward pass.

    Args:
        loss: What training_step returned.
        losses: What its module's ``sample_losses`` returned; ``None`` without that method.
        rows: Samples in the batch, where their number is known.

    Raises:
        ValueError: The samples cannot be told apart.
    """
    world = world_size()
    if rows is None:
        raise ValueError(
            "the batch's tensors do not share one leading size, so the number of samples is unknown; give ids with "
            "WithIds, a key 'id', or `id_from=`."
        )
    if losses is None:
        return Step(loss, None, None, rows, world)
    if losses.values is None:
        raise ValueError(
            "the module has a method `sample_losses`, but training_step did not call it; training_step must "
            "return the mean of `self.sample_losses(batch)`."
        )
    if len(losses.values) not in (rows, rows * world):
        raise ValueError(f"`sample_losses` returned {len(losses.values)} losses for {rows} samples.")
    return Step(loss, losses.live, losses.edge, rows, world)


def same_samples(given: Tensor, losses: LossTap | None) -> Tensor:
    """The reference's losses; raises ``ValueError`` if they are not as many as the model's."""
    own = None if losses is None else losses.values
    if own is not None and given.shape != own.shape:
        raise ValueError(
            f"the reference's `sample_losses` returned shape {tuple(given.shape)}, the model's {tuple(own.shape)}; "
            "both must give one loss for each of the same samples."
        )
    return given
