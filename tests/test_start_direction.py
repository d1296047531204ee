"""The direction from the starting weights is held over a run, survives a resume, and is refused where there is none."""

import re
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_mimic import Aligned, AtCheckpoints, GradMimic, Ledger, Reweighter
from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import Direction
from lightning_mimic.scorers import Influence, Posterior, RhoLoss
from oracles import mimic_scores, per_sample_gradients
from support.cases import for_each
from support.toys import WithLosses, loader, losses_of, parameters_of, toy, toy_data, trainer

EXACT = {"rtol": 0, "atol": 0}


def reference() -> dict[str, torch.Tensor]:
    return parameters_of(toy(seed=1))


def test_it_is_held_from_the_moment_it_is_set():
    weight = nn.Parameter(torch.zeros(2))
    direction = Direction({"w": torch.tensor([3.0, 4.0])}, {"w": weight})
    assert direction.start is None
    with torch.no_grad():
        weight += 1
        direction.set_start()
        weight += 5
    torch.testing.assert_close(dict(direction), {"w": torch.tensor([2.0, 3.0])}, **EXACT)
    torch.testing.assert_close(direction.norm(), torch.tensor(13.0).sqrt())
    other = Direction({"w": torch.tensor([3.0, 4.0])}, {"w": weight})
    given = direction.start
    other.set_start(given)
    given["w"] += 9
    torch.testing.assert_close(dict(other), {"w": torch.tensor([2.0, 3.0])}, **EXACT)


@for_each(
    ("given", "what"),
    [
        ({}, "'w' is missing among the weights that the run started with; expected (2,)."),
        ({"w": torch.ones(3)}, "'w' has shape (3,) among the weights that the run started with; expected (2,)."),
    ],
)
def test_starting_weights_that_do_not_fit_are_refused(given, what):
    direction = Direction({"w": torch.ones(2)}, {"w": nn.Parameter(torch.zeros(2))})
    with pytest.raises(MimicError, match=f"^{re.escape(what)}$"):
        direction.set_start(given)


def trained(net: nn.Module, reweighter: Reweighter, batches: list[Any]) -> torch.Tensor:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    scores = []
    for batch in batches:
        with reweighter.step(batch) as step:
            scores.append(step.backward(losses_of(net, step.batch).mean()).scores)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(scores)


@for_each("parameters", ["all", "head"])
def test_scores_are_taken_along_the_way_from_the_start(parameters):
    net, start = toy(), parameters_of(toy())
    batches = list(zip(*(part.split(4) for part in toy_data(12).tensors), strict=True))
    with Reweighter(net, reference(), parameters, direction="start") as reweighter:
        names = list(reweighter.targets)
        for batch in batches:
            gradients = per_sample_gradients(net, losses_of, batch)
            expected = mimic_scores({n: gradients[n] for n in names}, reference(), {n: start[n] for n in names})
            torch.testing.assert_close(trained(net, reweighter, [batch]), expected)
            assert not torch.equal(net.head.weight, start["head.weight"])


def test_no_outputs_are_taken_for_the_references():
    net, batches = toy(), list(zip(*(part.split(16) for part in toy_data(48).tensors), strict=True))
    with Reweighter(net, reference(), "head", direction="start", diagnose_reference=False) as reweighter:
        for batch in batches:
            with reweighter.step(batch) as step:
                result = step.backward(losses_of(net, step.batch).mean())
            assert "reference_predicted" not in result.columns()
            assert result.wrong_share is None


