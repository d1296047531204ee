"""How well scores find the wrong labels, where these are known."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_precision,
    binary_recall,
)


@dataclass(frozen=True)
class Detection:
    """Figures for wrong labels as the positive class, each between 0 and 1.

    Attributes:
        auroc: Probability that a wrong label scores lower than a right one.
        average_precision: Of the ranking by score, the lowest first.
        share_kept: Share of samples judged right.
        share_right: Share of samples that are right.
        precision: Share of those judged wrong that are.
        recall: Share of the wrong that are judged so.
        f1: Harmonic mean of the two.
    """

    auroc: float
    average_precision: float
    share_kept: float
    share_right: float
    precision: float
    recall: float
    f1: float


def detect(scores: Tensor, predicted_wrong: Tensor, wrong: Tensor) -> Detection:
    """Compares scores and decisions with the truth.

    Args:
        scores: Shape ``(n,)``; lower is more suspicious.
        predicted_wrong: Boolean, the decision on each sample.
        wrong: Boolean, the truth.

    Example:
        >>> import torch
        >>> wrong = torch.tensor([True, False, False])
        >>> detect(torch.tensor([-2.0, -1.0, 3.0]), torch.tensor([True, True, False]), wrong).precision
        0.5
    """
    truth = wrong.long()
    return Detection(
        auroc=float(binary_auroc(detection_scores(scores), truth)),
        average_precision=float(binary_average_precision(detection_scores(scores), truth)),
        share_kept=float((~predicted_wrong).float().mean()),
        share_right=float((~wrong).float().mean()),
        precision=float(binary_precision(predicted_wrong.long(), truth)),
        recall=float(binary_recall(predicted_wrong.long(), truth)),
        f1=float(binary_f1_score(predicted_wrong.long(), truth)),
    )


def detection_scores(scores: Tensor) -> Tensor:
    """Negate scores and map them to 0 to 1, in float64, as curves and their areas need them.

    torchmetrics squashes what lies outside 0 to 1, batch by batch and in float32, where large scores become equal.

    Args:
        scores: Lower is more suspicious.

    Example:
        >>> detection_scores(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.7500, 0.5000, 0.2500], dtype=torch.float64)
    """
    return 0.5 - torch.atan(scores.double()) / torch.pi
