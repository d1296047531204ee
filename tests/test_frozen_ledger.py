"""Ledgers written once, with schema version 1 as first released: they must be readable for ever.

The files in ``tests/data`` are never written again. Two ranks wrote ``ledger_v1_int``; rows of its first attempt from
step 2 on (score 9) were superseded by the second, which was resumed there. ``ledger_v1_str`` has no labels, and its
last row is a distributed sampler's repeat.
"""

from pathlib import Path

import pyarrow as pa
import pytest

from lightning_mimic.curation import Sign, curate
from lightning_mimic.ledger import Ledger

DATA = Path(__file__).parent / "data"
NAMES = ["id", "epoch", "step", "batch", "rank", "position", "attempt", "score", "weight", "loss", "batch_size", "flag"]
NAMES += ["label", "predicted"]
INT_ROWS = [
    (10, 0, 0, 0, 0, 0, 0, 0.5, 0.25, 1.5, 4, "ok", 0, 0),
    (11, 0, 0, 0, 0, 1, 0, -1.25, 0.125, 2.5, 4, "ok", 1, 2),
    (13, 0, 0, 0, 1, 0, 0, 0.75, 0.375, 0.5, 4, "ok", 0, 0),
    (14, 0, 0, 0, 1, 1, 0, None, 0.25, 3.0, 4, "overflow", 1, 1),
    (12, 0, 1, 1, 0, 0, 0, None, 0.0, None, 2, "nonfinite_loss", 2, 0),
    (15, 0, 1, 1, 1, 0, 0, 2.0, 1.0, 0.25, 2, "ok", 2, 2),
    (12, 1, 2, 0, 0, 0, 1, -0.5, 0.125, 1.0, 3, "ok", 2, 1),
    (10, 1, 2, 0, 0, 1, 1, 1.0, 0.625, 0.75, 3, "ok", 0, 0),
    (11, 1, 2, 0, 1, 0, 1, -0.75, 0.25, 2.0, 3, "ok", 1, 1),
    (-7, 1, 3, 1, 0, 0, 1, 0.125, 1.0, 4.0, 1, "alone", None, None),
]
STR_ROWS = [
    ("cat/1.png", 0, 0, 0, 0, 0, 0, 0.5, 0.5, 1.5, 2, "ok", None, None),
    ("ä/ö, 2.png", 0, 0, 0, 0, 1, 0, -0.25, 0.5, 1.75, 2, "ok", None, None),
    ("", 0, 1, 1, 0, 0, 0, None, 0.5, 2.25, 2, "zero_direction", None, None),
]
REPEATED = ("cat/1.png", 0, 1, 1, 0, 1, 0, None, 0.5, 1.25, 2, "zero_direction", None, None)


@pytest.mark.parametrize(("kind", "rows", "repeats"), [("int", INT_ROWS, []), ("str", STR_ROWS, [REPEATED])])
def test_every_row_is_read_as_it_was_written(kind, rows, repeats):
    ledger = Ledger(DATA / f"ledger_v1_{kind}")
    for deduplicate, expected in ((True, rows), (False, [*rows, *repeats])):
        table = ledger.table(deduplicate=deduplicate)
        assert [tuple(row[name] for name in NAMES) for row in table.to_pylist()] == expected
    types = {"int": pa.int64(), "str": pa.string()}
    assert table.schema.field("id").type == types[kind]
    parts = ledger.parts()
    assert (parts.id_type, parts.has_classes, parts.lost) == (types[kind], kind == "int", ())
    assert (parts.attempts, parts.until) == (((0, 1), {0: 2}) if kind == "int" else ((0,), {}))


def test_the_description_is_read_as_it_was_written():
    meta = Ledger(DATA / "ledger_v1_int").meta
    assert (meta["schema_version"], meta["run"]) == (1, "0123456789ab")
    assert [attempt["start_step"] for attempt in meta["attempts"]] == [0, 2]
    assert [attempt["score_kind"] for attempt in meta["attempts"]] == ["own", "own"]
    assert meta["attempts"][0]["config"]["parameters"] == ["head.weight", "head.bias"]


def test_decisions_on_numbers():
    done = curate(DATA / "ledger_v1_int", Sign(), unscored="drop")
    columns = ["id", "keep", "score", "scorings", "relative_weight", "reason", "label", "predicted"]
    rows = [tuple(row[name] for name in columns) for row in done.manifest.table().to_pylist()]
    assert rows == [
        (11, False, -1.0, 2, 0.625, "mean score below 0", 1, 1),
        (12, False, -0.5, 1, 0.375, "mean score below 0", 2, 1),
        (-7, True, 0.125, 1, None, None, None, None),
        (10, True, 0.75, 2, 1.4375, None, 0, 0),
        (13, True, 0.75, 1, 1.5, None, 0, 0),
        (15, True, 2.0, 1, 2.0, None, 2, 2),
        (14, False, None, 0, None, "no score: overflow", 1, 1),
    ]


def test_decisions_on_text():
    done = curate(DATA / "ledger_v1_str", Sign(), unscored="keep")
    rows = [(row["id"], row["keep"], row["score"], row["reason"]) for row in done.manifest.table().to_pylist()]
    assert rows == [
        ("ä/ö, 2.png", False, -0.25, "mean score below 0"),
        ("cat/1.png", True, 0.5, None),
        ("", True, None, "no score: zero_direction"),
    ]
