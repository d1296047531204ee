"""The direction from the trained weights to the reference."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_mimic.sharding import full_tensor

#: Below this length, relative to the reference's own, a direction is rounding error and not a direction.
RELATIVE_ZERO = 1e-6


class Direction(Mapping[str, Tensor]):
    """``v = θ_ref − θ`` over the chosen parameters, by name; fresh whenever it is looked up.

    Only the reference is kept: the direction of a whole model would be another copy of it.

    Args:
        reference: Name to reference tensor; the shapes of ``parameters``.
        parameters: Name to live parameter, each parameter once.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> direction = Direction({"w": torch.tensor([3.0, 4.0])}, {"w": weight})
        >>> direction["w"], direction.norm()
        (tensor([3., 4.]), tensor(5.))
    """

    def __init__(self, reference: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        # Half precision would round v away long before the weights meet; float64 models keep float64.
        self.set_reference(
            {
                name: reference[name].detach().to(p.device, torch.promote_types(p.dtype, torch.float32), copy=True)
                for name, p in self._parameters.items()
            }
        )

    def set_reference(self, reference: Mapping[str, Tensor]) -> None:
        """Set another reference, of the same names, shapes and devices, float32 or higher; no copy is made."""
        self._reference = dict(reference)
        # Parameters in half precision cannot come closer to the reference than their own rounding.
        rounding = max(torch.finfo(p.dtype).eps / 2 for p in self._parameters.values())
        self._zero = max(RELATIVE_ZERO, rounding) * norm_of(self._reference) + torch.finfo(torch.float32).tiny

    @property
    def reference(self) -> Mapping[str, Tensor]:
        """The reference's tensors by name, float32 or higher."""
        return self._reference

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        reference = self._reference[name]
        return reference - full_tensor(self._parameters[name].detach()).to(reference.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reference)

    def __len__(self) -> int:
        return len(self._reference)

    def norm(self) -> Tensor:
        """``‖v‖`` over all parameters, in their own unit: a scalar on their device, float32 or higher."""
        return norm_of(self)

    def vanishes(self, norm: Tensor) -> Tensor:
        """Whether ``norm`` is so small that the model has met its reference (a boolean scalar, no host sync)."""
        return norm <= self._zero


def norm_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """The length of all tensors together, as one vector: a scalar of the widest of their dtypes."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors.values()]
    dtype = max((norm.dtype for norm in norms), key=lambda d: torch.finfo(d).bits)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]))
    return norm
