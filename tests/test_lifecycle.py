"""Fits that start, stop, break, go on or are repeated; modules that are copied; nothing left behind."""

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from lightning_mimic import GradMimic, Ledger
from support.hooks_left import untouched
from support.toys import Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer


class Stop(pl.Callback):
    """Raises at a global step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def reference() -> dict[str, torch.Tensor]:
    return parameters_of(toy(seed=1))


@pytest.mark.parametrize("reweight", ["all", "target"])
@pytest.mark.parametrize("end", [None, RuntimeError("boom"), KeyboardInterrupt()])
def test_hooks_and_wrappers_are_gone_after_fit(end, reweight, tmp_path):
    module, callback = toy(WithLosses), GradMimic(reference(), "head", reweight=reweight, ledger=tmp_path / "s")
    more = [] if end is None else [Stop(2, end)]
    fit = trainer(callback, *more)
    if end is None:
        fit.fit(module, loader(toy_data(12)))
    else:
        with pytest.raises(SystemExit if isinstance(end, KeyboardInterrupt) else RuntimeError):
            fit.fit(module, loader(toy_data(12)))
    assert untouched(module)
    # What was scored before the end is on the disk.
    assert Ledger(tmp_path / "s").table().num_rows == (12 if end is None else 8)
    assert Ledger(tmp_path / "s").meta["attempts"][0]["rows"] == [12 if end is None else 8]


def test_a_copy_made_while_training_is_a_plain_module():
    copies = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copies.append(copy.deepcopy(pl_module))

    module = toy(WithLosses)
    trainer(GradMimic(reference(), "head"), Copy()).fit(module, loader(toy_data(8)))
    other, batch = copies[0], toy_data(4)[:]
    with torch.no_grad():
        other.head.weight.zero_()
        other.head.bias.zero_()
    torch.testing.assert_close(other.sample_losses(batch), torch.full((4,), 3.0, dtype=torch.float64).log())


@pytest.mark.parametrize(
    "average", [StochasticWeightAveraging(0.1, swa_epoch_start=1), EMAWeightAveraging(decay=0.5)], ids=["swa", "ema"]
)
def test_weight_averaging_goes_on_beside_it(average, tmp_path):
    module, callback = toy(WithLosses), GradMimic(reference(), "head", ledger=tmp_path / "s")
    trainer(callback, average, epochs=3).fit(module, loader(toy_data(8)))
    assert Ledger(tmp_path / "s").table().num_rows == 24
    assert untouched(module)


class Normed(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.body(x))))


class NormedResidual(Normed):
    """The head is no cut, so that it is scored in a pass of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.body(x)))
        return self.head(hidden) + hidden[:, :3]


@pytest.mark.parametrize("kind", [Normed, NormedResidual])
def test_the_pass_that_renews_batch_norms_after_swa_is_not_scored(kind, tmp_path):
    module = toy(kind)
    callback = GradMimic(parameters_of(toy(kind, seed=1)), "head", reweight="none", ledger=tmp_path / "s")
    swa = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    trainer(callback, swa, epochs=3).fit(module, loader(toy_data(8)))
    ledger = Ledger(tmp_path / "s")
    assert ledger.table()["epoch"].to_pylist() == [0] * 8 + [1] * 8 + [2] * 8
    assert ledger.meta["attempts"][0]["rows"] == [24]


@pytest.mark.parametrize("kind", [Toy, NormedResidual])
def test_a_step_without_a_backward_pass_is_not_scored(kind, tmp_path):
    class Skips(kind):
        def backward(self, loss: torch.Tensor) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx != 1:
                super().backward(loss)

    callback = GradMimic(parameters_of(toy(kind, seed=1)), "head", reweight="none", ledger=tmp_path / "s")
    trainer(callback).fit(toy(Skips), loader(toy_data(12)))
    assert Ledger(tmp_path / "s").table()["batch"].unique().to_pylist() == [0, 2]


def test_a_fit_of_no_steps_leaves_an_empty_ledger(tmp_path):
    callback = GradMimic(reference(), "head", ledger=tmp_path / "s")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of max_steps=0
        trainer(callback, max_steps=0).fit(toy(), loader(toy_data(8)))
    assert not (tmp_path / "s").exists() or Ledger(tmp_path / "s").table().num_rows == 0


