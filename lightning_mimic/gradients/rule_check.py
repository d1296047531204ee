"""The comparison of a layer's rule with autograd."""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.layer_rule import LayerRule, cast, map_tensors
from lightning_mimic.gradients.layer_rules import is_registered, objection, rule_of
from lightning_mimic.random_streams import torch_generator

# Of the largest value; matrix products on a GPU may be rounded to TF32's 10 bits.
_TOLERANCE = {torch.float32: 5e-3, torch.float64: 1e-7}

# Layers whose registered rule was found right, with the rule and the kinds of call that were compared.
_CHECKED: weakref.WeakKeyDictionary[nn.Module, list[tuple[LayerRule, Any]]] = weakref.WeakKeyDictionary()


def check_layer_rule(layer: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Compare the rule of a layer with autograd on given inputs.

    With random values in place of its parameters, the layer's gradient must not depend on these values, for each
    parameter alone and for all of them the rule's product must be autograd's, and so must be the gradient of the rule.
    A wrong rule fails with probability 1, unless its error is within rounding (0.5 % of the largest value in float32).
    Takes about ten runs of the layer; neither the layer, nor gradients, nor the random state change.

    Rules that ship are compared by the tests. Registered ones are compared at the first call of each layer that is
    scored, and not at registration, because only then the inputs are known that the layer really gets.

    Args:
        layer: A layer with a rule.
        *inputs: Positional arguments of the layer's call, as a batch.
        **kwargs: Keyword arguments of the layer's call.

    Raises:
        MimicError: The layer has no rule or is not one that the rule is for, the rule is wrong, or the inputs do not
            show it, because the output does not depend on a parameter.

    Example:
        >>> check_layer_rule(nn.ConvTranspose1d(2, 3, 4, stride=2), torch.randn(5, 2, 6), output_size=[15])
        >>> check_layer_rule(nn.Linear(2, 3), torch.zeros(5, 2))
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: the output of the Linear does not depend on 'weight' with these inputs, so
        that its rule cannot be checked; give others.
    """
    refused = objection(layer)
    if refused is not None:
        raise MimicError(f"the layer {refused}")
    unseen = _compare(layer, inputs, kwargs)
    if unseen:
        raise MimicError(
            f"the output of the {type(layer).__name__} does not depend on {unseen[0]!r} with these inputs, so that its "
            "rule cannot be checked; give others."
        )


def check_registered_rule(layer: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Compare the rule of a layer with autograd, if it was registered and has not been compared for such a call.

    Calls differ in the layer's mode (training or evaluation), in which arguments are given, and in their axes. Where
    the output does not depend on a parameter with these inputs, the next call is compared too.

    Raises:
        MimicError: The rule is wrong.
    """
    if not is_registered(layer):
        return
    given: dict[Any, Any] = {**dict(enumerate(inputs)), **kwargs}
    axes = {key: value.ndim if isinstance(value, Tensor) else value is None for key, value in given.items()}
    checked, now = _CHECKED.setdefault(layer, []), (rule_of(layer), (layer.training, axes))
    if now not in checked and not _compare(layer, inputs, kwargs):
        checked.append(now)


def _compare(layer: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Raise ``MimicError`` if the rule is wrong, and return the parameters on which the output does not depend."""
    rule, parameters = rule_of(layer), dict(layer.named_parameters(recurse=False))
    first = next(iter(parameters.values()))
    dtype, device = torch.promote_types(first.dtype, torch.float32), first.device
    generator = torch_generator(0, "rule check")

    def drawn() -> dict[str, Tensor]:
        return {n: torch.randn(p.shape, generator=generator, dtype=dtype).to(device) for n, p in parameters.items()}

    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        # A sample that holds NaN is compared at finite numbers.
        args, named = (map_tensors(_finite, cast(each, dtype)) for each in (tuple(inputs), dict(kwargs)))
        run, values, vectors = _with_parameters(layer, dtype, args, named), drawn(), drawn()
        of_layer = _Output(run, values)
        # All of one sign and all different: neither the gradient nor an error cancels in the sums.
        rows = torch.rand(of_layer.output.shape, generator=generator, dtype=dtype).add(0.5).to(device)
        expected = of_layer.gradients(rows)
        elsewhere = _Output(run, vectors).gradients(rows)
        if not all(_close(elsewhere[name], expected[name]) for name in parameters):
            raise _wrong(layer, "the layer is not linear in its parameters, so that no rule can be right; name others")
        of_rule = _Output(lambda p: rule.linear_part(layer, p, args, named, of_layer.output), values).gradients(rows)
        for names in [[name] for name in parameters] + [list(parameters)] * (len(parameters) > 1):
            some, quoted = {name: vectors[name] for name in names}, " and ".join(map(repr, names))
            with torch.no_grad():
                part = rule.linear_part(layer, some, args, named, of_layer.output)
            along = sum(
                ((g * some[n]).sum() for n, g in of_layer.gradients(rows * part).items() if n in some), rows[:0].sum()
            )
            product = of_layer.product(some)
            if not _close(along, (rows * part * part).sum()) or (product is not None and not _close(part, product)):
                raise _wrong(layer, f"its product with other values of {quoted} is not autograd's")
            if not all(_close(of_rule[name], expected[name]) for name in names):
                raise _wrong(layer, f"its gradient by {quoted} is not autograd's")
        return [name for name in parameters if not bool(expected[name].any())]


class _Output:
    """A function's output for given parameters, and its derivatives by autograd."""

    def __init__(self, function: Callable[[Mapping[str, Tensor]], Tensor], values: Mapping[str, Tensor]) -> None:
        self._leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        self.output = function(self._leaves)

    def gradients(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the gradient by each parameter, given that of the output."""
        if not self.output.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}
        found = torch.autograd.grad(
            self.output, list(self._leaves.values()), rows, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self._leaves, found, strict=True))

    def product(self, vectors: Mapping[str, Tensor]) -> Tensor | None:
        """Return the derivative along parameters, or ``None`` if the layer cannot be differentiated twice."""
        rows = torch.zeros_like(self.output, requires_grad=True)
        try:
            wanted = [self._leaves[name] for name in vectors]
            found = torch.autograd.grad(self.output, wanted, rows, create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(found, vectors.values(), strict=True)]).sum()
            return torch.autograd.grad(along, rows)[0]
        except RuntimeError:
            return None


def _with_parameters(
    layer: nn.Module, dtype: torch.dtype, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return a function from parameters to the layer's output, by the layer's own forward, without its hooks."""

    def run(parameters: Mapping[str, Tensor]) -> Tensor:
        twin = copy.copy(layer)
        buffers = {name: None if b is None else cast(b.clone(), dtype) for name, b in layer._buffers.items()}
        vars(twin).update(_parameters={**layer._parameters, **parameters}, _buffers=buffers)
        output = twin.forward(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise _wrong(layer, f"the layer returns a {type(output).__name__}, not one tensor")
        return output

    return run


def _close(found: Tensor, expected: Tensor) -> bool:
    if not expected.numel():
        return True
    tolerance = _TOLERANCE.get(expected.dtype, 5e-3)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())  # False for NaN


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor.detach(), 0.0, 0.0, 0.0)


def _wrong(layer: nn.Module, why: str) -> MimicError:
    return MimicError(f"the rule for {type(layer).__name__} cannot be used: {why}.")
