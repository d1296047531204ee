"""Names of the classes: from the data into the ledger, the manifest and what other tools read of it."""

import csv

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_mimic import GradMimic, Ledger, WithIds, collate_with_ids
from lightning_mimic.curation import Manifest, curate, select
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.models import ImageClassifier
from support.ledgers import write_ledger
from support.toys import trainer

NAMES = ["cat, big", "it's a 'dog'", 'the "owl"']


@pytest.fixture
def named(tmp_path):
    rows = {"id": [1, 2, 3, 4, 5], "score": [1.0, 2.0, 3.0, 4.0, 5.0]}
    rows |= {"label": [0, 1, 2, None, 2**63 - 1], "predicted": [2, 1, 0, 1, -2]}
    write_ledger(tmp_path / "scores", rows, notes={"class_names": NAMES})
    return curate(tmp_path / "scores", None, tmp_path / "out").manifest


def test_a_manifest_has_names_beside_indices(named):
    table = named.table()
    assert table["label"].to_pylist() == [0, 1, 2, None, 2**63 - 1]
    assert table["label_name"].to_pylist() == [*NAMES, None, None]  # there are three
    assert table["predicted_name"].to_pylist() == [NAMES[2], NAMES[1], NAMES[0], NAMES[1], None]
    assert named.class_names == Manifest(named.path).class_names == tuple(NAMES)


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_and_cleanlabs_table_show_the_names(named, tmp_path):
    named.to_csv(tmp_path / "a.csv")
    rows = read_csv(tmp_path / "a.csv")
    assert [(row["label"], row["label_name"]) for row in rows[:4]] == [
        ("0", NAMES[0]),
        ("1", NAMES[1]),
        ("2", NAMES[2]),
        ("", ""),
    ]
    named.to_cleanlab(tmp_path / "b.csv")
    rows = read_csv(tmp_path / "b.csv")
    assert [row["given_label"] for row in rows] == [*NAMES, "", str(2**63 - 1)]
    assert [row["predicted_label"] for row in rows] == [NAMES[2], NAMES[1], NAMES[0], NAMES[1], "-2"]


def test_a_selection_from_manifests_keeps_the_names(named, tmp_path):
    recipe = f"{named.path}:score top 3 and {named.path}:score bottom 4"
    chosen = select(recipe, tmp_path / "chosen.parquet", exports=["csv"])
    assert chosen.class_names == tuple(NAMES)
    rows = chosen.table().sort_by("id").to_pylist()
    assert [(row["id"], row["keep"]) for row in rows] == [(1, False), (2, False), (3, True), (4, True), (5, False)]
    assert [row["label_name"] for row in rows] == [*NAMES, None, None]
    assert [row["predicted"] for row in rows] == [2, 1, 0, 1, -2]
    assert [row["label_name"] for row in read_csv(next(tmp_path.glob("chosen*.csv")))] == [*NAMES, "", ""]


def test_without_names_there_are_indices_only(tmp_path):
    write_ledger(tmp_path / "scores", {"id": [1], "score": [1.0], "label": 0})
    made = curate(tmp_path / "scores").manifest
    assert (made.class_names, Ledger(tmp_path / "scores").class_names) == (None, None)
    assert made.table().column_names[-2:] == ["label", "predicted"]
    assert "class_names" not in made.provenance


def classifier(inputs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), 10, inputs)


def test_a_fit_records_the_names_of_its_data_module(tmp_path):
    mimic = GradMimic(classifier((1, 8, 8)).state_dict(), "head", ledger=tmp_path, on_doubtful="warn")
    with pytest.warns(UserWarning, match="stands at its reference"):
        trainer(mimic, max_steps=2, limit_val_batches=0).fit(classifier((1, 8, 8)), datamodule=DigitsDataModule())
    assert Ledger(tmp_path).class_names == tuple("0123456789")


class Birds(TensorDataset):
    classes = ("owl", "wren")


def test_a_fit_records_the_names_of_a_data_set_that_is_wrapped(tmp_path):
    birds = Birds(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
    loader = DataLoader(WithIds(Subset(birds, range(6))), 3, collate_fn=collate_with_ids)
    mimic = GradMimic(classifier((1, 8, 8)).state_dict(), "head", ledger=tmp_path)
    with pytest.warns(UserWarning, match="stands at its reference"):
        trainer(mimic, max_steps=2, limit_val_batches=0).fit(classifier((1, 8, 8)), loader)
    assert Ledger(tmp_path).class_names == ("owl", "wren")
