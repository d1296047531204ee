"""Detection metrics of scores for data in which the wrong labels are known."""

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
    """Detection metrics with wrong labels as the positive class, each between 0 and 1.

    Attributes:
        auroc: Probability that a sample with a wrong label scores lower than one with a right label.
        average_precision: Average precision of the ranking by score, lowest score first.
        share_kept: Share of samples that are predicted right.
        share_right: Share of samples whose label is right.
        precision: Share of wrong labels among the samples that are predicted wrong.
        recall: Share of the wrong labels that are predicted wrong.
        f1: Harmonic mean of precision and recall.
    """

    auroc: float
    average_precision: float
    share_kept: float
    share_right: float
    precision: float
    recall: float
    f1: float


def detect(scores: Tensor, predicted_wrong: Tensor, wrong: Tensor) -> Detection:
    """Compare scores and decisions with the known wrong labels.

    Args:
        scores: Scores, shape ``(n,)``; lower is more suspicious.
        predicted_wrong: Decisions, boolean, shape ``(n,)``; true where the label is predicted to be wrong.
        wrong: Ground truth, boolean, shape ``(n,)``; true where the label is wrong.

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
    """Negate scores and map them to the range 0 to 1, in float64, for torchmetrics' curves and areas.

    torchmetrics applies a sigmoid, in float32 and batch by batch, to inputs outside 0 to 1, and large scores would
    become equal.

    Args:
        scores: Scores of any shape; lower is more suspicious.

    Example:
        >>> detection_scores(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.7500, 0.5000, 0.2500], dtype=torch.float64)
    """
    return 0.5 - torch.atan(scores.double()) / torch.pi
