"""The engine in loops of one's own: the same scores and steps as the callback's, wherever it runs."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_mimic import GradMimic, Ledger, MimicError, Reweighter, WithIds, collate_with_ids
from lightning_mimic.scorers import CosineSimilarity, GradNorm, RhoLoss
from support.ranks import strategy, two
from support.toys import CLASSES, FEATURES, HIDDEN, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
SETTINGS = {"temperature": 0.7, "min_ess": 0}


class Net(nn.Module):
    """The toy's network as a plain module, without Lightning's methods."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def net_like(module: Toy) -> Net:
    net = Net().to(torch.float64)
    net.load_state_dict(module.state_dict())
    return net


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def rows_of(folder: Path) -> Any:
    return Ledger(folder).table(deduplicate=False)


def assert_same_rows(ours: Path, theirs: Path) -> None:
    found, expected = rows_of(ours), rows_of(theirs)
    for name in ("id", "epoch", "batch", "rank", "position", "flag", "batch_size"):
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    for name in ("score", "weight"):
        columns = (torch.tensor(rows[name].to_pylist()) for rows in (found, expected))
        torch.testing.assert_close(*columns, rtol=1e-6, atol=1e-8)  # as the ledger's float32 keeps them


CASES = {
    "head": ("head", {}),
    "all": ("all", {}),
    "target": ("head", {"reweight": "target"}),
    "all, target": (["all", "!head.bias"], {"reweight": "target"}),
    "only scored": ("head", {"reweight": "none"}),
    "cosine": ("head", {"scorer": CosineSimilarity()}),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_plain_loop_takes_the_steps_of_the_callback(case, accumulate, tmp_path):
    parameters, options = CASES[case]
    reference, data = parameters_of(toy(seed=1)), toy_data(18)
    module, net = toy(), net_like(toy())
    callback = GradMimic(reference, parameters, ledger=tmp_path / "theirs", **SETTINGS, **options)
    trainer(callback, epochs=2, accumulate_grad_batches=accumulate).fit(module, loader(data, 6))
    optimizer = torch.optim.SGD(net.parameters(), lr=module.lr)
    with Reweighter(net, reference, parameters, ledger=tmp_path / "ours", **SETTINGS, **options) as reweighter:
        for epoch in range(2):
            for index, batch in enumerate(loader(data, 6), start=1):
                with reweighter.step(batch, ids=batch.ids, epoch=epoch) as step:
                    step.backward(loss_of(net, batch), lambda loss: (loss / accumulate).backward())
                if index % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
    torch.testing.assert_close(parameters_of(net), parameters_of(module), **CLOSE)
    assert_same_rows(tmp_path / "ours", tmp_path / "theirs")
    assert not any(part._forward_hooks for part in net.modules())


def test_the_example_of_the_documentation_runs_as_it_stands(tmp_path):
    """One pass, ids by argument, the loss from the batch itself."""
    model, data = net_like(toy()), toy_data(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reweighter = Reweighter(model, parameters_of(toy(seed=1)), "head", ledger=tmp_path / "scores")
    for start in range(0, 12, 4):
        batch, ids = data[start : start + 4], list(range(start, start + 4))
        with reweighter.step(batch, ids=ids) as step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    reweighter.close()
    assert rows_of(tmp_path / "scores")["id"].to_pylist() == list(range(12))
    assert Ledger(tmp_path / "scores").meta["attempts"][0]["score_kind"] == "own_loss"


def test_a_module_with_sample_losses_is_scored_from_them():
    reference, batch = toy(WithLosses, seed=1), toy_data(6)[:]
    module = toy(WithLosses)
    with Reweighter(module, reference, scorer=RhoLoss()) as reweighter, reweighter.step(batch) as step:
        result = step.backward(module.sample_losses(batch).mean(), label=batch[1])
    difference = module.sample_losses(batch) - reference.sample_losses(batch)
    torch.testing.assert_close(result.scores.double(), difference.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.losses, module.sample_losses(batch).detach(), **CLOSE)
    assert step.classes["label"] is batch[1]


def test_a_gradient_scaler_is_divided_out():
    reference, batch, nets = parameters_of(toy(seed=1)), toy_data(6)[:], [net_like(toy()), net_like(toy())]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with Reweighter(nets[0], reference, "all") as plain, plain.step(batch) as step:
        expected = step.backward(loss_of(nets[0], batch))
    with Reweighter(nets[1], reference, "all", grad_scaler=scaler) as scaled, scaled.step(batch) as step:
        found = step.backward(loss_of(nets[1], batch), lambda loss: scaler.scale(loss).backward())
    torch.testing.assert_close(found.scores, expected.scores, **CLOSE)
    for ours, theirs in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad / 2**10, theirs.grad, **CLOSE)


@pytest.mark.filterwarnings("ignore:1 samples held NaN")
def test_a_sample_that_holds_nan_is_left_out_of_the_steps_batch():
    reference, (x, y) = parameters_of(toy(seed=1)), toy_data(6)[:]
    x[2] = torch.nan
    net, clean = net_like(toy()), net_like(toy())
    with Reweighter(net, reference, "head") as reweighter, reweighter.step((x, y)) as step:
        result = step.backward(loss_of(net, step.batch))
    keep = torch.arange(6) != 2
    with Reweighter(clean, reference, "head") as reweighter, reweighter.step((x[keep], y[keep])) as step:
        expected = step.backward(loss_of(clean, step.batch))
    torch.testing.assert_close(result.scores[keep], expected.scores, **CLOSE)
    assert result.weights.weights[2] == 0
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in clean.parameters()], **CLOSE)


