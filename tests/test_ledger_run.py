"""A run in a ledger's folder: locked, continued from what a checkpoint knows, started again, or refused."""

import errno
import json
import os
import random
import re
import signal
import time
import warnings
from contextlib import closing, suppress

import duckdb
import pyarrow.dataset
import pytest
from filelock import UnixFileLock

from lightning_mimic.curation import Sign, curate
from lightning_mimic.ledger import Checkpoint, Ledger, LedgerError, LedgerWriter, description, open_run
from support.cases import for_each
from support.ledgers import note, write_ledger

CONFIG = {"reweight": "all", "temperature": 0.5}
NOTES = {"ranks": 1, "data": {"dataset": "own.Set", "samples": 4}}


def begin(folder, start=0, run=None, config=CONFIG, notes=NOTES, **how):
    with closing(open_run(folder, config, start, run, notes, **how)) as opened:
        return opened


def write(folder, steps, start=0, run=None, ranks=(0,), rows=2, **how):
    """Writes an attempt, a part per step and rank; returns what was opened."""
    opened = begin(folder, start, run, **how)
    for rank in ranks:
        writer = LedgerWriter(folder, opened.run, opened.attempt, rank)
        for step in steps:
            ids = [100 * opened.attempt + 10 * step + 5 * rank + k for k in range(rows)]
            same = {name: [value] * rows for name, value in (("epoch", 0), ("step", step), ("batch", step))}
            writer.append({"id": ids, "position": range(rows), "flag": ["ok"] * rows, "score": [1.0] * rows, **same})
            writer.flush()
    return opened


def steps_of(folder, **how):
    """By attempt, the steps that are read."""
    found = {}
    for row in Ledger(folder).table(deduplicate=False, **how).to_pylist():
        found.setdefault(row["attempt"], set()).add(row["step"])
    return {attempt: sorted(steps) for attempt, steps in found.items()}


# Locks


def test_a_run_is_written_by_one_at_a_time(tmp_path):
    first = open_run(tmp_path, CONFIG, 0, None, NOTES)
    named = rf"is being written by attempt 0 of run {first.run} \(started .*\), and this is a new run"
    with pytest.raises(LedgerError, match=named):
        begin(tmp_path)
    resumed = f"process {os.getpid()}), and this is run {first.run}, resumed at step 4. Wait for its end"
    with pytest.raises(LedgerError, match=re.escape(resumed)):
        begin(tmp_path, 4, first.run)
    assert len(Ledger(tmp_path).meta["attempts"]) == 1
    first.close()
    first.close()
    begin(tmp_path, 4, first.run)
    assert len(Ledger(tmp_path).meta["attempts"]) == 2


def test_a_run_that_cannot_be_opened_is_not_locked(tmp_path):
    first = write(tmp_path, [0], config=CONFIG | {"temperature": 2.0})
    with pytest.raises(LedgerError, match="already holds"):
        begin(tmp_path)
    begin(tmp_path, 1, first.run, config=CONFIG | {"temperature": 2.0})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_lock_ends_with_a_killed_process_although_its_workers_live(tmp_path):
    ready, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        opened = open_run(tmp_path, CONFIG, 0, None, NOTES)
        if os.fork() == 0:
            time.sleep(20)  # a worker of its loader
            os._exit(0)
        os.write(write_end, opened.run.encode())
        time.sleep(20)
        os._exit(0)
    run = os.read(ready, 100).decode()
    with pytest.raises(LedgerError, match=f"is being written by attempt 0 of run {run} .*, process {child}"):
        begin(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.warns(UserWarning, match="starts again as attempt 1"):
        assert begin(tmp_path).run == run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_copy_writes_no_rows_and_keeps_the_lock(tmp_path):
    run = open_run(tmp_path, CONFIG, 0, None, NOTES)
    writer = LedgerWriter(tmp_path, run.run, run.attempt, 0)
    columns = {"id": [7], "epoch": [0], "step": [0], "batch": [0], "position": [0], "flag": ["ok"]}
    writer.append(columns)
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException), closing(run):
            try:
                writer.flush()
            except LedgerError as error:
                code = 0 if "a forked copy of it" in str(error) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(LedgerError, match="is being written by attempt 0"):
        begin(tmp_path, 0, run.run)
    writer.flush()
    run.close()
    assert [path.name[-10:] for path in tmp_path.glob("*.parquet")] == ["n1.parquet"]


