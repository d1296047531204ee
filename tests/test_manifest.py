"""Manifests and what other tools read of them: no id is ever another one, and every form says the same."""

import csv
import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_mimic import WithIds, collate_with_ids
from lightning_mimic.curation import CurationError, Manifest, curate, select
from lightning_mimic.database import Database
from lightning_mimic.manifest import KeptIds, kept_subset, write_manifest
from support.cases import for_each
from support.ledgers import write_scores


def manifest(path, ids, keep=True, **columns):
    keep = [keep] * len(ids) if isinstance(keep, bool) else keep
    pq.write_table(pa.table({"id": ids, "keep": keep} | columns), path, compression="zstd", write_page_checksum=True)
    return Manifest(path)


def uids(n, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.bytes(16).hex() for _ in range(n)]


def read_csv(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def npy(made, folder):
    made.to_datacomp(folder / "read.npy")
    return np.load(folder / "read.npy").tolist()


def comma_separated(made, folder):
    made.to_csv(folder / "read.csv")
    return (folder / "read.csv").read_text()


def issues(made, folder):
    made.to_cleanlab(folder / "read.csv")
    return (folder / "read.csv").read_text()


def selection(made, folder):
    (folder / "out.parquet").unlink(missing_ok=True)
    return select(str(made.path), folder / "out.parquet").table().to_pylist()


READERS = {
    "table": lambda made, folder: made.table().to_pylist(),
    "subset": lambda made, folder: kept_subset(WithIds(range(150), uids(150)), made.path).indices,
    "csv": comma_separated,
    "datacomp": npy,
    "cleanlab": issues,
    "select": selection,
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_is_never_read_as_other_decisions(reader, run_seed, tmp_path):
    ids, keep = uids(150), [k % 3 > 0 for k in range(150)]
    write_scores(tmp_path / "scores", [1.0 if k else -1.0 for k in keep], ids=ids, label=1, predicted=2)
    path = curate(tmp_path / "scores", None, tmp_path / "out").manifest.path
    right = READERS[reader](Manifest(path), tmp_path)
    content, wrong, refused = path.read_bytes(), [], 0
    pages = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # before what describes the file
    draw = np.random.default_rng(run_seed)
    for at in draw.integers(4, pages, size=pages // 97).tolist():
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(draw.integers(8))
        path.write_bytes(flipped)
        try:
            if READERS[reader](Manifest(path), tmp_path) != right:
                wrong.append(at)
        except (ValueError, OSError):  # CurationError among them
            refused += 1
    assert (wrong, refused > 20) == ([], True)


def test_what_is_no_manifest_is_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("no table at all")
    pq.write_table(pa.table({"id": [1], "kept": [True]}), tmp_path / "other.parquet")
    for name, why in (
        ("none.parquet", "there is no such file."),
        (".", "there is no such file."),
        ("text.parquet", "Parquet magic bytes not found"),
        ("other.parquet", "its columns are id, kept."),
    ):
        path = tmp_path / name
        with pytest.raises(CurationError, match=f"^{re.escape(f'{path} is no manifest: {why}')}"):
            Manifest(path)
        if name != ".":
            with pytest.raises(ValueError, match=f"^{re.escape(f'{path} is no manifest: ')}"):
                kept_subset([0], path)


def test_a_file_that_is_cut_off_is_no_manifest(tmp_path):
    content = manifest(tmp_path / "a.parquet", list(range(100))).path.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "a.parquet").write_bytes(content[:size])
        with pytest.raises(CurationError, match=r"a\.parquet is no manifest: "):
            Manifest(tmp_path / "a.parquet")


def test_it_is_written_in_the_order_of_its_query_with_its_provenance(tmp_path):
    said = {"made": ["of", 1, None]}
    with Database() as database:
        query = "SELECT range AS id, range % 2 = 0 AS keep FROM range(300000) ORDER BY id DESC"
        with database.reader(query) as rows:
            made = write_manifest(tmp_path / "new" / "a.parquet", rows, said)
    assert made.provenance == said == Manifest(tmp_path / "new" / "a.parquet").provenance
    assert made.table()["id"].to_pylist() == list(range(299999, -1, -1))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("kind", ["int", "str", "places"])
def test_a_subset_has_what_is_kept_in_the_data_sets_order(kind, tmp_path):
    ids = {"int": [40, 30, 20, 10], "str": ["b", "007", "7", "a"], "places": [0, 1, 2, 3]}[kind]
    images = torch.arange(4.0)
    dataset = TensorDataset(images, images.long())
    dataset = dataset if kind == "places" else WithIds(dataset, ids)
    made = manifest(tmp_path / "a.parquet", [ids[3], ids[0], ids[1], ids[2]], [True, True, False, True])
    subset = made.subset(dataset)
    assert subset.indices == [0, 2, 3]
    assert subset.dataset is dataset
    if kind == "places":
        assert subset[1] == (2.0, 2)
        assert WithIds(dataset).ids is None
        assert made.subset(WithIds(dataset)).indices == [0, 2, 3]
        return
    batches = list(DataLoader(subset, 2, collate_fn=collate_with_ids))
    assert [x.tolist() for x, _ in batches] == [[0.0, 2.0], [3.0]]
    told = [list(batch.ids) if kind == "str" else batch.ids.tolist() for batch in batches]
    assert told == [[ids[0], ids[2]], [ids[3]]]


def test_what_a_manifest_keeps_twice_is_there_twice(tmp_path):
    made = manifest(tmp_path / "a.parquet", ["x", "y", "x", "z", "z"], [True, True, True, True, False])
    assert made.subset(WithIds(list("zyx"), list("zyx"))).indices == [0, 1, 2, 2]


def test_undecided_samples_are_not_kept(tmp_path):
    assert manifest(tmp_path / "a.parquet", [0, 1], [None, True]).subset(["a", "b"]).indices == [1]


@pytest.mark.parametrize(
    ("ids", "dataset", "message"),
    [
        ([0, 1, 2], WithIds("ab"), "3 samples and the data set has 2; 1 ids are in one of them alone, such as 2."),
        ([0, 1], WithIds("abc", [0, 1, 5]), "2 samples and the data set has 3; 1 ids are in one of them alone,"),
        (["0", "1"], "ab", "2 samples and the data set has 2; 4 ids are in one of them alone, such as "),
        ([1, 2], "ab", "2 samples and the data set has 2; 2 ids are in one of them alone, such as 0. Curate the"),
    ],
)  # fmt: skip
def test_a_manifest_of_other_samples_is_refused(ids, dataset, message, tmp_path):
    made = manifest(tmp_path / "a.parquet", ids)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{made.path} decides on {message}')}"):
        made.subset(dataset)


def test_a_manifest_that_keeps_none_has_no_subset(tmp_path):
    with pytest.raises(ValueError, match=r"a\.parquet keeps none of its 2 samples\.$"):
        manifest(tmp_path / "a.parquet", [0, 1], keep=False).subset("ab")


def recipe(kept):
    """As DataComp's own text says."""
    arr = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in kept], np.dtype("u8,u8"))
    arr.sort()
    file = io.BytesIO()
    np.save(file, arr)
    return file.getvalue()


