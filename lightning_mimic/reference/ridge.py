"""The linear layer that turns features into targets, from running statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mimic.reference.running_statistics import RunningStatistics

#: Default penalty on a weight, relative to the features' mean variance.
RIDGE = 1e-2


@dataclass(frozen=True)
class RidgeFit:
    """A linear layer fitted to running statistics.

    Attributes:
        weight: Shape ``(K, D)``.
        bias: Shape ``(K,)``; zero where the statistics are not centred.
        sound: Boolean scalar: the equations could be solved.
    """

    weight: Tensor
    bias: Tensor
    sound: Tensor


@torch.no_grad()
def ridge_fit(statistics: RunningStatistics, penalty: float = RIDGE) -> RidgeFit:
    """Minimise ``Σ ‖W x + c − y‖² + λ ‖W‖²`` over the samples in the sums; no host sync.

    λ is the penalty times the features' mean variance times their count, so it follows their scale. However few the
    samples, the condition number of the equations stays below ``1 + D / penalty``, which float32 bears at the default
    penalty for widths up to about 10⁴.

    Args:
        statistics: With features as *x*, shape D, and targets as *y*, shape K.
        penalty: Penalty on a weight, relative to the features' mean variance.

    Example:
        >>> statistics, x = RunningStatistics(), torch.linspace(-1, 1, 100).unsqueeze(1)
        >>> _ = statistics.add(x, 3 * x + 1)
        >>> fit = ridge_fit(statistics)  # the penalty shrinks 3 by 1 %
        >>> round(float(fit.weight), 2), round(float(fit.bias), 2), bool(fit.sound)
        (2.97, 1.0, True)
    """
    size = statistics.xx.diagonal().mean()
    # What constant features leave is the rounding of their mean.
    rounding = statistics.count * (10 * torch.finfo(size.dtype).eps * statistics.mean_x).square().mean()
    identity = torch.eye(len(statistics.xx), dtype=size.dtype, device=size.device)
    factor, failed = torch.linalg.cholesky_ex(statistics.xx + penalty * size * identity)
    weight = torch.cholesky_solve(statistics.xy, factor).T
    sound = (failed == 0) & (size > rounding) & torch.isfinite(weight).all()
    with torch.autocast(size.device.type, enabled=False):
        return RidgeFit(weight, statistics.mean_y - weight @ statistics.mean_x, sound)
