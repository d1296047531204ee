"""Whether a ledger has the rows of all ranks: refused, doubted or read, by what its description knows of them."""

import json
import re

import pytest

from lightning_mimic.curation import Sign, curate
from lightning_mimic.ledger import Ledger, LedgerError
from support.cases import for_each
from support.ledgers import note, write_ledger

TWO = {"ranks": 2}
#: Two ranks, two parts of two rows each, steps 0 and 1.
ROWS = [
    {"id": 10 * rank + 2 * part + k, "rank": rank, "part": part, "step": part, "score": 1.0}
    for rank in (0, 1)
    for part in (0, 1)
    for k in (0, 1)
]


def ended(folder, rows=ROWS, by_rank=(4, 4), **how):
    run = write_ledger(folder, rows, notes=TWO, **how)
    note(folder, 0, {"rows": list(by_rank)})
    return run


def remove(folder, pattern):
    (part,) = folder.glob(pattern)
    part.unlink()


def ids_of(folder, **how):
    return sorted(Ledger(folder).table(**how)["id"].to_pylist())


REMOVED = [
    (["a0-r1-000001"], "attempt 0, rank 1, 2 of 4 rows (missing)", [0, 1, 2, 3, 10, 11]),
    (["a0-r0-000001"], "attempt 0, rank 0, 2 of 4 rows (missing)", [0, 1, 10, 11, 12, 13]),
    (["a0-r1-000000"], "attempt 0, rank 1, 2 of 4 rows (missing)", [0, 1, 2, 3, 12, 13]),
    (["a0-r1-000000", "a0-r1-000001"], "attempt 0, rank 1, 4 of 4 rows (missing)", [0, 1, 2, 3]),
]


@for_each(("parts", "missing", "rest"), REMOVED)
def test_rows_that_a_rank_has_written_are_missed(parts, missing, rest, tmp_path):
    ended(tmp_path / "s")
    assert len(ids_of(tmp_path / "s")) == 8
    for part in parts:
        remove(tmp_path / "s", f"*-{part}-*")
    message = f"{tmp_path / 's'}: rows are missing: {missing}. `allow_partial=True` reads the rest."
    for read in (lambda: Ledger(tmp_path / "s").table(), lambda: curate(tmp_path / "s", Sign())):
        with pytest.raises(LedgerError, match=re.escape(message)):
            read()
    assert ids_of(tmp_path / "s", allow_partial=True) == rest
    done = curate(tmp_path / "s", Sign(), allow_partial=True)
    assert sorted(done.manifest.table()["id"].to_pylist()) == rest
    assert done.manifest.provenance["lost"] == [missing]


def test_all_ranks_that_lack_rows_are_named_and_damaged_parts_beside_them(tmp_path):
    ended(tmp_path)
    for part in ("r0-000001", "r1-000000"):
        remove(tmp_path, f"*-{part}-*")
    (damaged,) = tmp_path.glob("*-r1-000001-*")
    damaged.write_bytes(b"PAR1")
    both = "attempt 0, rank 0, 2 of 4 rows (missing); attempt 0, rank 1, 2 of 4 rows (missing)"
    with pytest.raises(LedgerError, match=re.escape(f"1 of 2 parts are damaged: {damaged.name}")) as raised:
        Ledger(tmp_path).table()
    assert f"; and rows are missing: {both}. " in str(raised.value)


def test_nothing_left_of_what_was_written_is_not_an_empty_ledger(tmp_path):
    ended(tmp_path)
    for part in tmp_path.glob("*.parquet"):
        part.unlink()
    with pytest.raises(LedgerError, match=re.escape("rank 0, 4 of 4 rows (missing); attempt 0, rank 1, 4 of 4")):
        Ledger(tmp_path).table()


def test_a_rank_that_scored_nothing_is_not_missed(tmp_path):
    ended(tmp_path, [row for row in ROWS if row["rank"] == 0], by_rank=(4, 0))
    assert ids_of(tmp_path) == [0, 1, 2, 3]
    assert Ledger(tmp_path).parts().lost == ()


def test_rows_after_the_noted_end_are_read(tmp_path):
    ended(tmp_path, by_rank=(4, 3))
    assert len(ids_of(tmp_path)) == 8


OPEN = (
    "attempt 0 has not ended: it still runs, or was stopped or killed, so that its last rows may be missing",
    {
        "all at one step": ([], ""),
        "one rank behind": (["a0-r1-000001"], " (rank 1 stops at step 0, before others)"),
    },
)


