"""The direction from the trained weights to the reference."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

#: Below this length, relative to the reference's own, a direction is rounding error and not a direction.
RELATIVE_ZERO = 1e-6


class Direction:
    """``v = θ_ref − θ`` over the chosen parameters, fresh at every call.

    Args:
        reference: Name to reference tensor; the shapes of ``parameters``.
        parameters: Name to live parameter.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> vectors, norm = Direction({"w": torch.tensor([3.0, 4.0])}, {"w": weight})()
        >>> vectors["w"], norm
        (tensor([3., 4.]), tensor(5.))
    """

    def __init__(self, reference: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        # Half precision would round v away long before the weights meet; float64 models keep float64.
        self._reference = {
            name: reference[name].detach().to(p.device, torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }
        # Parameters in half precision cannot come closer to the reference than their own rounding.
        rounding = max(torch.finfo(p.dtype).eps / 2 for p in self._parameters.values())
        self._zero = max(RELATIVE_ZERO, rounding) * _norm(self._reference) + torch.finfo(torch.float32).tiny

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, Tensor], Tensor]:
        """The direction now.

        Returns:
            Name to ``v`` in float32 (float64 for float64 parameters), and its Euclidean norm over all of
            them, a scalar on the parameters' device in the parameters' own unit.
        """
        vectors = {
            name: reference - self._parameters[name].detach().to(reference.dtype)
            for name, reference in self._reference.items()
        }
        return vectors, _norm(vectors)

    def vanishes(self, norm: Tensor) -> Tensor:
        """Whether ``norm`` is so small that the model has met its reference (a boolean scalar, no host sync)."""
        return norm <= self._zero


def _norm(tensors: Mapping[str, Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors.values()]))
    return norm