def test_where_the_file_system_has_no_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch):
    def without(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(UnixFileLock, "acquire", without)
    with pytest.warns(
        UserWarning, match=re.escape(f"the file system of {tmp_path} has no locks ([Errno {errno.ENOLCK}]")
    ):
        run = write(tmp_path, [0]).run
    with pytest.warns(UserWarning, match="has no locks"):
        begin(tmp_path, 1, run)


# A run that starts again


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path):
    first = write(tmp_path, [0, 1, 2], rows=3)
    message = f"holds 3 parts of run {first.run}, which ended before its first checkpoint. It starts again as attempt 1"
    with pytest.warns(UserWarning, match=re.escape(message)):
        second = write(tmp_path, [0, 1])
    assert (second.run, second.attempt) == (first.run, 1)
    with pytest.warns(UserWarning, match="has not ended"):
        assert steps_of(tmp_path) == {1: [0, 1]}, "also beyond the steps that were gone over again"
    assert len(list(tmp_path.glob("*.parquet"))) == 5


REFUSED = {
    "a checkpoint was saved": ({"checkpointed": True}, {}),
    "an earlier release does not tell": ({"checkpointed": None}, {}),
    "it has ended": ({"rows": [6]}, {}),
    "other settings": ({}, {"config": CONFIG | {"temperature": 1.0}}),
    "other data": ({}, {"notes": NOTES | {"data": {"dataset": "own.Set", "samples": 5}}}),
    "not at the first step": ({}, {"start": 1}),
}


@for_each("case", REFUSED)
def test_other_runs_do_not_start_again(case, tmp_path):
    notes, how = REFUSED[case]
    write(tmp_path / case, [0, 1, 2])
    note(tmp_path / case, 0, notes)
    with pytest.raises(LedgerError, match=r"already holds 3 parts of run .*, and this is a new run"):
        begin(tmp_path / case, **how)


def test_a_run_that_scored_nothing_starts_again(tmp_path):
    begin(tmp_path)
    note(tmp_path, 0, {"rows": [0]})  # it ended in an error of the user's
    with pytest.warns(UserWarning, match="starts again"):
        assert begin(tmp_path).attempt == 1


# What a checkpoint knows


def test_an_attempt_that_continues_an_earlier_one_supersedes_what_came_between(tmp_path):
    run = write(tmp_path, range(5)).run
    write(tmp_path, [2, 3], 2, run, checkpoint=Checkpoint(0, (0, 1, 1)))
    assert steps_of(tmp_path, allow_partial=True) == {0: [0, 1], 1: [2, 3]}
    write(
        tmp_path, [4, 5], 4, run, checkpoint=Checkpoint(0, (0, 3, 3))
    )  # resumed from a checkpoint of the first attempt
    assert steps_of(tmp_path, allow_partial=True) == {0: [0, 1, 2, 3], 2: [4, 5]}
    begin(tmp_path, 3, run, checkpoint=Checkpoint(1))  # has no rows, and nobody continues it yet
    assert steps_of(tmp_path, allow_partial=True) == {0: [0, 1, 2, 3], 2: [4, 5]}
    write(tmp_path, [9], 9, run, checkpoint=Checkpoint(3))  # its steps were not scored
    assert steps_of(tmp_path, allow_partial=True) == {0: [0, 1], 1: [2], 4: [9]}


#: By what is not there: the last micro-batch of the checkpoint, and which ranks lack what.
LACKING = {
    "the last part of a rank": (["r1-000002"], "those of rank 1 end in step 1 (epoch 0, batch 1)"),
    "a part before": (["r0-000001"], "those of rank 0 end in step 0 (epoch 0, batch 0)"),
    "all of a rank": (["r1-000000", "r1-000001", "r1-000002"], "rank 1 has none"),
    "the last of both": (
        ["r0-000002", "r1-000002"],
        "those of rank 0 end in step 1 (epoch 0, batch 1); those of rank 1 end in step 1 (epoch 0, batch 1)",
    ),
}


