"""The direction in which a step on other samples would lead."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_mimic.gradients.direction import norm_of


class Descent(Mapping[str, Tensor]):
    """``v = −ḡ`` over the chosen parameters, by name: against the mean gradient of other samples.

    Empty until :meth:`follow` gives it one; stands where a :class:`Direction` to a reference would.

    Example:
        >>> descent = Descent()
        >>> descent.follow({"w": torch.tensor([3.0, -4.0])})
        >>> descent["w"], descent.norm(), descent.vanishes(descent.norm())
        (tensor([-3.,  4.]), tensor(5.), tensor(False))
    """

    def __init__(self) -> None:
        self._way: dict[str, Tensor] = {}
        self._norm: Tensor | None = None

    def follow(self, gradients: Mapping[str, Tensor]) -> None:
        """Takes the mean gradient of the samples that count now, float32 or higher, on the parameters' devices."""
        self._way = {name: -gradient for name, gradient in gradients.items()}
        self._norm = norm_of(self._way)

    def __getitem__(self, name: str) -> Tensor:
        return self._way[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._way)

    def __len__(self) -> int:
        return len(self._way)

    def norm(self) -> Tensor:
        """``‖ḡ‖``, loss per unit of weight distance: a scalar."""
        assert self._norm is not None
        return self._norm

    def vanishes(self, norm: Tensor) -> Tensor:
        """Whether there is no gradient, and so no direction (a boolean scalar, no host sync)."""
        return norm <= torch.finfo(torch.float32).tiny
