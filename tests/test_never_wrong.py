"""What only looks like a known use is unseen or exact, never wrong; what was changed since then stops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mimic.gradients import Graph, ModelHooks, WholeModelGradients
from oracles import per_sample_gradients
from support.functional_nets import FLAT, TOKENS, B, D, ad
from support.gradient_checks import Ad, assert_exact, looped, losses_of, param, traced, vectors_of


class Annealed(nn.Linear):
    factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


# The parameter meets no batch, but its output happens to have as many rows as there are samples.
COINCIDENCES = {
    "a position table": (lambda n, x: x + n.l(torch.arange(B)), lambda: {"l": nn.Embedding(B, D)}),
    "learned queries under a norm": (
        lambda n, x: x + n.l(torch.linspace(-1, 1, B * D).double().view(B, D)),
        lambda: {"l": nn.LayerNorm(D)},
    ),
    "a doubled table": (lambda n, x: x + 2 * n.p, lambda: {"p": param(B, D)}),
    "a scaled table": (lambda n, x: x + n.p * torch.linspace(-1, 1, B * D).double().view(B, D), lambda: {"p": param()}),
    "a token spread over time": (lambda n, x: x + n.p.expand(B, D), lambda: {"p": param(D)}),
    "rows and columns": (lambda n, x: x + (n.p + torch.ones(B, 1)) @ n.q, lambda: {"p": param(D), "q": param(D, D)}),
    "a low rank weight": (
        lambda n, x: F.linear(x, torch.linspace(-1, 1, B * 2).double().view(B, 2) @ n.p),
        lambda: {"p": param(2, D)},
    ),
    "an exponential weight": (lambda n, x: F.linear(x, n.p.exp()), lambda: {"p": param(B, D)}),
    "a merged weight": (lambda n, x: F.linear(x, n.p @ n.q), lambda: {"p": param(B, 2), "q": param(2, D)}),
    "time first": (lambda n, x: n.l(x.transpose(0, 1)).transpose(0, 1), lambda: {"l": nn.Linear(D, D)}),
}


@pytest.mark.parametrize("kind", COINCIDENCES)
def test_as_many_rows_as_samples_are_not_taken_for_the_samples(kind):
    net = ad(*COINCIDENCES[kind])
    # Nothing but the rows shows that an axis is not the batch's.
    unseen = {"time first": ["l.*"], "a low rank weight": ["p"]}
    assert_exact(net, torch.randn(B, B, D).double(), unseen=unseen.get(kind, []))


NEVER_WRONG = {
    "a weight whose axes stay": (lambda n, x: x @ n.p.permute(0, 1), lambda: {"p": param(D, D)}),
    "a layer with a forward of its own": (lambda n, x: n.l(x), lambda: {"l": patched(nn.Linear(D, D))}),
    "samples exchanged and put back": (
        lambda n, x: n.l(x[[0, 2, 1]])[[0, 2, 1]],
        lambda: {"l": nn.Linear(D, D)},
    ),
}


@pytest.mark.parametrize("kind", NEVER_WRONG)
def test_what_looks_like_a_known_use_and_is_none_is_unseen_or_exact(kind):
    assert_exact(ad(*NEVER_WRONG[kind]), torch.randn(TOKENS).double(), unseen=None)


def test_a_layer_that_changes_what_it_computes_is_unseen_or_exact():
    torch.manual_seed(0)
    layer = Annealed(D, D).double()
    net, x = Ad(lambda net, x: net.layer(x).sin(), layer=layer), torch.randn(TOKENS).double()
    hooks = ModelHooks(net, dict(net.named_parameters()))
    vectors = vectors_of(net)
    for factor in (1.0, 3.0):
        layer.factor = factor
        with hooks.recording() as calls:
            losses = losses_of(net, x)
        graph = Graph(losses.grad_fn)
        uses, unseen = hooks.uses(calls, graph, B)
        if not unseen:
            dot = WholeModelGradients(losses, uses, graph, B).dot(vectors)
            expected = looped(per_sample_gradients(net, losses_of, x), vectors)
            torch.testing.assert_close(dot, expected, rtol=1e-9, atol=1e-9)
    hooks.remove()


def test_an_input_changed_in_place_after_its_use_stops():
    torch.manual_seed(0)
    parts = {"before": nn.Linear(D, D), "layer": nn.Linear(D, D)}

    def compute(net, x):
        h = net.before(x).detach()  # autograd itself would stop, did it need this tensor
        y = net.layer(h)
        h.add_(1)
        return y + net.before(x)

    net = Ad(compute, **parts).double()
    net.layer.weight.requires_grad_(False)
    x = torch.randn(FLAT).double()
    vectors = vectors_of(net) | vectors_of(net, ["layer.weight"])
    rows = traced(net, losses_of, x, vectors)[1]
    with pytest.raises(RuntimeError, match=r"^the input of 'layer' was changed in place after the layer had used it"):
        rows.dot(vectors)


@pytest.mark.parametrize("change", ["x", "hidden"])
def test_what_autograd_keeps_changed_in_place_stops(change):
    torch.manual_seed(0)

    def compute(net, x):
        h = net.before(x)
        y = h * net.scale
        (x if change == "x" else h).mul_(2)
        return y.sin()

    net = Ad(compute, before=nn.Linear(D, D), scale=param(D)).double()
    vectors = vectors_of(net)
    x = torch.randn(FLAT).double()
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        traced(net, losses_of, x, vectors)[1].dot(vectors)
