"""Recipes: what they say, what they refuse, and what they select, against Python's sets."""

import math
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from lightning_mimic.curation import CurationError, Manifest, Recipe, curate, select
from lightning_mimic.curation.selection import Term
from lightning_mimic.version import __version__
from support.cases import for_each
from support.ledgers import write_scores

GRAMMAR = (
    "expected PATH (a manifest: the samples it keeps) or PATH:COLUMN top|bottom AMOUNT (such as 30% or 300), combined "
    "from left to right by and, or, minus; a PATH ends in .parquet, .csv, or, if it is a directory of Parquet files, /"
)


def write(path, **columns):
    (pq.write_table if path.suffix == ".parquet" else pa.csv.write_csv)(pa.table(columns), path)
    return path


def selected(recipe, folder, **how):
    (folder / "out.parquet").unlink(missing_ok=True)
    rows = select(recipe, folder / "out.parquet", **how).table().to_pylist()
    assert [row["reason"] for row in rows] == [None if row["keep"] else "not in the recipe" for row in rows]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    return [row["id"] for row in rows if row["keep"]], [row["id"] for row in rows if not row["keep"]]


@for_each(
    ("text", "term"),
    [
        ("a.parquet", Term("a.parquet")),
        ("  b/a.b.csv\n", Term("b/a.b.csv")),
        ("a.csv.parquet", Term("a.csv.parquet")),
        ("/x/a.parquet:clip top 30%", Term("/x/a.parquet", "clip", "top", fraction=0.3)),
        ("a.csv:b.csv bottom 12.5 %", None),
        ("a.csv:s bottom 12.5%", Term("a.csv", "s", "bottom", fraction=0.125)),
        ("a.csv:s  top   7", Term("a.csv", "s", "top", count=7)),
        ("a.csv:s top 0", Term("a.csv", "s", "top", count=0)),
        ("a.csv:s top 0%", Term("a.csv", "s", "top", fraction=0.0)),
        ("a.csv:s top 100%", Term("a.csv", "s", "top", fraction=1.0)),
        ("a=1/x:y.csv:s:t top 1", Term("a=1/x:y.csv", "s:t", "top", count=1)),
    ],
)
def test_a_term_reads_as_it_says(text, term):
    if term is None:
        with pytest.raises(CurationError, match=re.escape(f"`recipe`: {text!r} cannot be read; {GRAMMAR}.")):
            Recipe.parse(text)
    else:
        assert Recipe.parse(text) == Recipe((term,), ())


def test_terms_are_joined_in_their_order():
    read = Recipe.parse("a.csv and b.csv:and top 1 or or.csv\n minus  minus.parquet:or bottom 2%")
    assert read.joints == ("and", "or", "minus")
    assert [term.path for term in read.terms] == ["a.csv", "b.csv", "or.csv", "minus.parquet"]
    assert [term.column for term in read.terms] == [None, "and", None, "or"]


@for_each("text", ["", "a", "a.txt", "a.csv:s", "a.csv:s top", "a.csv:s middle 3", "a.csv top 3",
                                  "a.csv: top 3", "a.csv xor b.csv", "a.csv b.csv", "not a.csv", "a.csv:s Top 3",
                                  "a.csv)", "a.csv:s top 3 4", "b c.csv"])  # fmt: skip
def test_what_is_no_term_is_named(text):
    with pytest.raises(CurationError, match=f"^{re.escape(f'`recipe`: {text!r} cannot be read; {GRAMMAR}.')}$"):
        Recipe.parse(text)


@for_each(("text", "bad"), [("a.csv and", "a.csv and"), ("and a.csv", "and a.csv"),
                                           ("a.csv and  or b.csv", "or b.csv"), ("a.csv and b", "b")])  # fmt: skip
def test_a_joint_joins_two_terms(text, bad):
    with pytest.raises(CurationError, match=f"^{re.escape(f'`recipe`: {bad!r} cannot be read;')}"):
        Recipe.parse(text)


