"""What is put on a module catches one step, says what it cannot use, and comes off without a trace."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from lightning_mimic.errors import MimicError
from lightning_mimic.reweighting.hooks import GradientHooks, LossCapture, wrap_method


class Module(nn.Module):
    def __init__(self, name="original"):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.name = name

    def step(self, batch: int, scale: float = 1.0) -> tuple:
        """The step's own words."""
        return self.name, batch, scale


def noted(calls):
    def around(call, *args, **kwargs):
        calls.append((args, kwargs))
        return "around", call(*args, **kwargs)

    return around


def test_a_wrapped_call_goes_through_around_with_its_arguments():
    module, calls = Module(), []
    wrap_method(module, "step", noted(calls))
    assert module.step(3, scale=2.0) == ("around", ("original", 3, 2.0))
    assert module.step(batch=4) == ("around", ("original", 4, 1.0))
    assert calls == [((3,), {"scale": 2.0}), ((), {"batch": 4})]
    assert Module("another").step(5) == ("another", 5, 1.0)


def test_a_wrapped_method_keeps_its_signature_and_name():
    module = Module()
    plain = inspect.signature(module.step)
    wrap_method(module, "step", noted([]))
    assert inspect.signature(module.step) == plain
    assert list(inspect.signature(module.step).parameters) == ["batch", "scale"]
    assert (module.step.__name__, module.step.__doc__) == ("step", "The step's own words.")


def test_undo_leaves_nothing_behind():
    module, calls = Module(), []
    before = dict(vars(module))
    undo = wrap_method(module, "step", noted(calls))
    assert "step" in vars(module)
    undo()
    assert vars(module) == before
    assert module.step(1) == ("original", 1, 1.0)
    assert not calls


def test_an_instance_attribute_is_called_and_put_back():
    module, calls = Module(), []
    module.step = own = functools.partial(module.step, scale=7.0)
    undo = wrap_method(module, "step", noted(calls))
    assert module.step(2) == ("around", ("original", 2, 7.0))
    undo()
    assert vars(module)["step"] is own
    assert module.step(2) == ("original", 2, 7.0)


def test_two_wrappers_nest_and_come_off_in_reverse():
    module, inner, outer = Module(), [], []
    undo_inner, undo_outer = (wrap_method(module, "step", noted(calls)) for calls in (inner, outer))
    assert module.step(1) == ("around", ("around", ("original", 1, 1.0)))
    undo_outer()
    assert module.step(1) == ("around", ("original", 1, 1.0))
    assert (len(inner), len(outer)) == (2, 1)
    undo_inner()
    assert "step" not in vars(module)


def test_what_somebody_put_around_a_wrapper_stays_when_that_comes_off():
    module, calls = Module(), []
    undo = wrap_method(module, "step", noted(calls))
    ours = module.step
    module.step = theirs = lambda batch: ("theirs", ours(batch))
    undo()
    assert vars(module)["step"] is theirs
    assert module.step(1) == ("theirs", ("original", 1, 1.0))
    assert not calls


def test_a_copy_of_a_wrapped_module_has_the_plain_method_of_its_own():
    module, calls = Module(), []
    undo = wrap_method(module, "step", noted(calls))
    twin = copy.deepcopy(module)
    twin.name = "copy"
    assert twin.step(1, scale=3.0) == ("copy", 1, 3.0)
    assert not calls
    assert module.step(1)[0] == "around"
    undo()
    assert twin.step(2) == ("copy", 2, 1.0)


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def sample_losses(self, batch):
        return self.layer(batch).square().sum(1)


def test_losses_are_captured_with_their_graph_and_as_they_were():
    module = Losses()
    capture = LossCapture(module)
    module.sample_losses(torch.ones(3, 2))
    captured = capture.start()
    assert captured == []
    losses = module.sample_losses(torch.ones(3, 2))
    (found,) = captured
    assert found.live is losses
    assert found.edge.node is losses.grad_fn
    before = losses.detach().clone()
    with torch.no_grad():
        losses.zero_()  # as for a log; the graph does not show it
    torch.testing.assert_close(found.values, before, rtol=0, atol=0)
    assert not found.values.requires_grad
    with pytest.raises(MimicError, match="`sample_losses` is called more than once in a training step"):
        module.sample_losses(torch.ones(3, 2))
    capture.remove()
    module.sample_losses(torch.ones(3, 2))
    assert len(captured) == 1
    assert "sample_losses" not in vars(module)


def test_losses_without_gradient_are_not_the_steps():
    module = Losses()
    captured = LossCapture(module).start()
    with torch.no_grad():
        module.sample_losses(torch.ones(3, 2))
    assert captured == []


def test_losses_changed_in_place_are_refused():
    module = Losses()
    captured = LossCapture(module).start()
    module.sample_losses(torch.ones(3, 2)).mul_(2)
    with pytest.raises(MimicError, match="the losses that `sample_losses` returned were changed in place"):
        _ = captured[0].live


def test_losses_must_be_a_vector():
    module = Losses()
    module.sample_losses = lambda batch: module.layer(batch)
    LossCapture(module).start()
    with pytest.raises(MimicError, match=r"`sample_losses` returned shape \(3, 1\); expected \(B,\)."):
        module.sample_losses(torch.ones(3, 2))


def test_a_hook_changes_the_gradient_of_its_own_output_and_no_other():
    hooks, weight = GradientHooks(), nn.Parameter(torch.ones(3))
    first, second, third = (2 * weight).unbind()
    hooks.on_edge(get_gradient_edge(second), lambda gradient: 10 * gradient)
    (first + second + third).backward()
    assert weight.grad.tolist() == [2.0, 20.0, 2.0]


def test_gradient_hooks_act_until_they_are_removed():
    hooks, weight = GradientHooks(), nn.Parameter(torch.ones(2))
    doubled = weight * 2
    hooks.on_edge(get_gradient_edge(doubled), lambda gradient: 10 * gradient)
    hooks.on_parameter(weight, lambda gradient: gradient + 1)
    loss = doubled.sum()
    loss.backward(retain_graph=True)
    assert weight.grad.tolist() == [21.0, 21.0]
    hooks.remove()
    weight.grad = None
    loss.backward()
    assert weight.grad.tolist() == [2.0, 2.0]
    assert not weight._backward_hooks
