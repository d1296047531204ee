"""Weightings: from scores to weights that sum to 1 over the micro-batch of all ranks."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_mimic.distributed import stack_over_ranks
from lightning_mimic.errors import MimicError
from lightning_mimic.scorers.declarations import describe, validate_needs
from lightning_mimic.scorers.products import MakesWeights, Need, Products, Scorer

# Temperatures that are tried when the floor is broken: τ·2^(k/8), then infinity (uniform weights).
_STEPS_PER_DOUBLING = 8
_DOUBLINGS = 24

#: τ of the softmax: a number, or ``"auto"`` for one per batch.
Temperature = float | Literal["auto"]

# Samples after which the running share of positive scores has forgotten all but 1/e, and the shares that it may give.
_REMEMBERED = 2000
_LOWEST_SHARE, _HIGHEST_SHARE = 0.1, 0.95
# Automatic temperatures lie between 2^-24 and 2^12 times the range of the batch's scores, and are found in two looks at
# 64 each. From 2.2 times the range on, every batch has an effective sample size of 0.95 of its rows.
_LOOKS = 64
_LOWEST_DOUBLING, _HIGHEST_DOUBLING = -24, 12


@dataclass(frozen=True)
class BatchWeights:
    """The weights of one micro-batch and their statistics; all tensors on the scores' device.

    Attributes:
        weights: Shape ``(B,)`` for this rank's rows; over all ranks they sum to 1, or are all 0. 0 for invalid rows.
        scale: Shape ``(B,)``; a row of the local mean's gradient times this is its share in ``Σ wᵢ gᵢ``
            after ranks are averaged. 1 for invalid rows, and everywhere when no row is valid.
        ess: Effective sample size ``1/Σw²``, a scalar between 1 and the number of valid rows; 0 where all weights
            are 0.
        temperature: The temperature used, a scalar; ``inf`` where the floor requires uniform weights, ``None`` where
            there is no softmax.
        batch_size: Rows of all ranks, invalid ones included; an integer scalar.
        counted: Valid rows of all ranks; an integer scalar.
        score_mean: Mean score over the valid rows of all ranks.
        negative_share: Share of those rows with a negative score.
    """

    weights: Tensor
    scale: Tensor
    ess: Tensor
    temperature: Tensor | None
    batch_size: Tensor
    counted: Tensor
    score_mean: Tensor
    negative_share: Tensor


class Weighting(Protocol):
    """Makes weights of the scores of a micro-batch, and of the products it declares.

    To write your own, compute a weight of 0 or more for each row and let :func:`normalised_weights` do the rest.

    Example:
        A weighting by the probability that the reference gives to the label:

        >>> class LabelPosterior:
        ...     needs = frozenset({"reference_losses"})
        ...
        ...     def __call__(self, scores, products=None, *, valid=None, uniform=None):
        ...         probability = torch.exp(-products.reference_losses)
        ...         return normalised_weights(probability, scores, valid=valid, uniform=uniform)
        >>> losses = -torch.log(torch.tensor([0.9, 0.3]))
        >>> LabelPosterior()(torch.zeros(2), Products(losses, reference_losses=losses)).weights
        tensor([0.7500, 0.2500])
    """

    @property
    def needs(self) -> frozenset[Need]:
        """The products that :meth:`__call__` reads."""

    def __call__(
        self,
        scores: Tensor,
        products: Products | None = None,
        *,
        valid: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> BatchWeights:
        """Return the weights of this rank's rows.

        Args:
            scores: Shape ``(B,)``; B may differ between ranks.
            products: The products of the micro-batch, restricted to :attr:`needs`.
            valid: Boolean, shape ``(B,)``: rows that take part; the others may hold any value. All, if
                left out.
            uniform: Boolean scalar, the same on all ranks: the scores carry no information, so that all valid rows get
                the same weight.
        """


@runtime_checkable
class KeepsState(Protocol):
    """A weighting that keeps something over the batches of a run."""

    def for_run(self) -> "RunWeighting":
        """Return a weighting of the same settings for one run, which has seen no batch yet."""


class RunWeighting(Weighting, Protocol):
    """A weighting of one run, whose state is saved with the run's."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, the same on all ranks; empty before the first batch."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of another run's weighting."""


class SoftmaxWeighting:
    """``wᵢ = exp(mᵢ/τ) / Σⱼ exp(mⱼ/τ)`` over the micro-batch of all ranks together.

    Ranks exchange one small tensor (log-sum-exps and counts; three with an automatic temperature), never their scores;
    uneven ranks are exact.

    With ``temperature="auto"``, τ is chosen for each micro-batch, up or down, so that the effective sample size is the
    share of good samples among about the last 2,000 of all ranks: the mean of the probabilities that their labels are
    right, where the target is a last layer under cross-entropy, and otherwise the share of positive scores. It is kept
    between 0.1, or ``min_ess``, and 0.95. The unit of the score has no effect. A batch of few valid rows, or with equal
    scores at its top, may have a larger effective sample size, and none has less.

    Args:
        temperature: τ, in the unit of the score; smaller trusts the scores more. Or ``"auto"``.
        min_ess: Floor on the effective sample size, as a fraction of the valid rows, 0 to 1; τ is raised
            for a batch that would fall below it (in steps of 9 %). 0: no floor; 1: uniform weights.

    Raises:
        MimicError: τ neither a positive finite number nor ``"auto"``, or ``min_ess`` outside 0 to 1.

    Example:
        >>> SoftmaxWeighting(temperature=1.0, min_ess=0.0)(torch.tensor([0.0, math.log(3.0)])).weights
        tensor([0.2500, 0.7500])
        >>> SoftmaxWeighting("auto")(torch.tensor([0.2, 0.1, -0.1, -0.3])).ess  # half of the scores are positive
        tensor(2.0029)
    """

    needs: frozenset[Need] = frozenset()
    #: Products that are read where they are known.
    optional: frozenset[Need] = frozenset({"posteriors"})

    def __init__(self, temperature: Temperature = 1.0, min_ess: float = 0.25) -> None:
        is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not (temperature == "auto" or (is_number and math.isfinite(temperature) and temperature > 0)):
            raise MimicError(f"`temperature` must be a positive finite number or 'auto', not {temperature!r}.")
        if not (isinstance(min_ess, int | float) and 0 <= min_ess <= 1):
            raise MimicError(f"`min_ess` is a fraction of the batch between 0 and 1, not {min_ess!r}.")
        self.temperature: Temperature = "auto" if temperature == "auto" else float(temperature)
        self.min_ess = float(min_ess)
        # Good samples and valid rows so far, the older the less; None before the first batch.
        self._seen: Tensor | None = None

    def for_run(self) -> "SoftmaxWeighting":
        """Return a weighting of the same settings that has seen no batch."""
        fresh = copy.copy(self)
        fresh._seen = None
        return fresh

    def state_dict(self) -> dict[str, Any]:
        """Return what an automatic temperature needs to continue; empty with a fixed one."""
        return {} if self._seen is None else {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; an empty one, as of a run with a fixed temperature, begins anew.

        Raises:
            MimicError: It is none of :meth:`state_dict`.
        """
        seen = state.get("seen") if isinstance(state, Mapping) else state
        is_right = isinstance(seen, Tensor) and seen.shape == (2,) and bool((torch.isfinite(seen) & (seen >= 0)).all())
        if seen is not None and not is_right:
            raise MimicError(
                f"the state of the weighting is damaged: `seen` is {seen!r}; expected the numbers of good samples and "
                "of all, a tensor of shape (2,). Take another checkpoint."
            )
        self._seen = seen

    @torch.no_grad()
    def __call__(
        self,
        scores: Tensor,
        products: Products | None = None,
        *,
        valid: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> BatchWeights:
        """Return the weights of this rank's rows; see :class:`Weighting`."""
        valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
        scores = scores if uniform is None else torch.where(uniform, torch.zeros_like(scores), scores)
        scores = torch.where(valid, scores, torch.zeros_like(scores))
        if self.min_ess == 1:
            return _softmax(scores, valid, scores.new_full((1,), torch.inf), 1.0)[0]
        if self.temperature != "auto":
            return _softmax(scores, valid, self._temperatures(scores, self.temperature), self.min_ess)[0]
        posteriors = None if products is None else products.find("posteriors")
        good = (scores > 0).to(scores.dtype)
        if posteriors is not None:
            good = torch.where(torch.isnan(posteriors), good, posteriors.to(scores.dtype))
        spread, share = self._look(scores, good, valid, uniform)
        doublings = torch.linspace(
            _LOWEST_DOUBLING, _HIGHEST_DOUBLING, _LOOKS, device=scores.device, dtype=scores.dtype
        )
        coarse = torch.cat([spread * torch.exp2(doublings), scores.new_full((1,), torch.inf)])
        _, rung = _softmax(scores, valid, coarse, share)
        high, low = coarse.index_select(0, rung), coarse.index_select(0, (rung - 1).clamp(min=0))
        steps = torch.linspace(0, 1, _LOOKS, device=scores.device, dtype=scores.dtype)
        return _softmax(scores, valid, low * (high / low) ** steps, share)[0]

    def _look(self, scores: Tensor, good: Tensor, valid: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the range of all ranks' scores, and the share of the batch that its effective size shall be.

        Args:
            scores: Shape ``(B,)``.
            good: From 0 to 1, how good each sample is, shape ``(B,)``.
            valid: As for :class:`Weighting`.
            uniform: As for :class:`Weighting`.
        """
        lowest = scores.new_full((1,), -torch.inf)
        ends = [torch.cat([lowest, torch.where(valid, each, -torch.inf)]).amax() for each in (scores, -scores)]
        counts = [torch.where(valid, good, 0.0).sum(), valid.sum(dtype=scores.dtype)]
        ranks = stack_over_ranks(torch.stack([*ends, *counts]))
        top, bottom = ranks[:, :2].amax(0)
        spread = top + bottom
        # Where no row is valid, or all scores are equal, any range will do.
        least = torch.finfo(scores.dtype).tiny * 2.0**-_LOWEST_DOUBLING
        spread = torch.where(spread > least, spread, torch.ones_like(spread))
        here = ranks[:, 2:].sum(0)
        seen = torch.zeros_like(here) if self._seen is None else self._seen.to(here)
        later = seen * torch.exp(-here[1] / _REMEMBERED) + here
        # Scores without information are zero, and no evidence against the samples.
        self._seen = later if uniform is None else torch.where(uniform, seen, later)
        total, samples = self._seen
        share = (total / samples.clamp(min=1)).clamp(_LOWEST_SHARE, _HIGHEST_SHARE)
        return spread, share.clamp(min=self.min_ess)

    def _temperatures(self, scores: Tensor, temperature: float) -> Tensor:
        """τ, and above it what may be needed for the floor; made on the device, which costs no host sync."""
        lowest = max(temperature, torch.finfo(scores.dtype).tiny)
        if self.min_ess == 0:
            return scores.new_full((1,), lowest)
        rungs = torch.arange(_STEPS_PER_DOUBLING * _DOUBLINGS, device=scores.device, dtype=scores.dtype)
        rising = lowest * torch.exp2(rungs / _STEPS_PER_DOUBLING)
        return torch.cat([rising, scores.new_full((1,), torch.inf)])


class ShareWeighting:
    """``wᵢ = rᵢ / Σⱼ rⱼ`` over the micro-batch of all ranks together, of weights that a scorer makes itself.

    Where all of them are 0 so are the weights, and the batch has no gradient; an optimizer may still move by momentum.

    Args:
        weigh: From scores, shape ``(B,)``, to weights before they are divided, 0 or more, of the same shape.

    Example:
        >>> ShareWeighting(lambda scores: scores.clamp(min=0))(torch.tensor([3.0, -5.0, 1.0])).weights
        tensor([0.7500, 0.0000, 0.2500])
    """

    needs: frozenset[Need] = frozenset()

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        self._weigh = weigh

    @torch.no_grad()
    def __call__(
        self,
        scores: Tensor,
        products: Products | None = None,
        *,
        valid: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> BatchWeights:
        """Return the weights of this rank's rows; see :class:`Weighting`."""
        return normalised_weights(self._weigh(scores), scores, valid=valid, uniform=uniform)


class Posterior:
    """Weights in proportion to the probability that the given label is right, by the calibrated reference.

    ``wᵢ = πᵢ / Σⱼ πⱼ`` over the micro-batch of all ranks together, with
    ``π = (1 − r) q_y / ((1 − r) q_y + r (1 − q_y)/(C − 1))``: q is the calibrated reference's softmax and r the
    estimated share of wrong labels, both found while the model trains. Where no label is wrong, or as long as nothing
    is known, the weights are uniform. The scores are those of the scorer, which has no part in the weights.

    Example:
        >>> scores = torch.zeros(2)
        >>> Posterior()(scores, Products(scores, posteriors=torch.tensor([0.9, 0.3]))).weights
        tensor([0.7500, 0.2500])
    """

    needs: frozenset[Need] = frozenset({"posteriors"})

    @torch.no_grad()
    def __call__(
        self,
        scores: Tensor,
        products: Products | None = None,
        *,
        valid: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> BatchWeights:
        """Return the weights of this rank's rows; see :class:`Weighting`."""
        if products is None:
            raise MimicError("Posterior weighs by the product `posteriors`, and was called without products.")
        posteriors = products.posteriors
        known = torch.where(torch.isnan(posteriors), torch.ones_like(posteriors), posteriors)
        # One that rounds to 0 is still a share of its batch: a sample alone has weight 1.
        known = known.clamp(min=1e-30)
        return normalised_weights(known, scores, valid=valid, uniform=uniform)


@torch.no_grad()
def normalised_weights(
    raw: Tensor, scores: Tensor, *, valid: Tensor | None = None, uniform: Tensor | None = None
) -> BatchWeights:
    """Return weights divided by their sum over the valid rows of all ranks, with their statistics.

    Must be called on every rank, which exchange one small tensor. Where all weights are 0 they stay 0. A negative
    weight is an error of the caller, and so that training does not go on unnoticed it makes all weights NaN; it cannot
    be raised without waiting for the device.

    Args:
        raw: Weights before they are divided, 0 or more, shape ``(B,)``; invalid rows may hold any value.
        scores: Scores of the same rows, for the statistics.
        valid: As for :class:`Weighting`.
        uniform: As for :class:`Weighting`.

    Raises:
        MimicError: ``raw`` does not have the scores' shape, or lies on another device.

    Example:
        >>> found = normalised_weights(torch.tensor([3.0, 0.0, 1.0]), scores=torch.tensor([2.0, -1.0, 2.0]))
        >>> found.weights, found.ess, found.score_mean
        (tensor([0.7500, 0.0000, 0.2500]), tensor(1.6000), tensor(1.))
    """
    if not isinstance(raw, Tensor) or raw.shape != scores.shape or raw.device != scores.device:
        raise MimicError(
            f"`raw` is {describe(raw)}; expected weights of 0 or more, a tensor of shape {tuple(scores.shape)} on "
            f"{scores.device}."
        )
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    raw = torch.where(raw < 0, torch.nan, raw.to(scores.dtype))
    if uniform is not None:
        raw = torch.where(uniform, torch.ones_like(raw), raw)
        scores = torch.where(uniform, torch.zeros_like(scores), scores)
    raw, masked_scores = (torch.where(valid, each, torch.zeros_like(each)) for each in (raw, scores))
    ranks = stack_over_ranks(torch.cat([raw.sum()[None], raw.square().sum()[None], _sums(masked_scores, valid)]))
    total, squares = ranks[:, :2].sum(0)
    nonzero = torch.where(total == 0, torch.ones_like(total), total)
    ess = total * (total / torch.where(total == 0, torch.ones_like(squares), squares))
    return _batch_weights(raw / nonzero, valid, ranks[:, 2:], ess, None)


def _softmax(scores: Tensor, valid: Tensor, ladder: Tensor, share: Tensor | float) -> tuple[BatchWeights, Tensor]:
    """Weigh by the first of several temperatures that gives the effective sample size wanted.

    Args:
        scores: Shape ``(B,)``, 0 for invalid rows.
        valid: As for :class:`Weighting`.
        ladder: Temperatures, rising; the effective sample size rises with them.
        share: Wanted effective sample size, as a share of the valid rows of all ranks; reached by the last temperature.

    Returns:
        The weights, and the place of their temperature on the ladder, shape ``(1,)``.
    """
    # Relative to the rank's highest score, then to that of all ranks: large scores lose no digits.
    peak = torch.where(valid, scores, -torch.inf).amax() if len(scores) else scores.new_full((), -torch.inf)
    peak = torch.where(valid.any(), peak, torch.zeros_like(peak))
    logits = torch.where(valid, (scores - peak) / ladder[:, None], -torch.inf)  # (ladder, B)
    sums = _sums(scores, valid)
    ranks = stack_over_ranks(torch.cat([torch.logsumexp(logits, 1), torch.logsumexp(2 * logits, 1), peak[None], sums]))
    first, second, peaks, totals = ranks.split([len(ladder), len(ladder), 1, len(sums)], 1)
    holds = totals[:, 1] > 0  # ranks with valid rows
    top = torch.where(holds, peaks[:, 0], -torch.inf).amax()
    shift = torch.where(holds, peaks[:, 0] - top, torch.zeros_like(top))[:, None] / ladder
    normaliser = torch.logsumexp(first + shift, 0)  # (ladder,)
    ess = torch.exp(2 * normaliser - torch.logsumexp(second + 2 * shift, 0))
    counted = totals[:, 1].sum(0)
    # argmax finds the first True; a hair of tolerance keeps equal scores from climbing for rounding.
    rung = (ess >= share * counted * (1 - 1e-6)).to(torch.int8).argmax(0, keepdim=True)

    def chosen(values: Tensor) -> Tensor:
        return values.index_select(0, rung)[0]  # values[rung] would wait for the device

    offset = torch.where(valid.any(), (peak - top) / chosen(ladder), torch.zeros_like(peak))
    weights = torch.where(valid, torch.exp(chosen(logits) + offset - chosen(normaliser)), torch.zeros_like(scores))
    return _batch_weights(weights, valid, totals, chosen(ess), chosen(ladder)), rung


def _sums(masked_scores: Tensor, valid: Tensor) -> Tensor:
    """Return this rank's rows, valid rows, and the sum and number of negatives of their scores."""
    sums = [torch.ones_like(masked_scores), valid, masked_scores, valid & (masked_scores < 0)]
    return torch.stack([each.sum(dtype=masked_scores.dtype) for each in sums])


def _batch_weights(
    weights: Tensor, valid: Tensor, totals: Tensor, ess: Tensor, temperature: Tensor | None
) -> BatchWeights:
    """Put together this rank's weights and the statistics over all ranks, whose :func:`_sums` are ``totals``."""
    batch_size, counted, score_sum, negatives = totals.sum(0)
    return BatchWeights(
        weights=weights,
        scale=torch.where(valid, weights * (len(weights) * len(totals)), torch.ones_like(weights)),
        ess=ess,
        temperature=temperature,
        batch_size=batch_size.to(torch.int64),
        counted=counted.to(torch.int64),
        score_mean=score_sum / counted,
        negative_share=negatives / counted,
    )


def choose_weighting(
    scorer: Scorer,
    weighting: Weighting | None = None,
    temperature: Temperature | None = None,
    min_ess: float | None = None,
) -> Weighting:
    """Return the weighting of a run: the given one, the scorer's own weights, or a softmax of its scores.

    Args:
        scorer: The scorer whose scores are weighted.
        weighting: A weighting, instead of the softmax.
        temperature: τ of the softmax, or ``"auto"``; its default, if ``None``.
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
    settings: dict[str, Any] = {"temperature": temperature, "min_ess": min_ess}
    given = {name: value for name, value in settings.items() if value is not None}
    name = type(scorer).__name__
    if weighting is None:
        if not isinstance(scorer, MakesWeights):
            return _with_sign(SoftmaxWeighting(**given), scorer)
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
    return _with_sign(weighting, scorer)


def _with_sign(weighting: Weighting, scorer: Scorer) -> Weighting:
    """Return the weighting, unless it reads more from the sign of the scores than that holds."""
    automatic = isinstance(weighting, SoftmaxWeighting) and weighting.temperature == "auto"
    if automatic and not getattr(scorer, "signed", True):
        raise MimicError(
            f"`temperature` is 'auto', which takes the share of positive scores for that of good samples, but the sign "
            f"of {type(scorer).__name__}'s scores does not tell good from bad samples; give a number."
        )
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
