"""What holds of products with per-sample gradients whatever the layer, its shape, its dtype and the numbers."""

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lightning_mimic.gradients import Direction, LayerGradients
from lightning_mimic.scorers import MimicScore, Products
from oracles import mimic_scores, per_sample_gradients
from support.cases import for_each
from support.examples import examples

forty = examples(40)
twenty = examples(20)
DIGITS = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 1e-4, "atol": 5e-4}}
few, spots = st.integers(1, 4), st.integers(5, 7)
token_axes = st.lists(st.integers(1, 3), max_size=2)


def linear(draw, bias):
    layer = nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 6)), bias)
    return layer, (*draw(token_axes), layer.in_features)


def convolution(draw, bias):
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    options = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding_mode": draw(st.sampled_from(["zeros", "circular", "replicate", "reflect"])),
    }
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](*channels, groups=groups, bias=bias, **options)
    return layer, (channels[0], *(draw(spots) for _ in range(axes)))


def layer_norm(draw, bias):
    own = draw(st.lists(few, min_size=1, max_size=2))
    return nn.LayerNorm(own, bias=bias), (*draw(token_axes), *own)


def group_norm(draw, bias):
    groups = draw(few)
    channels = groups * draw(st.integers(2, 3))
    return nn.GroupNorm(groups, channels), (channels, *draw(token_axes))


def batch_norm(draw, bias):
    axes, channels = draw(st.integers(1, 3)), draw(few)
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    layer = kind(channels, track_running_stats=draw(st.booleans())).train(draw(st.booleans()))
    return layer, (channels, *(draw(st.integers(2, 3)) for _ in range(axes)))


def embedding(draw, bias):
    layer = nn.Embedding(draw(few), draw(few), padding_idx=draw(st.sampled_from([None, 0, -1])))
    return layer, tuple(draw(token_axes))


@st.composite
def cases(draw, kinds=(linear, convolution, layer_norm, group_norm, batch_norm, embedding)):
    """A layer, its input, the gradient of its output, and a vector for each of its parameters."""
    rows, dtype = draw(st.integers(1, 5)), draw(st.sampled_from([torch.float32, torch.float64]))
    layer, shape = draw(st.sampled_from(kinds))(draw, draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 999)))
    for tensor in [*layer.parameters(), *(b for n, b in layer.named_buffers() if n.startswith("running"))]:
        tensor.data.uniform_(0.5, 1.5)
    if isinstance(layer, nn.Embedding):
        inputs = torch.randint(layer.num_embeddings, (rows, *shape))
    else:
        inputs = torch.randn(rows, *shape).to(dtype)
    layer = layer.to(dtype)
    b = torch.randn(layer(inputs).shape).to(dtype)
    return layer, inputs, b, {name: torch.randn(p.shape).to(dtype) for name, p in layer.named_parameters()}


def looped(layer, inputs, b):
    """The matrix G in float64, by parameter."""
    exact = inputs.double() if inputs.is_floating_point() else inputs
    batch = exact, b.double()
    return per_sample_gradients(copy.deepcopy(layer).double(), lambda m, t: (m(t[0]) * t[1]).flatten(1).sum(1), batch)


@forty
@given(case=cases())
def test_dot_and_mean_are_those_of_a_loop(case):
    layer, inputs, b, vectors = case
    held, gradients = LayerGradients(layer, inputs, b), looped(layer, inputs, b)
    expected = sum((gradients[name] * v.double()).flatten(1).sum(1) for name, v in vectors.items())
    torch.testing.assert_close(held.dot(vectors), expected.to(b.dtype), **DIGITS[b.dtype])
    means = {name: g.mean(0).to(b.dtype) for name, g in gradients.items()}
    torch.testing.assert_close(held.mean(), means, **DIGITS[b.dtype])


@forty
@given(case=cases([linear]), part=st.sampled_from([None, "weight", "bias"]))
def test_norms_and_gram_are_those_of_a_loop(case, part):
    layer, inputs, b, vectors = case
    parts = list(vectors) if part is None else [part]
    assume(set(parts) <= set(vectors))
    gradients = looped(layer, inputs, b)
    matrix = torch.cat([gradients[name].flatten(1) for name in parts], 1)
    held = LayerGradients(layer, inputs, b, parts)
    torch.testing.assert_close(held.norms(), matrix.norm(dim=1).to(b.dtype), **DIGITS[b.dtype])
    torch.testing.assert_close(held.gram(), (matrix @ matrix.T).to(b.dtype), **DIGITS[b.dtype])


@forty
@given(case=cases(), shuffle=st.randoms(use_true_random=False))
def test_a_samples_products_follow_it_to_its_place_in_the_batch(case, shuffle):
    layer, inputs, b, vectors = case
    order = shuffle.sample(range(len(b)), len(b))
    held, moved = LayerGradients(layer, inputs, b), LayerGradients(layer, inputs[order], b[order])
    torch.testing.assert_close(moved.dot(vectors), held.dot(vectors)[order], **DIGITS[b.dtype])
    torch.testing.assert_close(moved.mean(), held.mean(), **DIGITS[b.dtype])
    if "norms" in held.products:
        torch.testing.assert_close(moved.norms(), held.norms()[order], **DIGITS[b.dtype])
        torch.testing.assert_close(moved.gram(), held.gram()[order][:, order], **DIGITS[b.dtype])


