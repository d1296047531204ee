"""The rules that ship: torch's layers whose output is linear in their parameters."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mimic.gradients.layer_rule import LayerRule, Parameters


def _linear(layer: nn.Linear, parameters: Parameters, input: Tensor) -> Tensor:
    return F.linear(input, parameters["weight"], parameters.get("bias"))


def _bilinear(layer: nn.Bilinear, parameters: Parameters, input1: Tensor, input2: Tensor) -> Tensor:
    return F.bilinear(input1, input2, parameters["weight"], parameters.get("bias"))


def _convolution(layer: nn.Conv2d, parameters: Parameters, input: Tensor) -> Tensor:
    # The layer's own arithmetic with other weights: it honours stride, groups and padding_mode.
    output: Tensor = layer._conv_forward(input, parameters["weight"], parameters.get("bias"))
    return output


def _transposed_convolution(
    layer: nn.ConvTranspose2d, parameters: Parameters, input: Tensor, output_size: list[int] | None = None
) -> Tensor:
    axes = len(layer.kernel_size)
    options: Any = layer  # torch declares lists where it keeps tuples
    output_padding = layer._output_padding(
        input, output_size, options.stride, options.padding, options.kernel_size, axes, options.dilation
    )
    transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    weight, bias, groups = parameters["weight"], parameters.get("bias"), layer.groups
    output: Tensor = transposed(
        input, weight, bias, layer.stride, layer.padding, output_padding, groups, layer.dilation
    )
    return output


def _layer_norm(layer: nn.LayerNorm, parameters: Parameters, input: Tensor) -> Tensor:
    return F.layer_norm(input, layer.normalized_shape, parameters["weight"], parameters.get("bias"), layer.eps)


def _rms_norm(layer: nn.RMSNorm, parameters: Parameters, x: Tensor) -> Tensor:
    # Without eps it is that of the dtype torch computes in, float32 for half precision too.
    return F.rms_norm(x, layer.normalized_shape, parameters["weight"], layer.eps)


def _group_norm(layer: nn.GroupNorm, parameters: Parameters, input: Tensor) -> Tensor:
    return F.group_norm(input, layer.num_groups, parameters["weight"], parameters.get("bias"), layer.eps)


def _batch_norm(layer: nn.BatchNorm2d, parameters: Parameters, input: Tensor) -> Tensor:
    by_batch = layer.training or layer.running_mean is None
    mean, variance = (None, None) if by_batch else (layer.running_mean, layer.running_var)
    if mean is not None and variance is not None:
        mean, variance = mean.to(input.dtype), variance.to(input.dtype)
    return F.batch_norm(input, mean, variance, parameters["weight"], parameters.get("bias"), by_batch, 0.0, layer.eps)


def _embedding(layer: nn.Embedding, parameters: Parameters, input: Tensor) -> Tensor:
    rows = F.embedding(input, parameters["weight"], layer.padding_idx)
    # The padding row gets no gradient, whatever direction it is given.
    return rows if layer.padding_idx is None else rows * (input != layer.padding_idx).unsqueeze(-1)


def _unsupported_embedding(layer: nn.Embedding) -> str | None:
    refused = [option for option in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(layer, option)]
    if not refused:
        return None
    return (
        f"is an Embedding with {', '.join(refused)}, under which its gradient is not linear in its rows or not dense. "
        "Switch that off, or name another layer."
    )


def _prelu(layer: nn.PReLU, parameters: Parameters, input: Tensor) -> Tensor:
    weight = parameters["weight"]
    return input.clamp(max=0) * (weight.view(-1, *[1] * (input.ndim - 2)) if len(weight) > 1 else weight)


def _normalized_axes(layer: nn.LayerNorm | nn.RMSNorm) -> int:
    return len(layer.normalized_shape)


def _with_bias(apply: Callable[..., Tensor], sample_axes: int | Callable[[Any], int], **fields: Any) -> LayerRule:
    return LayerRule(apply, ("weight", "bias"), added=("bias",), sample_axes=sample_axes, **fields)


_CONVOLUTION = {"methods": ("forward", "_conv_forward")}
_TRANSPOSED = {"methods": ("forward", "_output_padding")}

#: The rule of nn.Linear, whose rows offer norms and gram too.
LINEAR = _with_bias(_linear, 1, channels_last=True)

#: The rules by class; the tests compare every one of them with autograd.
SHIPPED_RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LINEAR,
    nn.Bilinear: _with_bias(_bilinear, 1, channels_last=True),
    nn.Conv1d: _with_bias(_convolution, 2, **_CONVOLUTION),
    nn.Conv2d: _with_bias(_convolution, 3, **_CONVOLUTION),
    nn.Conv3d: _with_bias(_convolution, 4, **_CONVOLUTION),
    nn.ConvTranspose1d: _with_bias(_transposed_convolution, 2, **_TRANSPOSED),
    nn.ConvTranspose2d: _with_bias(_transposed_convolution, 3, **_TRANSPOSED),
    nn.ConvTranspose3d: _with_bias(_transposed_convolution, 4, **_TRANSPOSED),
    nn.LayerNorm: _with_bias(_layer_norm, _normalized_axes, channels_last=True),
    nn.RMSNorm: LayerRule(_rms_norm, ("weight",), sample_axes=_normalized_axes),
    nn.GroupNorm: _with_bias(_group_norm, 1),
    nn.BatchNorm1d: _with_bias(_batch_norm, 1),
    nn.BatchNorm2d: _with_bias(_batch_norm, 3),
    nn.BatchNorm3d: _with_bias(_batch_norm, 4),
    nn.Embedding: LayerRule(_embedding, ("weight",), sample_axes=1, unsupported=_unsupported_embedding),
    nn.PReLU: LayerRule(_prelu, ("weight",), sample_axes=lambda layer: int(layer.num_parameters > 1)),
}
