"""What a user registers for layers of their own: refusals, inheritance, and exact products."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import LayerGradients, LayerRule, check_layer_rule, layer_rules, register_layer_rule
from oracles import per_sample_gradients, weighted_gradient
from support.cases import for_each
from support.custom_layers import NAMES, RIGHT, SCALE, Modulate, Square, call, modulate


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(layer_rules, "_REGISTERED", {})


def raises(message):
    return pytest.raises(MimicError, match=f"^{re.escape(message)}$")


PARTS = [[name] for name in NAMES] + [["gain", "offset"], ["mix", "gain"], list(NAMES)]


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@for_each("power", [1, 2])
def test_a_registered_layer_of_several_inputs_and_parameters_has_the_products_of_a_loop(power, parts):
    register_layer_rule(Modulate, RIGHT)
    layer, (x, condition), b = call()
    LayerGradients.check("head", layer)
    batch = (x, condition, b)
    gradients = per_sample_gradients(layer, lambda m, t: (m(t[0], t[1], power=power) * t[2]).flatten(1).sum(1), batch)
    vectors = {name: torch.randn_like(layer.get_parameter(name)) for name in parts}
    expected = sum((gradients[name] * v).flatten(1).sum(1) for name, v in vectors.items())
    for inputs, kwargs in (((x, condition), {"power": power}), ((x,), {"condition": condition, "power": power})):
        rows = LayerGradients(layer, inputs, b, parts, kwargs=kwargs)
        torch.testing.assert_close(rows.dot(vectors), expected)
        assert rows.products == {"dot"}
        weights = torch.rand(4, dtype=torch.float64)
        sums = weighted_gradient({name: gradients[name] for name in layer.state_dict() if name in parts}, weights)
        torch.testing.assert_close(rows.weighted_sum(weights), sums)
        torch.testing.assert_close(rows.divided(torch.tensor(0.5)).dot(vectors), 2 * expected)


class Wide(nn.Conv2d):
    pass


def test_the_nearest_class_with_a_rule_counts_and_a_subclass_inherits_it():
    rule = LayerRule(lambda layer, p, x: layer._conv_forward(x, p["weight"], p["bias"]), ("weight", "bias"), (), 3)
    register_layer_rule(Wide, rule)
    assert [layer_rules.rule_of(layer(1, 1, 1)) is rule for layer in (Wide, type("Wider", (Wide,), {}), nn.Conv2d)] == [
        True,
        True,
        False,
    ]
    layer, x = Wide(2, 3, 3), torch.randn(4, 2, 5, 5)
    vectors = {"bias": torch.randn(3)}
    b = torch.randn(layer(x).shape)
    torch.testing.assert_close(LayerGradients(layer, x, b).dot(vectors), b.sum((2, 3)) @ vectors["bias"])
    LayerGradients.check("head", layer)

    class Bent(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    with pytest.raises(
        MimicError, match=r"'head' is a Bent with a forward of its own, which may compute .* than Wide\."
    ):
        LayerGradients.check("head", Bent(1, 1, 1))


def test_a_linear_layer_with_a_rule_of_its_own_offers_the_dot_alone():
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    assert LayerGradients.products_of(nn.Linear(2, 2)) == {"dot", "norms", "gram"}
    register_layer_rule(
        Halved, LayerRule(lambda layer, p, x: F.linear(x, p["weight"], p["bias"]) / 2, ("weight", "bias"))
    )
    assert LayerGradients.products_of(Halved(2, 2)) == {"dot"}
    with raises(
        "LayerGradients of Halved does not offer `norms`; it offers `dot`. `norms` and `gram` are offered by "
        "LayerGradients of one nn.Linear."
    ):
        LayerGradients(Halved(2, 2), torch.ones(1, 2), torch.ones(1, 2)).norms()


@for_each(
    ("arguments", "message"),
    [
        ((Square(), SCALE), "`layer_class` is a Square; expected a subclass of nn.Module, such as nn.Linear."),
        ((int, SCALE), "`layer_class` is int; expected a subclass of nn.Module, such as nn.Linear."),
        (
            (nn.Module, SCALE),
            "`layer_class` is nn.Module, whose rule would hold for every module; give the layer's class.",
        ),
        (
            (Square, lambda layer, p, x: x),
            "`rule` is a function; expected a lightning_mimic.gradients.LayerRule.",
        ),
        (
            (nn.Linear, SCALE),
            "Linear has a rule; register one for a subclass, or replace it for all of its layers with `replace=True`.",
        ),
    ],
)
def test_what_cannot_be_registered_is_refused_in_a_sentence(arguments, message):
    with raises(message):
        register_layer_rule(*arguments)
    assert not layer_rules._REGISTERED


def test_a_rule_is_replaced_on_purpose_only_and_the_same_one_may_come_again():
    register_layer_rule(Square, SCALE)
    register_layer_rule(Square, SCALE)
    other = LayerRule(SCALE.apply, ("weight",), sample_axes=2)
    with pytest.raises(MimicError, match=r"^Square has a rule; "):
        register_layer_rule(Square, other)
    register_layer_rule(Square, other, replace=True)
    assert layer_rules.rule_of(Square()) is other
    register_layer_rule(nn.PReLU, SCALE, replace=True)  # of what ships too, but it is compared then
    with pytest.raises(MimicError, match="the rule for PReLU cannot be used"):
        LayerGradients(nn.PReLU(), torch.randn(4, 3), torch.ones(4, 3))


@for_each(
    ("options", "message"),
    [
        ({"apply": 3}, "`apply` of a LayerRule is 3; expected apply(layer, parameters, *inputs)."),
        (
            {"parameters": "scale"},
            "`parameters` of a LayerRule is 'scale'; expected a tuple of names, such as ('weight',).",
        ),
        (
            {"methods": ("forward", 3)},
            "`methods` of a LayerRule is ('forward', 3); expected a tuple of names, such as ('w",
        ),
        (
            {"parameters": ()},
            "`parameters` of a LayerRule is (); expected the names of all parameters of the layer, those ",
        ),
        (
            {"added": ("bias",)},
            "`parameters` of a LayerRule is ('scale',); expected the names of all parameters of the l",
        ),
    ],
)
def test_a_rule_with_a_field_of_the_wrong_type_is_refused(options, message):
    with pytest.raises(MimicError, match=f"^{re.escape(message)}"):
        LayerRule(**{"apply": modulate, "parameters": ("scale",)} | options)


def test_a_layer_without_a_rule_has_no_gradients_and_no_comparison():
    with raises("no rule is known for Square; register one with `register_layer_rule`."):
        LayerGradients(Square(), torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(MimicError, match=r"^the layer is a Square; per-sample gradients are known for Linear, "):
        check_layer_rule(Square(), torch.ones(1, 3))


def test_a_vector_for_what_is_no_parameter_names_the_nearest():
    rows = LayerGradients(nn.Linear(2, 2), torch.ones(1, 2), torch.ones(1, 2))
    with raises("Linear has no 'wieght'; nearest: 'weight'."):
        rows.dot({"wieght": torch.ones(2, 2)})


def test_a_parameter_of_another_name_or_a_missing_one_is_refused():
    register_layer_rule(Modulate, LayerRule(modulate, ("gain", "mix"), sample_axes=2))
    with pytest.raises(MimicError, match="'head' makes its gain and mix of gain, mix, offset"):
        LayerGradients.check("head", Modulate())
    register_layer_rule(Modulate, RIGHT, replace=True)
    layer = Modulate()
    del layer.offset  # what is added may be missing
    layer.offset = None
    LayerGradients.check("head", layer)
    del layer.gain
    with pytest.raises(MimicError, match="'head' makes its gain and mix of mix"):
        LayerGradients.check("head", layer)
