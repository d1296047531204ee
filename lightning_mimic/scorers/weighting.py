"""From scores to weights that sum to 1 over the micro-batch of all ranks: a softmax, or a scorer's own shares."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_mimic.distributed import stack_over_ranks
from lightning_mimic.errors import MimicError
from lightning_mimic.scorers.products import Scorer, Weighs

# Temperatures that are tried when the floor is broken: τ·2^(k/8), then infinity (uniform weights).
_STEPS_PER_DOUBLING = 8
_DOUBLINGS = 24


@dataclass(frozen=True)
class BatchWeights:
    """The weights of one micro-batch and what they say; all tensors on the scores' device.

    Attributes:
        weights: Shape ``(B,)`` for this rank's rows; over all ranks they sum to 1, or are all 0. 0 for rows left out.
        scale: Shape ``(B,)``; a row of the local mean's gradient times this is its share in ``Σ wᵢ gᵢ``
            after ranks are averaged. 1 for rows left out, and everywhere when no row counts.
        ess: Effective sample size ``1/Σw²``, a scalar between 1 and the number of rows that count; 0 where all weights
            are 0.
        temperature: The temperature used, a scalar; ``inf`` where the floor asks for uniform weights, ``None`` where
            there is no softmax.
        batch_size: Rows of all ranks, those left out included; an integer scalar.
        counted: Rows of all ranks that count.
        score_mean: Mean score over the rows that count, of all ranks.
        misaligned: Share of those rows with a negative score.
    """

    weights: Tensor
    scale: Tensor
    ess: Tensor
    temperature: Tensor | None
    batch_size: Tensor
    counted: Tensor
    score_mean: Tensor
    misaligned: Tensor


class Weighting(Protocol):
    """Makes weights of the scores of a micro-batch."""

    @property
    def temperature(self) -> float | None:
        """τ of a softmax; ``None`` where there is none."""

    @property
    def min_ess(self) -> float | None:
        """The floor on a softmax's effective sample size; ``None`` where there is no softmax."""

    def __call__(self, scores: Tensor, counts: Tensor | None = None, alike: Tensor | None = None) -> BatchWeights:
        """The weights of this rank's rows.

        Args:
            scores: Shape ``(B,)``; B may differ between ranks.
            counts: Boolean, shape ``(B,)``: rows that take part; the others may hold any value. All, if
                left out.
            alike: Boolean scalar, the same on all ranks: the scores say nothing, all rows that count weigh the same.
        """


