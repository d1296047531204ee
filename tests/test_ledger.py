"""The ledger: what is written is read back, once, whole, and from one run; what is damaged is never read as numbers."""

import os
import re
import shutil
from contextlib import closing, suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_mimic.ledger import NO_CLASS, Ledger, LedgerError, LedgerWriter, open_run
from lightning_mimic.ledger.columns import schema
from support.cases import for_each

CONFIG = {"reweight": "all", "temperature": 0.5}


def rows(ids, **columns):
    n = len(ids)
    plain = {"id": ids, "epoch": [0] * n, "step": [0] * n, "batch": [0] * n, "position": range(n), "flag": ["ok"] * n}
    return plain | dict.fromkeys(["score", "weight", "loss", "batch_size", "label", "predicted"]) | columns


def started(directory, start_step=0, run=None, config=CONFIG):
    with closing(open_run(directory, config, start_step, run, {})) as opened:
        return opened.run, LedgerWriter(directory, opened.run, opened.attempt, rank=0)


def write(directory, *parts, **how):
    run, writer = started(directory, **how)
    for part in parts:
        writer.append(part)
        writer.flush()
    return run


def parts_in(directory):
    """Their names without the run's id."""
    return sorted(re.sub(r"^part-[0-9a-z]+-a", "part-a", p.name) for p in directory.glob("*.parquet"))


def ids_of(directory, **how):
    return Ledger(directory).table(**how)["id"].to_pylist()


@pytest.mark.parametrize(
    ("ids", "kind"),
    [([7, -(2**63), 2**63 - 1], "int64"), ([2**64 - 1, 0, 2**63], "uint64"), (["b", " ", "ä/1"], "string")],
)
def test_every_column_comes_back_with_its_type_and_nulls(ids, kind, tmp_path):
    floats = np.array([0.5, np.nan, -2.0], np.float32)
    columns = {"epoch": [3] * 3, "step": [2**40] * 3, "batch": [9] * 3, "batch_size": np.array([6] * 3)}
    columns |= {"score": floats, "weight": np.array([0.25, 0, 0.75], np.float32), "loss": floats + 1}
    columns |= {"flag": ["ok", "nonfinite_loss", "alone"], "label": np.array([4, 5, 6]), "predicted": None}
    columns |= {"posterior": floats, "reference_predicted": np.array([1, NO_CLASS, 2])}
    columns |= {"reference_confidence": floats + 1, "reference_loss": None}
    write(tmp_path, rows(ids, **columns))
    table = Ledger(tmp_path).table()
    assert table.schema == schema(pa.type_for_alias(kind))
    assert table.to_pydict() == {
        "id": ids, "epoch": [3] * 3, "step": [2**40] * 3, "batch": [9] * 3, "rank": [0] * 3, "position": [0, 1, 2],
        "attempt": [0] * 3, "score": [0.5, None, -2.0], "weight": [0.25, 0.0, 0.75], "loss": [1.5, None, -1.0],
        "batch_size": [6] * 3, "flag": ["ok", "nonfinite_loss", "alone"], "label": [4, 5, 6], "predicted": [None] * 3,
        "posterior": [0.5, None, -2.0], "reference_predicted": [1, None, 2],
        "reference_confidence": [1.5, None, -1.0], "reference_loss": [None] * 3,
    }  # fmt: skip


def test_ranks_are_read_together_in_order_of_epoch_step_batch_rank_position(tmp_path):
    run = write(tmp_path, rows(["e"], epoch=[1]), rows(["d"], step=[1], batch=[2]), rows(["a", "b"]))
    other = LedgerWriter(tmp_path, run, attempt=0, rank=1)
    other.append(rows(["c", "f", "g"], epoch=[0, 1, 1], batch=[0, 0, 1]))
    other.commit()
    assert ids_of(tmp_path) == ["a", "b", "c", "d", "e", "f", "g"]
    assert Ledger(tmp_path).table()["rank"].to_pylist() == [0, 0, 1, 0, 0, 1, 1]


