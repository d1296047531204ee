"""The direction of a gradient step on other samples."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_mimic.gradients.direction import norm_of


class GradientDirection(Mapping[str, Tensor]):
    """``v = −ḡ`` over the chosen parameters, by name: the negative mean gradient of other samples.

    Empty until the first :meth:`update`; takes the place of a :class:`Direction` towards a reference.

    Example:
        >>> direction = GradientDirection()
        >>> direction.update({"w": torch.tensor([3.0, -4.0])})
        >>> direction["w"], direction.norm(), direction.vanishes(direction.norm())
        (tensor([-3.,  4.]), tensor(5.), tensor(False))
    """

    def __init__(self) -> None:
        self._direction: dict[str, Tensor] = {}
        self._norm: Tensor | None = None

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Set the direction.

        Args:
            gradients: The mean gradient by name, float32 or higher, on the parameters' devices.
        """
        self._direction = {name: -gradient for name, gradient in gradients.items()}
        self._norm = norm_of(self._direction)

    def __getitem__(self, name: str) -> Tensor:
        return self._direction[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._direction)

    def __len__(self) -> int:
        return len(self._direction)

    def norm(self) -> Tensor:
        """Return ``‖ḡ‖``, loss per unit of weight distance, a scalar."""
        assert self._norm is not None
        return self._norm

    def vanishes(self, norm: Tensor) -> Tensor:
        """Return whether there is no gradient, and so no direction: a boolean scalar, without a host sync."""
        return norm <= torch.finfo(torch.float32).tiny
