"""Target parameters are chosen by name; a name that fits nothing, or no one layer, is refused with the way out."""

import re

import pytest
import torch
from torch import nn

from lightning_mimic.gradients import owning_layer, select_parameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.header = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.embed.weight


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("head", ["head.weight", "head.bias"]),
        ("blocks", ["blocks.0.weight", "blocks.0.bias", "blocks.2.weight"]),
        ("blocks.2", ["blocks.2.weight"]),
        ("head.bias", ["head.bias"]),
        ("scale", ["scale"]),
        ("blocks.*.weight", ["blocks.0.weight", "blocks.2.weight"]),
        ("head*.bias", ["head.bias", "header.bias"]),
        ("h??d.weight", ["head.weight"]),
        ("blocks.[!0].*", ["blocks.2.weight"]),
        (["head.bias", "head", "blocks.2", "h*d.bias"], ["blocks.2.weight", "head.weight", "head.bias"]),
        (("norm", "scale"), ["scale", "norm.weight", "norm.bias"]),
        ("tied", ["tied.weight"]),
        ("embed.weight", ["embed.weight"]),
        (["tied", "embed"], ["embed.weight", "tied.weight"]),
    ],
)
def test_parameters_are_chosen_by_module_name_and_glob_in_the_modules_order(patterns, names):
    net = Net()
    chosen = select_parameters(net, patterns)
    assert list(chosen) == names
    assert all(parameter is net.get_parameter(name) for name, parameter in chosen.items())


@pytest.mark.parametrize(
    ("patterns", "wrong", "hint"),
    [
        ("haed", "haed", "nearest: 'head', 'header'"),
        ("Head.weight", "Head.weight", "nearest: 'head.weight'"),
        (["head", "blocks.1.wieght"], "blocks.1.wieght", "nearest: 'blocks.2.weight', 'blocks.0.weight'"),
        ("norm.running_maen", "norm.running_maen", "nearest: 'norm"),
        ("head.weight.", "head.weight.", "nearest: 'head.weight'"),
        ("*.wieght", "*.wieght", "nearest: "),
        ("zzz", "zzz", "there are: 'blocks', 'blocks.0', 'blocks.0.bias', 'blocks.0.weight' and 17 more"),
        ("", "", "there are: 'blocks'"),
    ],
)
def test_a_name_that_fits_nothing_is_refused_with_the_nearest(patterns, wrong, hint):
    message = f"{wrong!r} names no module and no parameter of Net; {hint}"
    with pytest.raises(ValueError, match=re.escape(message)):
        select_parameters(Net(), patterns)


@pytest.mark.parametrize("patterns", [[], ()])
def test_no_names_are_refused_with_an_example(patterns):
    with pytest.raises(ValueError, match=re.escape("`parameters` is empty; name a module ('head')")):
        select_parameters(Net(), patterns)


def test_a_module_without_parameters_is_refused_as_such():
    with pytest.raises(ValueError, match=re.escape("the module 'blocks.1' has no parameters of its own or below it")):
        select_parameters(Net(), ["head", "blocks.1"])


@pytest.mark.parametrize("patterns", ["head", "blocks.2", "blocks.0.bias", "norm"])
def test_the_one_layer_that_owns_the_parameters_is_found(patterns):
    net = Net()
    path, layer = owning_layer(net, select_parameters(net, patterns))
    assert path == patterns.removesuffix(".bias")
    assert layer is net.get_submodule(path)


def test_a_bare_parameter_belongs_to_the_module_itself():
    net = Net()
    path, layer = owning_layer(net, ["scale"])
    assert path == ""
    assert layer is net


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["head.weight", "blocks.0.weight", "head.bias"], "2 layers ('blocks.0', 'head')"),
        (["scale", "norm.bias"], "2 layers ('', 'norm')"),
        ([f"{n}.w" for n in "abcdefg"], "7 layers ('a', 'b', 'c', 'd', 'e', 'f' ...)"),
    ],
)
def test_several_layers_are_counted_named_and_refused(names, shown):
    with pytest.raises(ValueError, match=re.escape(f"`parameters` selects {shown}; the scores are taken from one")):
        owning_layer(Net(), names)


@pytest.mark.parametrize(("name", "other"), [("tied.weight", "embed.weight"), ("embed.weight", "tied.weight")])
def test_a_tied_parameter_is_refused_with_its_other_name(name, other):
    with pytest.raises(ValueError, match=re.escape(f"{name!r} is tied to {other!r}; ")):
        owning_layer(Net(), [name])


def test_a_layer_that_stands_twice_in_the_module_is_tied():
    layer = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=re.escape("'0.weight' is tied to '2.weight'; ")):
        owning_layer(nn.Sequential(layer, nn.ReLU(), layer), ["0.weight"])
