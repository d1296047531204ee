"""What the rules that ship do beyond one tensor in: two inputs, the size of an output, and no batch axis."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import LayerGradients, check_layer_rule
from lightning_mimic.gradients.layer_hooks import LayerCalls, LayerHooks
from oracles import per_sample_gradients, weighted_gradient
from support.cases import case, for_each
from support.gradient_checks import Ad, assert_exact, vectors_of

SAMPLES = 3


def bilinear(tokens, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layer = nn.Bilinear(5, 3, 4, bias=bias).to(dtype)
    return layer, torch.randn(6, *tokens, 5, dtype=dtype), torch.randn(6, *tokens, 3, dtype=dtype)


@pytest.mark.parametrize("tokens", [(), (2,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bilinear_layer_has_the_products_of_a_loop(dtype, tokens):
    layer, x, y = bilinear(tokens, dtype=dtype)
    b = torch.randn(6, *tokens, 4).to(dtype)
    exact = copy.deepcopy(layer).double()
    batch = [t.double() for t in (x, y, b)]
    gradients = per_sample_gradients(exact, lambda m, t: (m(t[0], t[1]) * t[2]).flatten(1).sum(1), batch)
    wide = torch.promote_types(dtype, torch.float32)
    digits = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    factors = torch.rand(6)
    calls = [((x, y), {}), ((x,), {"input2": y}), ((), {"input2": y, "input1": x})]
    for parts, (inputs, kwargs) in product([("weight", "bias"), ("weight",), ("bias",)], calls):
        vectors = {n: v for n, v in vectors_of(exact).items() if n in parts}
        expected = sum((gradients[name] * v).flatten(1).sum(1) for name, v in vectors.items())
        rows = LayerGradients(layer, inputs, b, parts, kwargs=kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            dot = rows.dot({name: v.to(wide) for name, v in vectors.items()})
        with case(parts, *kwargs):
            torch.testing.assert_close(dot, expected.to(wide), **digits)
            if dtype != torch.bfloat16:
                sums = weighted_gradient({n: g for n, g in gradients.items() if n in parts}, factors.double())
                sums = {n: g.to(dtype) for n, g in sums.items()}
                torch.testing.assert_close(rows.weighted_sum(factors), sums, **digits)
    for name in ("norms", "gram"):
        with pytest.raises(MimicError, match=f"^LayerGradients of Bilinear does not offer `{name}`; it"):
            getattr(rows, name)()
    check_layer_rule(layer, x, y)


@pytest.mark.parametrize("bias", [True, False])
@for_each("size", [[10, 8], [11, 9], None])
def test_a_transposed_convolution_honours_the_size_that_it_is_called_with(size, bias):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias).double()
    x = torch.randn(3, 4, 5, 4).double()
    size = size and [size[0] - 1, size[1] - 1]
    b = torch.randn_like(layer(x, output_size=size))
    gradients = per_sample_gradients(layer, lambda m, t: (m(t, size) * b).flatten(1).sum(1), x)
    vectors = vectors_of(layer)
    expected = sum((gradients[name] * v).flatten(1).sum(1) for name, v in vectors.items())
    for inputs, kwargs in (((x, size), {}), ((x,), {"output_size": size}), ((), {"output_size": size, "input": x})):
        rows = LayerGradients(layer, inputs, b, kwargs=kwargs)
        torch.testing.assert_close(rows.dot(vectors), expected)
        sums = weighted_gradient(gradients, torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(rows.weighted_sum(torch.ones(3)), sums)


def test_a_prelu_of_one_number_scores_rows_without_another_axis():
    layer, x, b = nn.PReLU().double(), torch.tensor([1.0, -2.0, -3.0]).double(), torch.tensor([5.0, 7.0, 0.5]).double()
    rows = LayerGradients(layer, x, b)
    torch.testing.assert_close(
        rows.dot({"weight": torch.tensor([2.0]).double()}), torch.tensor([0.0, -28.0, -3.0]).double()
    )
    torch.testing.assert_close(rows.mean()["weight"], torch.tensor([-15.5 / 3]).double())


@for_each(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(2, SAMPLES, 1), (2, 4)),
        (nn.ConvTranspose2d(2, SAMPLES, 1), (2, 4, 4)),
        (nn.ConvTranspose3d(2, SAMPLES, 1), (2, 4, 4, 4)),
        (nn.RMSNorm((SAMPLES, 2)), (SAMPLES, 2)),
        (nn.RMSNorm(SAMPLES), (SAMPLES,)),
    ],
)
def test_an_output_without_a_batch_axis_is_exact_or_not_scored(layer, shape):
    net = Ad(lambda n, x: n.l(x), l=layer).double()

    def losses(n, x):
        rows = n(x).square()
        return rows.flatten(1).sum(1) if rows.ndim > 1 else rows

    assert_exact(net, torch.randn(shape).double(), losses_of=losses, names=["l.weight"], unseen=None)


def test_every_tensor_of_a_call_is_watched_for_changes_in_place():
    layer, x, y = bilinear(())
    hooks = LayerHooks("fuse", layer, {"weight": "fuse.weight"})
    hooks.into = into = LayerCalls()
    layer(x, y)
    layer(input2=y, input1=x)
    for call in into.calls:
        assert torch.equal(call.inputs, call._versions[0][0])
        call.gradients(torch.ones(6, 4))
    assert torch.equal(into.calls[0].inputs, x)
    y.mul_(2)
    for call in into.calls:
        for read in (lambda: call.inputs, lambda: call.gradients(torch.ones(6, 4))):  # noqa: B023
            with pytest.raises(RuntimeError, match=r"the input of 'fuse' was changed in place after.*out-of-place"):
                read()
    hooks.remove()
