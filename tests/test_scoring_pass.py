"""The pass that takes the products of a whole model leaves everything as it was, and says what its rows are."""

import copy

import pytest
import torch
from torch import nn

from lightning_mimic.gradients import Graph, ModelHooks, WholeModelGradients
from oracles import per_sample_gradients
from support.gradient_checks import Ad, contrastive, looped, losses_of, traced, vectors_of
from support.networks import made

DTYPES = ["mlp of tokens", "conv net", "timm vit", "torchvision vit", "timm resnet in eval mode"]


@pytest.mark.parametrize("kind", ["mlp", "timm vit", "torchvision vit"])
def test_a_seed_scales_the_rows(kind):
    net, x, _ = made(kind)
    net.eval()
    vectors = vectors_of(net)
    seed = torch.tensor([0.0, 2.0, -1.5, 1e3], dtype=x.dtype)
    plain = traced(net, losses_of, x, vectors)[1].dot(vectors)
    scaled = traced(net, losses_of, x, vectors, seed)[1].dot(vectors)
    torch.testing.assert_close(scaled, seed * plain, rtol=1e-9, atol=1e-12)


def test_a_summed_loss_serves_as_its_parts_do():
    net, x, _ = made("timm vit")
    vectors = vectors_of(net)
    apart = traced(net, losses_of, x, vectors)[1].dot(vectors)
    hooks = ModelHooks(net, dict(net.named_parameters()))
    with hooks.recording() as calls:
        mean = losses_of(net, x).mean()
    graph = Graph(mean.grad_fn)
    uses, unseen = hooks.uses(calls, graph, len(x))
    hooks.remove()
    assert unseen == {}
    together = WholeModelGradients(mean, uses, graph, len(x), torch.tensor(4.0, dtype=x.dtype)).dot(vectors)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "kind", ["mlp of tokens", "timm vit, layer scale", "torchvision vit", "torchvision resnet in eval mode"]
)
def test_the_backward_pass_afterwards_is_the_one_without_scoring_to_the_last_bit(kind):
    net, x, _ = made(kind, dtype=torch.float32)
    vectors = vectors_of(net)
    gradients = []
    for scored in (True, False):
        net.zero_grad()
        torch.manual_seed(3)
        if scored:
            losses, rows, _ = traced(net, losses_of, x, vectors)
            rows.dot(vectors)
            rows.rows_that_mix_samples()
            assert all(p.grad is None for p in net.parameters())
        else:
            losses = losses_of(net, x)
        losses.mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_nothing_looks_on_after_the_products_are_taken(monkeypatch):
    net, x, _ = made("timm vit")
    vectors = vectors_of(net)
    losses, rows, _ = traced(net, losses_of, x, vectors)
    assert not any(layer._forward_hooks for layer in net.modules())
    first = rows.dot(vectors)
    for use in [use for uses in rows._at.values() for use in uses]:
        monkeypatch.setattr(type(use), "dot", lambda *_: pytest.fail("a hook was left behind"))
    losses.mean().backward()
    monkeypatch.undo()
    assert first.shape == (4,)


def test_hooks_are_taken_off_when_a_product_fails():
    net, x, _ = made("timm vit")
    vectors = vectors_of(net)
    losses, rows, _ = traced(net, losses_of, x, vectors)
    with pytest.raises(KeyError):
        rows.dot({})
    losses.mean().backward()


def test_products_can_be_taken_again():
    net, x, _ = made("timm vit")
    vectors = vectors_of(net)
    rows = traced(net, losses_of, x, vectors)[1]
    torch.testing.assert_close(rows.dot(vectors), rows.dot(vectors), rtol=0, atol=0)
    doubled = rows.dot({name: 2 * v for name, v in vectors.items()})
    torch.testing.assert_close(doubled, 2 * rows.dot(vectors), rtol=1e-12, atol=0)


def test_no_gradient_of_a_weight_is_computed():
    net, x, _ = made("mlp of tokens")
    vectors = vectors_of(net)
    rows = traced(net, losses_of, x, vectors)[1]
    for parameter in net.parameters():
        parameter.register_hook(lambda _: pytest.fail("a weight's gradient was computed"))
    rows.dot(vectors)


def test_a_copys_calls_are_its_own():
    net, x, _ = made("timm vit")
    names = list(vectors_of(net))
    hooks = ModelHooks(net, {name: net.get_parameter(name) for name in names})
    twin = copy.deepcopy(net)
    with hooks.recording() as calls:
        twin(x)
        assert calls.calls == []
        net(x)
    assert {call.name for call in calls.calls} == {layer.name for layer in hooks.layers}
    assert len(calls.calls) == len(hooks.layers)
    net(x)
    assert len(calls.calls) == len(hooks.layers)
    hooks.remove()


def with_those_before(net, x):
    """Losses in which the first sample sees no other one."""
    return losses_of(net, x).cumsum(0)


def with_those_after(net, x):
    return losses_of(net, x).flip(0).cumsum(0).flip(0)


