"""What scorers are formulas of: products with per-sample gradients, and losses."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from lightning_mimic.errors import MimicError

#: What a scorer may need: products that a holder of per-sample gradients declares, and two kinds of loss.
Need = Literal["dot", "norms", "gram", "losses", "reference_losses"]


@dataclass(frozen=True)
class Products:
    """What is known of a micro-batch; ``None`` for what the scorer did not ask for.

    Attributes:
        samples: A tensor of shape ``(B,)`` for its shape, dtype and device; values have no meaning.
        dot: ``⟨gᵢ, v⟩`` with the direction to the reference, or against the gradient of a second batch, shape
            ``(B,)``.
        direction_norm: ``‖v‖``, a scalar; comes with ``dot``.
        norms: ``‖gᵢ‖`` over the chosen parameters, shape ``(B,)``.
        gram: ``⟨gᵢ, gⱼ⟩`` between the samples of all ranks, shape ``(N, N)``; NaN in the row and the column of a sample
            that does not count.
        own: Which of these N are this rank's B; comes with ``gram``.
        losses: The model's unreduced losses, shape ``(B,)``.
        reference_losses: The reference's losses on the same samples and labels, shape ``(B,)``.
    """

    samples: Tensor
    dot: Tensor | None = None
    direction_norm: Tensor | None = None
    norms: Tensor | None = None
    gram: Tensor | None = None
    own: slice | None = None
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


@runtime_checkable
class Weighs(Protocol):
    """A scorer that makes weights of its scores itself, in place of the softmax."""

    def weigh(self, scores: Tensor) -> Tensor:
        """Weights before they are divided by their sum over all ranks, 0 or more, shape ``(B,)``.

        Args:
            scores: What the scorer returned; anything may stand where a sample does not count.
        """


@runtime_checkable
class Compares(Protocol):
    """A scorer whose direction is where a step on a second batch would lead, instead of where a reference stands."""

    @property
    def loader(self) -> Iterable[Any]:
        """Second batches, as the module's ``sample_losses`` takes them; begun again at its end."""


def second_batches(loader: Iterable[Any], scorer: str) -> Iterable[Any]:
    """Gives the loader back if it can serve for a whole training.

    Args:
        loader: As a :class:`Compares` gets it.
        scorer: Its name, for the message.

    Raises:
        ValueError: It holds nothing, can be gone through only once, or not at all.

    Example:
        >>> second_batches([], "Agra")
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `loader` of Agra is empty; expected at least one batch.
    """
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")) or isinstance(loader, str | dict | Tensor):
        raise MimicError(
            f"`loader` of {scorer} is a {type(loader).__name__}; expected an iterable of batches, such as a DataLoader."
        )
    if isinstance(loader, Iterator):
        raise MimicError(
            f"`loader` of {scorer} is a {type(loader).__name__}, which ends once and for all; expected what can be "
            "begun again, such as a DataLoader or a list of batches."
        )
    try:
        empty = isinstance(loader, Sized) and not len(loader)
    except TypeError:  # a DataLoader of a stream, which does not know
        empty = False
    if empty:
        raise MimicError(f"`loader` of {scorer} is empty; expected at least one batch.")
    return loader
