"""From scores to weights: a softmax over the micro-batch of all ranks, with a floor on its effective size."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Temperatures that are tried when the floor is broken: τ·2^(k/8), then infinity (uniform weights).
_STEPS_PER_DOUBLING = 8
_DOUBLINGS = 24


@dataclass(frozen=True)
class BatchWeights:
    """The weights of one micro-batch and what they say; all tensors on the scores' device.

    Attributes:
        weights: Shape ``(B,)`` for this rank's rows; over all ranks they sum to 1. 0 for rows left out.
        scale: Shape ``(B,)``; a row of the local mean's gradient times this is its share in ``Σ wᵢ gᵢ``
            after ranks are averaged. 1 for rows left out, and everywhere when no row counts.
        ess: Effective sample size ``1/Σw²``, a scalar between 1 and the number of rows that count.
        temperature: The temperature used, a scalar; ``inf`` where the floor asks for uniform weights.
        batch_size: Rows of all ranks, those left out included; an integer scalar.
        counted: Rows of all ranks that count.
        score_mean: Mean score over the rows that count, of all ranks.
        misaligned: Share of those rows with a negative score.
    """

    weights: Tensor
    scale: Tensor
    ess: Tensor
    temperature: Tensor
    batch_size: Tensor
    counted: Tensor
    score_mean: Tensor
    misaligned: Tensor


class SoftmaxWeighting:
    """``wᵢ = exp(mᵢ/τ) / Σⱼ exp(mⱼ/τ)`` over the micro-batch of all ranks together.

    Ranks exchange one small tensor (log-sum-exps and counts), never their scores; uneven ranks are exact.

    Args:
        temperature: τ, in the unit of the score; smaller trusts the scores more.
        min_ess: Floor on the effective sample size, as a fraction of the rows that count, 0 to 1; τ is raised
            for a batch that would fall below it (in steps of 9 %). 0: no floor; 1: uniform weights.

    Raises:
        ValueError: τ not a positive finite number, or ``min_ess`` outside 0 to 1.

    Example:
        >>> SoftmaxWeighting(temperature=1.0, min_ess=0.0)(torch.tensor([0.0, math.log(3.0)])).weights
        tensor([0.2500, 0.7500])
    """

    def __init__(self, temperature: float = 1.0, min_ess: float = 0.25) -> None:
        if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"`temperature` must be a positive finite number, not {temperature!r}.")
        if not (isinstance(min_ess, int | float) and 0 <= min_ess <= 1):
            raise ValueError(f"`min_ess` is a fraction of the batch between 0 and 1, not {min_ess!r}.")
        self.temperature = float(temperature)
        self.min_ess = float(min_ess)

    @torch.no_grad()
    def __call__(self, scores: Tensor, counts: Tensor | None = None) -> BatchWeights:
        """The weights of this rank's rows.

        Args:
            scores: Shape ``(B,)``; B may differ between ranks.
            counts: Boolean, shape ``(B,)``: rows that take part; the others may hold any value. All, if
                left out.
        """
        counts = torch.ones_like(scores, dtype=torch.bool) if counts is None else counts
        known = torch.where(counts, scores, torch.zeros_like(scores))
        ladder = self._temperatures(scores)
        # Relative to the rank's highest score, then to that of all ranks: large scores lose no digits.
        peak = torch.where(counts, scores, -torch.inf).amax() if len(scores) else scores.new_full((), -torch.inf)
        peak = torch.where(counts.any(), peak, torch.zeros_like(peak))
        logits = torch.where(counts, (known - peak) / ladder[:, None], -torch.inf)  # (ladder, B)
        sums = [torch.ones_like(scores), counts, known, counts & (known < 0)]
        totals = torch.stack([peak, *[s.sum(dtype=scores.dtype) for s in sums]])
        ranks = _gather(torch.cat([torch.logsumexp(logits, 1), torch.logsumexp(2 * logits, 1), totals]))
        first, second, totals = ranks.split([len(ladder), len(ladder), 5], 1)
        holds = totals[:, 2] > 0  # ranks with rows that count
        top = torch.where(holds, totals[:, 0], -torch.inf).amax()
        shift = torch.where(holds, totals[:, 0] - top, torch.zeros_like(top))[:, None] / ladder
        normaliser = torch.logsumexp(first + shift, 0)  # (ladder,)
        ess = torch.exp(2 * normaliser - torch.logsumexp(second + 2 * shift, 0))
        batch_size, counted, score_sum, misaligned = totals[:, 1:].sum(0)
        # argmax finds the first True; a hair of tolerance keeps equal scores from climbing for rounding.
        rung = (ess >= self.min_ess * counted * (1 - 1e-6)).to(torch.int8).argmax(0, keepdim=True)

        def chosen(values: Tensor) -> Tensor:
            return values.index_select(0, rung)[0]  # values[rung] would wait for the device

        own = torch.where(counts.any(), (peak - top) / chosen(ladder), torch.zeros_like(peak))
        weights = torch.where(counts, torch.exp(chosen(logits) + own - chosen(normaliser)), torch.zeros_like(scores))
        return BatchWeights(
            weights=weights,
            scale=torch.where(counts, weights * (len(scores) * len(ranks)), torch.ones_like(scores)),
            ess=chosen(ess),
            temperature=chosen(ladder),
            batch_size=batch_size.to(torch.int64),
            counted=counted.to(torch.int64),
            score_mean=score_sum / counted,
            misaligned=misaligned / counted,
        )

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


def _gather(row: Tensor) -> Tensor:
    """Stacks one row per rank, shape ``(ranks, n)``; ``(1, n)`` without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return row[None]
    rows = [torch.empty_like(row) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(rows, row)
    return torch.stack(rows)