def test_a_repeated_sample_counts_once_per_epoch_the_first_time(tmp_path):
    again = rows([2, 3, 1], epoch=[0, 0, 1], batch=[4] * 3, score=[9, 2.5, 3.5])
    run = write(tmp_path, rows([1, 2], score=[0.5, 1.5]), again)
    other = LedgerWriter(tmp_path, run, 0, rank=1)  # a distributed sampler gives one sample to two ranks
    other.append(rows([3], batch=[4], score=[8]))
    other.commit()
    kept = Ledger(tmp_path).table().select(["id", "epoch", "score"]).to_pydict()
    assert kept == {"id": [1, 2, 3, 1], "epoch": [0, 0, 0, 1], "score": [0.5, 1.5, 2.5, 3.5]}
    assert ids_of(tmp_path, deduplicate=False) == [1, 2, 2, 3, 3, 1]


def test_a_later_attempt_supersedes_what_it_went_over_again_and_deletes_nothing(tmp_path):
    run = write(tmp_path, rows([0, 1, 2, 3], step=[0, 1, 2, 3]))
    write(tmp_path, start_step=1, run=run)  # died before its first part: supersedes nothing
    assert ids_of(tmp_path) == [0, 1, 2, 3]
    write(tmp_path, rows([12, 13, 14], step=[2, 3, 4]), start_step=2, run=run)
    assert ids_of(tmp_path) == [0, 1, 12, 13, 14]
    write(tmp_path, rows([23], step=[3]), start_step=3, run=run)
    assert ids_of(tmp_path, deduplicate=False) == [0, 1, 12, 23]
    assert Ledger(tmp_path).table()["attempt"].to_pylist() == [0, 0, 2, 3]
    write(tmp_path, rows([31], step=[1]), start_step=1, run=run)  # before all of them
    assert ids_of(tmp_path, deduplicate=False) == [0, 31]
    assert sum(pq.read_metadata(part).num_rows for part in tmp_path.glob("*.parquet")) == 9


def test_attempts_with_other_settings_are_warned_about_and_not_mixed(tmp_path):
    run = write(tmp_path, rows([1]))
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path} goes on with other settings (temperature: 0.5, 0.1)")):
        _, writer = started(tmp_path, start_step=1, run=run, config=CONFIG | {"temperature": 0.1})
    assert ids_of(tmp_path) == [1]
    writer.append(rows([2], step=[1]))
    writer.commit()
    with pytest.raises(LedgerError, match=re.escape("its attempts differ in temperature: 0.5, 0.1, so their")):
        Ledger(tmp_path).table()


@pytest.mark.parametrize(("run", "name"), [(None, "a new run"), ("feedbeef", "run feedbeef")])
def test_two_runs_in_one_directory_are_refused_naming_both(run, name, tmp_path):
    first = write(tmp_path, rows([1]), rows([2]), config=CONFIG | {"temperature": 2.0})
    before = Ledger(tmp_path).meta
    holder = f"{tmp_path} already holds 2 parts of run {first} (started {before['attempts'][0]['started']})"
    with pytest.raises(LedgerError, match=re.escape(f"{holder}, and this is {name}.")):
        open_run(tmp_path, CONFIG, 0, run, {})
    assert Ledger(tmp_path).meta == before


def test_a_run_that_has_written_nothing_yet_keeps_its_directory(tmp_path):
    first, _ = started(tmp_path)
    with pytest.raises(LedgerError, match=f"already holds 0 parts of run {first} .* delete the directory"):
        started(tmp_path, config=CONFIG | {"temperature": 2.0})
    assert Ledger(tmp_path).meta["run"] == first


def test_of_two_runs_that_start_at_once_one_is_refused(tmp_path, monkeypatch):
    started(tmp_path)
    monkeypatch.setattr("lightning_mimic.ledger.run.read_meta", lambda directory: None)  # it looked too early
    with pytest.raises(LedgerError, match=r"another run started in .* just now"):
        started(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"_lock", "_meta.json"}  # nothing is left lying about


