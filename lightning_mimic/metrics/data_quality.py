"""The calibrated share of good samples as a torchmetrics metric, accumulated over batches and ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_mimic.metrics.estimate import estimate_quality


class DataQuality(Metric):
    """Estimate the share of good samples, 0 to 1; see :func:`~lightning_mimic.metrics.estimate_quality`.

    Pass the mean scores of the data to :meth:`update`, and the mean scores of trusted samples, once with true and once
    with wrong labels, to :meth:`calibrate`.

    Example:
        >>> metric = DataQuality()
        >>> metric.update(torch.tensor([1.0, 1.0, -1.0, -1.0]))
        >>> metric.calibrate(torch.ones(20), -torch.ones(20))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True
    full_state_update = False
    kept: Tensor
    samples: Tensor
    right: list[Tensor]
    wrong: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("kept", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("right", [], dist_reduce_fx="cat")
        self.add_state("wrong", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor) -> None:
        """Add samples of the data.

        Args:
            scores: Mean scores, shape ``(n,)``; samples with NaN are ignored.
        """
        self.kept += (scores >= 0).sum()
        self.samples += (~scores.isnan()).sum()

    def calibrate(self, right: Tensor, wrong: Tensor) -> None:
        """Add trusted samples. A sample with NaN in either argument is ignored.

        Args:
            right: Mean scores of the samples with their true labels, shape ``(n,)``.
            wrong: Mean scores of the same samples with wrong labels, shape ``(n,)``, or ``(n, k)`` for ``k`` wrong
                labels per sample.
        """
        scored = ~(right.isnan() | wrong.reshape(len(right), -1).isnan().any(1))
        self.right.append(right[scored] >= 0)
        self.wrong.append(wrong[scored] >= 0)
        self._computed = None  # discard the cached result, which is out of date

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Add a batch as :meth:`update` does, and return nothing: there is no estimate for a single batch."""
        self.update(*args, **kwargs)

    def compute(self) -> Tensor:
        """Compute the estimate, a scalar.

        Raises:
            CurationError: There are no samples or no trusted samples, or the trusted samples are not kept clearly more
                often with true labels than with wrong ones.
        """
        right, wrong = (dim_zero_cat(part) if len(part) else torch.zeros(0) for part in (self.right, self.wrong))
        quality = estimate_quality(int(self.kept), int(self.samples), right.cpu().numpy(), wrong.cpu().numpy())
        return torch.tensor(quality.estimate, device=self.kept.device)