@for_each("share", [0.0, 0.5, 1.0])
def test_datacomps_file_is_byte_for_byte_what_its_recipe_gives(share, tmp_path):
    ids = [*uids(500), "0" * 32, "f" * 32, "8" + "0" * 31, "7" + "f" * 31, "0" * 16 + "f" * 16]
    ids += [*(uid.upper() for uid in uids(50, seed=1)), *ids[:20], ids[3]]  # repeats
    keep = np.random.default_rng(2).random(len(ids)) < share
    manifest(tmp_path / "a.parquet", ids, keep.tolist()).to_datacomp(tmp_path / "kept.npy")
    kept = [uid for uid, stays in zip(ids, keep, strict=True) if stays]
    assert (tmp_path / "kept.npy").read_bytes() == recipe(kept)
    loaded = np.load(tmp_path / "kept.npy")
    assert (loaded.dtype, loaded.shape) == (np.dtype("u8,u8"), (len(kept),))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "kept.npy"]


def test_repeats_stay_together_whatever_their_case(tmp_path):
    ids = ["a" * 32, "B" * 32, "A" * 32, "b" * 32, "A" * 31 + "9"]
    manifest(tmp_path / "a.parquet", ids).to_datacomp(tmp_path / "kept.npy")
    assert (tmp_path / "kept.npy").read_bytes() == recipe(ids)


