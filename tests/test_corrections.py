"""Decisions and labels corrected by hand: read, checked, written to the manifest, trained on."""

import csv
from collections import namedtuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_mimic import WithIds
from lightning_mimic.curation import CurationError, Manifest, curate, select
from lightning_mimic.errors import MimicError
from lightning_mimic.manifest import kept_subset
from support.cases import for_each
from support.ledgers import write_ledger

NAMES = ("cat", "dog", "=cow")


def written_ledger(folder, scores, labels=None, class_names=None):
    columns = {"id": list(range(len(scores))), "score": scores}
    if labels is not None:
        columns["label"] = labels
    write_ledger(folder, columns, notes={} if class_names is None else {"class_names": list(class_names)})
    return folder


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """Six samples, 0 to 5, of which the odd ones have scores below 0; labels 0 to 2."""
    scores = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0]
    return written_ledger(tmp_path_factory.mktemp("scores"), scores, labels=[0, 1, 2, 0, 1, 2], class_names=NAMES)


def file_of(folder, *rows, head="id,keep,label,label_name"):
    path = folder / "corrections.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_decisions_and_labels_are_replaced_with_their_provenance(ledger, tmp_path):
    file = file_of(tmp_path, "1,true,2,'=cow", "0,false,,", "4,,0,cat", "5,true,,dog")
    done = curate(ledger, out=tmp_path / "curated", corrections=file, exports=["csv"])
    rows = {row["id"]: row for row in done.manifest.table().to_pylist()}
    assert {each: row["keep"] for each, row in rows.items()} == {0: False, 1: True, 2: True, 3: False, 4: True, 5: True}
    assert {each: row["corrected_label"] for each, row in rows.items()} == {0: None, 1: 2, 2: None, 3: None, 4: 0, 5: 1}
    assert rows[1]["corrected_label_name"] == "=cow"
    assert rows[1]["label"] == 1  # what was recorded stays
    assert {each: row["reason"] for each, row in rows.items()} == {
        0: "by hand", 1: "by hand", 2: None, 3: "mean score below 0", 4: None, 5: "by hand",
    }  # fmt: skip
    assert (done.samples, done.kept) == (6, 4)
    noted = {"file": "corrections.csv", "samples": 4, "kept": 2, "dropped": 1, "relabelled": 3}
    assert done.manifest.provenance["corrections"] == noted
    with (tmp_path / "curated" / "manifest.csv").open(newline="") as text:
        assert {row["corrected_label_name"] for row in csv.DictReader(text)} == {"", "'=cow", "cat", "dog"}


def test_a_table_of_typed_columns_does_the_same(ledger, tmp_path):
    path = tmp_path / "corrections.parquet"
    pq.write_table(pa.table({"id": [3, 1], "keep": [True, None], "label": pa.array([None, 0], pa.int32())}), path)
    rows = {row["id"]: row for row in curate(ledger, corrections=path).manifest.table().to_pylist()}
    assert (rows[3]["keep"], rows[3]["corrected_label"]) == (True, None)
    assert (rows[1]["keep"], rows[1]["corrected_label"]) == (False, 0)


def test_a_sample_without_a_score_is_decided_by_hand(tmp_path):
    ledger = written_ledger(tmp_path / "scores", [1.0, None, 2.0], labels=[0, 1, 0])
    with pytest.raises(CurationError, match="1 of 3 samples"):
        curate(ledger)
    done = curate(ledger, corrections=file_of(tmp_path, "1,true", head="id,keep"))
    assert (done.kept, done.samples) == (3, 3)