@twenty
@given(case=cases([linear, convolution, layer_norm, group_norm, embedding]), data=st.data())
def test_a_samples_products_are_the_same_in_any_company(case, data):
    layer, inputs, b, vectors = case
    chosen = data.draw(st.lists(st.integers(0, len(b) - 1), min_size=1, max_size=6))
    dot = LayerGradients(layer, inputs[chosen], b[chosen]).dot(vectors)
    torch.testing.assert_close(dot, LayerGradients(layer, inputs, b).dot(vectors)[chosen], **DIGITS[b.dtype])


@forty
@given(case=cases(), factor=st.floats(-100, 100))
def test_the_dot_is_linear_in_the_vectors_and_in_the_output_gradient(case, factor):
    layer, inputs, b, vectors = case
    held, other = LayerGradients(layer, inputs, b), {name: torch.randn_like(v) for name, v in vectors.items()}
    combined = held.dot({name: v + factor * other[name] for name, v in vectors.items()})
    tolerance = {name: (1 + abs(factor)) * digits for name, digits in DIGITS[b.dtype].items()}
    torch.testing.assert_close(combined, held.dot(vectors) + factor * held.dot(other), **tolerance)
    scaled = LayerGradients(layer, inputs, factor * b).dot(vectors)
    torch.testing.assert_close(scaled, factor * held.dot(vectors), **tolerance)
    by_part = sum(held.dot({name: v}) for name, v in vectors.items())
    torch.testing.assert_close(by_part, held.dot(vectors), **DIGITS[b.dtype])


@forty
@given(case=cases())
def test_the_dots_add_up_to_the_batch_times_the_dot_of_the_mean(case):
    layer, inputs, b, vectors = case
    held = LayerGradients(layer, inputs, b)
    total = len(b) * sum((g * vectors[name]).sum() for name, g in held.mean().items())
    torch.testing.assert_close(held.dot(vectors).sum(), total, **DIGITS[b.dtype])


@twenty
@given(case=cases([linear]))
def test_norms_are_the_grams_diagonal_and_bound_the_dots(case):
    layer, inputs, b, vectors = case
    held = LayerGradients(layer, inputs, b)
    torch.testing.assert_close(held.norms().square(), held.gram().diag(), **DIGITS[b.dtype])
    length = sum(v.square().sum() for v in vectors.values()).sqrt()
    assert (held.dot(vectors).abs() <= held.norms() * length * (1 + 1e-5) + 1e-6).all()


def test_tokens_that_cancel_leave_a_small_norm_and_no_nan():
    a = torch.randn(50, 1, 4).expand(50, 2, 4) * torch.tensor([1.0, 1.0 + 1e-6])[:, None]
    b = torch.randn(50, 1, 3) * torch.tensor([1.0, -1.0])[:, None]
    norms = LayerGradients(nn.Linear(4, 3, bias=False), a, b).norms()
    assert (norms >= 0).all()
    assert (norms < 0.02).all()


@pytest.mark.parametrize("tokens", [(), (2,), (30,)])
@for_each("target", [("weight", "bias"), ("weight",), ("bias",)])
def test_a_confident_samples_tiny_gradient_keeps_its_norm(target, tokens):
    torch.manual_seed(0)
    layer, a, b = nn.Linear(5, 4), torch.randn(3, *tokens, 5), torch.randn(3, *tokens, 4)
    norms = LayerGradients(layer, a, b, target).norms()
    tiny = LayerGradients(layer, a, b * 2.0**-80, target).norms()  # 8e-25: the square leaves float32
    torch.testing.assert_close(tiny * 2.0**80, norms, rtol=1e-4, atol=0)


def scores_of(layer, inputs, targets, reference):
    """The mimic scores of a linear layer under squared errors."""
    b = (layer(inputs) - targets).detach()
    direction = Direction(reference, dict(layer.named_parameters()))
    dot = LayerGradients(layer, inputs, b).dot(direction)
    return MimicScore()(Products(dot, dot=dot, direction_norm=direction.norm()))


def losses_of(layer, batch):
    return (layer(batch[0]) - batch[1]).square().sum(1) / 2


@for_each("row", range(3))
def test_a_reference_one_descent_step_away_scores_the_length_of_that_step(row):
    layer = nn.Linear(4, 2).double()
    batch = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    gradients = per_sample_gradients(layer, losses_of, batch)
    reference = {name: p.detach() - gradients[name][row] for name, p in layer.named_parameters()}
    length = sum(g[row].square().sum() for g in gradients.values()).sqrt()
    scores = scores_of(layer, *batch, reference)
    torch.testing.assert_close(scores, mimic_scores(gradients, reference, dict(layer.named_parameters())))
    torch.testing.assert_close(scores[row], length)


@twenty
@given(distance=st.floats(1e-3, 1e3))
def test_the_distance_of_the_reference_does_not_change_the_score_and_its_side_turns_it(distance):
    torch.manual_seed(0)
    layer = nn.Linear(4, 2).double()
    batch = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    away = {name: torch.randn_like(p) for name, p in layer.named_parameters()}

    def scores(factor):
        return scores_of(layer, *batch, {name: p + factor * away[name] for name, p in layer.named_parameters()})

    torch.testing.assert_close(scores(distance), scores(1.0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores(-distance), -scores(1.0), rtol=1e-9, atol=1e-9)
