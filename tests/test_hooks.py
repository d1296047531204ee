"""What is put on a module catches one step, says what it cannot use, and comes off without a trace."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn

from lightning_mimic.callbacks.hooks import LossTap, wrap_method


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


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def sample_losses(self, batch):
        return self.layer(batch).square().sum(1)


def test_losses_are_caught_with_their_graph_and_as_they_were():
    module = Losses()
    tap = LossTap(module)
    module.sample_losses(torch.ones(3, 2))
    assert tap.values is None
    tap.armed = True
    losses = module.sample_losses(torch.ones(3, 2))
    assert tap.live is losses
    assert tap.edge.node is losses.grad_fn
    torch.testing.assert_close(tap.values, losses.detach(), rtol=0, atol=0)
    assert not tap.values.requires_grad
    with pytest.raises(ValueError, match="`sample_losses` is called more than once in a training step"):
        module.sample_losses(torch.ones(3, 2))
    tap.remove()
    assert tap.values is None
    assert "sample_losses" not in vars(module)


def test_losses_without_gradient_are_not_the_steps():
    module = Losses()
    tap = LossTap(module)
    tap.armed = True
    with torch.no_grad():
        module.sample_losses(torch.ones(3, 2))
    assert tap.values is None


def test_losses_changed_in_place_are_refused():
    module = Losses()
    tap = LossTap(module)
    tap.armed = True
    module.sample_losses(torch.ones(3, 2)).mul_(2)
    with pytest.raises(ValueError, match="the losses that `sample_losses` returned were changed in place"):
        _ = tap.live


def test_losses_must_be_a_vector():
    module = Losses()
    module.sample_losses = lambda batch: module.layer(batch)
    tap = LossTap(module)
    tap.armed = True
    with pytest.raises(ValueError, match=r"`sample_losses` returned shape \(3, 1\); expected \(B,\)."):
        module.sample_losses(torch.ones(3, 2))
    tap.remove()


@pytest.mark.parametrize("averaged", [True, False])
def test_a_loss_that_is_not_the_mean_is_told_in_the_backward_pass(averaged):
    module, expected, told = Losses(), [], []
    tap = LossTap(module)
    tap.armed = True
    losses = module.sample_losses(torch.ones(3, 2))
    tap.compare(lambda: expected[0] if expected else None, told.append)
    torch.autograd.grad(losses.sum(), module.layer.weight, retain_graph=True)  # not the backward pass yet
    assert not told
    expected.append(torch.tensor(1 / 3))
    (losses.mean() if averaged else losses.sum()).backward()
    assert [bool(unlike) for unlike in told] == [not averaged]