@for_each("amount", ["101%", "100.1%", "-3", "-3%", "1.5", "x", "%", "1e3", "3%%", "inf", "0.5.5%", "½"])
def test_what_is_no_amount_is_named(amount):
    message = f"`recipe`: {amount!r} is not an amount; expected 0% to 100%, or a count."
    with pytest.raises(CurationError, match=f"^{re.escape(message)}$"):
        Recipe.parse(f"a.csv:s top {amount}")


def sets(table, column, end, amount):
    """What a term stands for, from a dict of columns."""
    pairs = list(zip(table["id"], table[column], strict=True))
    if end is None:
        return {i for i, keep in pairs if keep}
    valued = sorted(
        (value if end == "bottom" else -value, i) for i, value in pairs if value is not None and value == value
    )
    if not amount.endswith("%"):
        return {i for _, i in valued[: int(amount)]}
    if amount == "0%":
        return set()
    first_out = int(len(pairs) * (float(amount[:-1]) / 100))
    return {i for value, i in valued if first_out >= len(valued) or value <= valued[first_out][0]}


OPERATIONS = {"and": set.__and__, "or": set.__or__, "minus": set.__sub__}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int", "str"])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_recipes_select_what_sets_do(suffix, kind, run_seed, tmp_path):
    draw = random.Random(f"{run_seed} {suffix} {kind}")
    names = [k * 3 - 40 for k in range(40)] if kind == "int" else [f"n{k:02}, \"{k}'" for k in range(40)]
    tables, paths = [], []
    for k in range(4):
        ids = draw.sample(names, draw.choice([25, 40]))
        table = {"id": ids, "keep": [draw.choice([True, False, None]) for _ in ids]}
        table["s"] = [draw.choice([None, math.nan, -math.inf, *[n / 4 for n in range(-4, 5)]]) for _ in ids]
        path = tmp_path / f"t{k}.{suffix if k else 'parquet'}"
        tables.append(table)
        paths.append(write(path, id=ids, keep=pa.array(table["keep"]), s=pa.array(table["s"], pa.float64())))
    different = set()
    for _ in range(25):
        text, want, known = "", set(), set()
        for place in range(draw.randint(1, 4)):
            k, joint = draw.randrange(4), draw.choice(list(OPERATIONS))
            end = draw.choice([None, "top", "bottom"])
            amount = draw.choice(["0", "3", "17", "99", "0%", "12.5%", "30%", "50%", "62.5%", "100%"])
            chosen = sets(tables[k], "s" if end else "keep", end, amount)
            want = OPERATIONS[joint](want, chosen) if place else chosen
            known |= set(tables[k]["id"])
            text += (f" {joint} " if place else "") + (f"{paths[k]}:s {end} {amount}" if end else f"{paths[k]}")
        assert selected(text, tmp_path, allow_unknown=True) == (sorted(want), sorted(known - want)), text
        different.add(frozenset(want))
    assert len(different) > 10


def test_joints_go_from_left_to_right(tmp_path):
    for name, keep in (("a", [1, 0, 0]), ("b", [1, 1, 0]), ("c", [0, 1, 1])):
        write(tmp_path / f"{name}.csv", id=[1, 2, 3], keep=[bool(k) for k in keep])
    a, b, c = (tmp_path / f"{name}.csv" for name in "abc")
    assert selected(f"{a} or {b} and {c}", tmp_path)[0] == [2]
    assert selected(f"{a} or {c} minus {b}", tmp_path)[0] == [3]
    assert selected(f"{c} minus {b} or {a}", tmp_path)[0] == [1, 3]


