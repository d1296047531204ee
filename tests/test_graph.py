"""The graph tells which parameters the gate misses, which are tied, and which norms mix samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mimic.gradients.graph import (
    mixes_samples,
    normalises_batch,
    reaches,
    uncovered_parameters,
    used_beyond,
    walk,
)
from support.cases import for_each

BODY = ["body.bias", "body.weight"]
OUTSIDE = torch.ones(3, requires_grad=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.layer = nn.Linear(4, 4)
        self.aux = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.gate = None
        self.layer.register_forward_hook(self.take)

    def take(self, layer, args, output):
        self.gate = output.grad_fn


def relu_in_place(net, h):
    return net.layer(h).relu_().mul_(2.0).square().mean()


LOSSES = {
    "a head": (lambda n, h: n.layer(h).square().mean(), []),
    "a head and what follows without parameters": (lambda n, h: F.layer_norm(n.layer(h).relu(), (4,)).mean(), []),
    "changed in place afterwards": (relu_in_place, []),
    "a residual branch around": (lambda n, h: (h + n.layer(h)).square().mean(), BODY),
    "an auxiliary loss": (lambda n, h: n.layer(h).mean() + n.aux(h).mean(), ["aux.bias", "aux.weight", *BODY]),
    "an auxiliary loss on detached features": (
        lambda n, h: n.layer(h).mean() + n.aux(h.detach()).mean(),
        ["aux.bias", "aux.weight"],
    ),
    "an L2 term": (lambda n, h: n.layer(h).mean() + 1e-4 * n.layer.weight.square().sum(), ["layer.weight"]),
    "a scale after the head": (lambda n, h: (n.layer(h) * n.scale.exp()).mean(), ["scale"]),
    "a layer after the head": (lambda n, h: n.aux(n.layer(h)).mean(), ["aux.bias", "aux.weight"]),
    "a tensor of nobody": (lambda n, h: (n.layer(h).mean(0)[:3] * OUTSIDE).sum(), ["a tensor outside the module"]),
}


@pytest.mark.parametrize("case", LOSSES)
def test_parameters_that_the_loss_reaches_around_the_gate_are_named(case):
    net, (loss_of, names) = Net(), LOSSES[case]
    loss = loss_of(net, net.body(torch.randn(3, 4)))
    assert uncovered_parameters(loss.grad_fn, net.gate, dict(net.named_parameters())) == names


def test_a_frozen_backbone_does_not_escape():
    net = Net()
    net.body.requires_grad_(False)
    h = net.body(torch.randn(3, 4))
    loss = (h + net.layer(h)).mean()
    assert uncovered_parameters(loss.grad_fn, net.gate, dict(net.named_parameters())) == []


def test_the_graph_is_walked_without_recursion():
    net = Net()
    y = net.layer(torch.randn(3, 4))
    for _ in range(5000):
        y = y + 1.0
    assert reaches(y.grad_fn, net.gate)


def test_reaches_follows_the_gradient_and_nothing_else():
    net = Net()
    h = net.body(torch.randn(3, 4))
    loss, other = net.layer(h).mean(), net.aux(h).mean()
    assert reaches(loss.grad_fn, net.gate)
    assert reaches(loss.grad_fn, h.grad_fn)
    assert reaches(net.gate, net.gate)
    assert not reaches(other.grad_fn, net.gate)
    assert not reaches(net.gate, loss.grad_fn)


TARGETS = torch.tensor([0, 1, 3])
X = torch.linspace(-1, 1, 12).view(3, 4)
WAYS = {  # around a call of the layer: what is after it, and whether its weight meets data beyond it
    "a head": (lambda n, h: n.layer(h).mean(), False),
    "an L2 term": (lambda n, h: n.layer(h).mean() + n.layer.weight.square().sum(), False),
    "an L2 term of both": (lambda n, h: n.layer(h).mean() + n.layer.weight.square().sum() * n.layer.bias.sum(), False),
    "an L2 term through a transpose": (lambda n, h: n.layer(h).mean() + n.layer.weight.t().square().sum(), False),
    "tied before": (lambda n, h: n.layer(F.linear(h, n.layer.weight)).mean(), False),
    "tied beside": (lambda n, h: n.layer(h).mean() + F.linear(h, n.layer.weight).mean(), True),
    "tied after": (lambda n, h: F.linear(n.layer(h), n.layer.weight).mean(), True),
    "tied after, through a transpose": (lambda n, h: F.linear(n.layer(h), n.layer.weight.t()).mean(), True),
    "beside, through a function": (lambda n, h: n.layer(h).mean() + F.linear(h.sin(), n.layer.weight**2).mean(), True),
    "beside, in part": (lambda n, h: n.layer(h).mean() + (h[:, :4] @ n.layer.weight[:2].repeat(2, 1).T).mean(), True),
    "beside, with inputs": (lambda n, h: n.layer(h).mean() + F.linear(X, n.layer.weight).mean(), True),
    "beside, with one input": (lambda n, h: n.layer(h).mean() + (X[:1] * n.layer.weight[0]).mean(), True),
    "beside, spread": (lambda n, h: n.layer(h).mean() + (X[:, :1, None] * n.layer.weight).mean(), True),
    "beside, looked up": (lambda n, h: n.layer(h).mean() + F.embedding(TARGETS, n.layer.weight).mean(), True),
    "beside, per sample": (lambda n, h: (n.layer(h).mean(1) + n.layer.weight.square().sum()).mean(), True),
    "times the loss": (lambda n, h: n.layer(h).mean() * n.layer.weight.square().sum(), True),
    "a norm": (lambda n, h: n.layer(h).mean() + 0.1 * n.layer.weight.norm(), False),
    "a distance": (lambda n, h: n.layer(h).mean() - (n.layer.weight - 1.5).abs().mean() / 3, False),
    "two norms": (lambda n, h: n.layer(h).mean() + (n.layer.weight.norm() + n.layer.bias.norm()) / 2, False),
}


@pytest.mark.parametrize("case", WAYS)
def test_a_parameter_that_meets_data_beyond_the_gate_is_told_from_a_regularised_one(case):
    net, (loss_of, beyond) = Net(), WAYS[case]
    loss = loss_of(net, net.body(torch.randn(3, 4)))
    assert used_beyond(loss.grad_fn, net.gate, {"weight": net.layer.weight}) == ["weight"] * beyond


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm1d(4), lambda: nn.BatchNorm1d(4, affine=False)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_after_the_gate_mixes_samples_in_training_only(training, norm):
    net, norm = Net(), norm().train(training)
    loss = norm(net.layer(torch.randn(3, 4))).relu().mean()
    assert mixes_samples(loss.grad_fn, net.gate) is training


def test_batch_norm_before_the_gate_leaves_the_head_to_itself():
    net, norm = Net(), nn.BatchNorm1d(4).train()
    loss = F.layer_norm(net.layer(norm(net.body(torch.randn(3, 4)))), (4,)).mean()
    assert mixes_samples(loss.grad_fn, net.gate) is False


SEQUENCE = torch.randn(3, 4, 5, requires_grad=True)
NORMS = {
    "batch norm": (nn.BatchNorm1d(4), SEQUENCE, True),
    "batch norm, not training": (nn.BatchNorm1d(4).eval(), SEQUENCE, False),
    "batch norm without statistics": (nn.BatchNorm1d(4, track_running_stats=False).eval(), SEQUENCE, True),
    "batch norm of one sample": (nn.BatchNorm1d(4), SEQUENCE[:1], False),
    "instance norm": (nn.InstanceNorm1d(4, affine=True), SEQUENCE, False),
    "layer norm": (nn.LayerNorm(5), SEQUENCE, False),
    "group norm": (nn.GroupNorm(2, 4), SEQUENCE, False),
}


@for_each("case", NORMS)
def test_a_norm_over_the_batch_is_told_from_others(case):
    norm, x, over_batch = NORMS[case]
    assert any(normalises_batch(node) for node in walk(norm(x).grad_fn)) is over_batch
