"""What is put on a module catches one step, says what it cannot use, and comes off without a trace."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn

from lightning_mimic.callbacks.hooks import LayerTap, wrap_method


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


def tapped(on_gradient=lambda gradients: None, armed=True):
    module = Module()
    tap = LayerTap("body.layer", module.layer, on_gradient)
    tap.armed = armed
    return module, tap


def untouched(tap):
    return tap.node is None and tap.output_shape == () and tap._inputs is None


def test_a_tap_catches_input_node_and_shape_and_sees_the_gradient():
    seen = []
    module, tap = tapped(seen.append)
    x = torch.randn(5, 2, requires_grad=True)
    y = module.layer(x)
    node = y.grad_fn
    y.relu_().square().sum().backward()
    assert tap.node is node
    assert tap.output_shape == (5, 3)
    torch.testing.assert_close(tap.inputs, x.detach(), rtol=0, atol=0)
    assert not tap.inputs.requires_grad
    assert tap.inputs.data_ptr() == x.data_ptr()
    torch.testing.assert_close(seen, [2 * y.detach()])
    tap.check_used()


def test_what_the_hook_returns_takes_the_gradients_place():
    module, _ = tapped(lambda gradients: 3 * gradients)
    x = torch.ones(4, 2)
    module.layer(x).sum().backward()
    torch.testing.assert_close(module.layer.weight.grad, torch.full((3, 2), 12.0))


def test_an_input_given_by_keyword_is_caught():
    module, tap = tapped()
    x = torch.randn(5, 2)
    module.layer(input=x)
    torch.testing.assert_close(tap.inputs, x, rtol=0, atol=0)


def test_calls_are_ignored_while_not_armed():
    seen = []
    module, tap = tapped(seen.append, armed=False)
    module.layer(torch.randn(5, 2)).sum().backward()
    assert untouched(tap)
    assert not seen
    with pytest.raises(ValueError, match=r"^`parameters`: 'body\.layer' was not called in training_step"):
        tap.check_used()


def test_calls_without_gradient_are_ignored_and_named_if_there_is_no_other():
    module, tap = tapped()
    with torch.no_grad():
        module.layer(torch.randn(5, 2))
    assert untouched(tap)
    with pytest.raises(ValueError, match=r"no gradient passes through the output of 'body\.layer'"):
        tap.check_used()
    x = torch.randn(4, 2)
    module.layer(x)
    with torch.no_grad():
        module.layer(torch.randn(5, 2))
    tap.check_used()
    torch.testing.assert_close(tap.inputs, x, rtol=0, atol=0)


def test_calls_of_a_copy_are_ignored():
    seen = []
    module, tap = tapped(seen.append)
    twin = copy.deepcopy(module)
    twin.layer(torch.randn(5, 2)).sum().backward()
    assert untouched(tap)
    assert not seen
    module.layer(torch.randn(4, 2)).sum().backward()
    assert tap.output_shape == (4, 3)
    assert len(seen) == 1


def test_a_second_call_is_refused():
    module, tap = tapped()
    module.layer(torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"^`parameters`: 'body\.layer' is called more than once in a training step"):
        module.layer(torch.randn(5, 2))
    tap.reset()
    tap.armed = True
    module.layer(torch.randn(6, 2))
    assert tap.output_shape == (6, 3)


def test_an_input_changed_in_place_afterwards_is_refused_when_asked_for():
    module, tap = tapped()
    x = torch.randn(5, 2).relu_()
    module.layer(x)
    assert tap.inputs.shape == (5, 2)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"the input of 'body\.layer' was changed in place after.*out-of-place"):
        _ = tap.inputs


def test_reset_forgets_the_step_and_disarms():
    module, tap = tapped()
    module.layer(torch.randn(5, 2))
    with torch.no_grad():
        module.layer(torch.randn(5, 2))
    tap.reset()
    assert untouched(tap)
    assert not tap.armed
    with pytest.raises(ValueError, match="was not called"):
        tap.check_used()


def test_remove_takes_the_hook_off():
    module, tap = tapped()
    module.layer(torch.randn(5, 2))
    assert len(module.layer._forward_hooks) == 1
    tap.remove()
    assert not module.layer._forward_hooks
    assert not module.layer._forward_hooks_with_kwargs
    assert untouched(tap)
    module.layer(torch.randn(5, 2))
    assert untouched(tap)
