"""The known rules: those that ship and those that are registered."""

from torch import nn

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.layer_rule import LayerRule
from lightning_mimic.gradients.shipped_rules import LINEAR, SHIPPED_RULES

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
