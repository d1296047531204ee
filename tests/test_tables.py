"""Tables that users bring: no value is another one after reading, and what has no one meaning is refused."""

import datetime
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_mimic import WithIds
from lightning_mimic.curation import CurationError, Manifest, curate, select
from lightning_mimic.database import Database
from lightning_mimic.manifest import KeptIds, kept_subset
from lightning_mimic.tables import Table, settle_ids
from support.cases import for_each
from support.ledgers import write_scores

BIG = 2**53
HASHES = [2**64 - 1, 2**63, 5]


def folder(path, *parts):
    path.mkdir()
    for k, part in enumerate(parts):
        pq.write_table(part if isinstance(part, pa.Table) else pa.table(part), path / f"{k:05d}.parquet")
    return path


def top(path, most):
    out = path.parent / f"{path.name}-{most}.parquet"
    manifest = select(f"{path}{'/' if path.is_dir() else ''}:v top {most}", out)
    return [row["id"] for row in manifest.table().to_pylist() if row["keep"]]


def part(ids, values, kind=None):
    ids = pa.array(ids, pa.uint64() if ids[:1] and ids[0] in HASHES else None) if isinstance(ids, list) else ids
    return pa.table({"id": ids, "v": pa.array(values, kind)})


FRACTIONS = part([10, 11, 12], [0.1, 0.2, 0.3])


@for_each(
    ("other", "most", "best"),
    [
        (part([1, 2, 3], [0, 0, 0]), 2, [11, 12]),
        (part([1, 2, 3], [0, 0, 1], pa.int8()), 2, [3, 12]),
        (part([1, 2, 3], [False, False, True]), 2, [3, 12]),
        (part([1, 2, 3], [0.15, 0.25, 0.35], pa.float32()), 2, [3, 12]),
        (part([1, 2, 3], [None] * 3, pa.int64()), 2, [11, 12]),
        (part([1, 2, 3], [None] * 3, pa.null()), 2, [11, 12]),
        (part([1, 2, 3], [None] * 3, pa.string()), 2, [11, 12]),
        (part([1, 2, 3], [None] * 3, pa.timestamp("s")), 2, [11, 12]),
        (part(pa.array([], pa.null()), [], pa.null()), 2, [11, 12]),
        (part(pa.array([], pa.string()), [], pa.string()), 2, [11, 12]),
        (part([1, 2, 3], [1, 2, 3], pa.uint64()), 2, [2, 3]),
        (part([1, 2, 3], [BIG - 2, BIG - 1, BIG], pa.int64()), 2, [2, 3]),
        (part([1, 2, 3], pa.array([0, 5, 0]).dictionary_encode()), 2, [2, 12]),
    ],
)
def test_parts_of_other_types_hold_the_same_numbers_in_either_order(other, most, best, tmp_path):
    assert top(folder(tmp_path / "a", other, FRACTIONS), most) == best
    assert top(folder(tmp_path / "b", FRACTIONS, other), most) == best


@for_each(
    ("one", "other"),
    [
        (part([1, 2], [2**62, 2**62 + 1]), part([3], [2**62 + 2], pa.uint64())),
        (part([1, 2], [2**63, 2**63 + 1], pa.uint64()), part([3], [2**63 + 2], pa.uint64())),
        (part([1, 2], [-5, 2**62 + 1]), part([3], [2**64 - 1], pa.uint64())),
        (
            part([1, 2], [Decimal("0.1"), Decimal("1234567890.123456789012345")]),
            part([3], [Decimal("1234567890.123456789012346")], pa.decimal128(25, 15)),
        ),
    ],
)
def test_large_whole_numbers_are_compared_exactly(one, other, tmp_path):
    if pa.types.is_decimal(one["v"].type):
        one = part(one["id"], one["v"].cast(pa.decimal128(25, 15)))
    assert top(folder(tmp_path / "a", one, other), 2) == [2, 3]
    assert top(folder(tmp_path / "b", other, one), 1) == [3]
    lines = [f"{i},{v}\n" for i, v in zip([1, 2, 3], [BIG, BIG + 2, BIG + 1], strict=True)]
    (tmp_path / "c.csv").write_text("id,v\n" + "".join(lines))
    assert top(tmp_path / "c.csv", 1) == [2]
    assert top(tmp_path / "c.csv", 2) == [2, 3]


