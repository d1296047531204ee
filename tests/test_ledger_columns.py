"""The table of the ledger's columns: what follows from it, and ledgers that lack a column or have one more."""

import re
import shutil
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_mimic.curation import Sign, curate
from lightning_mimic.ledger import Column, Ledger, LedgerError, LedgerWriter, open_run
from lightning_mimic.ledger import columns as table_of
from support.ledgers import CONFIG, write_ledger, write_scores

DATA = Path(__file__).parent / "data"
NEWER = Column("entropy", pa.float32(), "nats", "entropy of the prediction", nullable=True, summary="mean")


def rewrite(directory, change):
    """Changes the parts of a ledger on the disk, under the same names."""
    for part in directory.glob("*.parquet"):
        with pq.ParquetFile(part) as file:
            table = change(file.read())
        pq.write_table(table, part, write_page_checksum=True, write_statistics=False)


@pytest.fixture
def frozen(tmp_path):
    """A copy of a ledger of the first format, whose description does not list its columns."""
    shutil.copytree(DATA / "ledger_v1_int", tmp_path / "frozen")
    return tmp_path / "frozen"


@pytest.fixture
def newer(monkeypatch):
    """A release with one column more, which is one line in the table."""
    monkeypatch.setattr(table_of, "COLUMNS", (*table_of.COLUMNS, NEWER))


def test_a_ledger_without_a_nullable_column_reads_it_as_null(frozen):
    before = Ledger(frozen).table()
    rewrite(frozen, lambda table: table.drop_columns(["predicted"]))
    after = Ledger(frozen).table()
    assert after.schema == before.schema
    assert after["predicted"].null_count == after.num_rows
    assert after.drop_columns(["predicted"]).equals(before.drop_columns(["predicted"]))
    rows = curate(frozen, Sign(), unscored="keep").manifest.table()
    assert (rows["predicted"].null_count, rows["label"].to_pylist().count(None)) == (rows.num_rows, 1)


def test_a_ledger_may_lack_the_column_in_some_of_its_parts_only(frozen):
    before = Ledger(frozen).table()
    rewrite(frozen, lambda table: table.drop_columns(["predicted"]) if table.num_rows > 2 else table)
    parts = Ledger(frozen).parts()
    assert (parts.uniform, "predicted" in parts.columns, "predicted" in parts.recorded) == (False, True, True)
    rows = curate(frozen, Sign(), unscored="keep").manifest.table()
    predicted = dict(zip(rows["id"].to_pylist(), rows["predicted"].to_pylist(), strict=True))
    assert predicted[11] == 1  # in a part of one row
    assert predicted[13] is None
    assert Ledger(frozen).table().drop_columns(["predicted"]).equals(before.drop_columns(["predicted"]))


def test_a_column_of_a_newer_release_is_left_out(frozen):
    before, rows = Ledger(frozen).table(), curate(frozen, Sign(), unscored="keep").manifest.table()
    rewrite(frozen, lambda table: table.append_column("entropy", pa.array([0.5] * table.num_rows, pa.float32())))
    assert Ledger(frozen).table().equals(before)
    assert curate(frozen, Sign(), unscored="keep").manifest.table().equals(rows)


@pytest.mark.parametrize("holder", ["a0-r0-000000", "a1-r1-000000"])  # the first part, the last
def test_a_column_of_a_newer_release_may_be_in_some_parts_only(holder, frozen):
    before, rows = Ledger(frozen).table(), curate(frozen, Sign(), unscored="keep").manifest.table()
    (part,) = frozen.glob(f"*-{holder}-*.parquet")
    with pq.ParquetFile(part) as file:
        table = file.read()
    table = table.add_column(0, "entropy", pa.array([0.5] * table.num_rows, pa.float32()))
    pq.write_table(table, part, write_page_checksum=True)
    assert Ledger(frozen).table().equals(before)
    assert curate(frozen, Sign(), unscored="keep").manifest.table().equals(rows)


def test_an_older_release_reads_ledgers_of_a_newer_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(table_of, "COLUMNS", (*table_of.COLUMNS, NEWER))
        write_scores(tmp_path, [1.0, 2.0], entropy=0.5)
        assert "entropy" in Ledger(tmp_path).table().column_names
    assert "entropy" in Ledger(tmp_path).meta["attempts"][0]["columns"]
    assert Ledger(tmp_path).table()["score"].to_pylist() == [1.0, 2.0]
    assert "entropy" not in Ledger(tmp_path).table().column_names


def test_a_newer_release_reads_ledgers_of_an_older_one(newer):
    table = Ledger(DATA / "ledger_v1_int").table()
    assert table.column_names[-1] == "entropy"
    assert table["entropy"].null_count == table.num_rows == 10
    assert "entropy" not in curate(DATA / "ledger_v1_int", Sign(), unscored="keep").manifest.table().column_names


