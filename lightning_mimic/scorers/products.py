"""The products that scorers and weightings read, and the protocols of scorers."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Literal, NoReturn, Protocol, get_args, runtime_checkable

from torch import Tensor

from lightning_mimic.errors import MimicError, nearest_names

#: A product that a scorer or a weighting may need: three products with per-sample gradients, two kinds of loss, and
#: what is known of a last linear layer under cross-entropy.
Need = Literal[
    "dot",
    "norms",
    "gram",
    "losses",
    "reference_losses",
    "outputs",
    "reference_outputs",
    "labels",
    "calibrated_outputs",
    "posteriors",
]
#: All products that can be declared.
NEEDS: tuple[Need, ...] = get_args(Need)
#: Those of a last linear layer whose outputs are the logits of a cross-entropy.
HEAD_NEEDS: frozenset[Need] = frozenset({"outputs", "reference_outputs", "labels", "calibrated_outputs", "posteriors"})
#: Those that come from the weights of a reference.
WEIGHT_NEEDS: frozenset[Need] = frozenset({"dot", "reference_outputs", "calibrated_outputs", "posteriors"})

# Fields that come with a declared product.
_COMPANIONS = {
    "direction_norm": "dot",
    "own": "gram",
    "output_gradients": "outputs",
    "calibrated_norm": "calibrated_outputs",
    "calibrated_direction_norm": "calibrated_outputs",
}
_OPTIONAL = (
    "dot",
    "direction_norm",
    "norms",
    "gram",
    "own",
    "losses",
    "reference_losses",
    "outputs",
    "output_gradients",
    "reference_outputs",
    "labels",
    "calibrated_outputs",
    "calibrated_norm",
    "calibrated_direction_norm",
    "posteriors",
)


class Products:
    """The products with one micro-batch's per-sample gradients, and its losses; read-only.

    A field that was not given raises :class:`~lightning_mimic.errors.MimicError` when it is read.

    Args:
        samples: A tensor of shape ``(B,)`` for its shape, dtype and device; values have no meaning.
        dot: ``⟨gᵢ, v⟩`` with the direction to the reference, or against the gradient of a reference batch, shape
            ``(B,)``.
        direction_norm: ``‖v‖``, a scalar; comes with ``dot``.
        norms: ``‖gᵢ‖`` over the chosen parameters, shape ``(B,)``.
        gram: ``⟨gᵢ, gⱼ⟩`` between the samples of all ranks, shape ``(N, N)``; NaN in the row and the column of a sample
            that does not count.
        own: The slice of these N that holds this rank's B; comes with ``gram``.
        losses: The model's unreduced losses, shape ``(B,)``.
        reference_losses: The reference's losses on the same samples and labels, shape ``(B,)``.
        outputs: The logits of the target layer, shape ``(B, C)``.
        output_gradients: ``∂ℓᵢ/∂outputs``, shape ``(B, C)``; comes with ``outputs``.
        reference_outputs: The logits of the reference's layer on the same features, shape ``(B, C)``.
        labels: Given classes, shape ``(B,)``; −1 where a row is not of a cross-entropy with one class.
        calibrated_outputs: Logits of the calibrated reference, shape ``(B, C)``.
        calibrated_norm: Length of its weights and biases, a scalar; comes with ``calibrated_outputs``.
        calibrated_direction_norm: Length of the direction to them, a scalar; comes with ``calibrated_outputs``.
        posteriors: Probability that the given label is right, by the calibrated reference, shape ``(B,)``; NaN where it
            is not known.

    Example:
        >>> import torch
        >>> products = Products(torch.zeros(2), losses=torch.tensor([0.5, 2.0]))
        >>> products.losses
        tensor([0.5000, 2.0000])
        >>> products.dot
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `dot` is not among these products; they hold `losses`.
    """

    samples: Tensor
    dot: Tensor
    direction_norm: Tensor
    norms: Tensor
    gram: Tensor
    own: slice
    losses: Tensor
    reference_losses: Tensor
    outputs: Tensor
    output_gradients: Tensor
    reference_outputs: Tensor
    labels: Tensor
    calibrated_outputs: Tensor
    calibrated_norm: Tensor
    calibrated_direction_norm: Tensor
    posteriors: Tensor

    def __init__(
        self,
        samples: Tensor,
        *,
        dot: Tensor | None = None,
        direction_norm: Tensor | None = None,
        norms: Tensor | None = None,
        gram: Tensor | None = None,
        own: slice | None = None,
        losses: Tensor | None = None,
        reference_losses: Tensor | None = None,
        outputs: Tensor | None = None,
        output_gradients: Tensor | None = None,
        reference_outputs: Tensor | None = None,
        labels: Tensor | None = None,
        calibrated_outputs: Tensor | None = None,
        calibrated_norm: Tensor | None = None,
        calibrated_direction_norm: Tensor | None = None,
        posteriors: Tensor | None = None,
    ) -> None:
        of_gradients = (dot, direction_norm, norms, gram, own)
        of_head = (outputs, output_gradients, reference_outputs, labels)
        of_calibration = (calibrated_outputs, calibrated_norm, calibrated_direction_norm, posteriors)
        values = (*of_gradients, losses, reference_losses, *of_head, *of_calibration)
        given = {name: value for name, value in zip(_OPTIONAL, values, strict=True) if value is not None}
        # Past __setattr__; what is absent falls through to __getattr__.
        vars(self).update(given, samples=samples, _reader=None, _needs=frozenset())

    def for_reader(self, reader: object) -> "Products":
        """Return the same products, restricted to what a scorer or a weighting declares.

        Reading any other raises an error that names the reader and the fix. ``direction_norm`` comes with ``dot``, and
        ``own`` with ``gram``; ``samples`` needs no declaration.

        Args:
            reader: An object with ``needs``.

        Example:
            >>> import torch
            >>> from lightning_mimic.scorers import GradNorm
            >>> ones = torch.ones(2)
            >>> Products(ones, norms=ones, losses=ones).for_reader(GradNorm()).losses
            Traceback (most recent call last):
            ...
            lightning_mimic.errors.MimicError: GradNorm reads `losses`, which it does not declare; add it to its
            `needs`.
        """
        needs: frozenset[Need] = reader.needs | getattr(reader, "optional", frozenset())  # type: ignore[attr-defined]
        mine = vars(self)
        view = Products(self.samples, **{n: mine[n] for n in _OPTIONAL if n in mine and _COMPANIONS.get(n, n) in needs})
        vars(view).update(_reader=type(reader).__name__, _needs=frozenset(needs))
        return view

    def find(self, name: Need) -> Tensor | None:
        """Return a product that its reader names in ``optional``; ``None`` where it is not known."""
        found: Tensor | None = vars(self).get(name)
        return found

    def __getattr__(self, name: str) -> NoReturn:
        if name not in _OPTIONAL:
            hint = "" if name.startswith("_") else f"; {nearest_names(name, ('samples', *_OPTIONAL))}"
            raise AttributeError(f"Products has no field {name!r}{hint}")
        mine = vars(self)
        product = _COMPANIONS.get(name, name)
        if mine["_reader"] is not None and product not in mine["_needs"]:
            comes = (
                "which it does not declare; add it" if product == name else f"which comes with `{product}`; add that"
            )
            raise MimicError(f"{mine['_reader']} reads `{name}`, {comes} to its `needs`.")
        held = [f"`{field}`" for field in _OPTIONAL if field in mine]
        raise MimicError(f"`{name}` is not among these products; they hold {', '.join(held) or 'none'}.")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Products are read-only; {name!r} cannot be set.")

    def __repr__(self) -> str:
        held = (f"{name}={vars(self)[name]!r}" for name in ("samples", *_OPTIONAL) if name in vars(self))
        return f"Products({', '.join(held)})"


class Scorer(Protocol):
    """A formula from products to one score per sample; the higher the score, the more weight.

    To write your own, declare the products it reads and return a floating-point tensor of shape ``(B,)``. Give it
    ``signed = False`` if positive scores do not mean good samples: an automatic temperature is refused then.

    Example:
        >>> import torch
        >>> class LossGap:
        ...     needs = frozenset({"losses", "reference_losses"})
        ...
        ...     def __call__(self, products: Products) -> Tensor:
        ...         return products.losses - products.reference_losses
        >>> LossGap()(Products(torch.zeros(1), losses=torch.tensor([3.0]), reference_losses=torch.tensor([1.0])))
        tensor([2.])
    """

    @property
    def needs(self) -> frozenset[Need]:
        """The products that :meth:`__call__` reads."""

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``."""


@runtime_checkable
class MakesWeights(Protocol):
    """A scorer that makes weights of its scores itself, in place of the softmax."""

    def weigh(self, scores: Tensor) -> Tensor:
        """Return weights before they are divided by their sum over all ranks, 0 or more, shape ``(B,)``.

        Args:
            scores: The scorer's scores; invalid rows may hold any value.
        """


@runtime_checkable
class UsesLoader(Protocol):
    """A scorer whose direction is a descent step on a reference batch, instead of the one towards a reference."""

    @property
    def loader(self) -> Iterable[Any]:
        """Reference batches, as the module's ``sample_losses`` takes them; iterated over again and again."""


def validate_loader(loader: Iterable[Any], scorer: str) -> Iterable[Any]:
    """Return the loader, checked that it can serve for a whole training.

    Args:
        loader: The loader of a :class:`UsesLoader`.
        scorer: The scorer's name, for the message.

    Raises:
        MimicError: It is empty, can be iterated over only once, or not at all.

    Example:
        >>> validate_loader([], "Agra")
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
