"""A layer's calls are recorded between start and stop, and only its own."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from lightning_mimic.gradients.layer_hooks import LayerCalls, LayerHooks

PARTS = {"weight": "body.layer.weight", "bias": "body.layer.bias"}


def hooked(recording=True):
    module, into = nn.ModuleDict({"layer": nn.Linear(2, 3)}), LayerCalls()
    hooks = LayerHooks("body.layer", module["layer"], PARTS)
    hooks.into = into if recording else None
    return module, into, hooks


def test_a_call_holds_input_node_and_shape():
    module, into, _ = hooked()
    x = torch.randn(5, 2, requires_grad=True)
    y = module["layer"](x)
    node = y.grad_fn
    y.relu_()
    (call,) = into.calls
    assert (call.node, call.shape, call.name, call.parts) == (node, (5, 3), "body.layer", PARTS)
    torch.testing.assert_close(call.inputs, x.detach(), rtol=0, atol=0)
    assert not call.inputs.requires_grad
    assert call.inputs.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("bias", [True, False])
def test_the_node_of_a_call_on_tokens_gets_the_whole_gradient_also_of_what_is_done_in_place(bias):
    layer = nn.Linear(2, 3, bias)
    hooks, into = LayerHooks("layer", layer, PARTS), LayerCalls()
    hooks.into = into
    y = layer(torch.randn(5, 4, 2))
    total = (3 * y).sum() + y.mul_(2).sum()
    (call,) = into.calls
    (arrived,) = torch.autograd.grad(total, [GradientEdge(call.node, 0)])
    assert call.shape == (5, 4, 3)
    torch.testing.assert_close(arrived.reshape(call.shape), torch.full((5, 4, 3), 5.0))


def test_an_input_given_by_keyword_is_recorded():
    module, into, _ = hooked()
    x = torch.randn(5, 2)
    module["layer"](input=x)
    torch.testing.assert_close(into.calls[0].inputs, x, rtol=0, atol=0)


def test_every_call_is_recorded_in_order():
    module, into, _ = hooked()
    for rows in (5, 4):
        module["layer"](torch.randn(rows, 2))
    assert [call.shape for call in into.calls] == [(5, 3), (4, 3)]


def test_calls_are_ignored_while_nothing_records():
    module, into, _ = hooked(recording=False)
    module["layer"](torch.randn(5, 2))
    assert not into.calls


def test_layers_that_ran_without_gradient_are_noted():
    module, into, _ = hooked()
    with torch.no_grad():
        module["layer"](torch.randn(5, 2))
    assert (into.calls, into.without_gradient) == ([], set(PARTS.values()))


def test_calls_of_a_copy_are_ignored():
    module, into, _ = hooked()
    copy.deepcopy(module)["layer"](torch.randn(5, 2))
    assert not into.calls


def test_an_input_changed_in_place_afterwards_is_refused_when_asked_for():
    module, into, _ = hooked()
    x = torch.randn(5, 2).relu_()
    module["layer"](x)
    assert into.calls[0].inputs.shape == (5, 2)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"the input of 'body\.layer' was changed in place after.*out-of-place"):
        _ = into.calls[0].inputs


def test_what_was_recorded_stays_and_remove_takes_the_hook_off():
    module, into, hooks = hooked()
    module["layer"](torch.randn(5, 2))
    hooks.into = None
    module["layer"](torch.randn(5, 2))
    assert len(into.calls) == 1
    assert len(module["layer"]._forward_hooks) == 1
    hooks.remove()
    assert not module["layer"]._forward_hooks