@for_each(
    ("rows", "message"),
    [
        (["7,true,,"], "corrects samples that are not in this ledger or pool, such as 7"),
        (["1,true,,", "1,false,,"], "two different corrections of sample 1"),
        (["1,,,"], "a row without a correction, for sample 1"),
        (["1,true,3,"], r"label of sample 1 is not a class \(keep True, label '3'\); expected 0 to 2"),
        (["1,true,-1,"], "label of sample 1 is not a class"),
        (["1,true,two,"], r"label of sample 1 is not a class \(keep True, label 'two'\)"),
        (["1,true,1.5,"], "label of sample 1 is not a class"),
        (["1,true,,dgo"], r"label of sample 1 is not a class \(keep True, label_name 'dgo'\).*nearest: 'dog'"),
        (["1,true,0,dog"], "label and label_name of sample 1 are different classes"),
        (["1,perhaps,,"], "column 'keep' holds 'perhaps'"),
        (["cat,true,,"], "cat"),
    ],
)
def test_what_cannot_be_applied_is_refused(ledger, tmp_path, rows, message):
    with pytest.raises(CurationError, match=message):
        curate(ledger, corrections=file_of(tmp_path, *rows))


def test_a_table_without_corrections_is_refused(ledger, tmp_path):
    with pytest.raises(CurationError, match="at least one of the columns keep, label, label_name"):
        curate(ledger, corrections=file_of(tmp_path, "1", head="id"))
    with pytest.raises(CurationError, match="is not there"):
        curate(ledger, corrections=tmp_path / "nowhere.csv")


def test_labels_of_a_run_without_labels_are_refused(tmp_path):
    ledger = written_ledger(tmp_path / "scores", [1.0, -1.0])
    with pytest.raises(CurationError, match="corrects the label of sample 1, but the run recorded no labels"):
        curate(ledger, corrections=file_of(tmp_path, "1,true,0,"))
    with pytest.raises(CurationError, match=r"without a correction, for sample 1\. The run recorded no class names"):
        curate(ledger, corrections=file_of(tmp_path, "1,,,cat"))


Pair = namedtuple("Pair", ["image", "label"])


@for_each(
    "wrap",
    [
        lambda label: ("image", label, "more"),
        lambda label: ["image", label],
        lambda label: Pair("image", torch.tensor(label)),
        lambda label: {"image": "image", "label": label},
        lambda label: {"pixels": "image", "labels": torch.tensor(label)},
    ],
)
def test_corrected_labels_are_trained_on(ledger, tmp_path, wrap):
    file = file_of(tmp_path, "1,true,2,", "4,,0,")
    manifest = curate(ledger, corrections=file).manifest
    given = [0, 1, 2, 0, 1, 2]
    for dataset in ([wrap(label) for label in given], WithIds([wrap(label) for label in given])):
        subset = manifest.subset(dataset)
        samples = [getattr(sample, "sample", sample) for sample in subset]
        expected = [wrap(label) for label in (0, 2, 2, 0)]  # of the samples 0, 1, 2 and 4
        assert [type(sample) for sample in samples] == [type(sample) for sample in expected]
        assert samples == expected
        assert getattr(dataset[1], "sample", dataset[1]) == wrap(1)  # the data set itself is not changed
        assert len(kept_subset(subset.dataset, manifest.path)) == 4  # ids are found below


def test_a_sample_without_a_known_label_is_refused(ledger, tmp_path):
    manifest = curate(ledger, corrections=file_of(tmp_path, "1,true,2,")).manifest
    subset = manifest.subset(["text"] * 6)
    assert subset[0] == "text"
    with pytest.raises(MimicError, match="a sample of the data set is a str whose label is not known"):
        subset[1]


def test_a_selection_of_corrected_manifests_keeps_the_labels(ledger, tmp_path):
    file = file_of(tmp_path, "1,true,2,")
    curate(ledger, corrections=file, out=tmp_path / "curated")
    chosen = select(f"{tmp_path}/curated/manifest.parquet:score top 5", tmp_path / "chosen.parquet")
    rows = {row["id"]: row for row in Manifest(chosen.path).table().to_pylist()}
    assert rows[1]["corrected_label"] == 2
    assert rows[0]["corrected_label"] is None
    curate(ledger, corrections=file_of(tmp_path, "1,true,0,"), out=tmp_path / "other")
    with pytest.raises(CurationError, match="different corrected labels of 1"):
        select(f"{tmp_path}/curated/manifest.parquet and {tmp_path}/other/manifest.parquet", tmp_path / "both.parquet")
