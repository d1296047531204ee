"""Torchmetrics metrics for the detection of wrong labels by low scores, where the wrong labels are known."""

from torch import Tensor
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from lightning_mimic.metrics.detection import detection_scores


class MislabelAUROC(BinaryAUROC):
    """Compute the probability that a wrong label scores lower than a right one, 0 to 1; 0.5 is chance.

    Example:
        >>> import torch
        >>> metric = MislabelAUROC()
        >>> metric.update(torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([True, False, False]))
        >>> metric.compute()
        tensor(1.)
    """

    def update(self, scores: Tensor, wrong: Tensor) -> None:
        """Add samples.

        Args:
            scores: Scores, shape ``(n,)``; lower is more suspicious.
            wrong: Ground truth, boolean, shape ``(n,)``; true where the label is wrong.
        """
        super().update(detection_scores(scores), wrong.long())


class MislabelAveragePrecision(BinaryAveragePrecision):
    """Compute the average precision of finding wrong labels by low scores, 0 to 1; chance is their share.

    Example:
        >>> import torch
        >>> metric = MislabelAveragePrecision()
        >>> metric.update(torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([True, False, True]))
        >>> metric.compute()
        tensor(0.8333)
    """

    def update(self, scores: Tensor, wrong: Tensor) -> None:
        """Add samples, as for :class:`MislabelAUROC`."""
        super().update(detection_scores(scores), wrong.long())
