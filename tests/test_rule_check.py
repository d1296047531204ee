"""A rule is compared with autograd before it is used, and a wrong one never scores."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import LayerGradients, LayerRule, check_layer_rule, layer_rules, register_layer_rule
from support.cases import case
from support.custom_layers import NAMES, RIGHT, SCALE, Modulate, Square, call, modulate
from support.layer_kinds import LAYERS, made


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(layer_rules, "_REGISTERED", {})


def raises(message):
    return pytest.raises(MimicError, match=f"^{re.escape(message)}$")


def test_a_rule_is_compared_once_per_layer_and_mode_and_leaves_no_trace():
    register_layer_rule(Modulate, RIGHT)
    layer, inputs, b = call()
    state, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    layer.register_forward_hook(lambda *_: pytest.fail("a hook was run"))
    counts = []
    for training in (True, True, False, False, True):
        layer.train(training)
        Modulate.runs = 0
        with torch.no_grad():  # as inside a backward pass
            LayerGradients(layer, inputs, b)
        counts.append(Modulate.runs)
    assert (counts[0] > 0, counts[1:]) == (True, [0, counts[0], 0, 0])
    torch.testing.assert_close(dict(layer.state_dict()), dict(state), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in layer.parameters())
    Modulate.runs = 0
    LayerGradients(copy.deepcopy(layer), inputs, b)
    assert Modulate.runs == counts[0]


def test_arguments_that_were_not_given_before_are_compared_when_they_are():
    class Masked(Square):
        def forward(self, x, mask=None):
            return x * self.weight if mask is None else x * self.weight * mask

    register_layer_rule(Masked, LayerRule(lambda layer, p, x, mask=None: x * p["weight"], ("weight",)))
    layer, x = Masked(), torch.randn(4, 3)
    LayerGradients(layer, x, x)
    LayerGradients(layer, (x, None), x)
    for inputs, kwargs in (((x, x > 0), {}), ((x,), {"mask": x > 0})):
        with pytest.raises(MimicError, match="the rule for Masked cannot be used"):
            LayerGradients(layer, inputs, x, kwargs=kwargs)


def test_another_rule_for_the_same_layer_is_compared_anew():
    register_layer_rule(Modulate, RIGHT)
    layer, inputs, b = call()
    LayerGradients(layer, inputs, b)
    register_layer_rule(Modulate, LayerRule(lambda *a, **k: 2 * modulate(*a, **k), NAMES), replace=True)
    with pytest.raises(MimicError, match="the rule for Modulate cannot be used"):
        LayerGradients(layer, inputs, b)


def without(name):
    def apply(layer, parameters, *inputs, **kwargs):
        return modulate(layer, {n: v if n != name else v * 0 for n, v in parameters.items()}, *inputs, **kwargs)

    return apply


def detached(layer, parameters, *inputs):
    return modulate(layer, {n: v.detach() for n, v in parameters.items()}, *inputs)


def own_values(layer, parameters, *inputs):  # forgets to use what it is given
    return modulate(layer, parameters | {"gain": layer.gain}, *inputs)


def nearly(layer, parameters, *inputs):
    return modulate(layer, parameters | {"gain": parameters["gain"] * torch.tensor([1, 1, 1.02])}, *inputs)


WRONG = {
    "factor": (lambda *a: 2 * modulate(*a), "its product with other values of 'gain' is not autograd's"),
    "no gain": (without("gain"), "its product with other values of 'gain' is not"),
    "no mix": (without("mix"), "its product with other values of 'mix' is not"),
    "nearly": (nearly, "its product with other values of 'gain' is not"),
    "own values": (own_values, "its product with other values of 'gain' is not"),
    "constant": (
        lambda layer, p, x, c: modulate(layer, p, x, c) + x.sin(),
        "its product with other values of 'gain' is not",
    ),
    "not linear": (
        lambda layer, p, *x: modulate(layer, p, *x).square(),
        "its product with other values of 'gain' is not",
    ),
    "detached": (detached, "its gradient by 'gain' is not autograd's"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_rule_is_refused_at_its_first_use(kind):
    apply, message = WRONG[kind]
    register_layer_rule(Modulate, LayerRule(apply, NAMES, added=("offset",), sample_axes=2))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer, inputs, b = call(dtype)
        for check in (lambda: LayerGradients(layer, inputs, b), lambda: check_layer_rule(layer, *inputs)):  # noqa: B023
            with case(dtype), pytest.raises(MimicError, match=f"^the rule for Modulate cannot be used: {message}"):
                check()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            LayerRule(modulate, NAMES, added=("offset",), channels_last=True, sample_axes=2),
            "expanded size of the tensor",
        ),
        (LayerRule(modulate, NAMES, added=("offset", "gain"), sample_axes=2), "gain"),
        (
            LayerRule(lambda layer, p, x, c: modulate(layer, p, x, c).sum(0, keepdim=True), NAMES),
            r"returned \(1, 3, 5\)",
        ),
        (LayerRule(lambda layer, p, x, c: 0.0, NAMES), "returned float where the layer's output has shape"),
    ],
)
def test_a_rule_whose_shapes_or_added_parts_are_wrong_is_refused(rule, message):
    register_layer_rule(Modulate, rule)
    layer, inputs, b = call()
    with pytest.raises((MimicError, RuntimeError, KeyError), match=message):
        LayerGradients(layer, inputs, b)


class Straight(Square):  # the gradient is not that of what is computed
    def forward(self, x):
        return x * (self.weight + (2 * self.weight - self.weight).detach())


class Random(Square):
    def forward(self, x):
        return F.dropout(x) * self.weight


class Twofold(Square):
    def forward(self, x):
        return x * self.weight, x


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        (
            Square,
            LayerRule(lambda layer, p, x: x * p["weight"].square(), ("weight",)),
            "the layer is not linear in its",
        ),
        (Square, SCALE, "the layer is not linear in its parameters, so that no rule can be right; name others."),
        (Random, SCALE, "the layer is not linear in its parameters"),
        (
            Straight,
            LayerRule(lambda layer, p, x: 2 * x * p["weight"], ("weight",)),
            "its product with other values of 'weight' is not autograd's.",
        ),
        (Twofold, SCALE, "the layer returns a tuple, not one tensor."),
    ],
)
def test_a_layer_for_which_no_rule_can_be_right_is_refused(kind, rule, message):
    register_layer_rule(kind, rule)
    x = torch.randn(4, 3)
    random = torch.get_rng_state()
    with pytest.raises(MimicError, match=f"^the rule for {kind.__name__} cannot be used: {re.escape(message)}"):
        LayerGradients(kind(), x, x)
    assert torch.equal(torch.get_rng_state(), random)


class Own(nn.Embedding):
    pass


def test_a_copied_rule_that_forgets_the_padding_row_is_refused():
    layer, words = Own(4, 3, padding_idx=0), torch.tensor([[0, 1], [2, 0]])
    plain = LayerRule(lambda layer, p, x: F.embedding(x, p["weight"], layer.padding_idx), ("weight",))
    register_layer_rule(Own, plain)
    with raises("the rule for Own cannot be used: its product with other values of 'weight' is not autograd's."):
        LayerGradients(layer, words, torch.ones(2, 2, 3))
    LayerGradients(nn.Embedding(4, 3, padding_idx=0), words, torch.ones(2, 2, 3))
    register_layer_rule(Own, LayerRule(layer_rules.SHIPPED_RULES[nn.Embedding].apply, ("weight",)), replace=True)
    dot = LayerGradients(layer, words, torch.ones(2, 2, 3)).dot({"weight": torch.eye(4, 3)})
    assert dot.tolist() == [1, 1]


def test_what_autograd_differentiates_counts_and_not_what_the_layer_computes():
    register_layer_rule(Straight, SCALE)
    x, b = torch.randn(4, 3), torch.randn(4, 3)
    dot = LayerGradients(Straight(), x, b).dot({"weight": torch.ones(3)})
    torch.testing.assert_close(dot, (x * b).sum(1))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, rows):
        return None, (rows * ctx.saved_tensors[0]).sum(0)


class Custom(Square):
    def forward(self, x):
        return Once.apply(x, self.weight)


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (torch.tensor([1, 1, 1.03]), False), (0.0, False)])
def test_a_layer_that_can_be_differentiated_once_only_is_compared_by_its_gradients(factor, right):
    register_layer_rule(Custom, LayerRule(lambda layer, p, x: factor * x * p["weight"], ("weight",)))
    x = torch.randn(4, 3)
    if right:
        check_layer_rule(Custom(), x)
        return
    with pytest.raises(MimicError, match=r"the rule for Custom cannot be used: its (product|gradient) .*'weight'"):
        check_layer_rule(Custom(), x)


def test_of_such_a_layer_the_product_is_compared_with_the_gradient():
    rule = LayerRule(lambda layer, p, x: x * (p["weight"] + p["weight"].detach()), ("weight",))  # the gradient is right
    register_layer_rule(Custom, rule)
    with pytest.raises(MimicError, match="its product with other values of 'weight' is not autograd's"):
        check_layer_rule(Custom(), torch.randn(4, 3))


def test_inputs_that_show_nothing_leave_the_comparison_to_the_next_call_and_nan_shows_nothing():
    register_layer_rule(Square, LayerRule(lambda layer, p, x: 2 * x * p["weight"], ("weight",)))

    class Plain(Square):
        def forward(self, x):
            return x * self.weight

    register_layer_rule(Plain, LayerRule(lambda layer, p, x: 2 * x * p["weight"], ("weight",)))
    layer, nan = Plain(), torch.full((2, 3), torch.nan)
    for inputs in (torch.zeros(2, 3), nan):
        LayerGradients(layer, inputs, torch.ones(2, 3))
        with pytest.raises(MimicError, match="does not depend on 'weight' with these inputs"):
            check_layer_rule(layer, inputs)
    nan[0] = 1.0
    with pytest.raises(MimicError, match="its product with other values of 'weight' is not autograd's"):
        LayerGradients(layer, nan, torch.ones(2, 3))
    register_layer_rule(Plain, SCALE, replace=True)
    dot = LayerGradients(layer, nan, torch.ones(2, 3)).dot({"weight": torch.ones(3)})
    assert dot.isnan().tolist() == [False, True]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_rules_that_ship_stand_their_own_comparison(kind):
    for dtype in (torch.float32, torch.float64, torch.float16):
        layer, (x, _) = made(kind, 4, torch.float32 if dtype == torch.float16 else dtype)
        with case(dtype), torch.autocast("cpu", torch.bfloat16):
            check_layer_rule(layer.to(dtype), x)