def test_a_run_that_is_resumed_equals_the_uninterrupted_one(tmp_path):
    data, reference = toy_data(16), parameters_of(toy(seed=1))
    batches = list(loader(data, 4))

    def run(net: nn.Module, reweighter: Reweighter, part: list[Any]) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        with reweighter:
            for batch in part:
                with reweighter.step(batch) as step:
                    step.backward(loss_of(net, batch))
                optimizer.step()
                optimizer.zero_grad()

    whole, net = net_like(toy()), net_like(toy())
    run(whole, Reweighter(whole, reference, "head", ledger=tmp_path / "whole"), batches)
    first = Reweighter(net, reference, "head", ledger=tmp_path / "parts")
    run(net, first, batches[:2])
    second = Reweighter(net, reference, "head", ledger=tmp_path / "parts")
    second.load_state_dict(first.state_dict())
    run(net, second, batches[2:])
    torch.testing.assert_close(parameters_of(net), parameters_of(whole), rtol=0, atol=0)
    assert rows_of(tmp_path / "parts")["score"].to_pylist() == rows_of(tmp_path / "whole")["score"].to_pylist()


def test_the_scores_that_a_state_has_trained_on_are_written_with_it(tmp_path):
    net = net_like(toy())
    with Reweighter(net, parameters_of(toy(seed=1)), "head", ledger=tmp_path / "s") as reweighter:
        with reweighter.step(toy_data(4)[:], ids=range(4)) as step:
            step.backward(loss_of(net, step.batch))
        reweighter.state_dict()
        assert Ledger(tmp_path / "s").table(allow_partial=True)["id"].to_pylist() == [0, 1, 2, 3]


def test_parameters_that_begin_to_train_within_an_epoch_are_not_overlooked():
    class Sided(Net):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(FEATURES, CLASSES).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.side(x)

    net, batch = Sided().double(), toy_data(4)[:]
    with Reweighter(net, parameters_of(toy(seed=1)), "head") as reweighter:
        with reweighter.step(batch) as step:
            step.backward(loss_of(net, batch))
        net.side.requires_grad_()
        with (
            pytest.raises(MimicError, match="can no longer be scored as in the first step"),
            reweighter.step(batch) as step,
        ):
            step.backward(loss_of(net, batch))


