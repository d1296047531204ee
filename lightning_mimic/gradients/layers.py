"""Per-sample gradients of one layer, held as its input and its output gradient."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Apply = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]


def _linear(layer: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(inputs, weight, bias)


def _conv2d(layer: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The layer's own arithmetic with other weights: it honours stride, groups and padding_mode.
    output: Tensor = layer._conv_forward(inputs, weight, bias)  # type: ignore[operator]
    return output


# Layers linear in their parameters, the arithmetic of each, and how many axes follow the batch's at the least.
_LAYERS: dict[type[nn.Module], tuple[Apply, int]] = {nn.Linear: (_linear, 1), nn.Conv2d: (_conv2d, 3)}


class LayerGradients:
    """The matrix G of per-sample gradients of one layer, never built.

    Row *i* is ``∂ℓᵢ/∂(weight, bias)``, the outer product of the layer's input row ``aᵢ`` and its output
    gradient ``bᵢ``. Exact for a layer that is linear in its parameters, called once and not tied, under a
    loss that is a plain mean of independent samples with the batch axis first.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d``.
        inputs: The layer's input *a*, shape ``(B, ..., in)`` or ``(B, C, H, W)``.
        output_gradients: ``∂ℓᵢ/∂output`` of the unreduced losses, the output's shape.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> rows = LayerGradients(layer, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 1))
        >>> rows.dot({"weight": torch.tensor([[3.0, 5.0]])})
        tensor([ 3., 10.])
    """

    def __init__(self, layer: nn.Module, inputs: Tensor, output_gradients: Tensor) -> None:
        self._layer = layer
        self._apply = _LAYERS[type(layer)][0]
        self._inputs = inputs
        self._output_gradients = output_gradients

    @staticmethod
    def check(name: str, layer: nn.Module) -> None:
        """Raises ``ValueError`` if the layer's gradients do not follow from its input and output gradient."""
        # An exact type: a subclass may compute something else in its forward.
        if type(layer) not in _LAYERS:
            known = ", ".join(t.__name__ for t in _LAYERS)
            raise ValueError(
                f"`parameters`: {name!r} is a {type(layer).__name__}; per-sample gradients are known for {known} "
                "layers. Name such a layer."
            )
        own = {n for n, _ in layer.named_parameters(recurse=False)}
        if "weight" not in own or not own <= {"weight", "bias"}:
            raise ValueError(
                f"`parameters`: {name!r} makes its weight of {', '.join(sorted(own))} (weight_norm, pruning ...), in "
                "which it is not linear. Name another layer, or remove the reparametrisation."
            )

    @staticmethod
    def batch_first(layer: nn.Module, output: Tensor) -> bool:
        """Whether ``output`` has a batch axis before the axes that one sample takes."""
        return output.ndim > _LAYERS[type(layer)][1]

    @torch.no_grad()
    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """``⟨gᵢ, v⟩`` for every sample.

        Args:
            vectors: ``"weight"`` and/or ``"bias"`` to a tensor of that parameter's shape; a part that is
                left out counts as zero.

        Returns:
            Shape ``(B,)``, in the dtype of ``vectors`` or higher.
        """
        weight, bias = vectors.get("weight"), vectors.get("bias")
        dtype = torch.promote_types(next(iter(vectors.values())).dtype, torch.float32)
        gradients = self._output_gradients.to(dtype)
        # Autocast would put the product back into half precision.
        with torch.autocast(gradients.device.type, enabled=False):
            if weight is not None:
                moved = self._apply(self._layer, self._inputs.to(dtype), weight, bias)
            else:
                assert bias is not None
                axes = _LAYERS[type(self._layer)][1]  # the bias runs along the first of a sample's own axes
                moved = bias.reshape(-1, *[1] * (axes - 1)).expand_as(gradients)
            return (gradients * moved).flatten(1).sum(1)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """``Σᵢ weightsᵢ gᵢ``, the gradient of a weighted loss.

        Args:
            weights: Shape ``(B,)``.

        Returns:
            ``"weight"``, and ``"bias"`` where the layer has one, each of that parameter's shape.
        """
        parameters = {name: p.detach().requires_grad_() for name, p in self._layer.named_parameters(recurse=False)}
        dtype = next(iter(parameters.values())).dtype
        rows = (self._output_gradients * weights.view(-1, *[1] * (self._output_gradients.ndim - 1))).to(dtype)
        with torch.enable_grad(), torch.autocast(rows.device.type, enabled=False):
            output = self._apply(self._layer, self._inputs.to(dtype), parameters["weight"], parameters.get("bias"))
            sums = torch.autograd.grad(output, list(parameters.values()), rows)
        return dict(zip(parameters, sums, strict=True))
