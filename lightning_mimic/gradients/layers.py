"""Per-sample gradients of one layer, held as its input and its output gradient."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mimic.errors import MimicError


def _linear(layer: nn.Linear, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(inputs, weight, bias)


def _convolution(layer: nn.Conv2d, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The layer's own arithmetic with other weights: it honours stride, groups and padding_mode.
    output: Tensor = layer._conv_forward(inputs, weight, bias)
    return output


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(inputs, layer.normalized_shape, weight, bias, layer.eps)


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.group_norm(inputs, layer.num_groups, weight, bias, layer.eps)


def _batch_norm(layer: nn.BatchNorm2d, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    by_batch = layer.training or layer.running_mean is None
    mean, variance = (None, None) if by_batch else (layer.running_mean, layer.running_var)
    if mean is not None and variance is not None:
        mean, variance = mean.to(inputs.dtype), variance.to(inputs.dtype)
    return F.batch_norm(inputs, mean, variance, weight, bias, by_batch, 0.0, layer.eps)


def _embedding(layer: nn.Embedding, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = F.embedding(inputs, weight, layer.padding_idx)
    # The padding row gets no gradient, whatever direction it is given.
    return rows if layer.padding_idx is None else rows * (inputs != layer.padding_idx).unsqueeze(-1)


@dataclass(frozen=True)
class _Rule:
    """What a kind of layer computes with other weights, and how many axes one sample takes at the least."""

    apply: Callable[..., Tensor]
    axes: int
    channels_last: bool = False  # the bias runs along the last axes, not along the second


# Layers linear in their parameters.
_RULES: dict[type[nn.Module], _Rule] = {
    nn.Linear: _Rule(_linear, 1, channels_last=True),
    nn.Conv1d: _Rule(_convolution, 2),
    nn.Conv2d: _Rule(_convolution, 3),
    nn.Conv3d: _Rule(_convolution, 4),
    nn.LayerNorm: _Rule(_layer_norm, 1, channels_last=True),
    nn.GroupNorm: _Rule(_group_norm, 1),
    nn.BatchNorm1d: _Rule(_batch_norm, 1),
    nn.BatchNorm2d: _Rule(_batch_norm, 3),
    nn.BatchNorm3d: _Rule(_batch_norm, 4),
    nn.Embedding: _Rule(_embedding, 1, channels_last=True),
}
_EMBEDDING_REFUSED = ("max_norm", "scale_grad_by_freq", "sparse")


class LayerGradients:
    """The matrix G of per-sample gradients of one layer, never built.

    Row *i* is ``∂ℓᵢ/∂(weight, bias)``; for a linear layer the outer product of its input row ``aᵢ`` and its
    output gradient ``bᵢ``. Exact for a layer that is linear in its parameters, called once and not tied, under
    a loss that is a plain mean of independent samples with the batch axis first. Above a batch
    normalisation in training mode the rows are the samples' contributions to the total.

    Args:
        layer: A linear, convolutional, normalisation or embedding layer (:meth:`check`).
        inputs: The layer's input *a*, shape ``(B, ...)``.
        output_gradients: ``∂ℓᵢ/∂output`` of the unreduced losses, the output's shape.
        parts: Which of ``"weight"`` and ``"bias"`` the rows hold; all that the layer has, if left out.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> rows = LayerGradients(layer, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 1))
        >>> rows.dot({"weight": torch.tensor([[3.0, 5.0]])}), rows.norms()
        (tensor([ 3., 10.]), tensor([1., 2.]))
    """

    def __init__(
        self, layer: nn.Module, inputs: Tensor, output_gradients: Tensor, parts: Sequence[str] | None = None
    ) -> None:
        self._layer = layer
        self._rule = _rule(layer)
        self._inputs = inputs
        self._output_gradients = output_gradients
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        self._parts = own if parts is None else [name for name in own if name in parts]

    @staticmethod
    def check(name: str, layer: nn.Module) -> None:
        """Raises ``ValueError`` if the layer's gradients do not follow from its input and output gradient."""
        kind = next((kind for kind in type(layer).__mro__ if kind in _RULES), None)
        if kind is None:
            known = ", ".join(t.__name__ for t in _RULES)
            raise MimicError(
                f"`parameters`: {name!r} is a {type(layer).__name__}; per-sample gradients are known for {known} "
                "layers. Name such a layer."
            )
        if any(_method(layer, method) is not getattr(kind, method, None) for method in ("forward", "_conv_forward")):
            raise MimicError(
                f"`parameters`: {name!r} is a {type(layer).__name__} with a forward of its own, which may compute "
                f"something else than {kind.__name__}."
            )
        own = {n for n, _ in layer.named_parameters(recurse=False)}
        if "weight" not in own or not own <= {"weight", "bias"}:
            made = f"makes its weight of {', '.join(sorted(own))}" if own else "has no plain weight of its own"
            raise MimicError(
                f"`parameters`: {name!r} {made} (weight_norm, pruning ...), in which it is not linear. Name another "
                "layer, or remove the reparametrisation."
            )
        options = _EMBEDDING_REFUSED if isinstance(layer, nn.Embedding) else ()
        refused = [option for option in options if getattr(layer, option)]
        if refused:
            raise MimicError(
                f"`parameters`: {name!r} is an Embedding with {', '.join(refused)}, under which its gradient is not "
                "linear in its rows or not dense. Switch that off, or name another layer."
            )

    @staticmethod
    def products(layer: nn.Module) -> frozenset[str]:
        """The products that are known for this kind of layer."""
        all_four = isinstance(layer, nn.Linear)
        return frozenset({"dot", "norms", "gram", "mean"} if all_four else {"dot", "mean"})

    @staticmethod
    def batch_first(layer: nn.Module, shape: Sequence[int]) -> bool:
        """Whether an output of this shape has a batch axis before the axes that one sample takes."""
        axes = len(layer.normalized_shape) if isinstance(layer, nn.LayerNorm) else _rule(layer).axes
        return len(shape) > axes

    def changed(self, change: Callable[[Tensor], Tensor]) -> "LayerGradients":
        """Rows of other samples, whose inputs and output gradients ``change`` makes of these."""
        return LayerGradients(self._layer, change(self._inputs), change(self._output_gradients), self._parts)

    def divided(self, scale: Tensor) -> "LayerGradients":
        """The same rows, if these are ``scale`` times too large; in float32 or higher."""
        dtype = torch.promote_types(self._output_gradients.dtype, torch.float32)
        return LayerGradients(self._layer, self._inputs, self._output_gradients.to(dtype) / scale, self._parts)

    @torch.no_grad()
    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """``⟨gᵢ, v⟩`` for every sample.

        Args:
            vectors: ``"weight"`` and/or ``"bias"`` to a tensor of that parameter's shape; a part that is
                left out counts as zero.

        Returns:
            Shape ``(B,)``, in the dtype of ``vectors`` or higher.
        """
        dtype = torch.promote_types(next(iter(vectors.values())).dtype, torch.float32)
        weight, bias = (vectors[part].to(dtype) if part in vectors else None for part in ("weight", "bias"))
        gradients = self._output_gradients.to(dtype)
        with _full_precision(gradients):
            if weight is not None:
                moved = self._rule.apply(self._layer, _as(self._inputs, dtype), weight, bias)
            else:
                assert bias is not None
                along = bias if self._rule.channels_last else bias.reshape(-1, *[1] * (gradients.ndim - 2))
                moved = along.expand_as(gradients)
            return (gradients * moved).flatten(1).sum(1)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """``‖gᵢ‖`` for every sample of an ``nn.Linear``, shape ``(B,)``; without tokens ``‖aᵢ‖ ‖bᵢ‖``."""
        inputs, gradients = self._tokens()
        # A confident sample's gradient is small, and its square may be none at all.
        size = gradients.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(gradients.dtype).tiny)
        gradients = gradients / size
        square = torch.zeros(len(inputs), dtype=inputs.dtype, device=inputs.device)
        with _full_precision(gradients):
            if "weight" in self._parts:
                tokens = inputs.shape[1]
                if tokens * tokens <= inputs.shape[2] * gradients.shape[2]:  # the smaller of two equal sums
                    square = square + ((inputs @ inputs.mT) * (gradients @ gradients.mT)).sum((1, 2))
                else:
                    square = square + (gradients.mT @ inputs).square().sum((1, 2))
            if "bias" in self._parts:
                square = square + gradients.sum(1).square().sum(1)
        return square.clamp(min=0).sqrt() * size[:, 0, 0]  # rounding may leave a sum of pairs below zero

    @torch.no_grad()
    def gram(self) -> Tensor:
        """``⟨gᵢ, gⱼ⟩`` for all pairs of samples of an ``nn.Linear``, shape ``(B, B)``."""
        inputs, gradients = self._tokens()
        rows, tokens = inputs.shape[:2]
        gram = torch.zeros(rows, rows, dtype=inputs.dtype, device=inputs.device)
        with _full_precision(gradients):
            if "weight" in self._parts:
                if rows * tokens * tokens <= inputs.shape[2] * gradients.shape[2]:
                    a, b = inputs.flatten(0, 1), gradients.flatten(0, 1)
                    pairs = (a @ a.T) * (b @ b.T)
                    gram = gram + pairs.view(rows, tokens, rows, tokens).sum((1, 3))
                else:
                    flat = (gradients.mT @ inputs).flatten(1)
                    gram = gram + flat @ flat.T
            if "bias" in self._parts:
                sums = gradients.sum(1)
                gram = gram + sums @ sums.T
        return gram

    def mean(self) -> dict[str, Tensor]:
        """``Σᵢ gᵢ / B`` by part, each of that parameter's shape."""
        rows = self._output_gradients
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return self.weighted_sum(torch.full((len(rows),), 1 / len(rows), dtype=dtype, device=rows.device))

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """``Σᵢ weightsᵢ gᵢ``, the gradient of a weighted loss.

        Args:
            weights: Shape ``(B,)``.

        Returns:
            By part, each of that parameter's shape.
        """
        held = {name: p.detach().requires_grad_() for name, p in self._layer.named_parameters(recurse=False)}
        wanted = {name: held[name] for name in self._parts}
        dtype = next(iter(held.values())).dtype
        rows = (self._output_gradients * weights.view(-1, *[1] * (self._output_gradients.ndim - 1))).to(dtype)
        with torch.enable_grad(), _full_precision(rows):
            output = self._rule.apply(self._layer, _as(self._inputs, dtype), held["weight"], held.get("bias"))
            sums = torch.autograd.grad(output, list(wanted.values()), rows)
        return dict(zip(wanted, sums, strict=True))

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Input and output gradient as ``(B, tokens, features)``, in float32 or higher."""
        if not isinstance(self._layer, nn.Linear):
            raise TypeError(f"norms and gram are known for Linear layers, not for {type(self._layer).__name__}.")
        dtype = torch.promote_types(self._output_gradients.dtype, torch.float32)
        rows = len(self._output_gradients)
        pair = [t.to(dtype).reshape(rows, -1, t.shape[-1]) for t in (self._inputs, self._output_gradients)]
        return pair[0], pair[1]


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast would put products back into half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _method(layer: nn.Module, name: str) -> object:
    """What the layer calls by this name: the class's function, or what was put in its place on the object."""
    return vars(layer).get(name, getattr(type(layer), name, None))


def _rule(layer: nn.Module) -> _Rule:
    return next(_RULES[kind] for kind in type(layer).__mro__ if kind in _RULES)


def _as(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs in the product's dtype; an embedding's are indices and stay what they are."""
    return inputs.to(dtype) if inputs.is_floating_point() else inputs
