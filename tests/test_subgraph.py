"""Parameters that no rule leads to the batch are scored where the first rows of samples are, or named with a reason."""

import fnmatch

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.subgraph import SubgraphUse
from oracles import per_sample_gradients
from support.cases import case
from support.functional_nets import TOKENS, B, D, T, ad
from support.gradient_checks import (
    Ad,
    assert_exact,
    assert_near_under_autocast,
    looped,
    losses_of,
    param,
    traced,
    vectors_of,
)
from support.parametrized_nets import NETWORKS, parametrized


class Squared(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.square(), self.bias)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


SEARCHED = {  # what is computed, and its parts
    "a slice": (lambda n, x: x @ n.p[:, :2], lambda: {"p": param(D, D)}),
    "a row": (lambda n, x: x + n.p[1], lambda: {"p": param(D, D)}),
    "rows by index": (lambda n, x: x + n.p[[1, 0]], lambda: {"p": param(T, D)}),
    "a repeated token": (lambda n, x: n.p.repeat(B, 1, 1) + x, lambda: {"p": param(1, 1, D)}),
    "an exponential": (lambda n, x: x * n.p.exp(), lambda: {"p": param()}),
    "an exponential added twice": (lambda n, x: x + n.p.exp() + n.p.exp(), lambda: {"p": param(D)}),
    "a difference": (lambda n, x: x - n.p, lambda: {"p": param(D)}),
    "a sum with a factor": (lambda n, x: torch.add(x, n.p, alpha=2), lambda: {"p": param(D)}),
    "a scale of a view in place": (
        lambda n, x: n.l(x).view(B, T, D).mul_(n.p),
        lambda: {"p": param(D), "l": nn.Linear(D, D)},
    ),
    "a product with a factor": (lambda n, x: torch.addmm(x[:, 0], x[:, 1], n.p, alpha=2), lambda: {"p": param(D, D)}),
    "a scaled table": (lambda n, x: x + n.p * torch.ones(T, D).double(), lambda: {"p": param()}),
    "layer norm by hand, time first": (
        lambda n, x: F.layer_norm(x.transpose(0, 1), (D,), n.p, n.q).transpose(0, 1),
        lambda: {"p": param(D), "q": param(D)},
    ),
    "einsum": (lambda n, x: torch.einsum("bti,io->bto", x, n.p), lambda: {"p": param(D, D)}),
    "prelu": (lambda n, x: F.prelu(x.mT, n.p), lambda: {"p": param(D)}),
    "instance norm": (lambda n, x: n.l(x.mT), lambda: {"l": nn.InstanceNorm1d(D, affine=True)}),
    "squared weight": (lambda n, x: n.l(x), lambda: {"l": Squared(D, D)}),
    "weight norm": (lambda n, x: n.l(x), lambda: {"l": parametrizations.weight_norm(nn.Linear(D, D))}),
    "a filter of frequencies": (
        lambda n, x: torch.fft.irfft(torch.fft.rfft(x, dim=2) * n.p, D, 2),
        lambda: {"p": param(D // 2 + 1)},
    ),
    "pruned": (lambda n, x: n.l(x), lambda: {"l": pruned(nn.Linear(D, D))}),
    "once by its layer and once by hand": (lambda n, x: n.l(x) + x @ n.l.weight, lambda: {"l": nn.Linear(D, D)}),
    "a call for nothing and one by hand": (
        lambda n, x: (n.l(x), F.linear(x, n.l.weight.square()))[1],
        lambda: {"l": nn.Linear(D, D, bias=False)},
    ),
    "a penalty": (lambda n, x: n.l(x) + n.l.weight.square().sum(), lambda: {"l": nn.Linear(D, D)}),
    "halves of the batch": (lambda n, x: torch.cat([n.l(x[:2]), n.l(x[2:])]), lambda: {"l": nn.Linear(D, D)}),
    "two views of the batch": (
        lambda n, x: torch.stack(n.l(torch.cat([x, 2 * x])).chunk(2), 1),
        lambda: {"l": nn.Linear(D, D)},
    ),
    "a norm over the batch's axis too": (lambda n, x: n.l(x[:, 0]), lambda: {"l": nn.LayerNorm((B, D))}),
    "a position table": (lambda n, x: x + n.l(torch.arange(T)), lambda: {"l": nn.Embedding(T, D)}),
}


@pytest.mark.parametrize("kind", SEARCHED)
def test_what_no_rule_is_known_for_is_exact(kind):
    net = ad(*SEARCHED[kind])
    rows = assert_exact(net, torch.randn(TOKENS).double())
    assert any(way[1] is SubgraphUse for way in rows.ways)
    assert not rows.rows_that_mix_samples()


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_are_exact_whatever_the_number_of_samples(kind):
    for rows in (1, 2, 5):
        for tokens in (2, 5):  # as many as samples, too
            with case(f"{rows} rows, {tokens} tokens"):
                net, x = parametrized(kind, rows, tokens)
                assert not assert_exact(net, x).rows_that_mix_samples()


@pytest.mark.parametrize("kind", ["gpt", "lora", "weight norm", "relative biases", "lstm", "gru", "decoder"])
def test_one_network_called_twice(kind):
    net, x = parametrized(kind, 2, 2)
    twice = Ad(lambda n, x: torch.cat([n.net(x).flatten(1), n.net(x.flip(1)).flatten(1).tanh()], 1), net=net)
    assert_exact(twice, x)


@pytest.mark.parametrize("kind", ["gpt", "bert", "lora", "weight norm", "relative biases", "lstm", "gru", "cells"])
def test_within_a_checkpoint(kind):
    net, x = parametrized(kind, 2, 5)
    assert_exact(Ad(lambda n, x: checkpoint(n.net, x, use_reentrant=False), net=net), x)


@pytest.mark.parametrize("kind", sorted(NETWORKS.keys() - {"lstm, projected"}))  # torch warns of its own choice
def test_float32_is_exact_within_its_rounding(kind):
    for rows, tokens in ((2, 5), (5, 5)):
        with case(rows, tokens):
            net, x = parametrized(kind, rows, tokens, torch.float32)
            assert_exact(net, x, rtol=2e-4)


@pytest.mark.parametrize("kind", ["gpt", "lora", "weight norm", "relative biases", "lstm", "gru", "decoder"])
def test_products_of_an_autocast_pass_are_near_those_of_the_exact_one(kind):
    net, x = parametrized(kind, 5, 2, torch.float32)
    assert_near_under_autocast(net, x)


def test_spectral_norm_in_training_is_that_of_its_own_forward_pass():
    net, x = parametrized("spectral norm", 5, 2)
    net.train()
    vectors = vectors_of(net)
    losses, rows, unseen = traced(net, losses_of, x, vectors)
    assert not unseen
    expected = looped(per_sample_gradients(net, lambda net, x: losses, x), vectors)
    torch.testing.assert_close(rows.dot(vectors), expected, rtol=1e-9, atol=1e-12)


def test_some_parameters_alone():
    for kind in ("gpt, tied", "lstm, two layers and ways", "decoder", "relative biases", "lora"):
        net, x = parametrized(kind, 5, 2)
        for name in vectors_of(net):
            with case(kind, name):
                assert_exact(net, x, names=[name])


def test_the_states_of_a_fused_recurrence():
    def last(net, x):
        outputs, (hidden, cell) = net.layer(x)
        return {"h": hidden[-1], "c": cell[-1], "all": hidden.sum(0) + cell.sum(0), "o": outputs[:, -1]}[net.use]

    for use, rows, layers in ((u, b, k) for u in ("h", "c", "all", "o") for b in (2, 5) for k in (1, 2)):
        with case(use, rows, layers):
            torch.manual_seed(0)
            net = Ad(last, layer=nn.LSTM(D, 3, layers, batch_first=True))
            net.use = use
            assert_exact(net, torch.randn(rows, 5, D), rtol=2e-4)


class Doubling(torch.autograd.Function):
    """Correct once; of its derivative autograd sees nothing."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.detach()


def packed(net, x):
    lengths = torch.tensor([2, 1, 2])
    sequences = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return net.l(sequences)[1][0]


def attended(x):
    return F.scaled_dot_product_attention(x, x, x)


REFUSED = {  # what is computed, its parts, what is unseen, and why
    "a custom function": (
        lambda n, x: x * Doubling.apply(n.p),
        lambda: {"p": param(D)},
        "p",
        "used by Doubling, a compiled or custom function",
    ),
    "below fused attention": (
        lambda n, x: attended(x.transpose(0, 1)[:, None] * n.p.exp()).transpose(0, 2),
        lambda: {"p": param(D)},
        "p",
        "differentiated twice; allow the slower attention that can with `math_attention=True`",
    ),
    "under a norm over the batch": (
        lambda n, x: F.batch_norm(x[:, 0], None, None, n.p.exp(), training=True),
        lambda: {"p": param(D)},
        "p",
        "used below a batch normalisation in training mode",
    ),
    "packed": (packed, lambda: {"l": nn.LSTM(D, 3, batch_first=True)}, "l.*", "was given a PackedSequence"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_differentiated_so_is_named_with_the_reason(kind):
    compute, parts, unseen, reason = REFUSED[kind]
    net, x = ad(compute, parts), torch.randn(TOKENS).double()
    found = traced(net, losses_of, x, vectors_of(net))[2]
    assert found
    assert all(fnmatch.fnmatchcase(name, unseen) and reason in why for name, why in found.items())


def test_axes_that_cannot_be_told_apart_below_a_norm_over_the_batch_are_refused():
    parts = {"l": Squared(D, 5), "n": nn.BatchNorm1d(5)}
    net = Ad(lambda n, x: n.n(n.l(x.transpose(0, 1)).tanh()[-1]), **parts).double()
    for rows in (3, 2):
        found = traced(net, losses_of, torch.randn(rows, 2, D).double(), vectors_of(net))[2]
        assert bool(found) == (rows == 2)
        assert all("cannot be checked which axis is that of the 2 samples" in why for why in found.values())


def test_an_operation_that_has_no_second_derivative_stops():
    lengths, words = torch.tensor([1, 3]), torch.tensor([[0, 1]])
    for compute in (
        lambda n, x: x + torch.segment_reduce(n.p.exp(), "sum", lengths=lengths).sum(),
        lambda n, x: x + F.embedding_bag(words, n.p.view(2, 2).exp()).sum(),
    ):
        net = ad(compute, lambda: {"p": param(D)})
        rows = traced(net, losses_of, torch.randn(TOKENS).double(), vectors_of(net))[1]
        with pytest.raises(MimicError, match=r"'p' cannot be scored, because an operation between them and the batch"):
            rows.dot(vectors_of(net))


def test_scoring_leaves_no_gradients_no_hooks_and_the_backward_pass_as_it_was():
    for kind in ("gpt", "lstm", "relative biases", "weight norm"):
        gradients = []
        for scored in (True, False):
            net, x = parametrized(kind, 5, 2, torch.float32)
            if scored:
                losses, rows, _ = traced(net, losses_of, x, vectors := vectors_of(net))
                rows.dot(vectors)
                assert all(p.grad is None for p in net.parameters())
            else:
                losses = losses_of(net, x)
            losses.mean().backward()
            gradients.append({name: p.grad for name, p in net.named_parameters()})
        with case(kind):
            torch.testing.assert_close(*gradients, rtol=0, atol=0)