@for_each("bad", ["0" * 33, "0" * 31, "+" + "0" * 31, "-" + "1" * 31, " " + "0" * 31, "0x" + "0" * 30,
                                 "g" * 32, "1_" * 16, "0" * 32 + "\n", "٣" * 32])  # fmt: skip
def test_what_is_no_uid_is_named_and_nothing_is_written(bad, tmp_path):
    made = manifest(tmp_path / "a.parquet", ["0" * 32, bad], keep=[True, False])
    message = f"DataComp's ids are 32 hexadecimal digits, and {bad!r} is not."
    with pytest.raises(CurationError, match=f"^{re.escape(message)}$"):
        made.to_datacomp(tmp_path / "kept.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_numbers_are_no_uids(tmp_path):
    with pytest.raises(
        CurationError, match=r"^DataComp's ids are 32 hexadecimal digits, and these are whole numbers\.$"
    ):
        manifest(tmp_path / "a.parquet", [0, 1]).to_datacomp(tmp_path / "kept.npy")


def test_cleanlabs_table_ranks_by_score_and_shows_labels(tmp_path):
    ids, scores = ["e", "d", "c", "b", "a", "f"], [2.0, 2.0, -5.0, None, 100.0, 0.5]
    keep = [True, True, False, False, True, True]
    labels = {"label": [1, 2, 3, None, 5, 6], "predicted": [1, None, 9, 9, 5, 6]}
    made = manifest(tmp_path / "a.parquet", ids, keep, score=scores, **labels)
    made.to_cleanlab(tmp_path / "issues.csv")
    with (tmp_path / "issues.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["id", "is_label_issue", "label_quality", "given_label", "predicted_label"],
        ["a", "false", "1.0", "5", "5"],
        ["b", "true", "", "", "9"],
        ["c", "true", "0.0", "3", "9"],
        ["d", "false", "0.5", "2", ""],  # as good as e: both are above two of the other four
        ["e", "false", "0.5", "1", "1"],
        ["f", "false", "0.25", "6", "6"],
    ]


def test_cleanlabs_table_has_the_label_that_the_reference_suggests(tmp_path):
    columns = {"label": [1, 2], "predicted": [1, None], "reference_predicted": [3, None]}
    made = manifest(tmp_path / "a.parquet", ["a", "b"], [True, False], score=[1.0, 0.0], **columns)
    made.to_cleanlab(tmp_path / "issues.csv")
    with (tmp_path / "issues.csv").open() as file:
        rows = list(csv.reader(file))
    assert [row[3:] for row in rows] == [
        ["given_label", "predicted_label", "reference_label"],
        ["1", "1", "3"],
        ["2", "", ""],
    ]


def test_cleanlabs_table_needs_labels(tmp_path):
    none = {"score": [1.0], "label": pa.nulls(1, pa.int64()), "predicted": pa.nulls(1, pa.int64())}
    for columns in ({}, none):
        with pytest.raises(CurationError, match=r"^cleanlab's table shows labels, and none were recorded\. Let"):
            manifest(tmp_path / "a.parquet", ["a"], **columns).to_cleanlab(tmp_path / "issues.csv")
    assert not (tmp_path / "issues.csv").exists()


AWKWARD = ["a,b", '"q"', "it's", "007", "7", " x ", "a;b", "#1", "line\nbreak", "ä/1", "NULL", "true", "1e3"]


def test_ids_survive_the_way_through_csv(tmp_path):
    keep = [k % 2 == 0 for k in range(len(AWKWARD))]
    manifest(tmp_path / "a.parquet", AWKWARD, keep).to_csv(tmp_path / "a.csv")
    rows = read_csv(tmp_path / "a.csv")
    assert [(row["id"], row["keep"]) for row in rows] == [
        (i, str(k).lower()) for i, k in zip(AWKWARD, keep, strict=True)
    ]
    back = select(str(tmp_path / "a.csv"), tmp_path / "b.parquet").table().to_pylist()
    assert {row["id"]: row["keep"] for row in back} == dict(zip(AWKWARD, keep, strict=True))


@for_each("bad", ["", None])
def test_no_id_is_missing_or_empty_more_than_once(bad, tmp_path):
    made = manifest(tmp_path / "a.parquet", [bad, bad, "b"])
    (tmp_path / "b.csv").write_text('id,keep\n"",true\n"",true\nb,true\n')
    for path, read in (
        (made.path, made.table),
        (made.path, lambda: made.to_csv(tmp_path / "a.csv")),
        (made.path, lambda: made.subset(WithIds("ab", ["a", "b"]))),
        (made.path, lambda: KeptIds(made.path)),
        (made.path, lambda: select(str(made.path), tmp_path / "c.parquet")),
        (tmp_path / "b.csv", lambda: select(str(tmp_path / "b.csv"), tmp_path / "c.parquet")),
    ):
        with pytest.raises(CurationError, match=f"^{path}: 2 rows have no id \\(it is missing or empty\\)\\.$"):
            read()


def test_all_columns_are_in_the_csv_as_they_are_in_the_table(tmp_path):
    write_scores(tmp_path / "scores", [0.1, None, -2.5], ids=[3, 2, 1], label=7, predicted=8)
    made = curate(tmp_path / "scores", None, tmp_path / "keep=7" / "[a]", unscored="drop").manifest
    made.to_csv(tmp_path / "a.csv")
    table = made.table()
    assert list(read_csv(tmp_path / "a.csv")[0]) == table.column_names
    text = [["" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in row.values()]
            for row in table.to_pylist()]  # fmt: skip
    assert [list(row.values()) for row in read_csv(tmp_path / "a.csv")] == text


def test_another_file_of_a_like_name_is_not_read(tmp_path):
    manifest(tmp_path / "run1.parquet", [8, 9])
    manifest(tmp_path / "run[1].parquet", [4, 5]).to_csv(tmp_path / "a.csv")
    assert [row["id"] for row in read_csv(tmp_path / "a.csv")] == ["4", "5"]


def test_ids_that_share_a_half_are_told_apart(tmp_path):
    known = [(1, 1), (1, 5), (1, 5), (2, 1)]
    made = manifest(tmp_path / "manifest.parquet", [f"{high:016x}{low:016x}" for high, low in known])
    kept = KeptIds(made.path)
    for high in range(4):
        for low in range(7):
            assert kept.times(f"{high:016x}{low:016x}") == (known.count((high, low)) or None)


def test_a_flipped_bit_of_an_id_is_not_another_sample(tmp_path):
    path, ids = tmp_path / "manifest.parquet", list(range(1000, 1040))
    table = pa.table({"id": ids, "keep": [True] * 40})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    place = content.index((1017).to_bytes(8, "little"))
    path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])  # 1017 becomes 953
    with pytest.raises(ValueError, match=r"manifest\.parquet is no manifest: .*CRC"):
        kept_subset(WithIds(ids, [953 if i == 1017 else i for i in ids]), path)