def test_one_callback_serves_two_fits(tmp_path):
    callback, data = GradMimic(reference(), "head", ledger=tmp_path / "s"), loader(toy_data(8))
    first, second = toy(), toy()
    trainer(callback).fit(first, data)
    trainer(callback).fit(second, data)
    torch.testing.assert_close(parameters_of(first), parameters_of(second), rtol=0, atol=0)
    ledger = Ledger(tmp_path / "s")
    assert [a["attempt"] for a in ledger.meta["attempts"]] == [0, 1]
    assert set(ledger.table()["attempt"].to_pylist()) == {1}  # the second went over all of the first again
    assert len(list((tmp_path / "s").glob("part-*-a0-*.parquet"))) == 1


# A run resumed without the checkpoint callback that saved it is warned of it by Lightning.
without_saver = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@without_saver
@pytest.mark.parametrize("reweight", ["all", "target"])
def test_a_resumed_run_equals_the_uninterrupted_one(reweight, tmp_path):
    def callback(name: str) -> GradMimic:
        return GradMimic(reference(), "head", temperature=0.5, reweight=reweight, ledger=tmp_path / name)

    whole, data = toy(), loader(toy_data(12))
    trainer(callback("whole"), epochs=4).fit(whole, data)
    trainer(
        callback("parts"),
        ModelCheckpoint(tmp_path / "c", "at-{step}", every_n_epochs=2),
        epochs=3,
        enable_checkpointing=True,
    ).fit(toy(), data)
    (checkpoint,) = tmp_path.glob("c/at-*.ckpt")
    resumed = toy()
    trainer(callback("parts"), epochs=4).fit(resumed, data, ckpt_path=checkpoint, weights_only=True)
    torch.testing.assert_close(parameters_of(resumed), parameters_of(whole), rtol=0, atol=0)
    # The third epoch was scored twice: once before the break, once after.
    one, two = Ledger(tmp_path / "whole"), Ledger(tmp_path / "parts")
    assert [a["start_step"] for a in two.meta["attempts"]] == [0, 6]
    columns = ["id", "epoch", "step", "batch", "position", "score", "weight"]
    assert two.table().select(columns).equals(one.table().select(columns))
    raw = sum(int(p.stem.rpartition("-n")[2]) for p in (tmp_path / "parts").glob("*.parquet"))
    assert raw == 36 + 24


