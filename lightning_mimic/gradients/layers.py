"""Per-sample gradients of one layer, held as its inputs and its output gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.gradients.layer_rule import cast, map_tensors
from lightning_mimic.gradients.layer_rules import is_linear, objection, rule_of
from lightning_mimic.gradients.rule_check import check_registered_rule
from lightning_mimic.gradients.sample_gradients import refuse_product


class LayerGradients:
    """The matrix G of per-sample gradients of one layer, never built.

    Row *i* is ``∂ℓᵢ/∂(weight, bias)``; for a linear layer the outer product of its input row ``aᵢ`` and its
    output gradient ``bᵢ``. Exact for a layer that is linear in its parameters, called once and not tied, under
    a loss that is a plain mean of independent samples with the batch axis first. Above a batch
    normalisation in training mode the rows are the samples' contributions to the total.

    Args:
        layer: A linear, convolutional, normalisation or embedding layer, a PReLU, or another one with a rule
            (:meth:`check`, :func:`~lightning_mimic.gradients.register_layer_rule`).
        inputs: The layer's input *a*, shape ``(B, ...)``, or a tuple of all positional arguments of its call.
        output_gradients: ``∂ℓᵢ/∂output`` of the unreduced losses, the output's shape.
        parts: Names of the parameters that the rows hold, such as ``"weight"``; all that the layer has, if left out.
        kwargs: Keyword arguments of the layer's call.

    Raises:
        MimicError: A rule that was registered for the layer is wrong.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> rows = LayerGradients(layer, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 1))
        >>> rows.dot({"weight": torch.tensor([[3.0, 5.0]])}), rows.norms()
        (tensor([ 3., 10.]), tensor([1., 2.]))
    """

    def __init__(
        self,
        layer: nn.Module,
        inputs: Tensor | tuple[Any, ...],
        output_gradients: Tensor,
        parts: Sequence[str] | None = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._layer = layer
        self._rule = rule_of(layer)
        self._inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self._kwargs = dict(kwargs or {})
        self._output_gradients = output_gradients
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        self._parts = own if parts is None else [name for name in own if name in parts]
        check_registered_rule(layer, self._inputs, self._kwargs)

    @staticmethod
    def check(name: str, layer: nn.Module) -> None:
        """Raise ``MimicError`` if the layer's gradients do not follow from its inputs and output gradient.

        Args:
            name: The layer's path, for the message.
            layer: The layer.
        """
        refused = objection(layer)
        if refused is not None:
            raise MimicError(f"`parameters`: {name!r} {refused}")

    @property
    def products(self) -> frozenset[str]:
        """The products that these rows offer, of ``"dot"``, ``"norms"`` and ``"gram"``."""
        return self.products_of(self._layer)

    @staticmethod
    def products_of(layer: nn.Module) -> frozenset[str]:
        """Return the products that the rows of a layer would offer: all three for ``nn.Linear``, else the dot.

        Example:
            >>> sorted(LayerGradients.products_of(nn.Conv2d(1, 1, 1)))
            ['dot']
        """
        return frozenset({"dot", "norms", "gram"} if is_linear(layer) else {"dot"})

    @property
    def output_gradients(self) -> Tensor:
        """``∂ℓᵢ/∂output`` of the unreduced losses, the output's shape."""
        return self._output_gradients

    @staticmethod
    def batch_first(layer: nn.Module, shape: Sequence[int]) -> bool:
        """Whether an output of this shape has a batch axis before the axes that one sample takes."""
        return len(shape) > rule_of(layer).axes(layer)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "LayerGradients":
        """Return rows of other samples, whose inputs and output gradients ``change`` makes of these."""
        inputs, kwargs = map_tensors(change, self._inputs), map_tensors(change, self._kwargs)
        return LayerGradients(self._layer, inputs, change(self._output_gradients), self._parts, kwargs=kwargs)

    def divided(self, scale: Tensor) -> "LayerGradients":
        """Return the rows divided by ``scale``, in float32 or higher."""
        dtype = torch.promote_types(self._output_gradients.dtype, torch.float32)
        gradients = self._output_gradients.to(dtype) / scale
        return LayerGradients(self._layer, self._inputs, gradients, self._parts, kwargs=self._kwargs)

    @torch.no_grad()
    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return ``⟨gᵢ, v⟩`` for every sample.

        Args:
            vectors: The layer's own parameter names, such as ``"weight"``, to a tensor of that parameter's shape; a
                part that is left out counts as zero.

        Returns:
            Shape ``(B,)``, in the dtype of ``vectors`` or higher.

        Raises:
            MimicError: A name that is no parameter of the layer.
        """
        for name in vectors:
            if name not in self._rule.parameters:
                raise MimicError(f"{type(self._layer).__name__} has no {name!r}; {nearest_names(name, self._parts)}.")
        change = self.output_change(vectors)
        if is_linear(self._layer) and "weight" in vectors:
            # Nobody else holds what a matrix product has made, and other memory of its size costs more than the rest.
            return change.mul_(self._output_gradients).flatten(1).sum(1)
        return self.along(change)

    @torch.no_grad()
    def output_change(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return the change of the layer's output if its parameters moved by the vectors, which :meth:`dot` rests on.

        Args:
            vectors: As for :meth:`dot`.

        Returns:
            The output's shape, in the dtype of ``vectors`` or higher.
        """
        dtype = torch.promote_types(next(iter(vectors.values())).dtype, torch.float32)
        with _full_precision(self._output_gradients):
            return self._linear_part({part: vector.to(dtype) for part, vector in vectors.items()}, dtype)

    @torch.no_grad()
    def along(self, change: Tensor) -> Tensor:
        """Return the inner product of each sample's output gradient with a change of the output, shape ``(B,)``."""
        product = self._output_gradients.to(change.dtype) * change
        return product.flatten(1).sum(1) if product.ndim > 1 else product

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return ``‖gᵢ‖`` for every sample of an ``nn.Linear``, shape ``(B,)``; without tokens ``‖aᵢ‖ ‖bᵢ‖``."""
        inputs, gradients = self._tokens("norms")
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
        """Return ``⟨gᵢ, gⱼ⟩`` for all pairs of samples of an ``nn.Linear``, shape ``(B, B)``."""
        inputs, gradients = self._tokens("gram")
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
        """Return ``Σᵢ gᵢ / B`` by part, each of that parameter's shape."""
        rows = self._output_gradients
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return self.weighted_sum(torch.full((len(rows),), 1 / len(rows), dtype=dtype, device=rows.device))

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """Return ``Σᵢ weightsᵢ gᵢ``, the gradient of a weighted loss.

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
            output = self._linear_part(held, dtype)
            sums = torch.autograd.grad(output, list(wanted.values()), rows)
        return dict(zip(wanted, sums, strict=True))

    def _linear_part(self, vectors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return what the layer adds to its output for these parameters, inputs being cast to the dtype."""
        inputs, kwargs = cast(self._inputs, dtype), cast(self._kwargs, dtype)
        return self._rule.linear_part(self._layer, vectors, inputs, kwargs, self._output_gradients)

    def _tokens(self, product: str) -> tuple[Tensor, Tensor]:
        """Return input and output gradient as ``(B, tokens, features)``, in float32 or higher."""
        if product not in self.products:
            refuse_product(product, f"LayerGradients of {type(self._layer).__name__}", self.products)
        dtype = torch.promote_types(self._output_gradients.dtype, torch.float32)
        rows = len(self._output_gradients)
        inputs: Tensor = next(each for each in (*self._inputs, *self._kwargs.values()))
        pair = [t.to(dtype).reshape(rows, -1, t.shape[-1]) for t in (inputs, self._output_gradients)]
        return pair[0], pair[1]


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast would put products back into half precision."""
    return torch.autocast(tensor.device.type, enabled=False)
