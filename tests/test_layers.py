"""Products with one layer's per-sample gradients agree with autograd's own, and with moving the weights."""

import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import finite_difference_scores, mimic_scores, per_sample_gradients, weighted_gradient
from torch import nn

from lightning_mimic.gradients import Direction, LayerGradients
from lightning_mimic.scorers import mimic_score

few = settings(max_examples=15, deadline=None)

LAYERS = {  # how the layer is made, and the shape of one sample
    "linear": (partial(nn.Linear, 5, 4), (5,)),
    "linear, one token axis": (partial(nn.Linear, 5, 4), (3, 5)),
    "linear, two token axes": (partial(nn.Linear, 5, 4), (2, 3, 5)),
    "linear, no bias": (partial(nn.Linear, 5, 4, bias=False), (3, 5)),
    "conv": (partial(nn.Conv2d, 3, 4, 3), (3, 5, 6)),
    "conv, stride padding dilation": (
        partial(nn.Conv2d, 3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (3, 6, 5),
    ),
    "conv, groups": (partial(nn.Conv2d, 4, 6, 3, groups=2), (4, 5, 4)),
    "conv, circular": (partial(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="circular"), (3, 4, 5)),
    "conv, reflect": (partial(nn.Conv2d, 3, 4, 3, padding=(1, 2), padding_mode="reflect"), (3, 4, 5)),
    "conv, same": (partial(nn.Conv2d, 3, 4, (1, 3), padding="same"), (3, 4, 5)),
    "conv, no bias": (partial(nn.Conv2d, 3, 4, 3, bias=False), (3, 5, 6)),
}
TARGETS = [("weight", "bias"), ("weight",), ("bias",)]
KINDS_AND_TARGETS = [
    pytest.param(kind, target, id=f"{kind}: {'+'.join(target)}")
    for kind in LAYERS
    for target in TARGETS
    if "bias" not in target or "no bias" not in kind
]


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.before = nn.Parameter(torch.ones(()))
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.before * x))


def losses_of(net, batch):
    x, target = batch
    outputs = torch.tanh(net(x)).flatten(1)
    return (outputs - target[:, None]).square().mean(1) + torch.logsumexp(outputs, 1)


def made(kind, rows, dtype=torch.float64):
    """A net and a batch; the same numbers, in float32 already, for every dtype."""
    torch.manual_seed(rows)
    make, shape = LAYERS[kind]
    net, batch = Net(make()), (torch.randn(rows, *shape), torch.randn(rows))
    return net.to(dtype), tuple(t.to(dtype) for t in batch)


def reference_of(net):
    torch.manual_seed(11)
    return {name: p.detach() + torch.randn(p.shape).to(p) for name, p in net.layer.named_parameters()}


def caught(net, batch):
    """The layer's rows, under the sum of the losses: each row is then an unreduced loss's own gradient."""
    seen = {}

    def catch(layer, args, output):
        seen["inputs"] = args[0].detach()
        output.register_hook(lambda gradients: seen.update(gradients=gradients))

    handle = net.layer.register_forward_hook(catch)
    losses_of(net, batch).sum().backward()
    handle.remove()
    net.zero_grad()
    return LayerGradients(net.layer, seen["inputs"], seen["gradients"])


def oracle_gradients(net, batch):
    every = per_sample_gradients(net, losses_of, batch)
    return {name.removeprefix("layer."): g for name, g in every.items() if name.startswith("layer.")}


def chosen(net, target):
    return {name: net.layer.get_parameter(name) for name in target}


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("kind", "target"), KINDS_AND_TARGETS)
def test_float64_scores_equal_those_of_a_loop_over_samples_and_of_moved_weights(kind, target, rows):
    net, batch = made(kind, rows)
    reference, parameters = reference_of(net), chosen(net, target)
    scores = mimic_score(caught(net, batch), *Direction(reference, parameters)())
    assert scores.shape == (rows,)
    assert scores.dtype == torch.float64
    looped = mimic_scores(oracle_gradients(net, batch), reference, parameters)
    torch.testing.assert_close(scores, looped, rtol=1e-9, atol=1e-9)
    moved = finite_difference_scores(net.layer, lambda _, b: losses_of(net, b), batch, reference, list(target), 1e-5)
    torch.testing.assert_close(scores, moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("kind", "target"), KINDS_AND_TARGETS)
def test_float32_scores_are_within_its_rounding_of_the_float64_loop(kind, target, rows):
    net, batch = made(kind, rows, torch.float32)
    reference = reference_of(net)
    scores = mimic_score(caught(net, batch), *Direction(reference, chosen(net, target))())
    assert scores.dtype == torch.float32
    exact, exact_batch = made(kind, rows)
    looped = mimic_scores(oracle_gradients(exact, exact_batch), reference, chosen(exact, target))
    torch.testing.assert_close(scores.double(), looped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_weighted_sum_is_the_gradient_of_the_weighted_loss(kind, dtype):
    net, batch = made(kind, 5, dtype)
    weights = torch.tensor([0.0, 2.5, -1.0, 0.3, 1.0], dtype=dtype)
    rows = caught(net, batch)
    with torch.no_grad():  # as inside a backward pass
        found = rows.weighted_sum(weights)
    exact, exact_batch = made(kind, 5)
    expected = weighted_gradient(oracle_gradients(exact, exact_batch), weights.double())
    assert list(found) == [name for name, _ in net.layer.named_parameters()]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, {n: g.to(dtype) for n, g in expected.items()}, **tolerance)
    assert not any(g.requires_grad for g in found.values())
    assert all(p.grad is None and p.requires_grad for p in net.layer.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "linear, two token axes", "conv, groups", "conv, reflect"])
