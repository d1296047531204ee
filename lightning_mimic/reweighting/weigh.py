"""The weights of a micro-batch, and flags for rows without a score."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mimic.ledger import Flag
from lightning_mimic.scorers import BatchWeights, Products, Weighting, validate_weights


@dataclass(frozen=True)
class StepResult:
    """The scores and weights of one micro-batch; tensors of shape ``(B,)`` on their device.

    Attributes:
        scores: NaN where a row has none.
        weights: The weights, and the figures over all ranks.
        flags: Codes of :class:`~lightning_mimic.ledger.Flag`.
        masked: Rows that are taken out of the gradient.
        losses: The samples' losses, where they are known.
        mimic_scores: The mimic score of each sample, whatever the scorer; NaN without a direction. ``None`` where
            scoring needs no direction.
        direction_norm: ``‖v‖``, a scalar; ``None`` without a direction.
        head: Ledger columns of the last layer under cross-entropy, or of a CLIP's pairs; ``None`` elsewhere.
        wrong_share: The estimated share of wrong labels, a scalar; ``None`` where it is not known.
        report: What was found about the reference, in the step in which that became known; else empty.
    """

    scores: Tensor
    weights: BatchWeights
    flags: Tensor
    masked: Tensor
    losses: Tensor | None = None
    mimic_scores: Tensor | None = None
    direction_norm: Tensor | None = None
    head: Mapping[str, Tensor] | None = None
    wrong_share: Tensor | None = None
    report: str = ""

    def __len__(self) -> int:
        return len(self.flags)

    def with_report(self, report: str) -> "StepResult":
        """Return the same result with a report on the reference."""
        return replace(self, report=report)

    def columns(self) -> dict[str, Tensor]:
        """Return the ledger's columns of this micro-batch, shape ``(B,)`` each."""
        columns = {
            "score": self.scores.float(),
            # A row that was left to the scaler has no weight of its own.
            "weight": self.weights.weights.float(),
            "flag": self.flags,
            "batch_size": self.weights.batch_size.expand_as(self.flags),
        }
        if self.losses is not None:
            columns["loss"] = self.losses.float()
        return columns | dict(self.head or {})

    def figures(self) -> dict[str, Tensor]:
        """Return what is logged, scalars by name."""
        figures = {
            "mimic/score_mean": self.weights.score_mean,
            "mimic/ess": self.weights.ess,
            "mimic/negative_share": self.weights.negative_share,
        }
        more = {"mimic/direction_norm": self.direction_norm, "mimic/wrong_share": self.wrong_share}
        return figures | {name: value for name, value in more.items() if value is not None}


def weigh_batch(
    scores: Tensor,
    clean: Tensor | None,
    vanishes: Tensor,
    weighting: Weighting,
    *,
    scaled: bool,
    distrusted: Tensor | None = None,
    products: Products | None = None,
) -> StepResult:
    """Weigh the rows whose score can be trusted, and flag the others.

    Args:
        scores: Shape ``(B,)``; may hold anything, NaN included.
        clean: Rows whose sample and loss are finite, where that is known.
        vanishes: Boolean scalar, the direction is zero.
        weighting: Makes weights of scores.
        scaled: A gradient scaler is at work: a row that is not finite has then overflowed and must pass, so
            that the scaler sees it and lowers its scale.
        distrusted: Boolean scalar, the weights shall be uniform although there are scores.
        products: What the weighting declares to need.

    Returns:
        The result. When no row of any rank counts, nothing is masked: the loss goes through as it is.
    """
    finite = torch.isfinite(scores)
    clean = torch.ones_like(finite) if clean is None else clean
    broken = ~clean if scaled else ~(clean & finite)
    valid = clean & finite
    # Without a direction no sample is better than another.
    uniform = vanishes if distrusted is None else vanishes | distrusted
    weights = validate_weights(weighting, weighting(scores, products, valid=valid, uniform=uniform), len(scores))
    flags = torch.full_like(scores, Flag.OK, dtype=torch.int8)
    # The later ones take precedence; torch.where, because an assignment through a mask waits for the device.
    for flag, rows in (
        (Flag.ALONE, (weights.batch_size == 1) & (weights.weights == 1)),
        (Flag.ZERO_DIRECTION, vanishes),
        (Flag.OVERFLOW, ~finite),
        (Flag.NONFINITE_LOSS, broken),
    ):
        flags = torch.where(rows, torch.full_like(flags, flag), flags)
    return StepResult(
        scores=torch.where(valid & ~vanishes, scores, torch.full_like(scores, torch.nan)),
        weights=weights,
        flags=flags,
        masked=broken & (weights.counted > 0),
    )
