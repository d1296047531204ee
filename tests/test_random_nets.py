"""Small nets of any composition: two fast ways and the slow loop agree, and the rows behave as rows do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_mimic.gradients import Graph, LossGradients
from oracles import per_sample_gradients
from support.examples import examples
from support.gradient_checks import looped, losses_of, param, traced, vectors_of

WORDS, TIME, WIDTH = 7, 3, 4


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = param(WIDTH), param(1, TIME, WIDTH)

    def forward(self, x):
        return x * self.scale + self.shift


class Multiplied(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = param(WIDTH, WIDTH)

    def forward(self, x):
        return x @ self.matrix


KINDS = {
    "linear": lambda earlier: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda earlier: nn.Linear(WIDTH, WIDTH, bias=False),
    "layer norm": lambda earlier: nn.LayerNorm(WIDTH),
    "wide layer norm": lambda earlier: nn.LayerNorm((TIME, WIDTH)),
    "group norm": lambda earlier: nn.GroupNorm(2, WIDTH),
    "conv": lambda earlier: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    "batch norm in eval mode": lambda earlier: nn.BatchNorm1d(WIDTH).eval(),
    "functional": lambda earlier: Scaled(),
    "product": lambda earlier: Multiplied(),
    "once more": lambda earlier: earlier[-1] if earlier else nn.Linear(WIDTH, WIDTH),
    "first again": lambda earlier: earlier[0] if earlier else nn.Linear(WIDTH, WIDTH),
    "tied": lambda earlier: tied_to([layer for layer in earlier if isinstance(layer, nn.Linear)]),
}
CHANNELS_FIRST = (nn.GroupNorm, nn.Conv1d, nn.BatchNorm1d)


def tied_to(linears):
    layer = nn.Linear(WIDTH, WIDTH)
    if linears:
        layer.weight = linears[0].weight
    return layer


class Net(nn.Module):
    def __init__(self, kinds, embedded, in_place):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH) if embedded else nn.Identity()
        layers = []
        for kind in kinds:
            layers.append(KINDS[kind](layers))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, 2)
        self.in_place = in_place

    def forward(self, x):
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h.mT).mT if isinstance(layer, CHANNELS_FIRST) else layer(h)
            h = nn.functional.elu(h, inplace=self.in_place)
        return self.head(h)


@st.composite
def nets(draw):
    """A net with some of its parameters frozen and some not looked at, and a batch."""
    torch.manual_seed(draw(st.integers(0, 99)))
    embedded, dtype = draw(st.booleans()), draw(st.sampled_from([torch.float64, torch.float32]))
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=0, max_size=5))
    net = Net(kinds, embedded, in_place=draw(st.booleans())).to(dtype)
    shape = (draw(st.integers(1, 5)), TIME)
    x = torch.randint(0, WORDS, shape) if embedded else torch.randn(*shape, WIDTH, dtype=dtype)
    rate = draw(st.sampled_from([0.0, 0.3]))
    names = ["head.bias"]
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
        if name != "head.bias":
            parameter.requires_grad_(bool(torch.rand(()) >= rate))
            names += [name] if parameter.requires_grad and torch.rand(()) >= rate else []
    return net, x, names


def both(net, x, names):
    vectors = vectors_of(net, names)
    losses, rows, unseen = traced(net, losses_of, x, vectors)
    assert unseen == {}
    found = LossGradients(losses, {name: net.get_parameter(name) for name in names})
    found.check(Graph(losses.grad_fn))
    return losses, rows, found, vectors


def near(actual, expected, scale):
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(scale))


@examples(40)
@given(nets())
def test_two_fast_ways_and_the_slow_one_agree(drawn):
    net, x, names = drawn
    _, rows, found, vectors = both(net, x, names)
    expected = looped(per_sample_gradients(net, losses_of, x), vectors)
    scale = 1 + expected.abs().max()
    near(rows.dot(vectors), expected, scale)
    near(found.dot(vectors), expected, scale)
    assert not rows.rows_that_mix_samples()
    assert all(p.grad is None for p in net.parameters())


@examples(20)
@given(nets(), st.randoms(use_true_random=False))
def test_a_sample_has_the_same_product_in_any_place(drawn, random):
    net, x, names = drawn
    order = list(range(len(x)))
    random.shuffle(order)
    _, rows, _, vectors = both(net, x, names)
    dot = rows.dot(vectors)
    near(both(net, x[order], names)[1].dot(vectors), dot[order], 1 + dot.abs().max())


@examples(20)
@given(nets())
def test_the_products_add_up_to_the_ordinary_gradients(drawn):
    net, x, names = drawn
    losses, rows, found, vectors = both(net, x, names)
    dots = [rows.dot(vectors).sum(), found.dot(vectors).sum()]
    total = torch.autograd.grad(losses.sum(), [net.get_parameter(name) for name in names])
    slope = sum((g * v).sum() for g, v in zip(total, vectors.values(), strict=True))
    scale = 1 + sum((g * v).abs().sum() for g, v in zip(total, vectors.values(), strict=True))
    for dot in dots:
        near(dot, slope, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_alone(kind):
    torch.manual_seed(0)
    net, x = Net([kind], embedded=False, in_place=False).double(), torch.randn(4, TIME, WIDTH).double()
    _, rows, found, vectors = both(net, x, [name for name, _ in net.named_parameters()])
    expected = looped(per_sample_gradients(net, losses_of, x), vectors)
    near(rows.dot(vectors), expected, 0)
    near(found.dot(vectors), expected, 0)