class SoftmaxWeighting:
    """``wᵢ = exp(mᵢ/τ) / Σⱼ exp(mⱼ/τ)`` over the micro-batch of all ranks together.

    Ranks exchange one small tensor (log-sum-exps and counts), never their scores; uneven ranks are exact.

    Args:
        temperature: τ, in the unit of the score; smaller trusts the scores more.
        min_ess: Floor on the effective sample size, as a fraction of the rows that count, 0 to 1; τ is raised
            for a batch that would fall below it (in steps of 9 %). 0: no floor; 1: uniform weights.

    Raises:
        MimicError: τ not a positive finite number, or ``min_ess`` outside 0 to 1.

    Example:
        >>> SoftmaxWeighting(temperature=1.0, min_ess=0.0)(torch.tensor([0.0, math.log(3.0)])).weights
        tensor([0.2500, 0.7500])
    """

    def __init__(self, temperature: float = 1.0, min_ess: float = 0.25) -> None:
        if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0):
            raise MimicError(f"`temperature` must be a positive finite number, not {temperature!r}.")
        if not (isinstance(min_ess, int | float) and 0 <= min_ess <= 1):
            raise MimicError(f"`min_ess` is a fraction of the batch between 0 and 1, not {min_ess!r}.")
        self.temperature = float(temperature)
        self.min_ess = float(min_ess)

    @torch.no_grad()
    def __call__(self, scores: Tensor, counts: Tensor | None = None, alike: Tensor | None = None) -> BatchWeights:
        """The weights of this rank's rows; see :class:`Weighting`."""
        counts = torch.ones_like(scores, dtype=torch.bool) if counts is None else counts
        scores = scores if alike is None else torch.where(alike, torch.zeros_like(scores), scores)
        known = torch.where(counts, scores, torch.zeros_like(scores))
        ladder = self._temperatures(scores)
        # Relative to the rank's highest score, then to that of all ranks: large scores lose no digits.
        peak = torch.where(counts, scores, -torch.inf).amax() if len(scores) else scores.new_full((), -torch.inf)
        peak = torch.where(counts.any(), peak, torch.zeros_like(peak))
        logits = torch.where(counts, (known - peak) / ladder[:, None], -torch.inf)  # (ladder, B)
        sums = _sums(known, counts)
        ranks = stack_over_ranks(
            torch.cat([torch.logsumexp(logits, 1), torch.logsumexp(2 * logits, 1), peak[None], sums])
        )
        first, second, peaks, totals = ranks.split([len(ladder), len(ladder), 1, len(sums)], 1)
        holds = totals[:, 1] > 0  # ranks with rows that count
        top = torch.where(holds, peaks[:, 0], -torch.inf).amax()
        shift = torch.where(holds, peaks[:, 0] - top, torch.zeros_like(top))[:, None] / ladder
        normaliser = torch.logsumexp(first + shift, 0)  # (ladder,)
        ess = torch.exp(2 * normaliser - torch.logsumexp(second + 2 * shift, 0))
        counted = totals[:, 1].sum(0)
        # argmax finds the first True; a hair of tolerance keeps equal scores from climbing for rounding.
        rung = (ess >= self.min_ess * counted * (1 - 1e-6)).to(torch.int8).argmax(0, keepdim=True)

        def chosen(values: Tensor) -> Tensor:
            return values.index_select(0, rung)[0]  # values[rung] would wait for the device

        own = torch.where(counts.any(), (peak - top) / chosen(ladder), torch.zeros_like(peak))
        weights = torch.where(counts, torch.exp(chosen(logits) + own - chosen(normaliser)), torch.zeros_like(scores))
        return _weighed(weights, counts, totals, chosen(ess), chosen(ladder))

    def _temperatures(self, scores: Tensor) -> Tensor:
        """τ, and above it what may be needed for the floor; made on the device, which costs no host sync."""
        lowest = max(self.temperature, torch.finfo(scores.dtype).tiny)
        if self.min_ess == 0:
            return scores.new_full((1,), lowest)
        if self.min_ess == 1:
            return scores.new_full((1,), torch.inf)
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

    temperature = min_ess = None

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        self._weigh = weigh

    @torch.no_grad()
    def __call__(self, scores: Tensor, counts: Tensor | None = None, alike: Tensor | None = None) -> BatchWeights:
        """The weights of this rank's rows; see :class:`Weighting`."""
        counts = torch.ones_like(scores, dtype=torch.bool) if counts is None else counts
        given = self._weigh(scores).to(scores.dtype)
        if alike is not None:
            given = torch.where(alike, torch.ones_like(given), given)
            scores = torch.where(alike, torch.zeros_like(scores), scores)
        given, known = (torch.where(counts, each, torch.zeros_like(each)) for each in (given, scores))
        ranks = stack_over_ranks(torch.cat([given.sum()[None], given.square().sum()[None], _sums(known, counts)]))
        total, squares = ranks[:, :2].sum(0)
        some = torch.where(total > 0, total, torch.ones_like(total))
        ess = total * (total / torch.where(total > 0, squares, torch.ones_like(squares)))
        return _weighed(given / some, counts, ranks[:, 2:], ess, None)


def weighting_of(scorer: Scorer, temperature: float | None = None, min_ess: float | None = None) -> Weighting:
    """The scorer's own weights, or a softmax of its scores.

    Args:
        scorer: Makes the scores.
        temperature: τ of the softmax; its default, if ``None``.
        min_ess: The softmax's floor; its default, if ``None``.

    Raises:
        MimicError: A setting out of its range, or given with a scorer that weighs itself.

    Example:
        >>> from lightning_mimic.scorers import MimicScore
        >>> weighting_of(MimicScore(), temperature=0.5).temperature
        0.5
    """
    settings = {"temperature": temperature, "min_ess": min_ess}
    given = {name: value for name, value in settings.items() if value is not None}
    if not isinstance(scorer, Weighs):
        return SoftmaxWeighting(**given)
    for name, value in given.items():
        raise MimicError(
            f"`{name}` is {value!r}, but {type(scorer).__name__} makes weights itself, without a softmax; leave it out "
            "(in a configuration: null)."
        )
    return ShareWeighting(scorer.weigh)


def _sums(known: Tensor, counts: Tensor) -> Tensor:
    """Of this rank: rows, rows that count, and the sum and number of negatives of their scores."""
    sums = [torch.ones_like(known), counts, known, counts & (known < 0)]
    return torch.stack([each.sum(dtype=known.dtype) for each in sums])


def _weighed(weights: Tensor, counts: Tensor, totals: Tensor, ess: Tensor, temperature: Tensor | None) -> BatchWeights:
    """Puts together this rank's weights and the figures over all ranks, whose :func:`_sums` are ``totals``."""
    batch_size, counted, score_sum, misaligned = totals.sum(0)
    return BatchWeights(
        weights=weights,
        scale=torch.where(counts, weights * (len(weights) * len(totals)), torch.ones_like(weights)),
        ess=ess,
        temperature=temperature,
        batch_size=batch_size.to(torch.int64),
        counted=counted.to(torch.int64),
        score_mean=score_sum / counted,
        misaligned=misaligned / counted,
    )