@for_each("case", OPEN[1])
def test_of_a_run_that_has_not_ended_the_end_is_in_doubt(case, tmp_path):
    parts, ends = OPEN[1][case]
    write_ledger(tmp_path / "s", ROWS, notes=TWO)
    for part in parts:
        remove(tmp_path / "s", f"*-{part}-*")
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path / 's'}: {OPEN[0]}{ends}.")):
        assert len(ids_of(tmp_path / "s")) == 8 - 2 * len(parts)
    assert len(ids_of(tmp_path / "s", allow_partial=True)) == 8 - 2 * len(parts)  # no warning: it was asked for
    with pytest.warns(UserWarning, match="has not ended"):
        done = curate(tmp_path / "s", Sign())
    assert done.manifest.provenance["lost"] == [OPEN[0] + ends]


def test_a_rank_without_any_rows_is_missed_although_the_run_has_not_ended(tmp_path):
    write_ledger(tmp_path, [row for row in ROWS if row["rank"] == 0], notes=TWO)
    with pytest.raises(LedgerError, match=re.escape("rows are missing: attempt 0, rank 1, all rows (missing). ")):
        Ledger(tmp_path).table()
    with pytest.raises(LedgerError, match="rank 1, all rows"):
        curate(tmp_path, Sign())
    assert ids_of(tmp_path, allow_partial=True) == [0, 1, 2, 3]


def test_a_run_that_has_begun_and_written_nothing_is_an_empty_ledger(tmp_path):
    write_ledger(tmp_path, [], notes=TWO)
    with pytest.raises(LedgerError, match="holds no rows"):
        Ledger(tmp_path).table()


#: Of the first attempt, which ended in a crash, by where the second goes on.
RESUMED = {
    "all wrote up to there": (1, ["a0-r1-000001"], None),
    "at once again from the first step, which only one rank had written": (0, ["a0-r1-000000", "a0-r1-000001"], None),
    "one rank did not write up to there": (2, ["a0-r1-000001"], "attempt 0, rank 1, rows after step 0 (missing)"),
    "one rank wrote nothing": (1, ["a0-r1-000000", "a0-r1-000001"], "attempt 0, rank 1, all rows (missing)"),
}


@for_each("case", RESUMED)
def test_what_a_resumed_run_continues_was_written_by_all_ranks(case, tmp_path):
    start, parts, missing = RESUMED[case]
    again = [{"id": 20 + rank, "rank": rank, "attempt": 1, "step": start, "score": 1.0} for rank in (0, 1)]
    rows = [row | {"part": row["part"] * row["rank"]} for row in ROWS]  # the first rank has a part that spans the steps
    write_ledger(tmp_path / "s", [*rows, *again], notes=TWO, starts=(0, start))
    note(tmp_path / "s", 1, {"rows": [1, 1]})
    for part in parts:
        remove(tmp_path / "s", f"*-{part}-*")
    if missing is None:
        assert ids_of(tmp_path / "s") == [0, 1, 10, 11, 20, 21][4 * (start == 0) :]
    else:
        with pytest.raises(LedgerError, match=re.escape(f"rows are missing: {missing}. ")):
            Ledger(tmp_path / "s").table()


def test_rows_that_a_later_attempt_went_over_again_may_be_missing(tmp_path):
    crashed = [{"id": 20, "attempt": 1, "step": 2}]  # on the first rank only
    again = [{"id": 20 + rank, "rank": rank, "attempt": 2, "step": 2} for rank in (0, 1)]
    write_ledger(tmp_path, [*ROWS, *crashed, *again], notes=TWO, starts=(0, 2, 2))
    note(tmp_path, 2, {"rows": [1, 1]})
    assert ids_of(tmp_path) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21]


def test_a_fit_that_has_just_begun_after_another_one_puts_the_end_in_doubt(tmp_path):
    run = ended(tmp_path)
    write_ledger(tmp_path, [], notes=TWO, run=run, starts=(2,))
    with pytest.warns(UserWarning, match="attempt 1 has not ended"):
        assert len(ids_of(tmp_path)) == 8


def test_an_older_ledger_knows_nothing_of_its_ranks_and_is_read_as_before(tmp_path):
    write_ledger(tmp_path, [row for row in ROWS if row["rank"] == 0 or row["part"] == 0])
    assert "ranks" not in json.loads((tmp_path / "_meta.json").read_text())["attempts"][0]
    remove(tmp_path, "*-r1-000000-*")
    assert ids_of(tmp_path) == [0, 1, 2, 3]
    assert Ledger(tmp_path).parts().lost == ()
