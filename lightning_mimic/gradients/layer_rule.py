"""The rule of a kind of layer: its output as a linear function of its parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic.errors import MimicError

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerRule:
    """The output of a layer as a linear function of its parameters.

    For a layer whose output is ``L(θ) = A(θ) + c`` with A linear and c free of parameters, the rule computes A for
    other values than the layer's own; ``⟨gᵢ, v⟩`` is then the output's gradient times ``A(v)``, summed over row *i*.

    Args:
        apply: Called as ``apply(layer, parameters, *inputs, **kwargs)`` with the arguments of the layer's call, cast to
            the dtype of the product; returns ``A(parameters)``, of the output's shape. ``parameters`` holds a tensor
            for every parameter of the layer, but those in ``added`` only where they are not zero.
        parameters: Names of the layer's parameters. A layer that has others (weight_norm, pruning ...) is refused.
        added: Those of them that are added to the output along its channels, and may be missing (a bias). A product
            with them alone does not run the layer.
        sample_axes: The number of axes that the output for one sample has at least, or a function of the layer that
            returns it. An output without a batch axis before these is refused.
        channels_last: Whether what is ``added`` runs along the last axes of the output, not along axis 1.
        methods: Names of the methods of the class that the rule reproduces. A subclass that overrides one is refused.
        unsupported: A function of the layer that returns why an instance is not linear or otherwise refused, as a
            phrase that goes on from the layer's name, or ``None``.

    Raises:
        MimicError: A field of the wrong type.

    Example:
        See :func:`~lightning_mimic.gradients.register_layer_rule`.
    """

    apply: Callable[..., Tensor]
    parameters: Sequence[str]
    added: Sequence[str] = ()
    sample_axes: int | Callable[[Any], int] = 1
    channels_last: bool = False
    methods: Sequence[str] = ("forward",)
    unsupported: Callable[[Any], str | None] | None = None

    def __post_init__(self) -> None:
        if not callable(self.apply):
            raise MimicError(f"`apply` of a LayerRule is {self.apply!r}; expected apply(layer, parameters, *inputs).")
        for field in ("parameters", "added", "methods"):
            names = getattr(self, field)
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise MimicError(
                    f"`{field}` of a LayerRule is {names!r}; expected a tuple of names, such as ('weight',)."
                )
        if not self.parameters or not set(self.added) <= set(self.parameters):
            raise MimicError(
                f"`parameters` of a LayerRule is {self.parameters!r}; expected the names of all parameters of the "
                f"layer, those in `added` ({self.added!r}) included."
            )

    def axes(self, layer: nn.Module) -> int:
        """Return the number of axes that the output for one sample has at least."""
        return self.sample_axes if isinstance(self.sample_axes, int) else self.sample_axes(layer)

    def linear_part(
        self, layer: nn.Module, vectors: Parameters, inputs: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """Return ``A(v)`` for a layer's call.

        Args:
            layer: A layer that the rule is for.
            vectors: Parameter name to a tensor of its shape; a parameter that is left out counts as zero.
            inputs: Positional arguments of the call, in the dtype of ``vectors``.
            kwargs: Keyword arguments of the call.
            output: A tensor of the output's shape.

        Raises:
            MimicError: The rule returns another shape.
        """
        if set(vectors) <= set(self.added):
            axes = [] if self.channels_last else [1] * (output.ndim - 2)
            spread = [(v if self.channels_last else v.reshape(-1, *axes)).expand_as(output) for v in vectors.values()]
            return spread[0] if len(spread) == 1 else torch.stack(spread).sum(0)
        dtype = next(iter(vectors.values())).dtype
        own = {name: p for name, p in layer.named_parameters(recurse=False) if name not in self.added}
        zeros = {n: torch.zeros_like(p, dtype=dtype) for n, p in own.items() if n not in vectors}
        part = self.apply(layer, {**vectors, **zeros}, *inputs, **kwargs)
        if not isinstance(part, Tensor) or part.shape != output.shape:
            shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise MimicError(
                f"the rule for {type(layer).__name__} returned {shape} where the layer's output has shape "
                f"{tuple(output.shape)}; `apply` must return what the layer computes with the given parameters."
            )
        return part


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of an argument in which every tensor is replaced, within tuples, lists and dictionaries too."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:
        return {name: map_tensors(function, each) for name, each in value.items()}
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        mapped = [map_tensors(function, each) for each in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return an argument with its floating-point tensors in a dtype; indices and masks stay what they are."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)