def test_a_resumed_run_goes_on_from_the_first_start_and_its_state_holds_no_more_than_the_target(tmp_path):
    batches, options = list(loader(toy_data(16), 4)), {"direction": "start"}
    whole, net = toy(), toy()
    with Reweighter(whole, reference(), "head", ledger=tmp_path / "whole", **options) as reweighter:
        expected = trained(whole, reweighter, batches)
    with Reweighter(net, reference(), "head", ledger=tmp_path / "parts", **options) as reweighter:
        first = trained(net, reweighter, batches[:2])
        torch.save(reweighter.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.testing.assert_close(
        state["target"]["start"], {n: p for n, p in parameters_of(toy()).items() if n.startswith("head")}, **EXACT
    )
    with Reweighter(net, reference(), "head", ledger=tmp_path / "parts", **options) as reweighter:
        reweighter.load_state_dict(state)
        second = trained(net, reweighter, batches[2:])
    torch.testing.assert_close(torch.cat([first, second]), expected, **EXACT)
    one, two = Ledger(tmp_path / "whole"), Ledger(tmp_path / "parts")
    configs = [attempt["config"] for ledger in (one, two) for attempt in ledger.meta["attempts"]]
    assert len(configs) == 3
    assert configs[0]["direction"] == "start"
    assert all(config == configs[0] for config in configs)


def test_a_state_of_before_the_first_step_leaves_the_start_open():
    net, batches = toy(), list(loader(toy_data(8), 4))
    with Reweighter(net, reference(), "head", direction="start") as reweighter:
        state = reweighter.state_dict()
    with Reweighter(net, reference(), "head", direction="start") as reweighter:
        reweighter.load_state_dict(state)
        trained(net, reweighter, batches)
        assert reweighter.state_dict()["target"]["start"].keys() == {"head.weight", "head.bias"}


def test_by_default_a_ledger_names_no_direction_so_that_older_ones_go_on():
    with Reweighter(toy(), reference(), "head") as reweighter:
        reweighter.start()
        assert not {"direction", "start"} & reweighter.config.keys()


def test_a_start_that_the_state_does_not_hold_is_not_replaced_by_later_weights():
    net, batches = toy(), list(loader(toy_data(8), 4))
    with Reweighter(net, reference(), "head", diagnose_reference=False) as reweighter:
        trained(net, reweighter, batches)
        state = reweighter.state_dict()
    with (
        Reweighter(net, reference(), "head", diagnose_reference=False, direction="start") as reweighter,
        pytest.raises(MimicError, match=r"does not contain its starting weights, .*start a new run\.$"),
    ):
        reweighter.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_a_fit_holds_the_start_and_another_fit_has_its_own(tmp_path):
    def callback(name: str) -> GradMimic:
        return GradMimic(reference(), "all", direction="start", ledger=tmp_path / name)

    whole, data = toy(), loader(toy_data(12))
    trainer(callback("whole"), epochs=4).fit(whole, data)
    saver = ModelCheckpoint(tmp_path / "c", "at", every_n_epochs=2)
    broken_off = callback("parts")
    trainer(broken_off, saver, epochs=2, enable_checkpointing=True).fit(toy(), data)
    resumed = toy(seed=5)  # what it holds before the checkpoint is loaded is no start
    trainer(callback("parts"), epochs=4).fit(resumed, data, ckpt_path=tmp_path / "c" / "at.ckpt", weights_only=True)
    torch.testing.assert_close(parameters_of(resumed), parameters_of(whole), **EXACT)
    columns = ["id", "epoch", "score", "weight"]
    one, two = (
        Ledger(tmp_path / name).table().sort_by([("epoch", "ascending"), ("id", "ascending")])
        for name in ("whole", "parts")
    )
    assert two.select(columns).equals(one.select(columns))
    with pytest.warns(UserWarning, match=r"goes on with other settings \(start: "):
        trainer(broken_off).fit(toy(seed=5), data)


@for_each(
    ("options", "why"),
    [
        ({"reference": Aligned(toy(seed=1))}, "an aligned reference is fitted to the model's current features"),
        ({"on_doubtful": "align"}, "`on_doubtful='align'` may align the reference"),
        ({"scorer": RhoLoss(), "parameters": None}, "RhoLoss takes no direction"),
        ({"weighting": Posterior()}, "'posteriors' rest on the reference's outputs"),
        (
            {"scorer": Influence([toy_data(4)[:]]), "reference": None},
            "Influence takes its direction from the batches of its `loader`",
        ),
    ],
)
def test_where_there_is_no_start_it_is_refused(options, why):
    given = {"reference": reference(), "parameters": "head"} | options
    with pytest.raises(MimicError, match=f"^`direction` is 'start', but {re.escape(why)}.*leave it out.$"):
        GradMimic(direction="start", **given)


def test_another_word_is_refused():
    with pytest.raises(MimicError, match=r"^`direction` is 'begin'; there are: 'current', 'start'\.$"):
        GradMimic(reference(), "head", direction="begin")


def test_scoring_at_checkpoints_has_no_start(tmp_path):
    net = toy(WithLosses)
    torch.save(net.state_dict(), tmp_path / "a.ckpt")
    callbacks = [GradMimic(reference(), "head", direction="start"), AtCheckpoints([tmp_path / "a.ckpt"])]
    with pytest.raises(MimicError, match="`direction='start'` takes the weights with which a training begins"):
        trainer(*callbacks).fit(net, loader(toy_data(4)))
