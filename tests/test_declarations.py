"""What scorers and weightings declare is checked, what they read is held to it, and what they return is checked."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import REPRESENTATIONS, LayerGradients, LossGradients, SampleGradients
from lightning_mimic.scorers import (
    NEEDS,
    MimicScore,
    Products,
    SoftmaxWeighting,
    Uniform,
    validate_needs,
    validate_scores,
)
from support.cases import case, for_each
from support.gradient_checks import losses_of, traced


class Reader:
    def __init__(self, needs=frozenset()):
        self.needs = needs

    def __call__(self, products):
        return products.samples


def full():
    number = torch.ones(3)
    return Products(
        number,
        dot=number,
        direction_norm=torch.ones(()),
        norms=number,
        gram=torch.ones(3, 3),
        own=slice(0, 3),
        losses=number,
        reference_losses=number,
    )


FIELDS = ["dot", "direction_norm", "norms", "gram", "own", "losses", "reference_losses"]
DECLARED_AS = {"direction_norm": "dot", "own": "gram"}


def raises(message):
    return pytest.raises(MimicError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("field", FIELDS)
def test_a_view_holds_what_its_reader_declares_and_names_the_reader_for_the_rest(field):
    products, owner = full(), DECLARED_AS.get(field, field)
    for need in NEEDS:
        view = products.for_reader(Reader(frozenset({need})))
        with case(need):
            assert view.samples is products.samples
            if owner == need:
                assert getattr(view, field) is getattr(products, field)
                continue
            reason = "which it does not declare; add it" if owner == field else f"which comes with `{owner}`; add that"
            with raises(f"Reader reads `{field}`, {reason} to its `needs`."):
                getattr(view, field)


def test_a_declared_product_that_was_not_computed_is_not_blamed_on_the_declaration():
    view = Products(torch.ones(2), losses=torch.ones(2)).for_reader(Reader(frozenset({"dot", "losses"})))
    with raises("`dot` is not among these products; they hold `losses`."):
        _ = view.dot
    with raises("`direction_norm` is not among these products; they hold none."):
        _ = Products(torch.ones(2)).direction_norm


def test_a_misspelt_field_names_the_nearest_and_products_are_read_only():
    products = full()
    with pytest.raises(AttributeError, match=r"Products has no field 'norm'; nearest: 'norms'"):
        _ = products.norm
    with pytest.raises(AttributeError, match="read-only; 'dot' cannot be set"):
        products.dot = torch.ones(3)
    with pytest.raises(TypeError):
        Products(torch.ones(3), torch.ones(3))


def test_products_can_be_copied_and_shown():
    view = Products(torch.ones(2), own=slice(0, 2)).for_reader(Reader())
    for other in (copy.copy(view), copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        with raises("Reader reads `own`, which comes with `gram`; add that to its `needs`."):
            _ = other.own
    assert repr(view) == "Products(samples=tensor([1., 1.]))"


@for_each("needs", [frozenset(), {"dot"}, frozenset(NEEDS)])
def test_known_needs_pass(needs):
    assert validate_needs(Reader(needs)) == frozenset(needs)
    assert validate_needs(MimicScore()) == {"dot"}
    assert validate_needs(SoftmaxWeighting(), "weighting") == frozenset()


class Nothing:
    def __call__(self, products):
        return products.samples


class NotCallable:
    needs = frozenset()


@for_each(
    ("reader", "message"),
    [
        (Reader({"dots"}), "Reader declares 'dots' in its `needs`, which is no product; nearest: 'dot', "),
        (
            Reader({"refrence_losses"}),
            "Reader declares 'refrence_losses' in its `needs`, which is no product; nearest: ",
        ),
        (
            Reader({"dot", "xyz"}),
            "Reader declares 'xyz' in its `needs`, which is no product; there are: 'calibrated_outputs', 'dot', ",
        ),
        (Reader({"direction_norm"}), "Reader declares 'direction_norm' in its `needs`, which is no product; "),
        (Reader({3}), "Reader declares 3 in its `needs`, which is no product; "),
        (Reader("dot"), "Reader has `needs` of type str; expected a frozenset of the products it reads, of 'dot', "),
        (Reader(["dot"]), "Reader has `needs` of type list; expected a frozenset"),
        (
            Nothing(),
            "Nothing has no `needs`; expected a frozenset of the products it reads, of 'dot', 'norms', 'gram', ",
        ),
    ],
)
def test_a_wrong_declaration_is_refused_in_a_sentence(reader, message):
    for argument in ("scorer", "weighting"):
        with pytest.raises(MimicError, match=f"^{re.escape(f'`{argument}`: {message}')}.*\\.$"):
            validate_needs(reader, argument)


def test_a_class_and_an_object_that_cannot_be_called_are_refused():
    with raises("`scorer` is the class MimicScore; expected an object: MimicScore(...)."):
        validate_needs(MimicScore)
    with pytest.raises(MimicError, match=r"`scorer` is <.*NotCallable.*>, which cannot be called; expected an object"):
        validate_needs(NotCallable())


@for_each(
    ("returned", "described"),
    [
        (torch.ones(3, 1), "a torch.float32 tensor of shape (3, 1) on cpu"),
        (torch.ones(2), "a torch.float32 tensor of shape (2,) on cpu"),
        (torch.ones(()), "a torch.float32 tensor of shape () on cpu"),
        (torch.ones(3, dtype=torch.int64), "a torch.int64 tensor of shape (3,) on cpu"),
        (torch.ones(3, dtype=torch.bool), "a torch.bool tensor of shape (3,) on cpu"),
        (torch.ones(3, dtype=torch.complex64), "a torch.complex64 tensor of shape (3,) on cpu"),
        (torch.ones(3, device="meta"), "a torch.float32 tensor of shape (3,) on meta"),
        ([0.1, 0.2, 0.3], "a list"),
        (0.5, "a float"),
        (None, "None"),
    ],
)
def test_what_is_not_one_score_per_sample_is_refused_with_what_it_is(returned, described):
    message = (
        f"Uniform returned {described}; expected a floating-point tensor of shape (3,) on cpu, one score per sample."
    )
    with raises(message):
        validate_scores(Uniform(), returned, full())


@for_each("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_given_back_detached_in_float32_or_higher(dtype):
    scores = torch.tensor([1.0, float("nan"), -2.0], dtype=dtype, requires_grad=True)
    checked = validate_scores(Uniform(), scores, full())
    assert (checked.dtype, checked.requires_grad) == (torch.promote_types(dtype, torch.float32), False)
    torch.testing.assert_close(checked, scores.detach().to(checked.dtype), rtol=0, atol=0, equal_nan=True)
    meta = torch.ones(3, device="meta")  # a comparison of values would fail here
    assert validate_scores(Uniform(), meta, Products(meta)).device.type == "meta"


def held():
    """One object of every class that represents per-sample gradients, over the parameters of one layer."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    losses, whole, unseen = traced(net, losses_of, torch.randn(4, 3), ["0.weight", "0.bias"])
    assert not unseen
    return [
        LayerGradients(net[0], torch.randn(4, 3), torch.randn(4, 2)),
        whole,
        LossGradients(losses, dict(net.named_parameters())),
    ]


def test_every_class_offers_what_it_lists_and_refuses_the_rest_by_name():
    rows = held()
    assert [type(each) for each in rows] == list(REPRESENTATIONS)
    for each in rows:
        assert isinstance(each, SampleGradients)
        assert each.products <= {"dot", "norms", "gram"}
        assert "dot" in each.products
        for product in ("norms", "gram"):
            if product in each.products:
                assert len(getattr(each, product)()) == 4
                continue
            with raises(
                f"{type(each).__name__} does not offer `{product}`; it offers `dot`. `norms` and `gram` are offered by "
                "LayerGradients of one nn.Linear."
            ):
                getattr(each, product)()
    assert [sorted(each.products) for each in rows] == [["dot", "gram", "norms"], ["dot"], ["dot"]]
