"""The choice of a run's weighting, and the check of what it returns."""

import inspect
from dataclasses import fields

from torch import Tensor

from lightning_mimic.errors import MimicError
from lightning_mimic.scorers.declarations import describe, validate_needs
from lightning_mimic.scorers.products import MakesWeights, Scorer
from lightning_mimic.scorers.weighting import BatchWeights, ShareWeighting, SoftmaxWeighting, Weighting


def choose_weighting(
    scorer: Scorer,
    weighting: Weighting | None = None,
    temperature: float | None = None,
    min_ess: float | None = None,
) -> Weighting:
    """Return the weighting of a run: the given one, the scorer's own weights, or a softmax of its scores.

    Args:
        scorer: The scorer whose scores are weighted.
        weighting: A weighting, instead of the softmax.
        temperature: τ of the softmax; its default, if ``None``.
        min_ess: The softmax's floor; its default, if ``None``.

    Raises:
        MimicError: A setting out of its range, something that is no :class:`Weighting`, or settings that contradict
            each other.

    Example:
        >>> from lightning_mimic.scorers import MimicScore
        >>> choose_weighting(MimicScore(), temperature=0.5).temperature
        0.5
        >>> choose_weighting(MimicScore(), SoftmaxWeighting(), temperature=0.5)
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `temperature` is 0.5, but `weighting` is given; leave it out, or give
        `weighting=SoftmaxWeighting(temperature=0.5)` alone.
    """
    settings = {"temperature": temperature, "min_ess": min_ess}
    given = {name: value for name, value in settings.items() if value is not None}
    name = type(scorer).__name__
    if weighting is None:
        if not isinstance(scorer, MakesWeights):
            return SoftmaxWeighting(**given)
        for setting, value in given.items():
            raise MimicError(
                f"`{setting}` is {value!r}, but {name} makes weights itself, without a softmax; leave it out (in a "
                "configuration: null)."
            )
        return ShareWeighting(scorer.weigh)
    validate_needs(weighting, "weighting")
    if isinstance(scorer, MakesWeights):
        raise MimicError(
            f"`weighting` is given, but {name} makes weights itself by its method `weigh`; leave `weighting` out, or "
            "take another scorer."
        )
    for setting, value in given.items():
        raise MimicError(
            f"`{setting}` is {value!r}, but `weighting` is given; leave it out, or give "
            f"`weighting=SoftmaxWeighting({setting}={value!r})` alone."
        )
    try:
        inspect.signature(weighting).bind(None, None, valid=None, uniform=None)
    except TypeError as error:
        raise MimicError(
            f"`weighting`: {type(weighting).__name__} cannot be called as weighting(scores, products, valid=..., "
            f"uniform=...): {error}."
        ) from error
    return weighting


def validate_weights(weighting: object, weights: object, rows: int) -> BatchWeights:
    """Return what a weighting returned, if it is one weight per row with all statistics.

    Looks at types and shapes, never at values: there is no host sync.

    Args:
        weighting: The weighting, for the message.
        weights: Its return value.
        rows: B.

    Raises:
        MimicError: The return value is no :class:`BatchWeights`, or a field has another shape.

    Example:
        >>> import torch
        >>> validate_weights(SoftmaxWeighting(), torch.ones(2), rows=2)
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: SoftmaxWeighting returned a torch.float32 tensor of shape (2,) on cpu;
        expected BatchWeights, as `normalised_weights(raw, scores, valid=valid, uniform=uniform)` returns them.
    """
    name = type(weighting).__name__
    if not isinstance(weights, BatchWeights):
        raise MimicError(
            f"{name} returned {describe(weights)}; expected BatchWeights, as `normalised_weights(raw, scores, "
            "valid=valid, uniform=uniform)` returns them."
        )
    for field in fields(weights):
        value, shape = getattr(weights, field.name), (rows,) if field.name in ("weights", "scale") else ()
        if field.name == "temperature" and value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != shape:
            raise MimicError(
                f"{name} returned BatchWeights whose `{field.name}` is {describe(value)}; expected a tensor of shape "
                f"{shape}."
            )
    return weights
