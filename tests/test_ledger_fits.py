"""Fits and their ledger: disks that fail, processes that are killed, runs that are resumed otherwise, any ids."""

import errno
import os
import re
import signal
from contextlib import nullcontext, suppress
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mimic import GradMimic, Ledger, Reweighter
from lightning_mimic.errors import MimicError
from lightning_mimic.ledger import LedgerError
from lightning_mimic.reweighting.batch import sample_ids
from support.cases import for_each
from support.toys import Toy, loader, losses_of, parameters_of, toy, toy_data, trainer

pytestmark = [
    pytest.mark.slow,  # fits
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:resumed after . batches of epoch 0"),
]


def mimic(folder: Any, **how: Any) -> GradMimic:
    return GradMimic(parameters_of(toy(seed=1)), "head", ledger=folder / "s", diagnose_reference=False, **how)


def saver(folder: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "c", "at-{step}", save_top_k=-1, every_n_train_steps=1)


def ids_of(folder: Any, **how: Any) -> list[Any]:
    return Ledger(folder / "s").table(**how)["id"].to_pylist()


def checkpoints(folder: Any) -> list[str]:
    return sorted(path.name for path in (folder / "c").glob("*.ckpt"))


class Outage(pl.Callback):
    """The disk of the ledger is full from one step on, and stays so for some writes."""

    def __init__(self, step: int, writes: int) -> None:
        self.step, self.writes, self.patch = step, writes, pytest.MonkeyPatch()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step != self.step:
            return
        real = os.fsync

        def full(descriptor: int) -> None:
            if self.writes and "part-" in os.readlink(f"/proc/self/fd/{descriptor}"):
                self.writes -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        self.patch.setattr(os, "fsync", full)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks up names of open files there")
@for_each("writes", [1, 2])
def test_a_disk_that_fails_for_a_moment_costs_no_row_and_no_checkpoint(writes, tmp_path):
    folder, outage, callback = tmp_path / str(writes), Outage(2, writes), mimic(tmp_path / str(writes))
    fit = trainer(callback, outage, saver(folder), enable_checkpointing=True)
    message = f"4 rows could not be written to {folder / 's'}, twice in a row: [Errno {errno.ENOSPC}]"
    try:
        # Tried again at once; after the second failure the checkpoint holds the rows.
        with pytest.warns(UserWarning, match=re.escape(message)) if writes > 1 else nullcontext():
            fit.fit(toy(), loader(toy_data(12)))
    finally:
        outage.patch.undo()
    assert checkpoints(folder) == ["at-step=1.ckpt", "at-step=2.ckpt", "at-step=3.ckpt"]
    assert ids_of(folder) == list(range(12))
    # They were written after all, and are not written a second time.
    trainer(mimic(folder)).fit(
        toy(), loader(toy_data(12)), ckpt_path=folder / "c" / "at-step=2.ckpt", weights_only=True
    )
    assert ids_of(folder, deduplicate=False)[:8] == list(range(8))
    assert len(ids_of(folder, deduplicate=False)) == 12


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks up names of open files there")
def test_a_disk_that_stays_full_stops_the_training_and_the_checkpoint_has_the_rows(tmp_path):
    folder, outage = tmp_path, Outage(2, 99)
    fit = trainer(mimic(folder), outage, saver(folder), enable_checkpointing=True)
    full = r"8 rows could not be written to .*/s, twice in a row"
    held = "4 rows could not be written .* A checkpoint that is saved now contains these rows.$"
    try:
        with (
            pytest.warns(UserWarning, match=full),
            pytest.warns(UserWarning, match=held),
            pytest.raises(LedgerError, match=full),
        ):
            fit.fit(toy(), loader(toy_data(12)))
    finally:
        outage.patch.undo()
    assert checkpoints(folder) == ["at-step=1.ckpt", "at-step=2.ckpt", "at-step=3.ckpt"]
    assert ids_of(folder, allow_partial=True) == [0, 1, 2, 3]
    held = torch.load(folder / "c" / "at-step=3.ckpt", weights_only=True)["callbacks"]["GradMimic"]["unwritten"]
    assert held.dtype == torch.uint8
    resumed = trainer(mimic(folder), max_epochs=2)
    resumed.fit(toy(), loader(toy_data(12)), ckpt_path=folder / "c" / "at-step=3.ckpt", weights_only=True)
    assert ids_of(folder) == [*range(12), *range(12)]
    damaged = torch.load(folder / "c" / "at-step=3.ckpt", weights_only=True)
    damaged["callbacks"]["GradMimic"]["unwritten"] = held[:-40]
    torch.save(damaged, folder / "damaged.ckpt")
    for part in (folder / "s").glob("*-a0-r0-000001-*"):
        part.unlink()
    with pytest.raises(LedgerError, match="the rows that the checkpoint holds are damaged"):
        trainer(mimic(folder)).fit(toy(), loader(toy_data(12)), ckpt_path=folder / "damaged.ckpt", weights_only=True)


