"""What the callback cannot do exactly it refuses, before or at the first step, in a sentence that names the fix."""

import re
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_mimic import AtCheckpoints, GradMimic, LedgerError, ReferenceLoadError, Reweighter
from support.refused_modules import (
    L2,
    ByHand,
    Bypassed,
    BypassesLater,
    ChangedInput,
    ClassWeighted,
    Ignoring,
    InPlace,
    LeavesOutLater,
    NotAveraged,
    NotCalled,
    Penalised,
    Quasi,
    Reentrant,
    Summed,
    TakesIterator,
)
from support.toys import Toy, loader, parameters_of, toy, toy_data, trainer

# Lightning's advice on a signature that is refused here all the same.
pytestmark = pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")


def refused(kind: type[Toy], parameters: Any = "head", error: type = ValueError, batches: Any = None, **options: Any):
    """Fits and gives back the message; whatever happens, the module is left as it was."""
    module, settings = toy(kind), {"reference": parameters_of(toy(kind, seed=1)), **options}
    before = parameters_of(module)
    with pytest.raises(error) as caught:
        trainer(GradMimic(parameters=parameters, **settings)).fit(module, batches or loader(toy_data(8)))
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)
    assert not {"training_step", "sample_losses"} & vars(module).keys()
    assert not any(m._forward_hooks for m in module.modules())
    return str(caught.value)


def test_what_escapes_the_gate_is_named():
    message = refused(L2)
    assert "the loss reaches 1 trainable parameters around the tensor that is weighted" in message
    assert "so these would not be weighted: 'body.weight'." in message
    assert "uncovered='mean'" in message


def test_an_operation_in_place_after_the_layer_is_not_an_escape():
    module, data = toy(InPlace), loader(toy_data(8))
    trainer(GradMimic(parameters_of(toy(InPlace, seed=1)), "head")).fit(module, data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Reentrant, "'head.weight' (its layer ran without gradient: it and all before it are frozen, or it ran under"),
        (TakesIterator, "take `batch` instead of `dataloader_iter`"),
        (ClassWeighted, "it divides by the sum of its class weights"),
        (Ignoring, "samples have different numbers of them (ignore_index)"),
        (Summed, "it is a sum over the batch that is not divided by the number of samples"),
        (Bypassed, "'head.weight' (no path leads from the loss to it)"),
        (NotAveraged, "does not return the plain mean of `self.sample_losses(batch)`"),
        (NotCalled, "training_step did not call it"),
        (ByHand, "ByHand steps its optimizers by hand. lightning_mimic.Reweighter serves training loops"),
        (Quasi, "LBFGS evaluates a batch several times"),
    ],
)
def test_what_would_be_inexact_is_refused(kind, message):
    assert message in refused(kind)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (LeavesOutLater, ValueError, r"different numbers of them \(ignore_index\)"),
        (BypassesLater, RuntimeError, "no gradient reached the output of the scored layer"),
        (Penalised, ValueError, "no tensor with a row for each of 4 samples lies between the loss and the parameters"),
    ],
)
def test_what_turns_inexact_later_stops_training(kind, error, message):
    with pytest.raises(error, match=message):
        trainer(GradMimic(parameters_of(toy(seed=1)), "head")).fit(toy(kind), loader(toy_data(8)))


def test_an_input_changed_in_place_is_refused():
    assert "the input of 'head' was changed in place" in refused(ChangedInput, reweight="target", error=RuntimeError)