def test_equal_values_at_an_edge_go_by_their_ids(tmp_path):
    path = write(tmp_path / "a.parquet", id=[10, 9, 2, 1, 30], s=[1.0, 1.0, 1.0, 0.0, 2.0])
    assert selected(f"{path}:s top 3", tmp_path)[0] == [2, 9, 30]
    assert selected(f"{path}:s bottom 2", tmp_path)[0] == [1, 2]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_missing_value_is_never_chosen_nor_counted(suffix, tmp_path):
    values = [math.nan, 5.0, None, -5.0, math.inf, 0.0]
    path = write(tmp_path / f"a.{suffix}", id=[0, 1, 2, 3, 4, 5], s=values)
    assert selected(f"{path}:s top 100%", tmp_path) == ([1, 3, 4, 5], [0, 2])
    assert selected(f"{path}:s bottom 99", tmp_path) == ([1, 3, 4, 5], [0, 2])
    assert selected(f"{path}:s top 40%", tmp_path)[0] == [1, 4, 5]  # two of all six, and one more
    assert selected(f"{path}:s top 10%", tmp_path)[0] == [4]


@for_each(("rows", "missing", "ties", "percent"), [
    (997, 0, False, "30"), (997, 100, False, "30"), (1000, 0, True, "30"), (997, 50, True, "12.5"),
    (100, 0, False, "29"), (7, 2, False, "50"),
])  # fmt: skip
def test_a_share_is_what_datacomps_own_rule_keeps(rows, missing, ties, percent, tmp_path):
    generator = np.random.default_rng(rows)
    clip = generator.standard_normal(rows)
    clip = clip.round(1) if ties else clip
    clip[generator.permutation(rows)[:missing]] = np.nan
    ids = [generator.bytes(16).hex() for _ in range(rows)]
    path = write(tmp_path / "pool.parquet", uid=ids, clip_l14_similarity_score=clip)
    edge = -np.sort(-clip)[int(rows * (float(percent) / 100))]
    want = sorted(i for i, value in zip(ids, clip, strict=True) if value >= edge)
    assert selected(f"{path}:clip_l14_similarity_score top {percent}%", tmp_path)[0] == want
    if (rows, missing, ties) == (997, 0, False):
        assert len(want) == 300


def test_whole_numbers_of_a_column_order_it_too(tmp_path):
    path = write(tmp_path / "a.parquet", id=["a", "b", "c"], n=[2**40, 9, 10])
    assert selected(f"{path}:n bottom 2", tmp_path)[0] == ["b", "c"]
    assert selected(f"{write(tmp_path / 'a.csv', id=['a', 'b', 'c'], n=[100, 9, 10])}:n bottom 2", tmp_path)[0] == [
        "b",
        "c",
    ]


def test_datacomps_best_clip_scores_without_the_lowest_mimic_scores(tmp_path):
    generator = np.random.default_rng(0)
    ids = [generator.bytes(16).hex() for _ in range(1000)]
    clip, mimic = generator.standard_normal((2, 1000))
    write(tmp_path / "clip.parquet", id=ids, clip_score=clip)
    write_scores(tmp_path / "scores", mimic, ids=ids)
    made = curate(tmp_path / "scores", None, tmp_path / "curated").manifest
    recipe = f"{tmp_path}/clip.parquet:clip_score top 30% minus {made.path}:score bottom 15%"
    final = select(recipe, tmp_path / "final.parquet")
    best = {ids[k] for k in np.argsort(-clip)[:301]} - {ids[k] for k in np.argsort(mimic.astype(np.float32))[:151]}
    assert {row["id"] for row in final.table().to_pylist() if row["keep"]} == best
    final.to_datacomp(tmp_path / "kept.npy")
    assert np.load(tmp_path / "kept.npy").tolist() == sorted((int(i[:16], 16), int(i[16:], 16)) for i in best)
    said = final.provenance
    assert said.pop("created").endswith("+00:00")
    want = {"package_version": __version__, "recipe": recipe, "sizes": [301, 151], "samples": 1000, "kept": len(best)}
    assert said == want
    assert select(Recipe.parse(recipe), tmp_path / "again.parquet").table() == final.table()


