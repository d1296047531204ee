"""A layer's calls are recorded while it is armed, and only its own."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from lightning_mimic.gradients.tap import LayerTap

PARTS = {"weight": "body.layer.weight", "bias": "body.layer.bias"}


def tapped(armed=True):
    module = nn.ModuleDict({"layer": nn.Linear(2, 3)})
    tap = LayerTap("body.layer", module["layer"], PARTS)
    tap.armed = armed
    return module, tap


def test_a_call_holds_input_node_and_shape():
    module, tap = tapped()
    x = torch.randn(5, 2, requires_grad=True)
    y = module["layer"](x)
    node = y.grad_fn
    y.relu_()
    (call,) = tap.calls
    assert (call.node, call.shape, call.name, call.parts) == (node, (5, 3), "body.layer", PARTS)
    torch.testing.assert_close(call.inputs, x.detach(), rtol=0, atol=0)
    assert not call.inputs.requires_grad
    assert call.inputs.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("bias", [True, False])
def test_the_node_of_a_call_on_tokens_gets_the_whole_gradient_also_of_what_is_done_in_place(bias):
    layer = nn.Linear(2, 3, bias)
    tap = LayerTap("layer", layer, PARTS)
    tap.armed = True
    y = layer(torch.randn(5, 4, 2))
    total = (3 * y).sum() + y.mul_(2).sum()
    (call,) = tap.calls
    (arrived,) = torch.autograd.grad(total, [GradientEdge(call.node, 0)])
    assert call.shape == (5, 4, 3)
    torch.testing.assert_close(arrived.reshape(call.shape), torch.full((5, 4, 3), 5.0))


def test_an_input_given_by_keyword_is_recorded():
    module, tap = tapped()
    x = torch.randn(5, 2)
    module["layer"](input=x)
    torch.testing.assert_close(tap.calls[0].inputs, x, rtol=0, atol=0)


def test_every_call_is_recorded_in_order():
    module, tap = tapped()
    for rows in (5, 4):
        module["layer"](torch.randn(rows, 2))
    assert [call.shape for call in tap.calls] == [(5, 3), (4, 3)]


def test_calls_are_ignored_while_not_armed():
    module, tap = tapped(armed=False)
    module["layer"](torch.randn(5, 2))
    assert not tap.calls


def test_calls_without_gradient_are_counted():
    module, tap = tapped()
    with torch.no_grad():
        module["layer"](torch.randn(5, 2))
    assert (tap.calls, tap.calls_without_gradient) == ([], 1)


def test_calls_of_a_copy_are_ignored():
    module, tap = tapped()
    copy.deepcopy(module)["layer"](torch.randn(5, 2))
    assert not tap.calls


def test_an_input_changed_in_place_afterwards_is_refused_when_asked_for():
    module, tap = tapped()
    x = torch.randn(5, 2).relu_()
    module["layer"](x)
    assert tap.calls[0].inputs.shape == (5, 2)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"the input of 'body\.layer' was changed in place after.*out-of-place"):
        _ = tap.calls[0].inputs


def test_reset_forgets_and_disarms_and_remove_takes_the_hook_off():
    module, tap = tapped()
    module["layer"](torch.randn(5, 2))
    tap.reset()
    assert not tap.calls
    assert not tap.armed
    assert len(module["layer"]._forward_hooks) == 1
    tap.remove()
    assert not module["layer"]._forward_hooks