def test_notes_are_added_to_their_attempt(tmp_path):
    run, _ = started(tmp_path)
    opened = open_run(tmp_path, CONFIG, 0, run, {})
    opened.note({"score_kind": "own"})
    assert [a.get("score_kind") for a in Ledger(tmp_path).meta["attempts"]] == [None, "own"]
    (tmp_path / "_meta.json").unlink()
    with pytest.raises(
        LedgerError, match=re.escape(f"{tmp_path / '_meta.json'} was removed while the run was writing")
    ):
        opened.note({})


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_part_is_named_and_refused_and_the_rest_can_be_read(share, tmp_path):
    write(tmp_path, rows([1, 2, 3]), rows([4, 5]))
    assert parts_in(tmp_path) == ["part-a0-r0-000000-n3.parquet", "part-a0-r0-000001-n2.parquet"]
    (part,) = tmp_path.glob("part-*-a0-r0-000000-n3.parquet")
    part.write_bytes(part.read_bytes()[: int(share * part.stat().st_size)])
    with pytest.raises(LedgerError, match=re.escape(f"1 of 2 parts are damaged: {part.name} (3 rows: ")):
        Ledger(tmp_path).table()
    assert ids_of(tmp_path, allow_partial=True) == [4, 5]


def test_one_flipped_bit_in_the_data_is_never_read_as_a_number(run_seed, tmp_path):
    values = np.arange(400, dtype=np.float32) / 7
    write(tmp_path, rows(list(range(400)), score=values, weight=values, loss=values))
    (part,) = tmp_path.glob("*.parquet")
    content, good, group = part.read_bytes(), Ledger(tmp_path).table(), pq.read_metadata(part).row_group(0)
    ends = [c["dictionary_page_offset"] + c["total_compressed_size"] for c in group.to_dict()["columns"]]
    bodies = [end - back for end in ends for back in (1, 5)]  # of the last page of each column
    draw = np.random.default_rng(run_seed)
    for position in [*bodies, *draw.integers(4, max(ends), size=max(ends) // 11).tolist()]:
        flipped = content[position] ^ 1 << int(draw.integers(8))
        part.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        with suppress(LedgerError):  # a page's header has no checksum; its statistics may change and harm nothing
            assert Ledger(tmp_path).table().equals(good), f"byte {position} of {len(content)}: other numbers"
            assert position not in bodies, f"byte {position} of {len(content)}: no error"


@pytest.mark.parametrize("torn", ["write_table", "replace"])
def test_a_crash_while_writing_leaves_no_file_under_the_final_name(torn, tmp_path, monkeypatch):
    _, writer = started(tmp_path)
    writer.append(rows([1]))
    writer.flush()
    writer.append(rows([2, 3]))

    def crash(*args, **kwargs):
        if torn == "write_table":
            args[1].write(b"PAR1 half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq if torn == "write_table" else os, torn, crash)
    with pytest.raises(KeyboardInterrupt):
        writer.flush()
    assert parts_in(tmp_path) == ["part-a0-r0-000000-n1.parquet"]
    assert not list(tmp_path.glob(".*")), "an interruption cleans up"
    (part,) = tmp_path.glob("part-*.parquet")  # what a killed process leaves
    shutil.copy(part, tmp_path / f".{part.name.replace('000000', '000001')}.0123456789abcdef.tmp")
    assert ids_of(tmp_path, deduplicate=False) == [1], "a left-over is no part, not even a whole one"


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", [(pq, "write_table"), (os, "replace"), (os, "fsync")])
def test_rows_of_a_failed_write_are_kept_and_written_by_the_next_flush(where, tmp_path, monkeypatch):
    _, writer = started(tmp_path)
    for part in (0, 1):  # the second time proves that a success in between is forgotten failure
        writer.append(rows([10 * part, 10 * part + 1], epoch=[part] * 2))
        with monkeypatch.context() as patch:
            patch.setattr(*where, full)
            writer.flush()
        assert len(parts_in(tmp_path)) == part
        writer.append(rows([10 * part + 2], epoch=[part]))
        writer.flush()
    assert sorted(ids_of(tmp_path, deduplicate=False)) == [0, 1, 2, 10, 11, 12]
    assert parts_in(tmp_path) == ["part-a0-r0-000000-n3.parquet", "part-a0-r0-000001-n3.parquet"]


@pytest.mark.parametrize("how", ["flush", "commit"])
def test_a_write_that_fails_twice_in_a_row_raises_with_rows_and_path(how, tmp_path, monkeypatch):
    _, writer = started(tmp_path)
    writer.append(rows([1, 2]))
    monkeypatch.setattr(os, "replace", full)
    if how == "flush":
        writer.flush()
    writer.append(rows([3]))
    with pytest.raises(LedgerError, match=re.escape(f"3 rows could not be written to {tmp_path}, twice in a row: [Er")):
        getattr(writer, how)()
    monkeypatch.undo()
    writer.commit()
    assert sorted(ids_of(tmp_path)) == [1, 2, 3]


IDS = [
    ([1, "a"], "ids must be all int or all str, and there are both: 1 and 'a'"),
    (["a", 1], "ids must be all int or all str, and there are both: 1 and 'a'"),
    ([1.5, 2.0], "the id 1.5 is a float; ids must be all int or all str"),
    ([1, float("nan")], "the id nan is a float"),
    (np.array([1.0]), "the id 1.0 is a float"),
    ([True], "the id True is a bool"),
    ([1, np.True_], "is a bool"),
    ([b"a"], "the id b'a' is a bytes"),
    ([[1]], "the id [1] is a list"),
    ([None], "an id is missing (None)"),
    ([1, None], "an id is missing (None)"),
    (["a", ""], "the id '' is empty"),
    (["caf\udce9.jpg"], "the id 'caf\\udce9.jpg' is not valid text"),
    ([1, 2**64], "the id 18446744073709551616 is out of range: int ids are from -2^63 to 2^64 - 1"),
    ([-(2**63) - 1], "the id -9223372036854775809 is out of range"),
    ([-1, 2**63], "the ids -1 and 9223372036854775808 do not go together"),
]
#: After the ids 1 and -2.
LATER = [
    (["1"], "the id '1' is str, and the ids before were int"),
    ([2**63], "the ids -2 and 9223372036854775808 do not"),
]


@for_each(("ids", "message"), [*IDS, *LATER])
def test_ids_are_ints_of_64_bits_or_text(ids, message, tmp_path):
    later = any(message is each for _, each in LATER)
    _, writer = started(tmp_path / message[:20].replace("/", ""))
    writer.append(rows([1, -2] if later else []))
    with pytest.raises(LedgerError, match=re.escape(message)):
        writer.append(rows(ids))
    writer.append(rows([3] if later else ["x"]))  # what was refused leaves nothing behind
    writer.commit()
    assert set(ids_of(tmp_path / message[:20].replace("/", ""))) == ({1, -2, 3} if later else {"x"})


@for_each("second", ["at once", "later"])
def test_ids_that_leave_the_signed_range_within_a_run_are_read_as_unsigned(second, tmp_path):
    _, writer = started(tmp_path)
    writer.append(rows([np.int64(5), 7]))
    if second == "later":
        writer.flush()
    writer.append(rows(np.array([2**63 + 1, 6], np.uint64), batch=[1] * 2))
    writer.commit()
    table = Ledger(tmp_path).table()
    assert table["id"].to_pylist() == [5, 7, 2**63 + 1, 6]
    parts = Ledger(tmp_path).parts()
    assert (parts.id_type, parts.uniform) == (pa.uint64(), second == "at once")


def test_parts_of_ranks_whose_ids_no_type_holds_are_named(tmp_path):
    run = write(tmp_path, rows([-3]))
    other = LedgerWriter(tmp_path, run, attempt=0, rank=1)
    other.append(rows([2**63]))
    other.commit()
    with pytest.raises(
        LedgerError, match=r"-a0-r0-000000-n1\.parquet has the id -3, and other parts have unsigned 64-bit ids"
    ):
        Ledger(tmp_path).table()


def test_no_ledger_and_no_rows_are_said(tmp_path):
    with pytest.raises(LedgerError, match=re.escape(f"{tmp_path} holds no ledger (no _meta.json in it)")):
        Ledger(tmp_path)
    started(tmp_path)
    with pytest.raises(LedgerError, match=re.escape(f"{tmp_path} holds no rows")):
        Ledger(tmp_path).table()


BROKEN = [(c, "is not a ledger's description: ") for c in (b"", b'{"schema_ver', b"[]", b"null", b"{}", b"\xff\xfe")]
NEWER = (b'{"schema_version": 99, "new": {}}', "has schema version 99; this release reads version 1")


@pytest.mark.parametrize("name", ["_meta.json", "meta.json"])
@pytest.mark.parametrize(("content", "message"), [*BROKEN, NEWER])
def test_a_broken_or_newer_description_is_named(content, message, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    named = re.escape(f"{tmp_path / name} {message}")
    with pytest.raises(LedgerError, match=named):
        Ledger(tmp_path)
    if content in (b"", b'{"schema_ver', b"\xff\xfe"):
        started(tmp_path)  # a system failed while the run was created, and nothing was written
        assert [attempt["attempt"] for attempt in Ledger(tmp_path).meta["attempts"]] == [0]
        assert (tmp_path / "meta.json").exists() == (name == "meta.json")  # of whatever it may be
    else:
        with pytest.raises(LedgerError, match=named):
            started(tmp_path)


def test_a_broken_description_beside_parts_is_refused(tmp_path):
    write(tmp_path, rows([1]))
    (tmp_path / "_meta.json").write_bytes(b"")
    with pytest.raises(LedgerError, match=r"-n1\.parquet but _meta\.json is empty or damaged; give another directory"):
        started(tmp_path)
    assert (tmp_path / "_meta.json").read_bytes() == b""


def test_a_directory_that_cannot_be_or_has_lost_its_description_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=re.escape(f"cannot write to {tmp_path / 'file'}")):
        started(tmp_path / "file")
    write(tmp_path / "run", rows([1]))
    (tmp_path / "run" / "_meta.json").unlink()
    with pytest.raises(LedgerError, match=r"-a0-r0-000000-n1\.parquet but no _meta\.json"):
        started(tmp_path / "run")


def test_other_settings_do_not_matter_once_all_their_rows_are_superseded(tmp_path):
    run = write(tmp_path, rows([1], step=[0]))
    with pytest.warns(UserWarning, match="goes on with other settings"):
        write(tmp_path, rows([2], step=[0]), run=run, config=CONFIG | {"temperature": 0.1})
    assert ids_of(tmp_path) == [2]


def test_a_damaged_description_of_a_part_is_seen(tmp_path):
    write(tmp_path, rows([1, 2]))
    (part,) = tmp_path.glob("*.parquet")
    content = bytearray(part.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[content.find(b"score", footer)] ^= 1  # a column by another name
    part.write_bytes(content)
    with pytest.raises(LedgerError, match=re.escape("1 of 1 parts are damaged")):
        Ledger(tmp_path).table()


def test_a_part_that_is_gone_is_missed(tmp_path):
    write(tmp_path, rows([1]), rows([2]))
    (first,) = tmp_path.glob("*-000000-*.parquet")
    first.unlink()
    with pytest.raises(LedgerError, match=re.escape("attempt 0, rank 0, part 0 (missing)")):
        Ledger(tmp_path).table()
    assert ids_of(tmp_path, allow_partial=True) == [2]
