"""The rules of layers: those that ship, for torch's layers, and those that are registered."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mimic.errors import MimicError
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

_REGISTERED: dict[type[nn.Module], LayerRule] = {}


def register_layer_rule(layer_class: type[nn.Module], rule: LayerRule, *, replace: bool = False) -> None:
    """Make layers of a class, and of its subclasses, known to :class:`~lightning_mimic.gradients.LayerGradients`.

    A wrong rule is never used: the first time a layer is scored by a registered rule, the rule is compared with
    autograd on the inputs of that call (:func:`~lightning_mimic.gradients.check_layer_rule`), at the cost of a few runs
    of that one layer; again if the layer changes between training and evaluation, or is called with other arguments.

    Args:
        layer_class: A subclass of ``nn.Module``.
        rule: Its rule.
        replace: Replace the rule that this very class has; without it that is refused. A subclass of a class with a
            rule needs no permission: the rule of the nearest class holds.

    Raises:
        MimicError: Not a layer class, not a rule, or a class that has a rule.

    Example:
        A layer with one factor per feature:

        >>> import torch
        >>> class Scale(nn.Module):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(features))
        ...
        ...     def forward(self, x):
        ...         return x * self.factor
        >>> register_layer_rule(Scale, LayerRule(lambda layer, p, x: x * p["factor"], parameters=("factor",)))
        >>> from lightning_mimic.gradients import LayerGradients
        >>> rows = LayerGradients(Scale(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2))
        >>> rows.dot({"factor": torch.tensor([1.0, 10.0])})
        tensor([21., 43.])

        The rule of ``nn.ConvTranspose2d``, without ``output_size``, for a class that repeats its forward:

        >>> import torch.nn.functional as F
        >>> class Upsample(nn.ConvTranspose2d):
        ...     def forward(self, input):
        ...         return F.conv_transpose2d(input, self.weight, self.bias, self.stride)
        >>> def upsample(layer, parameters, input):
        ...     return F.conv_transpose2d(input, parameters["weight"], parameters.get("bias"), layer.stride)
        >>> register_layer_rule(
        ...     Upsample, LayerRule(upsample, parameters=("weight", "bias"), added=("bias",), sample_axes=3)
        ... )
        >>> layer, images = Upsample(1, 1, 2, stride=2), torch.ones(3, 1, 4, 4)
        >>> rows = LayerGradients(layer, images, torch.ones_like(layer(images)))
        >>> rows.dot({"bias": torch.ones(1)})
        tensor([64., 64., 64.])
    """
    given: object = layer_class
    if not isinstance(given, type) or not issubclass(given, nn.Module):
        shown = given.__name__ if isinstance(given, type) else f"a {type(given).__name__}"
        raise MimicError(f"`layer_class` is {shown}; expected a subclass of nn.Module, such as nn.Linear.")
    if layer_class is nn.Module:
        raise MimicError("`layer_class` is nn.Module, whose rule would hold for every module; give the layer's class.")
    if not isinstance(rule, LayerRule):
        raise MimicError(f"`rule` is a {type(rule).__name__}; expected a lightning_mimic.gradients.LayerRule.")
    known = _REGISTERED.get(layer_class, SHIPPED_RULES.get(layer_class))
    if known is not None and known != rule and not replace:
        raise MimicError(
            f"{layer_class.__name__} has a rule; register one for a subclass, or replace it for all of its layers with "
            "`replace=True`."
        )
    if known is None or known != rule:
        _REGISTERED[layer_class] = rule


def find_rule(layer: nn.Module) -> tuple[type[nn.Module], LayerRule] | None:
    """Return the nearest class of a layer that has a rule, and the rule."""
    for kind in type(layer).__mro__:
        rule = _REGISTERED.get(kind, SHIPPED_RULES.get(kind))
        if rule is not None:
            return kind, rule
    return None


def rule_of(layer: nn.Module) -> LayerRule:
    """Return the rule of a layer that has one."""
    found = find_rule(layer)
    if found is None:
        raise MimicError(f"no rule is known for {type(layer).__name__}; register one with `register_layer_rule`.")
    return found[1]


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer computes what ``nn.Linear`` does; a subclass with another rule does not.

    Example:
        >>> is_linear(nn.Linear(2, 1)), is_linear(nn.Bilinear(2, 2, 1))
        (True, False)
    """
    found = find_rule(layer)
    return found is not None and found[1] is LINEAR and isinstance(layer, nn.Linear)


def is_registered(layer: nn.Module) -> bool:
    """Return whether the layer's rule was registered, and does not ship."""
    found = find_rule(layer)
    return found is not None and found[0] in _REGISTERED


def objection(layer: nn.Module) -> str | None:
    """Return why a layer's gradients do not follow from its call, as a phrase that goes on from the layer's name."""
    found = find_rule(layer)
    if found is None:
        known = ", ".join(kind.__name__ for kind in {**SHIPPED_RULES, **_REGISTERED})
        return (
            f"is a {type(layer).__name__}; per-sample gradients are known for {known} layers. Name such a layer, or "
            "register a rule for this one with `lightning_mimic.gradients.register_layer_rule`."
        )
    kind, rule = found
    if any(_method(layer, method) is not getattr(kind, method, None) for method in rule.methods):
        return (
            f"is a {type(layer).__name__} with a forward of its own, which may compute something else than "
            f"{kind.__name__}."
        )
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    if not own <= set(rule.parameters) or not set(rule.parameters) <= own | set(rule.added):
        missing = " and ".join(name for name in rule.parameters if name not in rule.added)
        what = f"makes its {missing} of {', '.join(sorted(own))}" if own else f"has no plain {missing} of its own"
        return (
            f"{what} (weight_norm, pruning ...), in which it is not linear. Name another layer, or remove the "
            "reparametrisation."
        )
    return None if rule.unsupported is None else rule.unsupported(layer)


def _method(layer: nn.Module, name: str) -> object:
    """Return what the layer calls by this name: the class's function, or its replacement on the object."""
    return vars(layer).get(name, getattr(type(layer), name, None))
