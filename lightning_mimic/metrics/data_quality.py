"""The calibrated share of good samples as a torchmetric, accumulated over batches and over ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_mimic.metrics.estimate import estimate_quality


class DataQuality(Metric):
    """The calibrated share of good samples, 0 to 1; see :func:`~lightning_mimic.metrics.estimate_quality`.

    Give mean scores of the data with :meth:`update`, and those of trusted samples, with true and with wrong labels,
    with :meth:`calibrate`.

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
        """Adds samples of the data.

        Args:
            scores: Mean scores, shape ``(n,)``; NaN is left out.
        """
        self.kept += (scores >= 0).sum()
        self.samples += (~scores.isnan()).sum()

    def calibrate(self, right: Tensor, wrong: Tensor) -> None:
        """Adds trusted samples.

        Args:
            right: Mean scores with their true labels, shape ``(n,)``.
            wrong: Of the same samples with wrong labels, shape ``(n,)``, or ``(n, k)`` for k of them; a sample with NaN
                anywhere is left out.
        """
        scored = ~(right.isnan() | wrong.reshape(len(right), -1).isnan().any(1))
        self.right.append(right[scored] >= 0)
        self.wrong.append(wrong[scored] >= 0)
        self._computed = None  # what was computed before does not hold any more

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch, as :meth:`update`; of one batch there is nothing to say."""
        self.update(*args, **kwargs)

    def compute(self) -> Tensor:
        """The estimate, a scalar.

        Raises:
            CurationError: No samples, no trusted samples, or trusted ones that are not told apart.
        """
        right, wrong = (dim_zero_cat(part) if len(part) else torch.zeros(0) for part in (self.right, self.wrong))
        quality = estimate_quality(int(self.kept), int(self.samples), right.cpu().numpy(), wrong.cpu().numpy())
        return torch.tensor(quality.estimate, device=self.kept.device)