def test_a_new_column_reaches_the_ledger_and_the_manifest(newer, tmp_path):
    columns = {"id": [1, 2, 1, 2], "epoch": [0, 0, 1, 1], "score": [1.0, 2.0, 3.0, None]}
    write_ledger(tmp_path / "scores", columns | {"entropy": [0.5, 0.25, 1.5, None]})
    assert Ledger(tmp_path / "scores").table()["entropy"].to_pylist() == [0.5, 0.25, 1.5, None]
    rows = curate(tmp_path / "scores", Sign()).manifest.table()
    assert rows.select(["id", "score", "entropy"]).to_pylist() == [
        {"id": 1, "score": 2.0, "entropy": 1.0},
        {"id": 2, "score": 2.0, "entropy": 0.25},
    ]


def test_a_writer_may_leave_out_what_is_nullable(tmp_path):
    opened = open_run(tmp_path, CONFIG, 0, None, {})
    writer = LedgerWriter(tmp_path, opened.run, opened.attempt, rank=0)
    columns = {"id": [7], "epoch": [0], "step": [0], "batch": [0], "position": [0], "flag": ["ok"]}
    writer.append(columns)
    writer.commit()
    assert Ledger(tmp_path).table()["score"].to_pylist() == [None]
    with pytest.raises(KeyError, match="epoch"):
        writer.append({name: values for name, values in columns.items() if name != "epoch"})


def damaged(name):
    return re.compile(rf"parts are damaged: .*holds columns .*{name}")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["label", "score", "step"])
def test_a_column_under_a_damaged_name_is_not_taken_for_an_unknown_one(name, old, frozen, tmp_path):
    directory = frozen if old else tmp_path / "scores"
    if not old:
        write_scores(directory, [1.0, 2.0], label=1, predicted=1)
    rewrite(directory, lambda t: t.rename_columns([f"{n[:-1]}~" if n == name else n for n in t.column_names]))
    with pytest.raises(LedgerError, match=damaged(f"{name[:-1]}~")):
        Ledger(directory).table()


@pytest.mark.parametrize("name", ["epoch", "flag"])
def test_a_column_that_every_row_needs_must_be_there(name, frozen):
    rewrite(frozen, lambda table: table.drop_columns([name]))
    with pytest.raises(LedgerError, match=damaged("rank")):
        Ledger(frozen).table()


def test_a_column_that_the_description_lists_must_be_there(tmp_path):
    write_scores(tmp_path, [1.0, 2.0], label=1)
    rewrite(tmp_path, lambda table: table.drop_columns(["label"]))
    with pytest.raises(LedgerError, match=damaged("predicted")):
        Ledger(tmp_path).table()


def test_a_column_of_another_type_is_damage(frozen):
    rewrite(frozen, lambda t: t.set_column(7, "score", t["score"].cast(pa.float64())))
    with pytest.raises(LedgerError, match=damaged("score")):
        Ledger(frozen).table()


def test_the_documentation_shows_the_table():
    text = (Path(__file__).parent.parent / "docs" / "formats" / "ledger.md").read_text()
    assert table_of.columns_as_markdown() in text, "docs/formats/ledger.md: paste what columns_as_markdown() returns"


def begun(directory, notes, start_step=0, run=None):
    with closing(open_run(directory, CONFIG, start_step, run, notes)) as opened:
        return opened.run


def test_class_names_are_recorded_once(tmp_path):
    run = begun(tmp_path, {"class_names": ["cat", "dog"], "package_version": "1"})
    begun(tmp_path, {"class_names": ("cat", "dog")}, 5, run)
    begun(tmp_path, {}, 6, run)
    ledger = Ledger(tmp_path)
    assert ledger.class_names == ("cat", "dog")
    assert ledger.meta["class_names"] == ["cat", "dog"]
    assert ["class_names" in attempt for attempt in ledger.meta["attempts"]] == [False] * 3
    assert ledger.meta["attempts"][0]["package_version"] == "1"
    assert Ledger(DATA / "ledger_v1_int").class_names is None


def test_class_names_may_be_noted_while_the_run_goes_on(tmp_path):
    with closing(open_run(tmp_path, CONFIG, 0, None, {})) as opened:
        opened.note({"class_names": ["cat", "dog"], "score_kind": "own"})
    assert Ledger(tmp_path).class_names == ("cat", "dog")
    assert Ledger(tmp_path).meta["attempts"][0]["score_kind"] == "own"


def test_a_run_does_not_go_on_with_other_classes(tmp_path):
    opened = open_run(tmp_path, CONFIG, 0, None, {"class_names": ["cat", "dog"]})
    run = opened.run
    before = Ledger(tmp_path).meta
    opened.close()
    message = f"`ledger`: run {run} began with classes 'cat', 'dog' and goes on with 'dog', 'cat', so that"
    with pytest.raises(LedgerError, match=f"^{re.escape(message)}"):
        begun(tmp_path, {"class_names": ["dog", "cat"]}, 3, run)
    opened = open_run(tmp_path, CONFIG, 3, run, {})
    before = Ledger(tmp_path).meta
    for wrong in ("cat", [1, 2]):
        with pytest.raises(LedgerError, match=r"^`class_names` is .*; expected a list of str"):
            opened.note({"class_names": wrong})
    assert Ledger(tmp_path).meta == before