def test_what_a_loop_can_do_wrong_is_refused_in_a_sentence(tmp_path):
    net, reference, batch = net_like(toy()), parameters_of(toy(seed=1)), toy_data(4)[:]
    with (
        Reweighter(net, reference, "head") as reweighter,
        pytest.raises(MimicError, match=r"has no loss: call `step\.backward\(loss\)` within it"),
        reweighter.step(batch),
    ):
        pass
    with (
        Reweighter(net, reference, "head", ledger=tmp_path / "s") as reweighter,
        pytest.raises(MimicError, match="carries no ids"),
        reweighter.step(batch),
    ):
        pass
    with (
        Reweighter(net, reference, "head") as reweighter,
        pytest.raises(RuntimeError, match="while another one on the same model is open"),
        reweighter.step(batch),
        reweighter.step(batch),
    ):
        pass
    with Reweighter(net, reference, "head") as reweighter, reweighter.step(batch) as step:
        step.backward(loss_of(net, batch))
        with pytest.raises(RuntimeError, match="the weights of a batch hold for one pass"):
            step.backward(loss_of(net, batch))
    with (
        Reweighter(net, reference, "head") as reweighter,
        pytest.raises(RuntimeError, match="`run` must run the backward pass from the loss"),
        reweighter.step(batch) as step,
    ):
        step.backward(loss_of(net, batch), lambda loss: None)
    assert not any(part._forward_hooks for part in net.modules())


def test_a_second_epoch_that_is_not_named_is_not_taken_for_repeats(tmp_path):
    net, reference, data = net_like(toy()), parameters_of(toy(seed=1)), toy_data(8)
    reweighter = Reweighter(net, reference, "head", ledger=tmp_path / "s", reweight="none")
    for _ in range(2):
        for batch in loader(data, 4, shuffle=True):
            with reweighter.step(batch) as step:
                step.backward(loss_of(net, batch))
    with pytest.raises(MimicError, match="was scored again, but no epoch was given"):
        reweighter.close()
    assert not any(part._forward_hooks for part in net.modules())


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_an_accelerate_loop_takes_the_steps_of_the_callback(parameters, tmp_path):
    reference, data = parameters_of(toy(seed=1)), toy_data(24)
    module, net = toy(), net_like(toy())
    callback = GradMimic(reference, parameters, ledger=tmp_path / "theirs", **SETTINGS)
    trainer(callback, epochs=2, accumulate_grad_batches=2).fit(module, loader(data, 6))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=module.lr))
    ledger = tmp_path / "ours"
    with Reweighter(accelerator.unwrap_model(model), reference, parameters, ledger=ledger, **SETTINGS) as reweighter:
        for epoch in range(2):
            for batch in loader(data, 6):
                with accelerator.accumulate(model):
                    with reweighter.step(batch, epoch=epoch) as step:
                        step.backward(loss_of(model, batch), accelerator.backward)
                    optimizer.step()
                    optimizer.zero_grad()
    torch.testing.assert_close(parameters_of(net), parameters_of(module), **CLOSE)
    assert_same_rows(ledger, tmp_path / "theirs")


# By two processes: name, options of DistributedDataParallel, parameters
PAIRED = {
    "head": ({}, "head", {}),
    "all": ({}, "all", {}),
    "target": ({}, "head", {"reweight": "target"}),
    "unused": ({"find_unused_parameters": True}, "head", {}),
    "unused, all": ({"find_unused_parameters": True}, "all", {}),
    "norms": ({}, "head", {"scorer": GradNorm()}),
}


def batches_of_rank(rank: int) -> DataLoader[Any]:
    batches = [list(range(start + 3 * rank, start + 3 * rank + 3)) for start in range(0, 24, 6)]
    return DataLoader(WithIds(toy_data(24)), batch_sampler=batches, collate_fn=collate_with_ids)


