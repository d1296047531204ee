"""The ledger of several ranks is complete when a run returns, and where it is not, its reader says so."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_mimic import GradMimic, Ledger, Reweighter, WithIds, collate_with_ids
from lightning_mimic.curation import curate
from lightning_mimic.ledger import OpenRun
from support.ranks import WORLD, on_two_ranks, strategy, two
from support.toys import losses_of, parameters_of, toy, toy_data, trainer

pytestmark = pytest.mark.slow  # fits and processes

SAMPLES = 12
#: A rank writes its rows so many seconds later than the other.
DELAY = 0.5


class Fails(pl.Callback):
    """Raises on some ranks after the last step of all."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = ranks

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_last_batch and trainer.global_rank in self.ranks:
            time.sleep(DELAY)  # the other has written by now
            raise RuntimeError("on purpose")


def data_of_rank(rank: int, rows: tuple[int, int] = (2, 2)) -> DataLoader[Any]:
    step = sum(rows)
    starts = range(sum(rows[:rank]), SAMPLES, step)
    batches = [list(range(start, start + rows[rank])) for start in starts]
    return DataLoader(WithIds(toy_data(SAMPLES)), batch_sampler=batches, collate_fn=collate_with_ids)


def mimic(ledger: Path) -> GradMimic:
    return GradMimic(parameters_of(toy(seed=1)), "head", ledger=ledger, diagnose_reference=False)


def fit(rank: int, callback: GradMimic, *more: pl.Callback, rows: tuple[int, int] = (2, 2), **options: Any) -> None:
    trainer(callback, *more, strategy=strategy(), **two(), **options).fit(toy(), data_of_rank(rank, rows))


def loop(rank: int, ledger: Path) -> Reweighter:
    """Trains by hand up to the end of the last step."""
    net = toy()
    model = DistributedDataParallel(net)
    reweighter = Reweighter(model, parameters_of(toy(seed=1)), "head", ledger=ledger, diagnose_reference=False)
    for batch in data_of_rank(rank):
        with reweighter.step(batch) as step:
            step.backward(losses_of(model, step.batch).mean())
    return reweighter


@contextlib.contextmanager
def writing(how: Any) -> Any:
    """Replaces the function that writes a part."""
    patch = pytest.MonkeyPatch()
    patch.setattr(pq, "write_table", how)
    yield
    patch.undo()


def late(*args: Any, **kwargs: Any) -> None:
    time.sleep(DELAY)
    WRITE(*args, **kwargs)


