"""Fits on image-text shards: what a model is given in each epoch, also in one that is resumed."""

import functools
import re
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_mimic.data.rejects import Rejects
from lightning_mimic.errors import MimicError
from support.pair_shards import SIZES, Reader, data_of, flat, module, pair, trainer, write, write_shards

pytestmark = pytest.mark.slow  # fits and processes

ALL = list(range(sum(SIZES)))


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", *SIZES)


KINDS = {"length known": {}, "workers": {"num_workers": 2}, "length unknown": {"pipe": True}}


def urls_of(shards, kind):
    return [f"pipe:cat {shard}" for shard in shards] if "unknown" in kind else shards


def options_of(kind):
    return {name: value for name, value in KINDS[kind].items() if name != "pipe"}


def fitted(shards, kind, folder, **options):
    model = Reader()
    run = trainer(folder)
    run.fit(model, datamodule=data_of(urls_of(shards, kind), **options_of(kind), **options))
    return model, run


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_sees_every_pair_in_every_epoch_and_validates_and_steps_after_each(kind, shards, tmp_path):
    model, run = fitted(shards, kind, tmp_path, val_shards=[str(shards[0]), str(shards[1])])
    assert [sorted(flat(batches)) for batches in model.seen.values()] == [ALL] * 3
    assert model.seen[0] != model.seen[1] != model.seen[2]
    assert model.steps == 3
    assert {epoch for epoch, _ in model.validated} == {0, 1, 2}
    assert sum(shape[0] for epoch, shape in model.validated if epoch == 1) == 10
    if kind == "length known":
        assert run.num_training_batches == 7
        assert run.global_step == 21


@pytest.mark.parametrize("kind", KINDS)
def test_broken_pairs_keep_neither_validation_nor_schedulers_from_an_epochs_end(kind, shards, tmp_path):
    html = {"png": b"<html>"}
    write(shards[2], [file for n in range(10, 19) for file in pair(n, **(html if n in (11, 12, 17) else {}))])
    with pytest.warns(UserWarning, match=r"3 image-text pairs were skipped \(3 undecodable image\); set `rejects="):
        model, _ = fitted(shards, kind, tmp_path, val_shards=[str(shards[0])])
    whole = [number for number in ALL if number not in (11, 12, 17)]
    assert [sorted(flat(batches)) for batches in model.seen.values()] == [whole] * 3
    assert model.steps == 3
    assert {epoch for epoch, _ in model.validated} == {0, 1, 2}


def test_limited_epochs_are_epochs_of_their_own(shards, tmp_path):
    model = Reader()
    trainer(tmp_path, limit_train_batches=2).fit(model, datamodule=data_of(shards))
    whole, _ = fitted(shards, "length known", tmp_path)
    assert [model.seen[epoch] for epoch in range(3)] == [whole.seen[epoch][:2] for epoch in range(3)]


class Steps(Callback):
    """Asks for the number of steps there will be, as a schedule does."""

    def on_train_start(self, trainer, pl_module):
        self.steps = trainer.estimated_stepping_batches