@for_each("case", LACKING)
@for_each("damaged", [False, True])
def test_a_checkpoint_that_has_trained_on_rows_that_are_not_there_is_refused(case, damaged, tmp_path):
    parts, lacking = LACKING[case]
    folder, two = tmp_path / f"{case} {damaged}", NOTES | {"ranks": 2}
    run = write(folder, range(3), ranks=(0, 1), notes=two).run
    begin(folder, 3, run, notes=two, checkpoint=Checkpoint(0, (0, 2, 2)))  # all are there
    meta = Ledger(folder).meta
    for part in parts:
        (path,) = folder.glob(f"*-a0-{part}-*")
        if damaged and case != "a part before":
            path.write_bytes(path.read_bytes()[:-20])
        else:
            path.unlink()
    message = (
        f"what attempt 0 scored up to step 2 (epoch 0, batch 2), and {folder} lacks some of these rows: {lacking}. "
    )
    with pytest.raises(LedgerError, match=re.escape(f"the checkpoint has trained on {message}Resume from an earlier")):
        begin(folder, 3, run, notes=two, checkpoint=Checkpoint(0, (0, 2, 2)))
    assert Ledger(folder).meta == meta
    if "has none" not in lacking:
        begin(folder, 1, run, notes=two, checkpoint=Checkpoint(0, (0, 0, 0)))  # an earlier checkpoint


def test_rows_that_were_there_when_a_run_was_resumed_are_missed_when_they_are_gone(tmp_path):
    run = write(tmp_path, range(3)).run
    write(tmp_path, [3], 3, run, checkpoint=Checkpoint(0, (0, 2, 2)))
    note(tmp_path, 1, {"rows": [2]})
    assert steps_of(tmp_path) == {0: [0, 1, 2], 1: [3]}
    (last,) = tmp_path.glob("*-a0-r0-000002-*")
    last.unlink()
    message = re.escape("rows are missing: attempt 0, rank 0, rows after step 1 (missing)")
    for read in (lambda: steps_of(tmp_path), lambda: curate(tmp_path, Sign(), unscored="keep")):
        with pytest.raises(LedgerError, match=message):
            read()


def test_half_a_window_of_accumulated_micro_batches_is_not_the_whole(tmp_path):
    opened = begin(tmp_path)
    writer = LedgerWriter(tmp_path, opened.run, 0, 0)
    for batch in (6, 7):
        writer.append({"id": [batch], "epoch": [0], "step": [3], "batch": [batch], "position": [0], "flag": ["ok"]})
        writer.flush()
    begin(tmp_path, 4, opened.run, checkpoint=Checkpoint(0, (0, 3, 7)))
    (last,) = tmp_path.glob("*-000001-*")
    last.unlink()
    with pytest.raises(LedgerError, match=re.escape("those of rank 0 end in step 3 (epoch 0, batch 6)")):
        begin(tmp_path, 4, opened.run, checkpoint=Checkpoint(0, (0, 3, 7)))


def test_an_older_copy_of_the_ledger_is_not_continued(tmp_path):
    run = write(tmp_path, [0, 1]).run
    with pytest.raises(LedgerError, match=f"knows 1 attempts of run {run}, and the checkpoint is of attempt 1"):
        begin(tmp_path, 1, run, checkpoint=Checkpoint(1, (0, 0, 0)))


def test_an_attempt_of_the_same_number_in_another_directory_is_not_continued(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    first = write(here, range(8))
    with pytest.warns(UserWarning, match="is new"):
        other = write(there, range(4, 8), 4, first.run, checkpoint=Checkpoint(0, (0, 3, 3), token=first.token))
    assert (other.run, other.attempt) == (first.run, first.attempt)
    with pytest.raises(LedgerError, match=r"attempt 0 of run \w+ in .*here is not the one that saved the checkpoint"):
        begin(here, 6, first.run, checkpoint=Checkpoint(0, (0, 5, 5), token=other.token))
    write(there, range(6, 8), 6, first.run, checkpoint=Checkpoint(0, (0, 5, 5), token=other.token))
    write(here, range(6, 8), 6, first.run, checkpoint=Checkpoint(0, (0, 5, 5), token=first.token))
    assert Ledger(here).meta["attempts"][1]["continues"] == 0
    begin(here, 6, first.run, checkpoint=Checkpoint(0, (0, 5, 5)))  # an earlier release saved it


def test_other_data_on_resume_is_warned_of(tmp_path):
    run = write(tmp_path, [0]).run
    other = NOTES | {"data": {"dataset": "own.Set", "samples": 64}}
    with pytest.warns(UserWarning, match=r"goes on with other data \(samples: 4, 64\); samples of one id"):
        begin(tmp_path, 1, run, notes=other, checkpoint=Checkpoint(0, (0, 0, 0)))
    begin(tmp_path, 1, run, notes=other, checkpoint=Checkpoint(1))


def test_a_run_that_goes_on_in_a_new_directory_says_where_its_first_rows_are_not(tmp_path):
    with pytest.warns(
        UserWarning, match=re.escape(f"{tmp_path} is new, and this is run abc, resumed at step 3: the rows")
    ):
        write(tmp_path, [3, 4], 3, "abc", checkpoint=Checkpoint(2, (0, 2, 2)))
    note(tmp_path, 0, {"rows": [4]})
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path}: the rows before step 3 are in another directory.")):
        assert steps_of(tmp_path) == {0: [3, 4]}
    with pytest.warns(UserWarning, match="in another directory"):
        assert list(curate(tmp_path, Sign()).lost) == ["the rows before step 3 are in another directory"]