WRITE = pq.write_table


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def collective(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a state is saved without waiting for others")


def error_of(act: Any) -> str | None:
    try:
        act()
    except Exception as error:  # whatever it is, the next case comes
        return f"{type(error).__name__}: {error}"
    return None


def found(ledger: Path) -> dict[str, Any]:
    """What a user sees who reads at once."""
    done = curate(ledger, unscored="keep")
    return {"rows": Ledger(ledger).table().num_rows, "samples": done.samples, "lost": list(done.lost)}


def saved_alone(rank: int, ledger: Path) -> dict[str, Any]:
    """The first rank saves its state while the other one's disk is full; then the run is resumed."""
    reweighter, state = loop(rank, ledger), dict[str, Any]()
    with pytest.MonkeyPatch.context() as patch, writing(full) if rank == 1 else contextlib.nullcontext():
        for name in ("all_gather_object", "all_reduce", "broadcast_object_list"):
            patch.setattr(torch.distributed, name, collective)
        behind = error_of(lambda: state.update(reweighter.state_dict()))
        error_of(reweighter.close)
    states: list[Any] = [None] * WORLD
    torch.distributed.all_gather_object(states, state)
    again = Reweighter(toy(), parameters_of(toy(seed=1)), "head", ledger=ledger, diagnose_reference=False)
    again.load_state_dict(states[0])
    resumed = error_of(again.start)
    again.close()
    return {"behind": behind, "resumed": resumed}


def cases(rank: int, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for slow in (0, 1):
        for time_ in range(2):
            with writing(late) if rank == slow else contextlib.nullcontext():
                fit(rank, mimic(folder / f"late {slow}{time_}"))
            seen[f"late {slow}{time_}"] = found(folder / f"late {slow}{time_}")
    with writing(late) if rank == 1 else contextlib.nullcontext(), loop(rank, folder / "loop"):
        pass
    seen["loop"] = found(folder / "loop")
    fit(rank, mimic(folder / "uneven"), rows=(3, 1))
    seen["uneven"] = found(folder / "uneven")
    twice = mimic(folder / "twice")
    fit(rank, twice)
    fit(rank, twice)
    seen["twice"] = found(folder / "twice")
    fit(rank, mimic(folder / "development"), fast_dev_run=True)
    seen["development"] = (folder / "development").exists()
    with writing(full) if rank == 1 else contextlib.nullcontext():
        seen["full"] = error_of(lambda: fit(rank, mimic(folder / "full")))
    seen |= saved_alone(rank, folder / "behind")
    patch = pytest.MonkeyPatch()
    noted = OpenRun.note

    def fails_at_the_end(self: OpenRun, notes: dict[str, Any]) -> None:
        if "rows" in notes:
            raise OSError("no description")
        noted(self, notes)

    patch.setattr(OpenRun, "note", fails_at_the_end)
    seen["not noted"] = error_of(lambda: fit(rank, mimic(folder / "not noted")))
    patch.undo()
    seen["both fail"] = error_of(lambda: fit(rank, mimic(folder / "both fail"), Fails(0, 1)))
    # Without `with` and without `finish`, no rank waits for another.
    if rank == 1:
        time.sleep(DELAY)
    loop(rank, folder / "closed").close()
    torch.distributed.barrier()
    unfinished = loop(rank, folder / "no group")
    torch.distributed.destroy_process_group()
    with pytest.warns(UserWarning, match="began on 2 ranks and ends with a process group of 1"), unfinished:
        pass
    assert unfinished._closed
    again = f"file://{folder / 'again'}"
    torch.distributed.init_process_group("gloo", init_method=again, rank=rank, world_size=WORLD)
    return seen


def on_rank(rank: int, folder: Path) -> None:
    (folder / f"{rank}.json").write_text(json.dumps(cases(rank, folder)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_two_ranks(on_rank, tmp_path_factory.mktemp("ledgers"))


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def noted_rows(ledger: Path) -> list[list[int] | None]:
    return [attempt.get("rows") for attempt in Ledger(ledger).meta["attempts"]]


ALL = {"rows": SAMPLES, "samples": SAMPLES, "lost": []}
HALF = [SAMPLES // 2] * 2


@pytest.mark.parametrize("case", ["late 00", "late 01", "late 10", "late 11", "loop"])
def test_whoever_reads_after_the_run_sees_the_rows_of_all_ranks(case, seen, folder):
    assert [report[case] for report in seen] == [ALL] * WORLD
    assert noted_rows(folder / case) == [HALF]


def test_ranks_of_uneven_batches_have_rows_of_their_own_number(seen, folder):
    assert [report["uneven"] for report in seen] == [ALL] * WORLD
    assert noted_rows(folder / "uneven") == [[9, 3]]


def test_a_second_fit_of_the_same_callback_counts_its_own_rows(seen, folder):
    assert [report["twice"] for report in seen] == [ALL] * WORLD
    assert noted_rows(folder / "twice") == [HALF, HALF]


def test_a_development_run_writes_nothing(seen):
    assert [report["development"] for report in seen] == [False] * WORLD


def test_a_rank_that_cannot_write_stops_all_of_them(seen, folder):
    other, own = (report["full"] for report in seen)
    assert re.match(r"LedgerError: `ledger`: 6 rows could not be written to .*full, twice in a row", own)
    assert other.startswith("MimicError: another rank could not write its last scores: rank 1: `ledger`: 6 rows")
    assert noted_rows(folder / "full") == [None]
    with pytest.raises(ValueError, match=r"attempt 0, rank 1, all rows \(missing\)"):
        Ledger(folder / "full").table()


def test_a_state_is_not_resumed_where_another_rank_could_not_write_its_rows(seen, folder):
    own, other = (report["behind"] for report in seen)
    assert own is None
    assert re.match(r"LedgerError: `ledger`: 6 rows could not be written to .*behind, twice in a row", other)
    message = "LedgerError: `ledger`: the checkpoint has trained on what attempt 0 scored up to step 2"
    for report in seen:
        assert report["resumed"].startswith(message)
        assert "lacks some of these rows: rank 1 has none. Resume from an earlier checkpoint" in report["resumed"]


def test_a_description_that_cannot_be_written_stops_all_ranks(seen, folder):
    own, other = (report["not noted"] for report in seen)
    assert own == "OSError: no description"
    assert other == "MimicError: another rank could not complete the ledger's description: rank 0: no description"
    with pytest.warns(UserWarning, match="attempt 0 has not ended"):
        assert Ledger(folder / "not noted").table().num_rows == SAMPLES


@pytest.mark.parametrize("case", ["both fail", "closed", "no group"])
def test_a_run_without_an_end_is_read_with_a_warning(case, seen, folder):
    expected = "RuntimeError: on purpose" if case == "both fail" else None
    assert [report.get(case) for report in seen] == [expected] * WORLD
    with pytest.warns(UserWarning, match="attempt 0 has not ended"):
        assert Ledger(folder / case).table().num_rows == SAMPLES


def fails_alone(rank: int, folder: Path) -> None:
    fit(rank, mimic(folder / "s"), Fails(1))


def test_an_error_on_one_rank_ends_the_run_and_leaves_what_was_scored(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="on purpose"):
        on_two_ranks(fails_alone, tmp_path)
    with pytest.warns(UserWarning, match="attempt 0 has not ended"):
        assert Ledger(tmp_path / "s").table().num_rows == SAMPLES


#: The first part of the README under the launcher that starts the script again for the second rank, which is late.
SCRIPT = """
import os, sys
import test_ledger_ddp as here

folder = here.Path(sys.argv[1])
if os.environ.get("LOCAL_RANK") == "1":
    here.pq.write_table = here.late
callback = here.mimic(folder / "s")
data = here.DataLoader(here.WithIds(here.toy_data(12)), 2, collate_fn=here.collate_with_ids)
here.trainer(callback, devices=2, strategy=here.strategy()).fit(here.toy(), data)
print(here.json.dumps(here.found(folder / "s")))
"""


def test_a_script_reads_its_ledger_after_the_fit_that_it_has_launched(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] == [ALL] * WORLD
