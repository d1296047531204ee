"""How well scores find the wrong labels, where these are known."""

from dataclasses import dataclass

from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_f1_score,
    binary_precision,
    binary_recall,
)


@dataclass(frozen=True)
class Detection:
    """Figures for wrong labels as the positive class, each between 0 and 1.

    Attributes:
        auroc: Probability that a wrong label scores lower than a right one.
        share_kept: Share of samples judged right.
        share_right: Share of samples that are right.
        precision: Share of those judged wrong that are.
        recall: Share of the wrong that are judged so.
        f1: Harmonic mean of the two.
    """

    auroc: float
    share_kept: float
    share_right: float
    precision: float
    recall: float
    f1: float


def detect(scores: Tensor, judged_wrong: Tensor, wrong: Tensor) -> Detection:
    """Compares scores and decisions with the truth.

    Args:
        scores: Shape ``(n,)``; lower is more suspicious.
        judged_wrong: Boolean, the decision on each sample.
        wrong: Boolean, the truth.

    Example:
        >>> import torch
        >>> wrong = torch.tensor([True, False, False])
        >>> detect(torch.tensor([-2.0, -1.0, 3.0]), torch.tensor([True, True, False]), wrong).precision
        0.5
    """
    truth = wrong.long()
    return Detection(
        auroc=float(binary_auroc(-scores, truth)),
        share_kept=float((~judged_wrong).float().mean()),
        share_right=float((~wrong).float().mean()),
        precision=float(binary_precision(judged_wrong.long(), truth)),
        recall=float(binary_recall(judged_wrong.long(), truth)),
        f1=float(binary_f1_score(judged_wrong.long(), truth)),
    )