# Settings


@for_each("name", ["batch_size", "ranks"])
def test_batches_of_another_size_are_warned_of_and_read_with_a_warning(name, tmp_path):
    known = {"ranks": 1, "batch_size": 8}
    run = write(tmp_path / name, [0], notes=known).run
    changed = f"{name}: {known[name]}, 2"
    with pytest.warns(UserWarning, match=rf"goes on with other settings \({changed}\): scores mean the same"):
        write(
            tmp_path / name,
            [1],
            1,
            run,
            notes=known | {name: 2},
            checkpoint=Checkpoint(0),
            ranks=range(1 + (name == "ranks")),
        )
    with pytest.warns(UserWarning, match=f"its attempts differ in {changed}. Their scores are comparable"):
        steps_of(tmp_path / name, allow_partial=True)


def test_the_size_of_batches_that_is_known_only_later_is_warned_of_then(tmp_path):
    run = write(tmp_path, [0], notes={"ranks": 1, "batch_size": 8}).run
    with closing(open_run(tmp_path, CONFIG, 1, run, {"ranks": 1}, checkpoint=Checkpoint(0))) as opened:
        opened.note({"score_kind": "own"})
        with pytest.warns(UserWarning, match=r"goes on with other settings \(batch_size: 8, 2\)"):
            opened.note({"batch_size": 2})


def test_ranks_of_an_earlier_release_are_no_other_meaning(tmp_path):
    earlier = {"config": CONFIG | {"world_size": 1}}
    run = write(tmp_path, [0], config=earlier["config"], notes={}).run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, [1], 1, run)
        assert steps_of(tmp_path, allow_partial=True) == {0: [0], 1: [1]}
    with pytest.warns(UserWarning, match=r"other settings \(ranks: 1, 2\)"):
        write(tmp_path, [2], 2, run, notes={"ranks": 2}, checkpoint=Checkpoint(0), ranks=(0, 1))


# The description


def test_what_is_noted_can_be_read_back_or_is_refused(tmp_path):
    opened = open_run(tmp_path, CONFIG, 0, None, NOTES)
    before = (tmp_path / "_meta.json").read_bytes()
    for notes, problem in (
        ({"own": object()}, "not JSON serializable"),
        ({"rows": [1, 2]}, "attempt 0 has rows of 2 ranks, and 1 wrote it"),
        ({"class_names": ["caf\udce9"]}, "expected a list of str"),
        ({"batch_size": 0}, "`batch_size` of attempt 0 is 0; expected an int from 1"),
    ):
        with pytest.raises(LedgerError, match=re.escape(problem)):
            opened.note(notes)
    assert (tmp_path / "_meta.json").read_bytes() == before
    with pytest.raises(LedgerError, match="cannot write to"):
        open_run(tmp_path / "other", {"own": object()}, 0, None, {})


def test_a_description_that_is_replaced_while_the_run_writes_is_named(tmp_path):
    opened = open_run(tmp_path / "s", CONFIG, 0, None, NOTES)
    other = write(tmp_path / "other", [0])
    os.replace(tmp_path / "other" / "_meta.json", tmp_path / "s" / "_meta.json")
    message = f"was replaced while the run was writing: it describes 1 attempts of run {other.run}, and this is attempt"
    with pytest.raises(LedgerError, match=re.escape(message)):
        opened.note({"rows": [1]})


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_wherever_the_description_is_written(tmp_path, monkeypatch):
    opened = open_run(tmp_path / "s", CONFIG, 0, None, NOTES)
    monkeypatch.setattr(os, "fsync", full)
    for act in (lambda: opened.note({}), lambda: begin(tmp_path / "new")):
        with pytest.raises(LedgerError, match=r"cannot write to .*No space left on device"):
            act()
    monkeypatch.undo()
    begin(tmp_path / "new")  # nothing is left that would be in its way