def test_a_schedule_can_know_the_number_of_steps(shards, tmp_path):
    steps = Steps()
    options = {"with_replacement": True, "samples_per_epoch": 30}
    trainer(tmp_path, steps, max_epochs=2).fit(Reader(), datamodule=data_of(shards, **options))
    assert steps.steps == 16


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("end", ["whole", "interrupted", "stopped"])
def test_what_was_skipped_is_said_once_and_listed(end, num_workers, shards, tmp_path):
    write(shards[0], [*pair(0), *pair(1, txt=b""), *pair(2, png=b""), *pair(3, png=b"")])
    shards[4].write_bytes(shards[4].read_bytes()[:5000])
    directory = tmp_path / "rejects"
    model = Reader(stop_at=(2, 1) if end == "interrupted" else None)
    data = data_of(shards, rejects=directory, num_workers=num_workers, shuffle=0)
    run = trainer(tmp_path, **({"max_steps": 9} if end == "stopped" else {}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if end == "interrupted":
            with pytest.raises(InterruptedError):
                run.fit(model, datamodule=data)
        else:
            run.fit(model, datamodule=data)
    said = [str(each.message) for each in said if "skipped" in str(each.message)]
    assert said == [
        "4 image-text pairs were skipped (2 undecodable image, 1 cut off with its shard, 1 empty caption); 1 shard "
        f"ended early; listed in {directory}."
    ]
    assert Rejects(directory).counts.to_pylist() == [
        {"shard": str(shards[0]), "reason": "empty caption", "count": 1},
        {"shard": str(shards[0]), "reason": "undecodable image", "count": 2},
        {"shard": str(shards[4]), "reason": "cut off with its shard", "count": 1},
        {"shard": str(shards[4]), "reason": "shard ends early", "count": 1},
    ]


def test_another_runs_rejects_stay_and_are_not_counted(shards, tmp_path):
    write(shards[0], pair(0, txt=b"") + pair(1))
    for number in (1, 2):
        data = module(shards, rejects=tmp_path / "rejects")
        list(data.train_dataloader())
        with pytest.warns(UserWarning, match=re.escape("1 image-text pair was skipped (1 empty caption); listed in")):
            data.teardown("fit")
        assert len(list((tmp_path / "rejects").iterdir())) == number


def test_whole_shards_end_in_silence(shards, tmp_path):
    fitted(shards, "workers", tmp_path)  # a warning would be an error
    assert not list(tmp_path.glob("rejects*"))


def test_shards_that_give_nothing_are_an_error_that_names_one(tmp_path):
    write(tmp_path / "0.tar", pair(1, txt=b""))
    with pytest.warns(UserWarning, match="1 empty caption"), pytest.raises(MimicError, match=r"usable pair.*0\.tar"):
        trainer(tmp_path).fit(Reader(), datamodule=data_of([tmp_path / "0.tar"]))


class Saver(Callback):
    """Saves once, after a batch or at an epoch's end, and ends the fit two batches later."""

    def __init__(self, path, hook, epoch, batch):
        self.path, self.hook, self.epoch, self.batch, self.left = path, hook, epoch, batch, None

    def saves(self, trainer, hook, batch=None):
        if (hook, trainer.current_epoch, batch) == (self.hook, self.epoch, self.batch):
            trainer.save_checkpoint(self.path)
            self.left = 2

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise InterruptedError

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.saves(trainer, "batch", batch_idx)

    def on_train_epoch_end(self, trainer, pl_module):
        self.saves(trainer, "epoch")

    def on_validation_end(self, trainer, pl_module):
        self.saves(trainer, "validation")


STOPS = {
    "in the first epoch": ("batch", 0, 3),
    "after a first batch": ("batch", 1, 0),
    "in the second epoch": ("batch", 1, 2),
    "after a last batch": ("batch", 0, None),
    "at an epoch's end": ("epoch", 0, None),
    "after validation": ("validation", 0, None),
}


# With workers and with an end by steps, only what the others do not tell.
WORKERS = ["in the second epoch", "after a last batch", "after validation"]
BY_STEPS = [stop for stop in STOPS if stop != "after a first batch"]
RESUMED = [(kind, stop, -1) for kind in KINDS for stop in STOPS if kind != "workers" or stop in WORKERS]
RESUMED += [("length known", stop, 17) for stop in BY_STEPS]
RESUMED += [("length unknown", stop, 17) for stop in ("in the second epoch", "at an epoch's end")]


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """A fit of one kind and number of steps, and what the whole one of it has seen in each epoch."""
    folder = tmp_path_factory.mktemp("fits")
    shards = write_shards(folder / "shards", *SIZES)

    def fit(kind, steps, *callbacks, **resumed):
        model = Reader()
        data = data_of(urls_of(shards, kind), **options_of(kind), val_shards=[str(shards[1])])
        trainer(folder, *callbacks, max_steps=steps, max_epochs=3 if steps < 0 else -1).fit(
            model, datamodule=data, **resumed
        )
        return model

    return fit, functools.cache(lambda kind, steps: list(fit(kind, steps).seen.values()))


@pytest.mark.parametrize(
    ("kind", "stop", "steps"), [pytest.param(*r, marks=[pytest.mark.slow] * (r[0] == "workers")) for r in RESUMED]
)
def test_a_resumed_fit_goes_through_what_the_whole_one_did(kind, stop, steps, fits, tmp_path):
    fit, whole_of = fits
    whole = whole_of(kind, steps)
    hook, epoch, batch = STOPS[stop]
    batch = len(whole[0]) - 1 if "last" in stop else batch
    saver = Saver(tmp_path / "saved.ckpt", hook, epoch, batch)
    with pytest.raises(InterruptedError):
        fit(kind, steps, saver)
    trained = len(whole[0]) * (1 if batch is None else epoch) + (0 if batch is None else batch + 1)
    assert torch.load(saver.path, weights_only=True)["global_step"] == trained
    rest = [each for batches in fit(kind, steps, ckpt_path=saver.path).seen.values() for each in batches]
    assert rest == [each for batches in whole for each in batches][trained:]