def test_a_checkpoint_whose_rows_are_gone_is_not_resumed(tmp_path):
    trainer(mimic(tmp_path), saver(tmp_path), enable_checkpointing=True).fit(toy(), loader(toy_data(12)))
    (part,) = (tmp_path / "s").glob("*-000001-*")
    part.unlink()
    again, plain = trainer(mimic(tmp_path)), {"weights_only": True}
    with pytest.raises(
        LedgerError, match=r"attempt 0 scored up to step 1 .*: those of rank 0 end in step 0 \(epoch 0, b"
    ):
        again.fit(toy(), loader(toy_data(12)), ckpt_path=tmp_path / "c" / "at-step=2.ckpt", **plain)
    again.fit(toy(), loader(toy_data(12)), ckpt_path=tmp_path / "c" / "at-step=1.ckpt", **plain)
    assert Ledger(tmp_path / "s").meta["attempts"][1]["scored"] == [0, 0, 0]


def test_a_checkpoint_of_a_run_that_went_on_elsewhere_is_not_mixed_with_its_first_directory(tmp_path):
    plain, first = {"weights_only": True}, tmp_path / "c" / "at-step=1.ckpt"
    trainer(mimic(tmp_path), saver(tmp_path), enable_checkpointing=True).fit(toy(), loader(toy_data(12)))
    there = trainer(mimic(tmp_path / "d"), saver(tmp_path / "d"), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="is new"), pytest.warns(UserWarning, match="dirpath has changed"):
        there.fit(toy(), loader(toy_data(12)), ckpt_path=first, **plain)
    later = tmp_path / "d" / "c" / "at-step=2.ckpt"
    with pytest.raises(LedgerError, match="is not the one that saved the checkpoint"):
        trainer(mimic(tmp_path)).fit(toy(), loader(toy_data(12)), ckpt_path=later, **plain)


@for_each("wrong", [{"run": 5}, {"attempt": -1}, {"scored": [1, 2]}, {"unwritten": b"x"}, {"position": 5}])
def test_a_damaged_state_of_the_run_is_named(wrong, tmp_path):
    folder = tmp_path / next(iter(wrong))
    trainer(mimic(folder), saver(folder), enable_checkpointing=True).fit(toy(), loader(toy_data(8)))
    state = torch.load(folder / "c" / "at-step=1.ckpt", weights_only=True)
    state["callbacks"]["GradMimic"] |= wrong
    torch.save(state, folder / "damaged.ckpt")
    with pytest.raises(MimicError, match=re.escape(f"is damaged: its `{next(iter(wrong))}` is ")):
        trainer(mimic(folder)).fit(toy(), loader(toy_data(8)), ckpt_path=folder / "damaged.ckpt", weights_only=True)