def test_tables_of_other_samples_are_refused_unless_allowed(tmp_path):
    one, two = (
        write(tmp_path / "a.csv", id=[1, 2, 3], keep=[True] * 3),
        write(tmp_path / "b.csv", id=[2, 7], keep=[True] * 2),
    )
    allow = "With `allow_unknown=true`, a sample that is missing from a table is not selected by its term."
    for recipe, message in (
        (f"{one} or {two}", f"2 samples of {one}, such as 1, are not in {two}. {allow}"),
        (f"{one} or {one} and {two}", f"2 samples of {one}, such as 1, are not in {two}. {allow}"),
    ):
        with pytest.raises(CurationError, match=f"^{re.escape(message)}$"):
            select(recipe, tmp_path / "out.parquet")
    three = write(tmp_path / "c.csv", id=[3, 2, 1, 0], keep=[True] * 4)
    with pytest.raises(CurationError, match=f"^{re.escape(f'1 samples of {three}, such as 0, are not in {one}.')}"):
        select(f"{one} and {three}", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    assert selected(f"{one} and {two}", tmp_path, allow_unknown=True) == ([2], [1, 3, 7])
    assert selected(f"{one} minus {two}", tmp_path, allow_unknown=True) == ([1, 3], [2, 7])


def test_repeats_of_the_first_table_stay(tmp_path):
    first = write(tmp_path / "a.parquet", id=[3, 1, 3, 2, 2], keep=[True, True, False, False, False])
    other = write(tmp_path / "b.parquet", id=[1, 1, 2, 3], keep=[True] * 4)
    assert selected(f"{first}", tmp_path) == ([1, 3, 3], [2, 2])
    assert selected(f"{first} and {other}", tmp_path) == ([1, 3, 3], [2, 2])
    assert selected(f"{other} and {first}", tmp_path) == ([1, 1, 3], [2])
    assert Manifest(tmp_path / "out.parquet").provenance["sizes"] == [4, 2]


def test_ids_of_text_tables_follow_the_others(tmp_path):
    numbers, texts = (
        write(tmp_path / "n.csv", id=[1, 10], keep=[True] * 2),
        write(tmp_path / "t.csv", id=["1", "x"], keep=[True] * 2),
    )
    parquet = write(tmp_path / "t.parquet", id=["1", "10"], keep=[True] * 2)
    assert selected(f"{numbers}", tmp_path)[0] == [1, 10]
    assert selected(f"{numbers} and {parquet}", tmp_path)[0] == ["1", "10"]
    assert selected(f"{numbers} and {texts}", tmp_path, allow_unknown=True) == (["1"], ["10", "x"])
    whole = write(tmp_path / "n.parquet", id=pa.array([1, 10], pa.int32()), keep=[True] * 2)
    assert selected(f"{whole} and {numbers}", tmp_path)[0] == [1, 10]
    with pytest.raises(CurationError, match=r"n\.parquet has ids that are whole numbers, and elsewhere they are text"):
        select(f"{parquet} and {whole}", tmp_path / "new.parquet")
    with pytest.raises(CurationError, match="such as 'x'"):
        select(f"{whole} and {texts}", tmp_path / "new.parquet")


@for_each("ids", [["007", "7"], ["0.5", "1.4"], ["1e3", "1000"], [" 5", "5"], ["0x10", "16"], ["1_0", "10"]])
def test_ids_that_are_not_plainly_whole_numbers_stay_text(ids, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("".join(f"{line}\n" for line in ["id,keep", f"{ids[0]},true", f"{ids[1]},false"]))
    assert selected(f"{path}", tmp_path) == ([ids[0]], [ids[1]])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("none.csv", "none.csv is not there."),
        ("a.csv:scores top 3", "a.csv has no column 'scores'; nearest: 'score'."),
        ("b.csv", "b.csv has no column 'keep'; there are: 'id'."),
        ("c.csv:score top 1", "c.csv has no column 'id'; nearest: 'ids'."),
        ("a.csv:name top 1", "a.csv: 2 values of column 'name' are not numbers, such as "),
        ("a.csv:name top 1 and b.csv", "b.csv has no column 'keep'; there are: 'id'."),
        (
            "d.csv",
            "d.csv: column 'keep' holds 'maybe' (string); expected booleans, 0 and 1, or ",
        ),
        ("bad.parquet", "bad.parquet cannot be read: "),
    ],
)
def test_tables_that_cannot_be_read_are_refused(recipe, message, tmp_path):
    for name, text in (("a", "id,score,name\n1,2,x\n2,3,y\n3,3,4\n"), ("b", "id\n1\n2\n3\n"), ("c", "ids,score\n1,2\n"),
                       ("d", "id,keep\n1,true\n2,maybe\n")):  # fmt: skip
        (tmp_path / f"{name}.csv").write_text(text)
    (tmp_path / "bad.parquet").write_text("PAR1, not")
    recipe = re.sub(r"(\w+\.(csv|parquet))", rf"{tmp_path}/\1", recipe)
    with pytest.raises(CurationError, match=f"^{re.escape(f'{tmp_path}/{message}')}"):
        select(recipe, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_the_place_must_be_a_free_parquet_file(tmp_path):
    path = write(tmp_path / "a.parquet", id=[1, 2], keep=[True, False])
    before = path.read_bytes()
    with pytest.raises(CurationError, match=f"^`out` is {tmp_path}/b.csv; expected a path that ends in .parquet.$"):
        select(f"{path}", tmp_path / "b.csv")
    with pytest.raises(CurationError, match=f"^`out`: {path} is there already; name another file, or delete it.$"):
        select(f"{path}", path)
    assert path.read_bytes() == before
    assert select(f"{path}", tmp_path / "new" / "b.parquet").table()["id"].to_pylist() == [1, 2]


def test_tables_without_rows_select_nothing(tmp_path):
    path = write(tmp_path / "a.parquet", id=pa.array([], pa.string()), keep=pa.array([], pa.bool_()))
    assert selected(f"{path}", tmp_path) == ([], [])


def test_told_stages_have_shares_from_0_to_1(tmp_path):
    path, told = write(tmp_path / "a.csv", id=[1, 2], keep=[True, False]), []
    select(f"{path}", tmp_path / "b.parquet", progress=lambda what, share: told.append((what, share)))
    assert list(dict.fromkeys(what for what, _ in told)) == ["reading a.csv", "selecting", "writing"]
    assert all(0 <= share <= 1 for _, share in told)


def test_datacomps_metadata_are_a_directory_of_files_with_uids(tmp_path):
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    uids = [f"{k:032x}" for k in range(6)]
    write(metadata / "0.parquet", uid=uids[:3], s=[1.0, 6.0, 2.0])
    write(metadata / "1.parquet", uid=uids[3:], s=[5.0, 3.0, 4.0])
    (metadata / "0.npz").write_bytes(b"features")
    kept = write(tmp_path / "kept.parquet", id=uids, keep=[True, True, True, False, True, True])
    assert selected(f"{metadata}/:s top 40%", tmp_path)[0] == [uids[k] for k in (1, 3, 5)]
    assert selected(f"{metadata}/:s top 40% and {kept}", tmp_path)[0] == [uids[1], uids[5]]
    write_scores(tmp_path / "scores", [1.0, -1.0], ids=uids[:2])
    done = curate(tmp_path / "scores", pool=metadata, unscored="drop")
    assert (done.samples, done.kept, done.unscored) == (6, 1, 4)
    (tmp_path / "none").mkdir()
    with pytest.raises(CurationError, match=r"none is a directory without Parquet files \(\*\.parquet\)\.$"):
        select(f"{tmp_path}/none/:s top 1", tmp_path / "o.parquet")
    with pytest.raises(CurationError, match=r"metadata has no column 't'; there are: 's', 'uid'\.$"):
        select(f"{metadata}/:t top 1", tmp_path / "o.parquet")
