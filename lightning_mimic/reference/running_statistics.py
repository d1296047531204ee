"""Running means and scatter of paired vectors, over the batches of all ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_mimic.distributed import sum_over_ranks
from lightning_mimic.errors import MimicError

#: Factor on the weight of older samples each time others are added.
DECAY = 0.9


class RunningStatistics:
    """Running count, means and scatter matrices of pairs ``(x, y)``.

    Older samples decay by a factor with each :meth:`add`, because features change while a model learns.
    The scatter is kept about the running mean, as in Chan, Golub and LeVeque, *Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances* (1979): raw second moments would lose it in float32 beside a large mean.

    Args:
        centred: Keep the scatter about the means; otherwise about zero, and the means stay zero.

    Example:
        >>> statistics = RunningStatistics()
        >>> _ = statistics.add(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0]]))
        >>> statistics.mean_x, statistics.xx, statistics.xy
        (tensor([2.]), tensor([[2.]]), tensor([[4.]]))
    """

    def __init__(self, *, centred: bool = True) -> None:
        self.centred = centred
        self._sums: dict[str, Tensor] = {}

    @property
    def count(self) -> Tensor:
        """Samples in the sums, each by its weight; a scalar."""
        return self._sum("count")

    @property
    def mean_x(self) -> Tensor:
        """Shape ``(D,)``; zero where the sums are not centred."""
        return self._sum("mean_x")

    @property
    def mean_y(self) -> Tensor:
        """Shape ``(K,)``; zero where the sums are not centred."""
        return self._sum("mean_y")

    @property
    def xx(self) -> Tensor:
        """``Σ (x − x̄)(x − x̄)ᵀ``, shape ``(D, D)``."""
        return self._sum("xx")

    @property
    def xy(self) -> Tensor:
        """``Σ (x − x̄)(y − ȳ)ᵀ``, shape ``(D, K)``."""
        return self._sum("xy")

    def state_dict(self) -> dict[str, Tensor]:
        """Return all sums by name; empty before the first :meth:`add`."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the sums from a state."""
        self._sums = dict(state)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, decay: float = DECAY) -> Tensor:
        """Add pairs, and those of the other ranks; every rank must call it.

        Args:
            x: Shape ``(n, D)``.
            y: Shape ``(n, K)``. A row in which either is not finite is left out. n may differ between ranks.
            decay: Factor on the weight of older samples, 0 to 1; 1 keeps it.

        Returns:
            Whether the sums could hold them, a boolean scalar; if not (an overflow), they stay as they were.
        """
        finite = (torch.isfinite(x).all(1) & torch.isfinite(y).all(1)).unsqueeze(1)
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = (torch.where(finite, t.detach(), 0).to(dtype) for t in (x, y))
        totals = torch.cat([finite.sum(0).to(dtype), x.sum(0), y.sum(0)])
        count, *sums = sum_over_ranks(totals).split([1, x.shape[1], y.shape[1]])
        some = count.clamp(min=1)
        means = [total / some if self.centred else torch.zeros_like(total) for total in sums]
        x, y = (torch.where(finite, t - mean, 0) for t, mean in zip((x, y), means, strict=True))
        with torch.autocast(x.device.type, enabled=False):
            scatter = sum_over_ranks(x.T @ torch.cat([x, y], 1))
        xx, xy = scatter.split([x.shape[1], y.shape[1]], 1)
        if not self._sums:
            zero = torch.zeros_like
            self._sums = {
                "count": zero(count[0]),
                "mean_x": zero(means[0]),
                "mean_y": zero(means[1]),
                "xx": zero(xx),
                "xy": zero(xy),
            }
        old = self.count * decay
        total = old + count[0]
        share = count[0] / total.clamp(min=1)
        to_x, to_y = means[0] - self.mean_x, means[1] - self.mean_y
        between = old * share
        new = {
            "count": total,
            "mean_x": self.mean_x + share * to_x,
            "mean_y": self.mean_y + share * to_y,
            "xx": self.xx * decay + xx + between * torch.outer(to_x, to_x),
            "xy": self.xy * decay + xy + between * torch.outer(to_x, to_y),
        }
        held = torch.isfinite(new["xx"]).all() & torch.isfinite(new["xy"]).all()
        self._sums = {name: torch.where(held, tensor, self._sums[name]) for name, tensor in new.items()}
        return held

    def _sum(self, name: str) -> Tensor:
        if not self._sums:
            raise MimicError("the sums are empty; add samples first.")
        return self._sums[name]
