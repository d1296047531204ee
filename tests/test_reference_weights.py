"""Which of a checkpoint's weights are the reference, and under which names they are found."""

import logging
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from lightning_mimic import Aligned, GradMimic
from lightning_mimic.reference import ReferenceLoadError, match_reference, read_reference
from support.cases import for_each
from support.checkpoints import weights
from support.toys import loader, parameters_of, toy, toy_data, trainer

FIRST, SECOND = weights(0), weights(1)


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def parameters(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.endswith("weight")}


SEVERAL = {
    "timm": ({"state_dict": FIRST, "state_dict_ema": SECOND}, "['state_dict'] and ['state_dict_ema']"),
    "model_ema": ({"model": FIRST, "model_ema": SECOND, "epoch": 3}, "['model'] and ['model_ema']"),
    "ema": ({"model_state_dict": FIRST, "ema": SECOND}, "['model_state_dict'] and ['ema']"),
    "below": ({"model": FIRST, "ema": {"decay": 0.9, "state_dict": SECOND}}, "['model'] and ['ema']['state_dict']"),
    "wrapped": ({"model": FIRST, "ema": under("module.", SECOND)}, "['model'] and ['ema']"),
    "unwrapped": ({"state_dict": under("net.", FIRST), "ema": SECOND}, "['state_dict'] and ['ema']"),
    "parameters": ({"state_dict": FIRST, "ema": parameters(SECOND)}, "['state_dict'] and ['ema']"),
    "teacher": ({"student": FIRST, "teacher": SECOND}, "['student'] and ['teacher']"),
    "two networks": ({"generator": FIRST, "critic": {"a.weight": torch.ones(3)}}, "['generator'] and ['critic']"),
    "two places": ({"model": FIRST, "module": {"a.weight": torch.ones(3)}}, "['model'] and ['module']"),
    "at the top": (FIRST | {"ema": SECOND}, "those at the top and ['ema']"),
    "callback": (
        {"state_dict": FIRST, "callbacks": {"EMA": {"ema_state_dict": SECOND}}},
        "['state_dict'] and ['callbacks']['EMA']['ema_state_dict']",
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_sets_of_weights_are_refused_naming_all_with_a_recipe_that_works(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, names = SEVERAL[kind]
    with pytest.raises(
        ReferenceLoadError, match=re.escape(f"holds 2 sets of weights, which differ: {names}. Give the")
    ):
        read_reference(content)
    torch.save(content, "both.pt")
    with pytest.raises(ReferenceLoadError, match=re.escape(names)) as caught:
        read_reference("both.pt")
    expression, line = re.findall(r"`([^`]*torch\.load[^`]*)`", str(caught.value))
    exec(line, {})
    meant = content
    for key in re.findall(r"\['(\w+)'\]", names.split(" and ")[1]):
        meant = meant[key]
    for found in (read_reference("weights.pt"), read_reference(eval(expression, {"torch": torch}))):
        torch.testing.assert_close(found, meant, rtol=0, atol=0)


ONE = {
    "equal": {"state_dict": FIRST, "state_dict_ema": {name: tensor.clone() for name, tensor in FIRST.items()}},
    "equal, with names that end alike": {
        "model": {"x.head.weight": torch.zeros(2, 4)} | FIRST,
        "module": {name: tensor.clone() for name, tensor in FIRST.items()},
    },
    "the same": {"model": FIRST, "module": FIRST},
    "another key": {"net": FIRST, "epoch": 3, "loss": torch.tensor(0.5), "rng": {"cpu": torch.zeros(9).byte()}},
    "average alone": {"model": None, "ema": FIRST},
    "two levels": {"model": {"state_dict": FIRST, "arguments": {"lr": 1}}},
    "optimizer": {"net": FIRST, "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 3)}}, "param_groups": []}},
    "FSDP's optimizer": {"model": FIRST, "optim": {"state": {name: {"exp_avg": t} for name, t in SECOND.items()}}},
    "center loss": {"model": FIRST, "criterion": {"centers": torch.ones(4, 3), "weight": torch.ones(4, 3)}},
    "scalars at the top": {"step": torch.tensor(3.0), "net": FIRST},
    "a callback's own": {"state_dict": FIRST, "callbacks": {"Mine": {"target": SECOND}}},
    "statistics at the top": {"mean": torch.ones(3), "std": torch.ones(3), "net": FIRST},
    "extra state": FIRST | {"body._extra_state": {"scale": torch.ones(4, 3)}},
}


@pytest.mark.parametrize("kind", ONE)
def test_where_one_set_is_meant_it_is_taken(kind, tmp_path):
    torch.save(ONE[kind], tmp_path / "w.pt")
    for source in (ONE[kind], tmp_path / "w.pt"):
        found = {name: tensor for name, tensor in read_reference(source).items() if name in FIRST}
        torch.testing.assert_close(found, FIRST, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Swapping scheduler")
def test_lightnings_averages_are_not_passed_over_and_our_own_state_is_no_average(tmp_path):
    averages = {
        "current_model_state": EMAWeightAveraging(decay=0.5),
        "average_model_state": StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1),
    }
    for name, callback in averages.items():
        fit = pl.Trainer(
            callbacks=[callback], max_epochs=3, accelerator="cpu", logger=False, default_root_dir=tmp_path / name
        )
        fit.fit(toy(), loader(toy_data(), 4))
        (path,) = (tmp_path / name / "checkpoints").glob("*.ckpt")
        with pytest.raises(ReferenceLoadError, match=rf"2 sets of weights, .*\['state_dict'\] and .*{name}"):
            read_reference(path)
    reference = toy(seed=1)
    fit = trainer(GradMimic(Aligned(reference, inputs=lambda batch: batch[0], every=1), "head"), max_epochs=3)
    fit.fit(module := toy(), loader(toy_data(), 4))
    fit.save_checkpoint(tmp_path / "own.ckpt")
    torch.testing.assert_close(read_reference(tmp_path / "own.ckpt"), dict(module.state_dict()), rtol=0, atol=0)
    assert set(parameters_of(module)) <= set(read_reference(tmp_path / "own.ckpt"))


# One prefix for another


@for_each(
    ("theirs", "own"),
    [("backbone_model.", "net."), ("module.backbone.", "model.net."), ("encoder.", "model.encoder_q."), ("a.", "b.c.")],
)
def test_one_prefix_is_read_as_another_where_every_name_and_shape_fits(theirs, own, caplog):
    saved = under(theirs, FIRST) | {"other.weight": torch.ones(3)}
    with caplog.at_level(logging.INFO, "lightning_mimic"):
        found = match_reference(saved, under(own, SECOND))
    torch.testing.assert_close(found, under(own, FIRST), rtol=0, atol=0)
    assert "every name and shape fits" in caplog.text
    assert theirs.split(".")[0] in caplog.text
    caplog.clear()
    head = {name: tensor for name, tensor in under(own, SECOND).items() if "head" in name}
    torch.testing.assert_close(match_reference(saved, head)[f"{own}head.bias"], FIRST["head.bias"], rtol=0, atol=0)


def test_a_prefix_that_could_be_read_in_two_ways_is_refused_naming_both():
    saved = under("student.", FIRST) | under("teacher.", SECOND)
    with pytest.raises(ReferenceLoadError, match=r"one of these were the same: 'student\.' were 'net\.', 'teacher\.'"):
        match_reference(saved, under("net.", FIRST))


def test_layers_of_another_name_or_shape_are_not_taken_for_the_models():
    with pytest.raises(ReferenceLoadError, match=r"no tensor for 'fc\.weight'.*'head\.' were 'fc\.'") as caught:
        match_reference({"head.weight": torch.ones(2, 2)}, {"fc.weight": torch.ones(2, 2)})
    recipe = re.findall(r"`(\{.*\})`", str(caught.value))[0]
    renamed = eval(recipe, {"state_dict": {"head.weight": torch.ones(2, 2)}})
    assert set(match_reference(renamed, {"fc.weight": torch.ones(2, 2)})) == {"fc.weight"}
    with pytest.raises(ReferenceLoadError, match=r"no tensor for 'net\.body\.weight'; [^`]*$"):
        match_reference(under("model.", FIRST) | {"model.head.bias": torch.ones(3)}, under("net.", FIRST))
    part = under("aux.", FIRST) | {f"main.layer{i}.weight": torch.ones(1) for i in range(9)}
    with pytest.raises(ReferenceLoadError, match=r"no tensor for 'net\.body\.weight'; .*'aux\.' were 'net\.'"):
        match_reference(part, under("net.", FIRST))


def test_the_model_of_another_attribute_name_is_read_from_its_file(tmp_path):
    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone_model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    torch.save({"state_dict": Saved().state_dict()}, tmp_path / "w.ckpt")
    own = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))})
    found = match_reference(read_reference(tmp_path / "w.ckpt"), dict(own.named_parameters()))
    assert set(found) == set(own.state_dict())
