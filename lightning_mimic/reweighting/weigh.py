"""Weights of a micro-batch, and flags for rows without a score."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mimic.ledger import Flag
from lightning_mimic.scorers import BatchWeights, Products, Weighting, validate_weights


@dataclass(frozen=True)
class StepResult:
    """Scores and weights of one micro-batch; tensors have shape ``(B,)`` unless stated otherwise.

    Attributes:
        scores: Scores of the samples; NaN where there is none.
        weights: Weights of the samples, and statistics over all ranks.
        flags: Codes of :class:`~lightning_mimic.ledger.Flag`.
        masked: Boolean mask of the rows that are removed from the gradient.
        losses: Losses of the samples; ``None`` where they are not known.
        mimic_scores: Mimic score of each sample, whichever scorer is used; NaN without a direction. ``None`` where
            scoring needs no direction.
        direction_norm: Norm of the direction ``‖v‖``, a scalar; ``None`` without a direction.
        head: Ledger columns of the last layer under cross-entropy, or of the pairs of a CLIP model; ``None`` for other
            models.
        wrong_share: Estimated share of wrong labels, a scalar; ``None`` where it is not known.
        report: Diagnosis of the reference as text, in the step that completed it; otherwise empty.
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
            # 0 for an invalid row, even if it stays in the gradient for the gradient scaler.
            "weight": self.weights.weights.float(),
            "flag": self.flags,
            "batch_size": self.weights.batch_size.expand_as(self.flags),
        }
        if self.losses is not None:
            columns["loss"] = self.losses.float()
        return columns | dict(self.head or {})

    def figures(self) -> dict[str, Tensor]:
        """Return the values to log, scalars by name."""
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
    """Compute weights from the valid scores, and flag the other rows.

    Args:
        scores: Scores, shape ``(B,)``; may hold any value, including NaN.
        clean: Mask of the rows whose sample and loss are finite, shape ``(B,)``; ``None`` where it is not known.
        vanishes: Boolean scalar; true if the direction is zero.
        weighting: Weighting that turns scores into weights.
        scaled: Whether a gradient scaler is in use. A row that is not finite has then overflowed and must not be
            masked, so that the scaler detects it and lowers its scale.
        distrusted: Boolean scalar; true if the weights must be uniform although there are scores.
        products: Products that the weighting declares to need.

    Returns:
        The result. If no row of any rank has a valid score, no row is masked, and the loss stays unchanged.
    """
    finite = torch.isfinite(scores)
    clean = torch.ones_like(finite) if clean is None else clean
    broken = ~clean if scaled else ~(clean & finite)
    valid = clean & finite
    # Without a direction no sample is better than another.
    uniform = vanishes if distrusted is None else vanishes | distrusted
    weights = validate_weights(weighting, weighting(scores, products, valid=valid, uniform=uniform), len(scores))
    flags = torch.full_like(scores, Flag.OK, dtype=torch.int8)
    # Later flags take precedence. torch.where, because assignment through a mask needs a host sync.
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