@pytest.mark.parametrize(
    ("kind", "contrasted"),
    [("mlp", contrastive), ("CLIP image tower", contrastive), ("mlp", with_those_before), ("mlp", with_those_after)],
)
def test_losses_that_see_each_other_are_coupled(kind, contrasted):
    net, x, _ = made(kind)
    vectors = vectors_of(net)
    assert traced(net, contrasted, x, vectors)[1].rows_that_mix_samples()
    assert not traced(net, losses_of, x, vectors)[1].rows_that_mix_samples()


@pytest.mark.parametrize("samples", [1, 2])
def test_a_single_sample_shows_nothing(samples):
    net, x, _ = made("mlp")
    rows = traced(net, losses_of, x[:samples], vectors_of(net))[1]
    assert rows.rows_that_mix_samples() == []
    assert rows.conclusive is (samples > 1)


def test_only_the_deepest_uses_gradients_are_asked_for():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 2))
    marks = []
    for layer in net:
        layer.register_forward_hook(lambda _, args, output: marks.append(output.grad_fn))
    losses = net(torch.randn(3, 2)).sum(1)
    graph = Graph(losses.grad_fn)
    assert graph.deepest(marks) == [marks[0]]
    assert graph.deepest(marks[2:]) == [marks[2]]
    assert graph.deepest([]) == []


@pytest.mark.parametrize("kind", ["mlp", "mlp of tokens"])
def test_one_call_of_one_layer_has_all_of_its_products(kind):
    net, x, _ = made(kind)
    gradients = per_sample_gradients(net, losses_of, x)
    names = ["2.weight", "2.bias"]
    rows = traced(net, losses_of, x, names)[1].only_layer()
    flat = torch.cat([gradients[name].flatten(1) for name in names], 1)
    torch.testing.assert_close(rows.gram(), flat @ flat.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(rows.norms(), flat.norm(dim=1), rtol=1e-9, atol=1e-11)
    seed = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=x.dtype)
    seeded = traced(net, losses_of, x, names, seed)[1].only_layer()
    torch.testing.assert_close(seeded.norms(), seed.abs() * flat.norm(dim=1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("names", [["0.weight", "2.weight"], []])
def test_several_layers_are_not_one(names):
    net, x, _ = made("mlp")
    rows = traced(net, losses_of, x, names)[1]
    with pytest.raises(ValueError, match=f"^the parameters were used {len(names)} times, not by one call"):
        rows.only_layer()


def test_a_layer_called_twice_is_not_one_call():
    net = Ad(lambda net, x: net.layer(net.layer(x).tanh()), layer=nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"used 2 times"):
        traced(net, losses_of, torch.randn(2, 3), ["layer.weight"])[1].only_layer()


class Stopped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("stopped", [lambda h: torch.where(h > 1e9, h, 0.5), Stopped.apply])
def test_layers_that_no_gradient_reaches_count_nothing(stopped):
    net, x, _ = made("mlp")
    vectors = vectors_of(net)
    rows = traced(net, lambda net, x: losses_of(lambda x: stopped(net(x)), x), x, vectors)[1]
    torch.testing.assert_close(rows.dot(vectors).double(), torch.zeros(4, dtype=x.dtype), rtol=0, atol=0)
    assert not rows.rows_that_mix_samples()


def test_one_layer_that_no_gradient_reaches_is_told():
    net, x, _ = made("mlp")
    rows = traced(net, lambda net, x: losses_of(lambda x: Stopped.apply(net(x)), x), x, ["0.bias"])[1]
    with pytest.raises(ValueError, match=r"^no gradient reaches the output of '0'\.$"):
        rows.only_layer()


def test_no_parameters_no_products():
    net, x, _ = made("mlp")
    _, rows, unseen = traced(net, losses_of, x, [])
    assert unseen == {}
    torch.testing.assert_close(rows.dot({}), torch.zeros(4), rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind", ["mlp of tokens", "conv net", "timm vit", "torchvision vit", "timm resnet in eval mode"]
)
def test_directions_in_double_on_a_net_in_single(kind):
    net, x, _ = made(kind, dtype=torch.float32)
    net.eval()
    vectors = vectors_of(net)
    rows = traced(net, losses_of, x, vectors)[1]
    dot, doubled = rows.dot(vectors), rows.dot({name: v.double() for name, v in vectors.items()})
    assert doubled.dtype == torch.float64
    torch.testing.assert_close(doubled.float(), dot, rtol=1e-4, atol=1e-4 * float(dot.abs().max()))


@pytest.mark.parametrize(
    "kind", ["mlp of tokens", "conv net", "timm vit", "torchvision vit", "timm resnet in eval mode"]
)
def test_directions_in_single_on_a_net_in_half(kind):
    net, x, _ = made(kind, dtype=torch.bfloat16)
    net.eval()
    vectors = {name: v.float() for name, v in vectors_of(net).items()}
    dot = traced(net, losses_of, x, vectors)[1].dot(vectors)
    assert dot.dtype == torch.float32
    expected = looped(per_sample_gradients(net, losses_of, x), vectors)
    assert float((dot - expected).norm() / expected.norm()) < 0.05
