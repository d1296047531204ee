"""Checks of what scorers and weightings declare and return."""

from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.scorers.products import NEEDS, Need, Products


def validate_needs(reader: object, argument: str = "scorer") -> frozenset[Need]:
    """Return the products that a scorer or a weighting declares, checked before training.

    Args:
        reader: An object with ``needs`` that is called with products.
        argument: The argument it was given as, for the message.

    Raises:
        MimicError: It is a class instead of an object, cannot be called, declares nothing, or declares an unknown
            product; the message has the nearest names.

    Example:
        >>> class Typo:
        ...     needs = frozenset({"dots"})
        ...
        ...     def __call__(self, products):
        ...         return -products.dot
        >>> validate_needs(Typo())
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `scorer`: Typo declares 'dots' in its `needs`, which is no product; nearest:
        'dot', 'outputs', 'norms', 'losses'.
    """
    if isinstance(reader, type):
        raise MimicError(f"`{argument}` is the class {reader.__name__}; expected an object: {reader.__name__}(...).")
    name = type(reader).__name__
    if not callable(reader):
        raise MimicError(f"`{argument}` is {reader!r}, which cannot be called; expected an object with `__call__`.")
    declared = getattr(reader, "needs", None)
    if not isinstance(declared, AbstractSet):
        found = "has no `needs`" if declared is None else f"has `needs` of type {type(declared).__name__}"
        raise MimicError(
            f"`{argument}`: {name} {found}; expected a frozenset of the products it reads, of "
            f"{', '.join(map(repr, NEEDS))}, such as frozenset({{'dot'}})."
        )
    for need in sorted(declared, key=str):
        if need not in NEEDS:
            raise MimicError(
                f"`{argument}`: {name} declares {need!r} in its `needs`, which is no product; "
                f"{nearest_names(str(need), NEEDS)}."
            )
    return frozenset(declared)


def validate_scores(scorer: object, scores: object, products: Products) -> Tensor:
    """Return what a scorer returned, detached and in float32 or higher, if it is one score per sample.

    Looks at type, shape, dtype and device, never at values: there is no host sync.

    Args:
        scorer: The scorer, for the message.
        scores: Its return value.
        products: The products it was called with.

    Raises:
        MimicError: The return value is not a floating-point tensor of shape ``(B,)`` on the samples' device.

    Example:
        >>> from lightning_mimic.scorers import Uniform
        >>> validate_scores(Uniform(), torch.zeros(2, 1), Products(torch.zeros(2)))
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: Uniform returned a torch.float32 tensor of shape (2, 1) on cpu; expected a
        floating-point tensor of shape (2,) on cpu, one score per sample.
    """
    samples = products.samples
    if (
        not isinstance(scores, Tensor)
        or scores.shape != samples.shape
        or not scores.is_floating_point()
        or scores.device != samples.device
    ):
        raise MimicError(
            f"{type(scorer).__name__} returned {describe(scores)}; expected a floating-point tensor of shape "
            f"{tuple(samples.shape)} on {samples.device}, one score per sample."
        )
    return scores.detach().to(torch.promote_types(scores.dtype, torch.float32))


def describe(value: object) -> str:
    """Return a phrase for an error message that describes a value by its type, shape, dtype and device.

    Example:
        >>> describe(torch.zeros(2, dtype=torch.int64)), describe([0.5])
        ('a torch.int64 tensor of shape (2,) on cpu', 'a list')
    """
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