class Dies(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.callbacks[0].reweighter.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def killed(act: Any) -> None:
    """Has a forked process act until it kills itself."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            torch.set_num_threads(1)
            act()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fit_that_was_killed_starts_again_if_no_checkpoint_was_saved(tmp_path):
    killed(lambda: trainer(mimic(tmp_path), Dies()).fit(toy(), loader(toy_data(12))))
    assert ids_of(tmp_path, allow_partial=True) == list(range(8))
    with pytest.warns(UserWarning, match="It starts again as attempt 1"):
        trainer(mimic(tmp_path)).fit(toy(), loader(toy_data(12)))
    assert ids_of(tmp_path) == list(range(12))
    assert set(Ledger(tmp_path / "s").table()["attempt"].to_pylist()) == {1}
    assert len(list((tmp_path / "s").glob("*-a0-*"))) == 1
    other = tmp_path / "other"
    watched = saver(other)
    killed(lambda: trainer(mimic(other), watched, Dies(), enable_checkpointing=True).fit(toy(), loader(toy_data(12))))
    with pytest.raises(LedgerError, match=r"already holds . parts of run .*, and this is a new run"):
        trainer(mimic(other)).fit(toy(), loader(toy_data(12)))


def test_another_size_of_batches_is_warned_of_at_the_start(tmp_path):
    trainer(mimic(tmp_path), saver(tmp_path), enable_checkpointing=True).fit(toy(), loader(toy_data(8)))
    with pytest.warns(UserWarning, match=r"goes on with other settings \(batch_size: 4, 8\)"):
        trainer(mimic(tmp_path), epochs=2).fit(
            toy(), loader(toy_data(8), 8), ckpt_path=tmp_path / "c" / "at-step=2.ckpt", weights_only=True
        )
    with pytest.warns(UserWarning, match="its attempts differ in batch_size: 4, 8"):
        assert len(ids_of(tmp_path)) == 16


def steps(reweighter: Reweighter, module: Any, batches: Any, ids: Any = None) -> None:
    for place, batch in enumerate(batches):
        with reweighter.step(batch, None if ids is None else ids[place]) as step:
            step.backward(losses_of(module, step.batch).mean())


def plain(folder: Any, module: Any) -> Reweighter:
    return Reweighter(module, parameters_of(toy(seed=1)), "head", ledger=folder / "s", diagnose_reference=False)


def test_another_size_of_batches_is_warned_of_in_a_loop_of_ones_own(tmp_path):
    module, data = toy(), toy_data(8)
    with plain(tmp_path, module) as first:
        steps(first, module, [data[:4]], [[0, 1, 2, 3]])
        state = first.state_dict()
    with plain(tmp_path, module) as second:
        second.load_state_dict(state)
        with pytest.warns(UserWarning, match=r"goes on with other settings \(batch_size: 4, 2\)"):
            steps(second, module, [data[4:6]], [[4, 5]])
    with pytest.warns(UserWarning, match="differ in batch_size"):
        assert ids_of(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_one_run_is_not_written_by_two(tmp_path):
    module, data = toy(), toy_data(8)
    with plain(tmp_path, module) as first:
        steps(first, module, [data[:4]], [[0, 1, 2, 3]])
        state = first.state_dict()
        second = plain(tmp_path, toy())
        second.load_state_dict(state)
        with pytest.raises(
            LedgerError, match=r"is being written by attempt 0 of run .*, and this is run .*, resumed at step 1"
        ):
            steps(second, toy(), [data[4:]], [[4, 5, 6, 7]])
        second.close()
    assert ids_of(tmp_path) == [0, 1, 2, 3]


class Counted(Toy):
    backward_passes = 0

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        type(self).backward_passes += 1
        super().backward(loss, *args, **kwargs)


#: From a batch's own ids to those of ``id_from``, and the message.
WRONG = [
    (lambda ids: ids / 2 * 0, "ids are a tensor of torch.float32, such as 0.0; ids must be all int or all str"),
    (lambda ids: ids < 0, "ids are a tensor of torch.bool, such as False"),
    (lambda ids: [0.5] * 4, "the id 0.5 is a float"),
    (lambda ids: np.array([0.5] * 4), "the id 0.5 is a float"),
    (lambda ids: [b"a"] * 4, "the id b'a' is a bytes"),
    (lambda ids: [None, *ids[1:].tolist()], "an id is missing (None)"),
    (lambda ids: ["", "b", "c", "d"], "the id '' is empty"),
    (lambda ids: ["a", "b", "c", 4], "ids must be all int or all str, and there are both: 4 and 'a'"),
    (lambda ids: ["caf\udce9", "b", "c", "d"], r"the id 'caf\udce9' is not valid text"),
    (lambda ids: [0, 1, 2, 2**64], "the id 18446744073709551616 is out of range"),
    (lambda ids: ids[:3], "`id_from` gave 3 ids for 4 samples"),
    (lambda ids: ids.tolist() * 2, "`id_from` gave 8 ids for 4 samples"),
]


@for_each("wrong", WRONG)
@for_each("first", [True, False])
def test_ids_of_another_kind_are_refused_before_their_batch_is_trained_on(wrong, first, tmp_path):
    change, message = wrong
    folder = tmp_path / f"{WRONG.index(wrong)} {first}"
    Counted.backward_passes = 0

    def id_from(batch: Any) -> Any:
        return change(batch.ids) if first or 4 in batch.ids.tolist() else batch.ids

    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(mimic(folder, id_from=id_from)).fit(toy(Counted), loader(toy_data(12)))
    assert Counted.backward_passes == (0 if first else 1)
    if not first:
        assert ids_of(folder) == [0, 1, 2, 3]  # what was scored before is written


def test_a_later_batch_with_ids_of_the_other_kind_is_refused(tmp_path):
    names = mimic(tmp_path, id_from=lambda batch: [f"s{each}" for each in batch.ids] if 4 in batch.ids else batch.ids)
    with pytest.raises(LedgerError, match=r"the id 's4' is str, and the ids before were int; a ledger holds one type"):
        trainer(names).fit(toy(), loader(toy_data(12)))
    assert ids_of(tmp_path) == [0, 1, 2, 3]


def test_a_resumed_run_keeps_the_kind_of_its_ids(tmp_path):
    trainer(mimic(tmp_path), saver(tmp_path), enable_checkpointing=True).fit(toy(), loader(toy_data(8)))
    names = mimic(tmp_path, id_from=lambda batch: [f"s{each}" for each in batch.ids])
    with pytest.raises(LedgerError, match="the id 's0' is str, and the ids before were int"):
        trainer(names, epochs=2).fit(
            toy(), loader(toy_data(8)), ckpt_path=tmp_path / "c" / "at-step=2.ckpt", weights_only=True
        )


HIGH = [3, 2**63 - 1, 2**63, 2**64 - 1, 7, 8, 2**63 + 5, 9]


@for_each("workers", [0, 1])
def test_unsigned_ids_of_64_bits_are_recorded(workers, tmp_path):
    folder = tmp_path / str(workers)
    trainer(mimic(folder)).fit(toy(), loader(toy_data(8), 2, HIGH, num_workers=workers))
    assert ids_of(folder) == HIGH
    batches = list(loader(toy_data(8), 2, np.array(HIGH, np.uint64)))
    assert [batch.ids.dtype for batch in batches] == [torch.int64, torch.uint64, torch.int64, torch.uint64]


def test_unsigned_ids_may_come_as_a_tensor_an_array_or_a_list(tmp_path):
    module, data = toy(), toy_data(8)
    given = [torch.tensor(HIGH[:2], dtype=torch.uint64), np.array(HIGH[2:4], np.uint64), HIGH[4:6], tuple(HIGH[6:])]
    with plain(tmp_path, module) as reweighter:
        steps(reweighter, module, [data[k : k + 2] for k in (0, 2, 4, 6)], given)
    assert ids_of(tmp_path) == HIGH


def test_the_number_of_ids_is_compared_with_that_of_the_samples():
    ids, time_first = torch.arange(4), torch.zeros(5, 4, 3)
    time_first.ids = ids
    assert sample_ids(time_first, None, needed=True).tolist() == [0, 1, 2, 3]
    other = torch.zeros(5, 6, 3)
    other.ids = ids
    with pytest.raises(ValueError, match=r"^the batch gave 4 ids for 5 samples; expected one id per sample"):
        sample_ids(other, None, needed=True)
    assert sample_ids(other, None, needed=False) is None, "an attribute of the user's own"
