"""The direction from the trained weights, or from those that the training started with, to the reference."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_mimic.errors import MimicError
from lightning_mimic.sharding import full_tensor

#: Below this length, relative to the reference's own, a direction is rounding error and not a direction.
RELATIVE_ZERO = 1e-6


class Direction(Mapping[str, Tensor]):
    """``v = θ_ref − θ`` over the chosen parameters, by name; fresh whenever it is looked up.

    Only the reference is kept: the direction of a whole model would be another copy of it. After :meth:`set_start` it
    is ``θ_ref − θ₀`` from given weights, which are kept, too, and no longer changes with the parameters.

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
        self._start: dict[str, Tensor] | None = None
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
    def start(self) -> dict[str, Tensor] | None:
        """θ₀ by name, if the direction is from there; whole tensors of the parameters' dtypes."""
        return self._start

    @torch.no_grad()
    def set_start(self, start: Mapping[str, Tensor] | None = None) -> None:
        """Take the direction from given weights from here on, or from what the parameters are now.

        Args:
            start: θ₀ by name; on any device.

        Raises:
            MimicError: A tensor is missing, or has another shape than its parameter.

        Example:
            >>> weight = nn.Parameter(torch.zeros(2))
            >>> direction = Direction({"w": torch.tensor([3.0, 4.0])}, {"w": weight})
            >>> direction.set_start()
            >>> with torch.no_grad():
            ...     weight += 3
            >>> direction["w"]
            tensor([3., 4.])
        """
        if start is None:
            self._start = {name: full_tensor(p.detach()).clone() for name, p in self._parameters.items()}
            return
        held = {}
        for name, parameter in self._parameters.items():
            given = start.get(name)
            if not isinstance(given, Tensor) or given.shape != parameter.shape:
                shape = f"has shape {tuple(given.shape)}" if isinstance(given, Tensor) else "is missing"
                raise MimicError(
                    f"{name!r} {shape} among the weights that the run started with; expected {tuple(parameter.shape)}."
                )
            held[name] = given.detach().to(parameter.device, parameter.dtype, copy=True)
        self._start = held

    @property
    def reference(self) -> Mapping[str, Tensor]:
        """The reference's tensors by name, float32 or higher."""
        return self._reference

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        reference = self._reference[name]
        origin = self._parameters[name].detach() if self._start is None else self._start[name]
        return reference - full_tensor(origin).to(reference.dtype)

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
