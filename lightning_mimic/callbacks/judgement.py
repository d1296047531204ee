"""Which rows of a micro-batch count, what is wrong with the others, and the weights that follow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mimic.ledger import Flag
from lightning_mimic.scorers import BatchWeights, Weighting


@dataclass(frozen=True)
class Judgement:
    """What a micro-batch's scores came to; tensors of shape ``(B,)`` on their device.

    Attributes:
        scores: NaN where a row has none.
        weights: The weights and the figures over all ranks.
        flags: Codes of :class:`~lightning_mimic.ledger.Flag`.
        masked: Rows to be taken out of the gradient.
    """

    scores: Tensor
    weights: BatchWeights
    flags: Tensor
    masked: Tensor

    def columns(self) -> dict[str, Tensor]:
        """What the ledger keeps of every row, shape ``(B,)`` each."""
        return {
            "score": self.scores.float(),
            # A row that was left to the scaler has no weight of its own.
            "weight": self.weights.weights.float(),
            "flag": self.flags,
            "batch_size": self.weights.batch_size.expand_as(self.flags),
        }

    def figures(self) -> dict[str, Tensor]:
        """What is logged, scalars."""
        return {
            "mimic/score_mean": self.weights.score_mean,
            "mimic/ess": self.weights.ess,
            "mimic/misaligned": self.weights.negative_share,
        }


def judge(scores: Tensor, clean: Tensor | None, vanishes: Tensor, weighting: Weighting, *, scaled: bool) -> Judgement:
    """Weighs the rows whose score can be trusted and flags the others.

    Args:
        scores: Shape ``(B,)``; anything may stand in them.
        clean: Rows whose sample and loss are finite, where that is known.
        vanishes: Boolean scalar, the direction is zero.
        weighting: Makes weights of scores.
        scaled: A gradient scaler is at work: a row that is not finite has then overflowed and must pass, so
            that the scaler sees it and lowers its scale.

    Returns:
        The judgement. When no row of any rank counts, nothing is masked: the loss goes through as it is.
    """
    finite = torch.isfinite(scores)
    clean = torch.ones_like(finite) if clean is None else clean
    broken = ~clean if scaled else ~(clean & finite)
    counts = clean & finite
    # Without a direction no sample is better than another.
    weights = weighting(scores, valid=counts, uniform=vanishes)
    flags = torch.full_like(scores, Flag.OK, dtype=torch.int8)
    # The later, the weightier; by where, because an assignment through a mask waits for the device.
    for flag, rows in (
        (Flag.ALONE, (weights.batch_size == 1) & (weights.weights == 1)),
        (Flag.ZERO_DIRECTION, vanishes),
        (Flag.OVERFLOW, ~finite),
        (Flag.NONFINITE_LOSS, broken),
    ):
        flags = torch.where(rows, torch.full_like(flags, flag), flags)
    return Judgement(
        scores=torch.where(counts & ~vanishes, scores, torch.full_like(scores, torch.nan)),
        weights=weights,
        flags=flags,
        masked=broken & (weights.counted > 0),
    )