def on_rank() -> None:
    """One of the two processes that torchrun starts."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, (options, parameters, settings) in PAIRED.items():
        reference = None if "scorer" in settings else parameters_of(toy(seed=1))
        module = toy()
        callback = GradMimic(reference, parameters, ledger=folder / "theirs" / name, **SETTINGS, **settings)
        trainer(callback, strategy=strategy(**options), **two()).fit(module, batches_of_rank(rank))
        net = net_like(toy())
        model = DistributedDataParallel(net, **options)
        optimizer = torch.optim.SGD(net.parameters(), lr=module.lr)
        ledger = folder / "ours" / name
        with Reweighter(model, reference, parameters, ledger=ledger, **SETTINGS, **settings) as reweighter:
            for batch in batches_of_rank(rank):
                with reweighter.step(batch) as step:
                    step.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()
        torch.save((parameters_of(net), parameters_of(module)), folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_under_torchrun_take_the_steps_of_the_callback(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = tmp_path / "program.py"
    program.write_text("import test_reweighter\n\ntest_reweighter.on_rank()\n")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*torchrun, str(program), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in PAIRED:
        for rank in (0, 1):
            ours, theirs = torch.load(tmp_path / f"{name}-{rank}.pt")
            torch.testing.assert_close(ours, theirs, **CLOSE)
        assert_same_rows(tmp_path / "ours" / name, tmp_path / "theirs" / name)


def test_a_static_graph_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net, batch = DistributedDataParallel(net_like(toy()), static_graph=True), toy_data(4)[:]
        with (
            Reweighter(net, parameters_of(toy(seed=1)), "head") as reweighter,
            pytest.raises(MimicError, match="`static_graph=True`, which begins to exchange gradients"),
            reweighter.step(batch) as step,
        ):
            step.backward(loss_of(net, batch))
    finally:
        torch.distributed.destroy_process_group()


def one_step(net: nn.Module, batch: Any, run: Any = Tensor.backward, loss: Any = loss_of, **options: Any) -> Any:
    reference = parameters_of(toy(seed=1))
    settings = {"parameters": "head", **options}
    with Reweighter(net, reference, **settings) as reweighter, reweighter.step(batch) as step:
        return step.backward(loss(net, step.batch), run)


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_a_backward_pass_that_is_put_off_is_refused(parameters):
    with pytest.raises(RuntimeError, match="must run the backward pass from the loss"):
        one_step(net_like(toy()), toy_data(6)[:], [].append, parameters=parameters)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none"), r"of shape \(6,\)"),
        (lambda net, batch: loss_of(net, batch).detach(), "without a gradient"),
    ],
)
def test_a_loss_that_is_no_differentiable_scalar_is_refused(loss, kind):
    with pytest.raises(MimicError, match=f"the loss is a tensor {kind}; expected the mean loss"):
        one_step(net_like(toy()), toy_data(6)[:], lambda loss: loss.mean().backward(), loss)


@pytest.mark.filterwarnings("ignore:1 samples held NaN")
def test_a_scaler_that_is_switched_off_is_none():
    x, y = toy_data(6)[:]
    x[2] = torch.nan
    nets = [net_like(toy()), net_like(toy())]
    for net, scaler in zip(nets, (None, torch.amp.GradScaler("cpu", enabled=False)), strict=True):
        one_step(net, (x.clone(), y), grad_scaler=scaler, on_nonfinite="mask_loss", parameters="head.bias")
    torch.testing.assert_close(nets[1].head.bias.grad, nets[0].head.bias.grad, rtol=0, atol=0)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_overlapping_steps_on_two_models_leave_compilation_on(order):
    dynamo = pytest.importorskip("torch._dynamo")
    before, batch, models = dynamo.eval_frame._stance.stance, toy_data(6)[:], {"a": toy(seed=1), "b": toy(seed=2)}
    both = {
        name: Reweighter(model, parameters_of(toy(seed=3)), "head", diagnose_reference=False)
        for name, model in models.items()
    }
    with both["a"] as first, both["b"] as second, first.step(batch) as a, second.step(batch) as b:
        for name in order:
            {"a": a, "b": b}[name].backward(models[name].training_step(batch, 0))
    assert dynamo.eval_frame._stance.stance == before == "default"


def test_two_open_steps_on_one_model_are_refused_and_others_are_not():
    net, other, batch = net_like(toy()), net_like(toy()), toy_data(6)[:]
    reference = parameters_of(toy(seed=1))
    first, second, third = (Reweighter(each, reference, "head") for each in (net, net, other))
    with first.step(batch) as step, third.step(batch) as elsewhere:
        with pytest.raises(RuntimeError, match="while another one on the same model is open"), second.step(batch):
            pass
        for each, model in ((step, net), (elsewhere, other)):
            each.backward(loss_of(model, batch))
    with second.step(batch) as step:
        step.backward(loss_of(net, batch))
    for each in (first, second, third):
        each.close()
    with pytest.raises(RuntimeError, match="this Reweighter is closed"), first.step(batch):
        pass


@pytest.mark.parametrize("reweight", ["all", "target", "none"])
def test_a_step_is_freed_without_the_garbage_collector(reweight):
    net, reference = net_like(toy()), parameters_of(toy(seed=1))
    gc.collect()
    gc.disable()
    try:
        with Reweighter(net, reference, "all", reweight=reweight, diagnose_reference=False) as reweighter:
            alive = []
            for _ in range(3):
                batch = toy_data(6)[:]
                with reweighter.step(batch) as step:
                    step.backward(loss_of(net, batch))
                alive.append(weakref.ref(batch[0]))
                del batch, step
            assert [each() for each in alive[:2]] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_in_half_precision_that_is_divided_far_is_scored(dtype):
    net, batch = net_like(toy()).to(dtype), (torch.randn(512, FEATURES, dtype=dtype), torch.randint(0, 3, (512,)))
    found = [
        one_step(net, batch, lambda loss, by=by: (loss / by).backward(), diagnose_reference=False).scores
        for by in (1, 128)
    ]
    assert all(scores.isfinite().all() for scores in found)
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("ids", [np.arange(6), torch.arange(6), list(range(6))])
def test_ids_may_be_an_array_and_their_buffer_may_be_used_again(ids, tmp_path):
    net, reference = net_like(toy()), parameters_of(toy(seed=1))
    with Reweighter(net, reference, "head", ledger=tmp_path / "s") as reweighter:
        for _ in range(2):
            with reweighter.step(toy_data(6)[:], ids) as step:
                step.backward(loss_of(net, step.batch))
            ids[:] = [each + 6 for each in ids] if isinstance(ids, list) else ids + 6
    assert rows_of(tmp_path / "s")["id"].to_pylist() == list(range(12))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(6, 1), r"ids have shape \(6, 1\)"),
        ("abcdef", "ids have type str"),
        ([1, 2], "`ids` holds 2 ids for 6 samples"),
    ],
)
def test_ids_that_are_not_one_per_sample_are_refused(ids, message):
    with (
        Reweighter(net_like(toy()), parameters_of(toy(seed=1)), "head") as reweighter,
        pytest.raises(MimicError, match=message),
        reweighter.step(toy_data(6)[:], ids),
    ):
        pass


def test_a_run_is_started_once_and_its_parameters_stay():
    net, batch = net_like(toy()), toy_data(6)[:]
    with Reweighter(net, parameters_of(toy(seed=1)), "head") as reweighter:
        reweighter.start()
        with pytest.raises(RuntimeError, match="this run was started before"):
            reweighter.start()
        net.load_state_dict(parameters_of(toy(seed=2)), assign=True)
        with pytest.raises(MimicError, match=r"'head\.weight' is another tensor than when"), reweighter.step(batch):
            pass


def test_classes_of_another_form_are_refused():
    net, batch = net_like(toy()), toy_data(6)[:]
    with Reweighter(net, parameters_of(toy(seed=1)), "head") as reweighter, reweighter.step(batch) as step:
        with pytest.raises(MimicError, match=r"`predicted` is .*expected class indices, an integer tensor"):
            step.backward(loss_of(net, batch), predicted=batch[1][:, None])
        step.backward(loss_of(net, batch), predicted=batch[1])


def scored_once(net: Net, folder: Path) -> Reweighter:
    reweighter = Reweighter(net, parameters_of(toy(seed=1)), "head", ledger=folder)
    batch = toy_data(4)[:]
    with reweighter.step(batch, ids=range(4)) as step:
        step.backward(loss_of(net, batch))
    return reweighter


def test_a_reweighter_that_is_dropped_warns_of_its_rows_and_one_that_has_ended_does_not(tmp_path):
    net = net_like(toy())
    ended = scored_once(net, tmp_path / "ended")
    ended.close()
    flushed = scored_once(net, tmp_path / "flushed")
    flushed.flush()
    del ended, flushed
    gc.collect()  # without a warning, which would be an error

    def drop() -> None:
        scored_once(net, tmp_path / "dropped")
        gc.collect()

    with pytest.warns(UserWarning, match=f"4 rows were not written to {tmp_path / 'dropped'}. Use it as a context man"):
        drop()


@pytest.mark.slow
def test_a_program_that_ends_before_its_reweighter_does_warns_of_its_rows(tmp_path):
    act = "import test_reweighter as t; from pathlib import Path; kept = t.scored_once(t.net_like(t.toy()), Path('s'))"
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", act],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "UserWarning: a Reweighter was not closed, and 4 rows were not written to s." in done.stderr
