"""Every product with one layer's per-sample gradients agrees with autograd's own, taken one sample at a time."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import LayerGradients
from oracles import finite_difference_scores, per_sample_gradients, weighted_gradient
from support.cases import case, pairwise
from support.layer_kinds import LAYERS, LINEAR, TARGETS, made

EXACT = {"rtol": 0, "atol": 0}
DIGITS = {torch.float64: {"rtol": 1e-9, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


def targets_of(kind):
    layer = LAYERS[kind][0]()
    return [target for target in TARGETS if all(getattr(layer, part, None) is not None for part in target)]


def losses_of(layer, batch):
    outputs = torch.tanh(layer(batch[0])).flatten(1)
    return (outputs - batch[1][:, None]).square().mean(1) + torch.logsumexp(outputs, 1)


def rows_of(layer, batch, parts=None):
    """The layer's rows, under the sum of the losses: each row is then an unreduced loss's own gradient."""
    seen = []
    handle = layer.register_forward_hook(lambda layer, args, output: seen.append(output))
    total = losses_of(layer, batch).sum()
    handle.remove()
    return LayerGradients(layer, batch[0], *torch.autograd.grad(total, seen), parts)


def vectors_of(layer, target=("weight", "bias"), dtype=None):
    torch.manual_seed(11)
    vectors = {name: torch.randn(p.shape).to(dtype or p.dtype) for name, p in layer.named_parameters()}
    return {name: v for name, v in vectors.items() if name in target}


def looped_dot(gradients, vectors):
    return sum((gradients[name] * v.double()).flatten(1).sum(1) for name, v in vectors.items())


def matrix(gradients, parts):
    return torch.cat([gradients[name].flatten(1) for name in gradients if name in parts], 1)


def possible(kind, rows):
    return 1 if rows == 1 and kind != "batch norm, training" else max(rows, 2)


@pytest.mark.parametrize("kind", LAYERS)
def test_float64_dots_equal_those_of_a_loop_over_samples_and_of_moved_weights(kind):
    for rows in (1, 4):
        layer, batch = made(kind, possible(kind, rows))
        held, gradients = rows_of(layer, batch), per_sample_gradients(layer, losses_of, batch)
        for target in targets_of(kind):
            with case(f"{rows} rows", target):
                vectors = vectors_of(layer, target)
                dot = held.dot(vectors)
                assert dot.dtype == torch.float64
                torch.testing.assert_close(dot, looped_dot(gradients, vectors), **DIGITS[torch.float64])
                if "padding" in kind:  # a moved padding row does change the loss
                    continue
                chosen = {name: layer.get_parameter(name).detach() for name in target}
                reference = {name: p + vectors[name] for name, p in chosen.items()}
                moved = finite_difference_scores(layer, losses_of, batch, reference, list(target), 1e-5)
                length = sum(v.square().sum() for v in vectors.values()).sqrt()
                torch.testing.assert_close(-dot / length, moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_dots_and_sums_over_samples_are_those_of_the_float64_loop_within_their_rounding(kind):
    exact, exact_batch = made(kind, 5)
    gradients = per_sample_gradients(exact, losses_of, exact_batch)
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    layer, batch = made(kind, 5, torch.float32)
    held = rows_of(layer, batch)
    for target in targets_of(kind):
        with case("dot", target):
            vectors = vectors_of(layer, target)
            dot = held.dot(vectors)
            assert dot.dtype == torch.float32
            torch.testing.assert_close(dot.double(), looped_dot(gradients, vectors), rtol=1e-5, atol=2e-5)
    for dtype in (torch.float32, torch.float64):
        layer, batch = made(kind, 5, dtype)
        weights = torch.tensor([0.0, 2.5, -1.0, 0.3, 1.0], dtype=dtype)
        for target in targets_of(kind):
            rows = rows_of(layer, batch, parts=target)
            with torch.no_grad():  # as inside a backward pass
                found = {"weighted": rows.weighted_sum(weights), "mean": rows.mean()}
            for name, factors in (("weighted", weights.double()), ("mean", uniform)):
                with case(dtype, target, name):
                    sums = weighted_gradient({part: gradients[part] for part in target}, factors)
                    torch.testing.assert_close(found[name], {p: g.to(dtype) for p, g in sums.items()}, **DIGITS[dtype])
                    assert not any(g.requires_grad for g in found[name].values())
        assert all(p.grad is None and p.requires_grad for p in layer.parameters())


def test_sums_over_samples_leave_frozen_parameters_frozen():
    layer, batch = made("linear", 2)
    rows = rows_of(layer, batch)
    layer.requires_grad_(False)
    rows.weighted_sum(torch.ones(2, dtype=batch[0].dtype))
    assert not any(p.requires_grad for p in layer.parameters())


def test_the_mean_of_float64_rows_has_float64_digits():
    layer = nn.Linear(2, 2, bias=False).double()
    inputs, b = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    mean = LayerGradients(layer, inputs, b).mean()["weight"]
    torch.testing.assert_close(mean, b.T @ inputs / 3, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", LINEAR)
def test_norms_and_gram_are_those_of_the_matrix_that_is_never_built(kind, rows):
    exact, exact_batch = made(kind, rows)
    gradients = per_sample_gradients(exact, losses_of, exact_batch)
    for dtype in (torch.float32, torch.float64):
        layer, batch = made(kind, rows, dtype)
        for target in targets_of(kind):
            with case(dtype, target):
                held, full = rows_of(layer, batch, parts=target), matrix(gradients, target)
                assert held.norms().dtype == held.gram().dtype == dtype
                torch.testing.assert_close(held.norms(), full.norm(dim=1).to(dtype), **DIGITS[dtype])
                torch.testing.assert_close(held.gram(), (full @ full.T).to(dtype), **DIGITS[dtype])


def test_without_parts_the_rows_hold_all_that_the_layer_has():
    layer, batch = made("linear, one token axis", 4)
    held, both = rows_of(layer, batch), rows_of(layer, batch, parts=("bias", "weight"))
    torch.testing.assert_close(held.norms(), both.norms(), **EXACT)
    torch.testing.assert_close(held.gram(), both.gram(), **EXACT)
    assert list(held.mean()) == list(both.mean()) == ["weight", "bias"]


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize(("tokens", "features"), [(40, 2), (1, 40), (3, 40), (3, 4)])
def test_neither_many_tokens_nor_many_features_are_squared(tokens, features):
    rows, layer = 5, nn.Linear(features, features)
    a, b = torch.randn(rows, tokens, features), torch.randn(rows, tokens, features)
    for product in ("norms", "gram"):
        with Largest() as largest:
            getattr(LayerGradients(layer, a, b), product)()
        pairs = rows * tokens**2 * (rows if product == "gram" else 1)
        assert largest.numel == max(a.numel(), rows**2, min(pairs, rows * features**2)), product


@pytest.mark.parametrize("shape", [(5,), (2, 5), (30, 5)])
def test_a_zero_gradient_has_norm_and_products_of_exactly_zero(shape):
    layer, a = nn.Linear(5, 4), torch.randn(3, *shape)
    b = torch.randn(3, *shape[:-1], 4)
    b[1] = 0
    for target in TARGETS:
        with case(target):
            held = LayerGradients(layer, a, b, target)
            assert held.norms()[1] == 0
            assert (held.norms()[[0, 2]] > 0).all()
            torch.testing.assert_close(held.gram()[1], torch.zeros(3), **EXACT)
            torch.testing.assert_close(held.gram()[:, 1], torch.zeros(3), **EXACT)


ONE_OF_EACH = {type(LAYERS[kind][0]()): kind for kind in LAYERS if kind not in LINEAR}.values()


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_norms_and_gram_of_other_layers_are_refused(kind):
    layer, batch = made(kind, 3)
    held = rows_of(layer, batch)
    for product in ("norms", "gram"):
        message = (
            f"LayerGradients of {type(layer).__name__} does not offer `{product}`; it offers `dot`. `norms` and `gram` "
            "are offered by LayerGradients of one nn.Linear."
        )
        with pytest.raises(MimicError, match=f"^{re.escape(message)}$"):
            getattr(held, product)()


@pytest.mark.parametrize("target", TARGETS)
def test_in_training_a_batch_norms_row_is_its_gradient_times_the_normalised_input(target):
    layer, (x, _) = made("batch norm, training, pixels", 4)
    before = copy.deepcopy(dict(layer.named_buffers()))
    b = torch.randn(4, 3, 4, 2, dtype=torch.float64)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    gradients = {"weight": (b * (x - mean) / (variance + layer.eps).sqrt()).sum((2, 3)), "bias": b.sum((2, 3))}
    held, vectors = LayerGradients(layer, x, b, target), vectors_of(layer, target)
    torch.testing.assert_close(held.dot(vectors), looped_dot(gradients, vectors), **DIGITS[torch.float64])
    expected = {name: gradients[name].mean(0) for name in target}
    torch.testing.assert_close(held.mean(), expected, **DIGITS[torch.float64])
    torch.testing.assert_close(dict(layer.named_buffers()), before, **EXACT)


def test_the_padding_row_has_no_part_in_any_product():
    layer, batch = made("embedding, padding", 4)
    held = rows_of(layer, batch)
    vector = torch.zeros(4, 3, dtype=torch.float64)
    vector[1] = 5.0
    torch.testing.assert_close(held.dot({"weight": vector}), torch.zeros(4, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(held.mean()["weight"][1], torch.zeros(3, dtype=torch.float64), **EXACT)


HALF = pairwise(weights=["full", "half"], half=[torch.bfloat16, torch.float16], autocast=[False, True])[1]


@pytest.mark.parametrize("kind", LAYERS)
def test_half_precision_activations_are_multiplied_in_float32(kind):
    for each in HALF:
        with case(*each):
            compare_in_half_precision(kind, *each)


def compare_in_half_precision(kind, weights, half, autocast):
    layer, (x, _) = made(kind, 4, torch.float32)
    layer = layer.to(half) if weights == "half" else layer
    vectors = vectors_of(layer, dtype=torch.float32)
    a = x.to(half) if x.is_floating_point() else x
    b = torch.randn(made(kind, 4, torch.float32)[0](x).shape).to(half)
    held = LayerGradients(layer, a, b)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dot = held.dot(vectors)
        squares = [held.norms().square(), held.gram().diag()] if kind in LINEAR else []
    exact = a.double() if a.is_floating_point() else a
    upcast = per_sample_gradients(
        copy.deepcopy(layer).double(), lambda m, ab: (m(ab[0]) * ab[1]).flatten(1).sum(1), [exact, b.double()]
    )
    assert dot.dtype == torch.float32
    torch.testing.assert_close(dot.double(), looped_dot(upcast, vectors), rtol=1e-5, atol=5e-5)
    for square in squares:
        torch.testing.assert_close(square.double(), matrix(upcast, upcast).square().sum(1), rtol=1e-5, atol=5e-5)
    if weights == "full":
        factors = torch.tensor([0.1, 0.2, 0.3, 0.4])
        sums = weighted_gradient(upcast, factors.double())
        found = held.weighted_sum(factors)
        torch.testing.assert_close(found, {n: g.float() for n, g in sums.items()}, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", ["linear", "conv2d, circular", "layer norm", "group norm", "batch norm"])
def test_half_precision_vectors_are_multiplied_in_float32_too(kind):
    layer, batch = made(kind, 4, torch.float32)
    held = rows_of(layer, batch)
    for target in TARGETS:
        with case(target):
            vectors = vectors_of(layer, target, torch.bfloat16)
            dot = held.dot(vectors)
            assert dot.dtype == torch.float32
            torch.testing.assert_close(dot, held.dot({name: v.float() for name, v in vectors.items()}))