@for_each(
    ("parts", "message"),
    [
        (
            [part([1], [BIG + 1]), part([2], [0.5])],
            "00000.parquet: column 'v' is int64 here and double in other files, which does not hold its values",
        ),
        ([part([1], ["a"]), part([2], [0.5])], "a: column 'v' is string in 00000.parquet and double in 00001.parquet;"),
        ([part([1], ["1"]), part([2], [1])], "a: column 'v' is string in 00000.parquet and int64 in 00001.parquet;"),
        (
            [part([1], [1]), part(["0004"], [2])],
            "a: column 'id' is int64 in 00000.parquet and string in 00001.parquet; write both with one type.",
        ),
        (
            [part([1], [1]), part([2.0], [2])],
            "00001.parquet has ids of type double; expected int64, uint64 or string. Ids become floats in pandas where",
        ),
        ([part([True], [1])], "00000.parquet has ids of type bool; expected int64, uint64 or string."),
        ([part([b"a"], [1])], "00000.parquet has ids of type binary; expected int64, uint64 or string. Write"),
        (
            [part([Decimal(1)], [1])],
            "00000.parquet has ids of type decimal128(1, 0); expected int64, uint64 or string.",
        ),
        ([part([[1]], [1])], "00000.parquet has ids of type list<"),
        (
            [part([1], [datetime.date(2020, 1, 1)])],
            "00000.parquet: column 'v' is of type date32[day]; expected",
        ),
        ([part([1], [{"x": 1}])], "00000.parquet: column 'v' is of type struct<x: int64>; expected numbers."),
        ([part([1], [1]), {"id": [2], "V": [2]}], "00001.parquet has no column 'v'; "),
        ([part([1], [1]), {"uid": [2], "v": [2]}], "00001.parquet has no column 'id'; nearest: 'uid'."),
        (
            [pa.Table.from_arrays([pa.array([1])] * 3, names=["id", "v", "v"])],
            "00000.parquet has 2 columns 'v'; expected one.",
        ),
        ([part(pa.nulls(1, pa.int64()), [1])], "00000.parquet: 1 rows have no id (it is missing or empty)."),
        (
            [part([-1], [1]), part([2**63], [1])],
            "ids from -1 to 9223372036854775808 are neither signed",
        ),
    ],
)
def test_what_has_no_one_meaning_is_refused_by_its_name(parts, message, tmp_path):
    path = folder(tmp_path / "a", *parts)
    for recipe in (f"{path}/:v top 1", f"{path}/:v bottom 100%"):
        with pytest.raises(CurationError, match=re.escape(message)):
            select(recipe, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@for_each("kinds", [(pa.int32(), pa.uint8()), (pa.int64(), pa.uint64()), (pa.uint64(), pa.int16())])
def test_ids_of_any_width_are_equal_by_value(kinds, tmp_path):
    one, other = (pa.array([1, 2, 3], kind) for kind in kinds)
    pq.write_table(pa.table({"id": one, "keep": [True, True, False]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": other, "keep": [False, True, True]}), tmp_path / "b.parquet")
    rows = select(f"{tmp_path}/a.parquet and {tmp_path}/b.parquet", tmp_path / "o.parquet").table().to_pylist()
    assert [(row["id"], row["keep"]) for row in rows] == [(1, False), (2, True), (3, False)]


def test_unsigned_ids_are_the_same_in_everything_that_reads_them(tmp_path):
    ids, keep = pa.array(HASHES, pa.uint64()), [True, False, True]
    pq.write_table(pa.table({"id": ids, "keep": keep}), tmp_path / "a.parquet")
    made = select(str(tmp_path / "a.parquet"), tmp_path / "b.parquet")
    assert made.table()["id"].type == pa.uint64()
    assert {row["id"]: row["keep"] for row in made.table().to_pylist()} == dict(zip(HASHES, keep, strict=True))
    assert made.subset(WithIds("xyz", HASHES)).indices == [0, 2]
    made.to_csv(tmp_path / "c.csv")
    again = select(f"{tmp_path}/c.csv and {tmp_path}/a.parquet", tmp_path / "d.parquet")
    assert again.table()["id"].to_pylist() == [5, 2**63, 2**64 - 1]
    # Parts of a pool as pandas writes them: signed where none is large.
    pool = folder(tmp_path / "pool", {"id": pa.array([7, 8])}, {"id": ids})
    write_scores(tmp_path / "scores", [1.0, -1.0], ids=[5, 7])
    done = curate(tmp_path / "scores", pool=pool, unscored="drop")
    assert {row["id"]: row["keep"] for row in done.manifest.table().to_pylist()} == {
        5: True, 7: False, 8: False, 2**63: False, 2**64 - 1: False,
    }  # fmt: skip


@for_each(
    ("keep", "kept"),
    [
        ([True, False, None], [0]),
        (pa.array([1, 0, 1], pa.int8()), [0, 2]),
        (pa.array([1, 0, None], pa.uint64()), [0]),
        (["true", "FALSE", "True"], [0, 2]),
        (["1", "0", None], [0]),
        (pa.array(["1", "0", "1"]).dictionary_encode(), [0, 2]),
        ([0.9, 0.02, 1.0], "holds 0.9 (double)"),
        ([1.0, 0.0, 1.0], "holds 1.0 (double)"),
        ([1, 0, 2], "holds 2 (int64)"),
        ([1, 0, -1], "holds -1 (int64)"),
        (["yes", "no", "no"], "holds 'yes' (string)"),
        (["1", "0", "1.0"], "holds '1.0' (string)"),
        (["true", "false", ""], "holds '' (string)"),
        ([b"1", b"0", b"1"], "holds b'1' (binary)"),
        ([[True], [False], [True]], "holds [True] (list<"),
    ],
)
def test_a_decision_is_yes_or_no_in_everything_that_reads_it(keep, kept, tmp_path):
    path, ids = tmp_path / "a.parquet", ["a", "b", "c"]
    pq.write_table(pa.table({"id": ids, "keep": keep}), path)

    def chosen(table):
        return [ids.index(row["id"]) for row in table.to_pylist() if row["keep"]]

    def from_csv():
        Manifest(path).to_csv(tmp_path / "a.csv")
        (tmp_path / "o.parquet").unlink(missing_ok=True)
        return chosen(select(str(tmp_path / "a.csv"), tmp_path / "o.parquet").table())

    def selected():
        (tmp_path / "o.parquet").unlink(missing_ok=True)
        return chosen(select(str(path), tmp_path / "o.parquet").table())

    readers = [
        lambda: chosen(Manifest(path).table()),
        lambda: kept_subset(WithIds("xyz", ids), path).indices,
        selected,
        from_csv,
    ]
    if isinstance(kept, str) or not pa.array(keep).null_count:  # the pair loader asks for a decision on each
        readers.append(lambda: [place for place, each in enumerate(ids) if KeptIds(path).times(each)])
    for read in readers:
        if isinstance(kept, str):
            message = f"{path}: column 'keep' {kept}"
            with pytest.raises(CurationError, match=f"^{re.escape(message)}.*expected booleans, 0 and 1, or the words"):
                read()
        else:
            assert read() == kept


def ids_in(path):
    with Database() as database:
        table = Table(path)
        table.load(database, "read", {"id": "id"})
        settle_ids(database, {"read": table})
        return database.column("SELECT id FROM read ORDER BY id")


@for_each(
    ("content", "found"),
    [
        (b"\xef\xbb\xbfid,v\r\n7,1\r\n", [7]),
        (b'"id","v"\n"a,b","x\ny"\n"q""",2\n', ["a,b", 'q"']),
        (b"v,id\n1,a\n\n2,b\n\n", ["a", "b"]),
        (b"id\r7\r8\r", [7, 8]),
        (b"id,v\na\0b,1\n", ["a\0b"]),
        (b"id,v\n'=x,1\n''=y,1\n'z,1\n'-5,1\n", ["'=y", "'z", "-5", "=x"]),
        (b"id,ID\n1,2\n", [1]),
        (b"id,v\n1,\n18446744073709551615,\n", [1, 2**64 - 1]),
        (b"id,v\n1,\n18446744073709551616,\n", ["1", "18446744073709551616"]),
        (b"", " is empty; expected a line with the names of its columns."),
        (b"7,1\n8,2\n", " has no column 'id'; there are: '1', '7'."),
        (b"id,v\n\xff,1\n", " cannot be read: 'utf-8' codec can't decode byte 0xff in position 5: invalid start byte."),
        ("id,v\na,1\n".encode("utf-16"), " cannot be read: 'utf-8' codec can't decode byte 0xff in position 0"),
        (b"id,id\na,b\n", " has 2 columns 'id'; expected one."),
        (b"id,v\na\n", " cannot be read: line 2 has 1 cells, and the first has 2."),
        (b"id,v\na,1\nb,1,2\n", " cannot be read: line 3 has 3 cells, and the first has 2."),
        (b'id\n"a\nb\n', " cannot be read: unexpected end of data."),
        (b'id\n"a"b\n', " cannot be read: ',' expected after '\"'."),
        (b"id,v\n,1\n", ": 1 rows have no id (it is missing or empty)."),
    ],
)
def test_a_csv_holds_what_it_says_or_is_refused_by_its_name(content, found, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    if isinstance(found, list):
        assert ids_in(path) == found
    else:
        with pytest.raises(CurationError, match=f"^{re.escape(f'{path}{found}')}"):
            ids_in(path)


@for_each(
    ("files", "message"),
    [
        (
            {"lang=en/0.parquet": 1, "0.parquet": 2},
            "lang=en/0.parquet, which are not read; give a",
        ),
        ({"lang=en/0.parquet": 1}, "lang=en/0.parquet, which are not read; give a"),
        ({"0.parquet": 1, "1.PARQUET": 2, ".2.parquet": 3, "3.txt": 4}, [1, 2]),
    ],
)
def test_no_file_of_a_directory_is_skipped(files, message, tmp_path):
    for name, i in files.items():
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": [i]}), tmp_path / "t" / name)
    if isinstance(message, list):
        assert ids_in(tmp_path / "t") == message
    else:
        with pytest.raises(CurationError, match=re.escape(message)):
            ids_in(tmp_path / "t")


def test_text_that_is_not_unicode_is_refused(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.int32([0, 1])), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"id": broken, "keep": [True]}), tmp_path / "a.parquet")
    for read in (ids_in, kept_subset.__get__("a"), KeptIds, lambda path: Manifest(path).table()):
        with pytest.raises(CurationError, match=r"a\.parquet .*[Ii]nvalid UTF-?8"):
            read(tmp_path / "a.parquet")


@for_each("text", ["1.5", "x", "007", "99999999999999999999", "-9223372036854775809"])
def test_text_that_is_no_whole_number_is_no_id_beside_whole_numbers(text, tmp_path):
    (tmp_path / "a.csv").write_text(f"id,keep\n3,1\n{text},0\n")
    pq.write_table(pa.table({"id": [3], "keep": [True]}), tmp_path / "b.parquet")
    message = f"1 rows have no id, or one that is no whole number as the others are, such as {text!r}."
    with pytest.raises(CurationError, match=f"^{re.escape(f'{tmp_path}/a.csv: {message}')}$"):
        select(f"{tmp_path}/a.csv and {tmp_path}/b.parquet", tmp_path / "o.parquet")
    assert ids_in(tmp_path / "a.csv") == sorted(["3", text])
