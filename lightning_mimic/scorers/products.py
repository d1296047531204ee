"""What scorers are formulas of: products with per-sample gradients, and losses."""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

#: What a scorer may need: products that a holder of per-sample gradients declares, and two kinds of loss.
Need = Literal["dot", "norms", "losses", "reference_losses"]


@dataclass(frozen=True)
class Products:
    """What is known of a micro-batch; ``None`` for what the scorer did not ask for.

    Attributes:
        samples: A tensor of shape ``(B,)`` for its shape, dtype and device; values have no meaning.
        dot: ``⟨gᵢ, v⟩`` with the direction to the reference, shape ``(B,)``.
        direction_norm: ``‖v‖``, a scalar; comes with ``dot``.
        norms: ``‖gᵢ‖`` over the chosen parameters, shape ``(B,)``.
        losses: The model's unreduced losses, shape ``(B,)``.
        reference_losses: The reference's losses on the same samples and labels, shape ``(B,)``.
    """

    samples: Tensor
    dot: Tensor | None = None
    direction_norm: Tensor | None = None
    norms: Tensor | None = None
    losses: Tensor | None = None
    reference_losses: Tensor | None = None


class Scorer(Protocol):
    """A formula from products to one score per sample; the higher, the more weight.

    To write your own: declare what it needs and return a tensor of shape ``(B,)``.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """The products that :meth:`__call__` reads."""

    def __call__(self, products: Products) -> Tensor:
        """The scores, shape ``(B,)``."""