def test_half_precision_activations_are_multiplied_in_float32(kind, half, autocast):
    net, (x, _) = made(kind, 4, torch.float32)
    vectors = {name: t - net.layer.get_parameter(name) for name, t in reference_of(net).items()}
    a = torch.randn(x.shape).to(half)
    b = torch.randn(net.layer(x).shape).to(half)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    rows = LayerGradients(net.layer, a, b)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dot = rows.dot(vectors)
    total = rows.weighted_sum(weights)
    upcast = per_sample_gradients(
        net.layer.double(), lambda m, ab: (m(ab[0]) * ab[1]).flatten(1).sum(1), [a.double(), b.double()]
    )
    expected = sum((upcast[name] * v).flatten(1).sum(1) for name, v in vectors.items())
    assert dot.dtype == torch.float32
    torch.testing.assert_close(dot.double(), expected, rtol=1e-5, atol=2e-5)
    sums = weighted_gradient(upcast, weights.double())
    torch.testing.assert_close(total, {n: g.float() for n, g in sums.items()}, rtol=1e-5, atol=2e-5)


class Special(nn.Linear):
    pass


@pytest.mark.parametrize(
    "layer", [Special(2, 2), nn.BatchNorm1d(2), nn.MultiheadAttention(2, 1), nn.Conv1d(2, 2, 1), nn.Sequential()]
)
def test_a_layer_whose_gradient_does_not_follow_is_refused_by_name_and_type(layer):
    message = (
        f"`parameters`: 'body.head' is a {type(layer).__name__}; per-sample gradients are known for Linear, Conv2d "
        "layers. Name such a layer."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LayerGradients.check("body.head", layer)


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Conv2d(2, 2, 1)])
def test_known_layers_pass_the_check(layer):
    LayerGradients.check("head", layer)


@pytest.mark.parametrize(
    ("layer", "shape", "first"),
    [
        (nn.Linear(2, 3), (3,), False),
        (nn.Linear(2, 3), (5, 3), True),
        (nn.Linear(2, 3), (5, 7, 3), True),
        (nn.Conv2d(2, 3, 1), (3, 4, 4), False),
        (nn.Conv2d(2, 3, 1), (5, 3, 4, 4), True),
    ],
)
def test_an_output_without_a_batch_axis_is_recognised(layer, shape, first):
    assert LayerGradients.batch_first(layer, torch.empty(shape)) is first


METAMORPHIC = ["linear", "linear, one token axis", "conv, stride padding dilation"]


def scores_of(net, batch, reference):
    return mimic_score(caught(net, batch), *Direction(reference, dict(net.layer.named_parameters()))())


@few
@given(kind=st.sampled_from(METAMORPHIC), order=st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_a_sample_has_the_same_score_in_any_place_and_any_company(kind, order):
    net, (x, target) = made(kind, 6)
    reference = reference_of(net)
    scores = scores_of(net, (x, target), reference)
    torch.testing.assert_close(scores_of(net, (x[order], target[order]), reference), scores[order], rtol=1e-9, atol=0)


@few
@given(kind=st.sampled_from(METAMORPHIC), factor=st.floats(1e-3, 1e3))
def test_the_length_of_the_direction_does_not_change_the_score_and_its_sign_turns_it(kind, factor):
    net, batch = made(kind, 4)
    vectors, norm = Direction(reference_of(net), dict(net.layer.named_parameters()))()
    rows = caught(net, batch)
    scores = mimic_score(rows, vectors, norm)
    for sign in (1, -1):
        other = mimic_score(rows, {name: sign * factor * v for name, v in vectors.items()}, factor * norm)
        torch.testing.assert_close(other, sign * scores, rtol=1e-9, atol=0)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("kind", LAYERS)
def test_a_reference_one_descent_step_away_scores_the_length_of_that_step(kind, row):
    net, batch = made(kind, 3)
    gradient = {name: g[row] for name, g in oracle_gradients(net, batch).items()}
    reference = {name: net.layer.get_parameter(name).detach() - g for name, g in gradient.items()}
    length = sum(g.square().sum() for g in gradient.values()).sqrt()
    torch.testing.assert_close(scores_of(net, batch, reference)[row], length, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_scores_add_up_to_the_slope_of_the_summed_loss(kind):
    net, batch = made(kind, 6)
    reference = reference_of(net)
    vectors, norm = Direction(reference, dict(net.layer.named_parameters()))()
    gradients = torch.autograd.grad(losses_of(net, batch).sum(), list(net.layer.parameters()))
    slope = sum((g * v).sum() for g, v in zip(gradients, vectors.values(), strict=True)) / norm
    torch.testing.assert_close(scores_of(net, batch, reference).sum(), -slope, rtol=1e-9, atol=1e-12)