def test_a_checkpoint_saved_after_fit_resumes_its_ledger(tmp_path):
    first = trainer(GradMimic(reference(), "head", ledger=tmp_path / "s"))
    first.fit(toy(), loader(toy_data(8)))
    first.save_checkpoint(tmp_path / "end.ckpt")
    again = GradMimic(reference(), "head", ledger=tmp_path / "s")
    trainer(again, epochs=2).fit(toy(), loader(toy_data(8)), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert set(Ledger(tmp_path / "s").table()["epoch"].to_pylist()) == {0, 1}


def test_what_a_checkpoint_has_seen_is_in_the_ledger(tmp_path):
    seen = {}

    class Watch(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, *rest)
            seen[trainer.global_step] = Ledger(tmp_path / "s").table(allow_partial=True).num_rows  # so far

    callback = GradMimic(reference(), "head", ledger=tmp_path / "s")
    watch = Watch(tmp_path / "c", every_n_train_steps=1, save_top_k=-1)
    trainer(callback, watch, enable_checkpointing=True).fit(toy(), loader(toy_data(12)))
    assert seen == {1: 4, 2: 8, 3: 12}


@without_saver
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resuming_within_an_epoch_says_what_it_costs(tmp_path):
    data, saver = loader(toy_data(12)), ModelCheckpoint(tmp_path / "c", "at-{step}", every_n_train_steps=2)
    callback = GradMimic(reference(), "head", ledger=tmp_path / "s")
    trainer(callback, saver, enable_checkpointing=True).fit(toy(), data)
    (checkpoint,) = tmp_path.glob("c/at-*.ckpt")
    again = GradMimic(reference(), "head", ledger=tmp_path / "s")
    with pytest.warns(UserWarning, match="resumed after 2 batches of epoch 0, but the loader starts"):
        trainer(again).fit(toy(), data, ckpt_path=checkpoint, weights_only=True)
    ids = Ledger(tmp_path / "s").table()["id"].to_pylist()
    assert len(ids) == len(set(ids))  # each sample once per epoch, although the loader started again


@without_saver
def test_other_settings_on_resume_are_not_mixed_in_silence(tmp_path):
    data, saver = loader(toy_data(8)), ModelCheckpoint(tmp_path / "c", "at", every_n_epochs=1)
    callback = GradMimic(reference(), "head", ledger=tmp_path / "s")
    trainer(callback, saver, enable_checkpointing=True).fit(toy(), data)
    other = GradMimic(reference(), "head", temperature=0.5, ledger=tmp_path / "s")
    with pytest.warns(UserWarning, match=r"goes on with other settings \(temperature: 1\.0, 0\.5\)"):
        trainer(other, epochs=2).fit(toy(), data, ckpt_path=tmp_path / "c" / "at.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"attempts differ in temperature: 1\.0, 0\.5"):
        Ledger(tmp_path / "s").table()


def test_a_learning_rate_finder_is_left_alone(tmp_path):
    class Found(Toy):
        seen = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            type(self).seen += 1
            return super().training_step(batch, batch_idx)

    callback = GradMimic(reference(), "head", ledger=tmp_path / "s")
    finder = LearningRateFinder(num_training_steps=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(finder, callback, default_root_dir=tmp_path, enable_checkpointing=True).fit(
            toy(Found), loader(toy_data(8))
        )
    assert Found.seen > 2  # the finder's batches ran
    assert Ledger(tmp_path / "s").table(deduplicate=False).num_rows == 8  # and were not scored


def test_a_development_run_leaves_no_ledger(tmp_path):
    callback = GradMimic(reference(), "head", ledger=tmp_path / "s")
    trainer(callback, fast_dev_run=True).fit(toy(), loader(toy_data(8)))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("when", ["start", "later"])
def test_a_model_that_meets_its_reference_trains_on_with_equal_weights(when, tmp_path):
    same = parameters_of(toy())
    callback = GradMimic(same, "head", ledger=tmp_path / "s")
    plain, ours, data = toy(), toy(), loader(toy_data(4))
    if when == "start":
        trainer().fit(plain, data)
        with pytest.warns(UserWarning, match="stands at its reference"):
            trainer(callback).fit(ours, data)
        torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=1e-12, atol=1e-12)
    else:

        class Return(pl.Callback):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                pl_module.load_state_dict(same)

        with torch.no_grad():
            ours.head.weight.add_(0.1)
        with pytest.warns(UserWarning, match="stands at its reference"):
            trainer(callback, Return(), epochs=2).fit(ours, data)
    rows = Ledger(tmp_path / "s").table().to_pylist()
    assert [(r["flag"], r["score"], r["weight"]) for r in rows[-4:]] == [("zero_direction", None, 0.25)] * 4
    assert all(p.isfinite().all() for p in ours.parameters())


def test_a_batch_of_one_is_recorded_and_said():
    module = toy()
    with pytest.warns(UserWarning, match="a micro-batch held a single sample"):
        trainer(GradMimic(reference(), "head")).fit(module, loader(toy_data(5)))


def test_a_step_that_returns_nothing_is_not_scored(tmp_path):
    class Skips(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    callback = GradMimic(reference(), "head", ledger=tmp_path / "s")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training_step.*returned.*None.*")
        trainer(callback).fit(toy(Skips), loader(toy_data(12)))
    assert Ledger(tmp_path / "s").table()["batch"].unique().to_pylist() == [0, 2]


def test_validation_within_an_epoch_is_not_scored(tmp_path):
    class Validates(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    callback = GradMimic(reference(), "head", ledger=tmp_path / "s")
    trainer(callback, val_check_interval=1).fit(toy(Validates), loader(toy_data(8)), loader(toy_data(4)))
    assert Ledger(tmp_path / "s").table().num_rows == 8
