"""Parameters used outside of layers, reused or tied are scored by the operation that combines them with the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.cases import case
from support.functional_nets import FLAT, IMAGE, TOKENS, B, D, T, ad
from support.gradient_checks import assert_exact, param

EXACT = {  # what is computed, its parts, and the inputs' shape
    "class token": (lambda n, x: torch.cat([n.p.expand(B, -1, -1), x], 1), lambda: {"p": param(1, 1, D)}, TOKENS),
    "class token without axes": (lambda n, x: n.p.expand(B, D) + x, lambda: {"p": param(D)}, FLAT),
    "positions": (lambda n, x: x + n.p, lambda: {"p": param(1, T, D)}, TOKENS),
    "positions without the batch's axis": (lambda n, x: n.p + x, lambda: {"p": param(T, D)}, TOKENS),
    "positions added in place": (lambda n, x: x.sin().add_(n.p), lambda: {"p": param(T, D)}, TOKENS),
    "one number added": (lambda n, x: x + n.p, lambda: {"p": param()}, FLAT),
    "one number multiplied": (lambda n, x: n.p * x, lambda: {"p": param()}, TOKENS),
    "scale": (lambda n, x: x * n.p, lambda: {"p": param(D)}, TOKENS),
    "scale from the left": (lambda n, x: n.p * x, lambda: {"p": param(D)}, FLAT),
    "scale of channels": (lambda n, x: n.p.view(1, -1, 1) * x, lambda: {"p": param(D)}, IMAGE),
    "scale twice": (lambda n, x: n.p * (x * n.p).tanh(), lambda: {"p": param(D)}, TOKENS),
    "scale of what is learned": (lambda n, x: n.l(x) * n.p, lambda: {"p": param(D), "l": nn.Linear(D, D)}, TOKENS),
    "scale in place": (lambda n, x: n.l(x).mul_(n.p), lambda: {"p": param(D), "l": nn.LayerNorm(D)}, TOKENS),
    "scale of a layer's output in place": (
        lambda n, x: n.l(x).mul_(n.p),
        lambda: {"p": param(D), "l": nn.Linear(D, D)},
        TOKENS,
    ),
    "scale by a column": (lambda n, x: x * n.p[:, None], lambda: {"p": param(D)}, IMAGE),
    "product": (lambda n, x: x @ n.p, lambda: {"p": param(D, 5)}, FLAT),
    "product of tokens": (lambda n, x: x @ n.p, lambda: {"p": param(D, 5)}, TOKENS),
    "product of a grid": (lambda n, x: x @ n.p, lambda: {"p": param(D, 5)}, (B, T, T, D)),
    "product, transposed": (lambda n, x: x @ n.p.T, lambda: {"p": param(5, D)}, TOKENS),
    "product, transposed and shaped": (lambda n, x: x @ n.p.view(5, D).mT, lambda: {"p": param(5 * D)}, FLAT),
    "product, twice transposed": (lambda n, x: x @ n.p.T.mT, lambda: {"p": param(D, D)}, FLAT),
    "linear by hand": (lambda n, x: F.linear(x, n.p, n.q), lambda: {"p": param(5, D), "q": param(5)}, FLAT),
    "linear by hand of tokens": (lambda n, x: F.linear(x, n.p, n.q), lambda: {"p": param(5, D), "q": param(5)}, TOKENS),
    "linear by hand of transposed tokens": (
        lambda n, x: F.linear(x.mT, n.p, n.q),
        lambda: {"p": param(5, T), "q": param(5)},
        TOKENS,
    ),
    "addmm": (lambda n, x: torch.addmm(n.q, x, n.p), lambda: {"p": param(D, 5), "q": param(5)}, FLAT),
    "layer norm by hand": (
        lambda n, x: F.layer_norm(x, (D,), n.p, n.q),
        lambda: {"p": param(D), "q": param(D)},
        TOKENS,
    ),
    "layer norm of channels": (
        lambda n, x: F.layer_norm(x.mT, (D,), n.p, n.q).mT,
        lambda: {"p": param(D), "q": param(D)},
        IMAGE,
    ),
    "one layer called twice": (lambda n, x: n.l(n.l(x).tanh()), lambda: {"l": nn.Linear(D, D)}, TOKENS),
    "one layer called in parallel": (lambda n, x: n.l(x) * n.l(x.sin()), lambda: {"l": nn.Linear(D, D)}, FLAT),
    "a call for nothing": (lambda n, x: (n.l(x), n.l(x.sin()))[1], lambda: {"l": nn.Linear(D, D)}, FLAT),
    "batch norm in eval mode": (lambda n, x: n.l.eval()(x), lambda: {"l": nn.BatchNorm1d(D)}, FLAT),
    "rms norm": (lambda n, x: n.l(x), lambda: {"l": nn.RMSNorm(D)}, TOKENS),
    "relu in place": (lambda n, x: n.m(F.relu_(n.l(x))), lambda: {"l": nn.Linear(D, D), "m": nn.Linear(D, D)}, TOKENS),
    "relu in place, flat": (lambda n, x: F.relu_(n.l(x)).cos(), lambda: {"l": nn.Linear(D, D)}, FLAT),
    "relu in place, norm": (lambda n, x: F.relu_(n.l(x)).cos(), lambda: {"l": nn.LayerNorm(D)}, TOKENS),
    "relu in place, conv": (lambda n, x: F.relu_(n.l(x)).cos(), lambda: {"l": nn.Conv1d(D, D, 1)}, IMAGE),
    "a part overwritten in place": (
        lambda n, x: overwritten(n.l(x)),
        lambda: {"l": nn.Linear(D, D)},
        TOKENS,
    ),
    "relu in place, by hand": (
        lambda n, x: F.relu_(F.linear(x, n.p, n.q)),
        lambda: {"p": param(5, D), "q": param(5)},
        TOKENS,
    ),
    "relu in place, of a view": (
        lambda n, x: F.relu_(torch.addmm(n.q, x.flatten(0, 1), n.p).view(B, T, 5).mul_(2)),
        lambda: {"p": param(D, 5), "q": param(5)},
        TOKENS,
    ),
    "used, then changed in place": (lambda n, x: used_before(n.l(x)), lambda: {"l": nn.Linear(D, D)}, TOKENS),
    "used, then changed in place, by hand": (
        lambda n, x: used_before(F.linear(x, n.p, n.q)),
        lambda: {"p": param(5, D), "q": param(5)},
        TOKENS,
    ),
    "sum in place": (
        lambda n, x: n.n(residual(n, x)),
        lambda: {"l": nn.Linear(D, D), "m": nn.Linear(D, D), "n": nn.LayerNorm(D)},
        TOKENS,
    ),
    "a subclass that doubles": (lambda n, x: n.l(x), lambda: {"l": Doubled(D, D)}, TOKENS),
    "another hook that doubles": (lambda n, x: n.l(x), lambda: {"l": hooked(nn.Linear(D, D))}, FLAT),
}


def overwritten(h):
    h[:, 0].mul_(2)
    return h.tanh()


def used_before(h):
    before = 3 * h
    h[:, 0].mul_(2)
    return before + h.relu_()


def residual(n, x):
    identity = n.l(x)
    out = n.m(identity.tanh())
    out += identity
    return out


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(layer):
    layer.register_forward_hook(lambda _, args, output: 2 * output)
    return layer


@pytest.mark.parametrize("kind", EXACT)
def test_products_equal_those_of_a_loop_over_samples(kind):
    compute, parts, shape = EXACT[kind]
    rows = assert_exact(ad(compute, parts), torch.randn(shape).double())
    assert not rows.rows_that_mix_samples()


def linears_of_one_weight():
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    net[4].weight = net[0].weight
    return net


def language_model():
    net = nn.Sequential(nn.Embedding(7, D), nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 7))
    net[4].weight = net[0].weight
    return net


@pytest.mark.parametrize("shape", [FLAT, TOKENS])
def test_linears_of_one_weight(shape):
    torch.manual_seed(0)
    net, x = linears_of_one_weight().double(), torch.randn(shape).double()
    for names in (None, ["0.weight"]):
        with case(names):
            assert_exact(net, x, names=names)


@pytest.mark.parametrize("padding", [None, 1])
def test_an_embedding_that_is_the_output_layer_too(padding):
    torch.manual_seed(0)
    net = language_model().double()
    net[0].padding_idx = padding
    words = torch.tensor([[0, 1, 1, 6], [2, 2, 2, 2], [1, 5, 0, 3]])
    for names in (None, ["0.weight"]):
        with case(names):
            assert_exact(net, words, names=names)
