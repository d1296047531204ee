"""Target parameters are chosen and left out by name; a name that fits nothing is refused with the way out."""

import re

import pytest
import torch
from torch import nn

from lightning_mimic.gradients import select_parameters
from support.cases import for_each


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


@for_each(
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
        (["tied", "embed"], ["embed.weight"]),
        (["*.weight", "!blocks", "!h*"], ["embed.weight", "norm.weight"]),
        (["head", "!head.bias"], ["head.weight"]),
        (["!head.bias", "head"], ["head.weight"]),
        (["blocks", "!*.bias", "!blocks.2"], ["blocks.0.weight"]),
        (["blocks", "!norm"], ["blocks.0.weight", "blocks.0.bias", "blocks.2.weight"]),
    ],
)
def test_parameters_are_chosen_by_module_name_and_glob_in_the_modules_order(patterns, names):
    net = Net()
    chosen = select_parameters(net, patterns)
    assert list(chosen) == names
    assert all(parameter is net.get_parameter(name) for name, parameter in chosen.items())


@for_each(
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


@for_each("patterns", [[], ()])
def test_no_names_are_refused_with_an_example(patterns):
    with pytest.raises(ValueError, match=re.escape("`parameters` is empty; name a module ('head')")):
        select_parameters(Net(), patterns)


def test_a_module_without_parameters_is_refused_as_such():
    with pytest.raises(ValueError, match=re.escape("the module 'blocks.1' has no parameters of its own or below it")):
        select_parameters(Net(), ["head", "blocks.1"])


EVERY = ["scale", "embed.weight", "blocks.0.weight", "blocks.0.bias", "blocks.2.weight"]
EVERY += ["norm.weight", "norm.bias", "head.weight", "head.bias", "header.weight", "header.bias"]


def test_all_are_the_trainable_ones_each_once_under_its_first_name():
    net = Net()
    chosen = select_parameters(net, "all")
    assert list(chosen) == EVERY
    assert chosen["embed.weight"] is net.tied.weight
    net.blocks.requires_grad_(False)
    net.head.bias.requires_grad_(False)
    trainable = [name for name in EVERY if not name.startswith("blocks") and name != "head.bias"]
    assert list(select_parameters(net, "all")) == trainable
    assert list(select_parameters(net, ["head", "all"])) == [n for n in EVERY if n in trainable or n == "head.bias"]


def test_a_frozen_parameter_is_chosen_when_it_is_named():
    net = Net().requires_grad_(False)
    assert list(select_parameters(net, "head")) == ["head.weight", "head.bias"]
    assert list(select_parameters(net, "head.*")) == ["head.weight", "head.bias"]


@for_each("patterns", ["all", ["all", "head"], "!head"])
def test_all_of_a_frozen_module_is_refused_as_such(patterns):
    with pytest.raises(ValueError, match=re.escape("`parameters`: no parameter of Net is trainable.")):
        select_parameters(Net().requires_grad_(False), patterns)


@for_each(
    ("patterns", "left_out"),
    [
        ("!head", {"head.weight", "head.bias"}),
        (["!head.bias", "!scale"], {"head.bias", "scale"}),
        ("!*.weight", {name for name in EVERY if name.endswith("weight")}),
        ("!tied", {"embed.weight"}),
        ("!embed.weight", {"embed.weight"}),
        (["all", "!blocks", "!blocks.0"], {name for name in EVERY if name.startswith("blocks")}),
    ],
)
def test_an_exclusion_alone_leaves_all_the_others(patterns, left_out):
    assert list(select_parameters(Net(), patterns)) == [name for name in EVERY if name not in left_out]


def test_an_exclusion_alone_leaves_the_trainable_others():
    net = Net()
    net.norm.requires_grad_(False)
    without = {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert list(select_parameters(net, "!head")) == [name for name in EVERY if name not in without]


@for_each("name", ["embed", "tied", "tied.weight"])
def test_a_tied_parameter_is_left_out_under_any_of_its_names(name):
    assert list(select_parameters(Net(), ["embed", "tied", "scale", f"!{name}"])) == ["scale"]


@for_each(
    ("patterns", "wrong", "hint"),
    [
        ("!haed", "haed", "nearest: 'head', 'header'"),
        (["head", "!head.baes"], "head.baes", "nearest: 'head.bias'"),
        (["all", "!*.pos_embed"], "*.pos_embed", ""),
        (["head", "!"], "", "there are: 'blocks'"),
        (["head", "!!head"], "!head", "nearest: 'head'"),
    ],
)
def test_an_exclusion_that_fits_nothing_is_refused_with_the_nearest(patterns, wrong, hint):
    message = f"`parameters`: {wrong!r} names no module and no parameter of Net; {hint}"
    with pytest.raises(ValueError, match=re.escape(message)):
        select_parameters(Net(), patterns)


@for_each(
    ("patterns", "shown"),
    [
        ("!*", "'!*'"),
        (["head", "!head"], "'head', '!head'"),
        (["all", "!all"], "'all', '!all'"),
        (("embed", "!tied"), "'embed', '!tied'"),
    ],
)
def test_nothing_left_is_refused_with_what_was_given(patterns, shown):
    with pytest.raises(ValueError, match=f"^{re.escape(f'`parameters`: nothing is left of {shown}.')}$"):
        select_parameters(Net(), patterns)