def test_a_ledger_of_an_earlier_release_goes_on_under_its_own_name(tmp_path):
    run = write(tmp_path, [0]).run
    meta = json.loads((tmp_path / "_meta.json").read_text())
    del meta["sha256"]
    (tmp_path / "_meta.json").unlink()
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert steps_of(tmp_path, allow_partial=True) == {0: [0]}
    write(tmp_path, [1], 1, run)
    assert steps_of(tmp_path, allow_partial=True) == {0: [0], 1: [1]}
    assert not (tmp_path / "_meta.json").exists()


def test_other_engines_read_the_folder_of_a_ledger(tmp_path):
    write(tmp_path, [0, 1])
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".parquet"} == {"_lock", "_meta.json"}
    assert pyarrow.dataset.dataset(tmp_path, format="parquet").count_rows() == 4
    assert duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/*.parquet'").fetchall() == [(4,)]


def test_a_symbolic_link_to_the_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    first = open_run(tmp_path / "link", CONFIG, 0, None, NOTES)
    with pytest.raises(LedgerError, match="is being written"):
        begin(tmp_path / "real", 1, first.run)


# Damage

DAMAGE = [
    ('"start_step": 5', '"start_step": 4'),
    ('"config_hash"', '"config_hasi"'),
    ('"sha256"', '"sha255"'),
    ('"rows": [', '"rowz": ['),
    ('"temperature": 0.5', '"temperature": 0.25'),
]


@for_each("change", DAMAGE)
def test_a_description_that_was_changed_is_not_believed(change, tmp_path):
    write_ledger(tmp_path, [{"id": i, "step": i, "attempt": i // 5} for i in range(10)], starts=(0, 5))
    note(tmp_path, 1, {"rows": [5]})
    path = tmp_path / "_meta.json"
    whole = path.read_text()
    assert whole.count(change[0]) >= 1
    path.write_text(whole.replace(*change))
    with pytest.raises(LedgerError, match=re.escape(f"{path} was damaged or changed: it")):
        Ledger(tmp_path)
    path.write_text(whole.replace("\n", "\r\n"))  # other white space is no other content
    assert Ledger(tmp_path).table().num_rows == 10


#: Values in the place of any other.
NUMBERS = [True, -1, 0, 7, 2**63, 2**70, 1.5, float("nan")]
VALUES = [None, *NUMBERS, "", "5", "\udce9", "a/b", [], [[]], {}, {"a": []}, [None], [-1]]


def changed(value, draw):
    """A copy of a JSON value with one change somewhere."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        how = draw.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return {(f"{k}x" if k == key else k): v for k, v in value.items()}
        return value | {key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [*value[:place], changed(value[place], draw), *value[place + 1 :]]
    return draw.choice(VALUES)


@for_each("checksum", ["right", "none"])
def test_a_description_of_any_other_structure_ends_in_an_error_of_ours(checksum, run_seed, tmp_path):
    write_ledger(tmp_path, [{"id": i, "step": i, "attempt": i // 5} for i in range(10)], starts=(0, 5), notes=NOTES)
    note(tmp_path, 1, {"rows": [5], "class_names": ["a"], "continues": 0, "scored": [0, 4, 4], "batch_size": 2})
    meta, draw, read = Ledger(tmp_path).meta, random.Random(run_seed), 0
    name = "_meta.json" if checksum == "right" else "meta.json"
    (tmp_path / "_meta.json").unlink()
    for _ in range(400):
        other = changed(meta, draw)
        if checksum == "right" and isinstance(other, dict):
            other = other | {"sha256": description._checksum(other)}
        (tmp_path / name).write_text(json.dumps(other))
        with suppress(LedgerError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read += Ledger(tmp_path).table().num_rows >= 0
            Ledger(tmp_path).class_names  # noqa: B018
            begin(tmp_path, 10, meta["run"], checkpoint=Checkpoint(1, (0, 9, 9)))
    assert read > 10
    (tmp_path / name).unlink()


def test_flipped_bytes_of_a_description_never_give_other_rows(run_seed, tmp_path):
    write_ledger(tmp_path, [{"id": i, "step": i, "attempt": i // 5} for i in range(10)], starts=(0, 5), notes=NOTES)
    note(tmp_path, 1, {"rows": [5]})
    path, draw, good = tmp_path / "_meta.json", random.Random(run_seed), Ledger(tmp_path).table()
    whole = path.read_bytes()
    for _ in range(1000):
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        with suppress(LedgerError):
            assert Ledger(tmp_path).table().equals(good)