def test_nothing_trained_before_or_in_the_layer():
    class Detached(Toy):
        def forward(self, x):
            return self.head(torch.tanh(self.body(x)).detach()) + self.body(x)[:, :3] * 0

        def configure_optimizers(self):
            self.head.requires_grad_(False)
            return super().configure_optimizers()

    assert "'head.weight' (its layer ran without gradient: it and all before it are frozen" in refused(Detached)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": "haed"}, "`parameters`: 'haed' names no module and no parameter of Toy; nearest: 'head'"),
        ({"reference": {"head.weight": torch.zeros(3, 8)}}, "no tensor for 'head.bias'"),
        ({"reference": {"head.weight": torch.zeros(4, 8), "head.bias": torch.zeros(3)}}, "(4, 8), the model's has (3"),
        ({"reference": "nowhere.ckpt"}, "no file nowhere.ckpt"),
        ({"ledger": ""}, "`ledger` is ''; expected the path of a directory"),
        ({"ledger": 5}, "`ledger` is 5; expected the path of a directory"),
    ],
)
def test_bad_arguments_stop_fit_before_training(options, message):
    settings = {"parameters": "head", "reference": parameters_of(toy(seed=1))} | options
    module = toy()
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(GradMimic(**settings)).fit(module, loader(toy_data(8)))
    assert trainer().global_step == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"reweight": "al"}, "`reweight` is 'al'; nearest: 'all'."),
        ({"uncovered": "ignore"}, "`uncovered` is 'ignore'"),
        ({"on_nonfinite": "skip"}, "`on_nonfinite` is 'skip'; nearest: 'mask'."),
        ({"temperature": 0}, "`temperature` must be a positive finite number or 'auto', not 0."),
        ({"min_ess": 2}, "`min_ess` is a fraction of the batch between 0 and 1, not 2."),
    ],
)
def test_bad_options_are_refused_at_construction(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GradMimic({}, "head", **option)


def test_frozen_parameters_cannot_be_weighted_alone():
    class FrozenHead(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head.requires_grad_(False)

    assert "they are frozen" in refused(FrozenHead, reweight="target")
    trainer(GradMimic(parameters_of(toy(seed=1)), "head")).fit(toy(FrozenHead), loader(toy_data(8)))


def test_a_ledger_without_ids_is_refused(tmp_path):
    batches = torch.utils.data.DataLoader(toy_data(8), 4)
    message = refused(Toy, batches=batches, ledger=tmp_path / "s")
    assert "carries no ids" in message
    assert "DataLoader(WithIds(dataset), collate_fn=collate_with_ids)" in message


def test_two_runs_in_one_ledger_are_refused_and_both_named(tmp_path):
    reference, data = parameters_of(toy(seed=1)), loader(toy_data(8))
    trainer(GradMimic(reference, "head", ledger=tmp_path / "s")).fit(toy(), data)
    with pytest.raises(LedgerError, match=r"already holds 1 parts of run [0-9a-f]{12} .* and this is a new run"):
        trainer(GradMimic(reference, "head", ledger=tmp_path / "s")).fit(toy(), data)


def test_two_callbacks_on_one_trainer_are_refused():
    reference = parameters_of(toy(seed=1))
    with pytest.raises(RuntimeError, match="GradMimic"):
        trainer(GradMimic(reference, "head"), GradMimic(reference, "head"))


def test_fsdp_is_refused():
    callback, fit, module = GradMimic({}, "head"), trainer(), toy()
    fit.strategy.__class__ = FSDPStrategy
    fit.strategy._lightning_module = module
    with pytest.raises(ValueError, match="FSDPStrategy splits or replaces parameters"):
        callback.on_fit_start(fit, module)


def test_fsdp1_is_refused_in_a_loop_of_ones_own():
    wrapped = type("FullyShardedDataParallel", (torch.nn.Sequential,), {})(toy())
    with pytest.raises(ValueError, match=r"is a FullyShardedDataParallel, .* Shard it with `torch.distributed.fsdp"):
        Reweighter(wrapped, {}, "0.head")


def test_checkpoints_are_not_scored_under_model_parallel_strategy(tmp_path):
    module = toy()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "a.ckpt")
    scoring = AtCheckpoints(tmp_path)
    fit = trainer(GradMimic(parameters_of(toy(seed=1)), "head"), scoring)
    fit.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(ValueError, match=r"ModelParallelStrategy shards the model. Score on a single device"):
        scoring.setup(fit, module, "fit")


def test_an_unreadable_reference_leaves_no_ledger(tmp_path):
    with pytest.raises(ReferenceLoadError):
        trainer(GradMimic("no.pt", "head", ledger=tmp_path / "s")).fit(toy(), loader(toy_data(8)))
    assert not (tmp_path / "s").exists()
