"""From a ledger to a manifest: every row against a slow loop, every id of the pool, and nothing left by what stops."""

import gc
import os
import re
import tempfile
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from lightning_mimic.curation import CurationError, Sign, Threshold, curate
from lightning_mimic.curation.filters import Filter, Vote
from lightning_mimic.ledger import LedgerError
from lightning_mimic.manifest import EXPORTS, Export
from lightning_mimic.version import __version__
from support.ledgers import write_ledger, write_scores

UID = "{:032x}".format


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def random_rows(names, seed=0):
    """Three epochs with gaps, repeats within an epoch and samples without a score; all numbers exact in float32."""
    generator = np.random.default_rng(seed)
    rows = []
    for epoch in range(3):
        for place, i in enumerate(generator.permutation(len(names))):
            if generator.random() < 0.2:
                continue
            lost = i >= len(names) - 3
            row = {"id": names[i], "epoch": epoch, "step": epoch, "batch": place // 8, "position": place % 8}
            row |= {"batch_size": 8, "weight": int(generator.integers(1, 64)) / 64, "label": int(generator.integers(4))}
            row |= {"score": None if lost else int(generator.integers(-9, 9)) / 8, "predicted": int(i) % 5 + epoch}
            row["flag"] = "nonfinite_loss" if lost else "alone" if i < 3 else "ok"
            rows.append(row)
            if generator.random() < 0.2:
                rows.append(row | {"batch": 50, "score": None if lost else 7.0, "weight": 0.5})
    return rows


def slow(rows, everyone, keep_unscored):
    """What curate should write, by the sign of the mean."""
    first = {}
    for row in sorted(rows, key=lambda r: (r["epoch"], r["step"], r["batch"], r["position"])):
        first.setdefault((row["id"], row["epoch"]), row)
    out = []
    for name in everyone:
        mine = [row for (owner, _), row in first.items() if owner == name]
        scored = [row for row in mine if row["score"] is not None]
        products = [row["weight"] * row["batch_size"] for row in scored if row["flag"] != "alone"]
        score = sum(row["score"] for row in scored) / len(scored) if scored else None
        why = f"no score: {mine[0]['flag']}" if mine else "never scored"
        reason = why if score is None else None if score >= 0 else "mean score below 0"
        facts = {"id": name, "keep": keep_unscored if score is None else score >= 0, "score": score}
        facts |= {"scorings": len(scored), "relative_weight": sum(products) / len(products) if products else None}
        facts |= {"votes_keep": None, "votes": None, "reason": reason}
        out.append(facts | {name: mine[-1][name] if mine else None for name in ("label", "predicted")})
    return sorted(out, key=lambda row: (row["score"] is None, row["score"] or 0, row["id"]))


@pytest.mark.parametrize("kind", ["int", "str"])
@pytest.mark.parametrize("pool", [None, "parquet", "csv"])
def test_every_row_agrees_with_a_slow_loop(kind, pool, run_seed, tmp_path):
    names = [k * 7 - 60 for k in range(50)] if kind == "int" else [f"{k:03}, of\"'{k}" for k in range(50)]
    rows = random_rows(names, run_seed)
    write_ledger(tmp_path / "scores", rows)
    everyone = sorted({row["id"] for row in rows})
    if pool is not None:
        # Two are listed twice, two were never scored.
        everyone = [*names, names[0], names[-1], *([10**12, -5] if kind == "int" else ["zz", "z"])]
        write = pq.write_table if pool == "parquet" else pa.csv.write_csv
        write(pa.table({"id": everyone[::-1], "x": range(len(everyone))}), tmp_path / f"pool.{pool}")
    path = None if pool is None else tmp_path / f"pool.{pool}"
    for unscored in ("keep", "drop"):
        done = curate(tmp_path / "scores", None, tmp_path / unscored, pool=path, unscored=unscored)
        want = slow(rows, everyone, unscored == "keep")
        table = done.manifest.table()
        assert table.to_pylist() == want
        assert (done.samples, done.kept) == (len(want), sum(row["keep"] for row in want))
        assert done.unscored == sum(row["score"] is None for row in want) > 0
        by_id = {row["id"]: row["score"] for row in want if row["score"] is not None}
        assert done.share_kept == sum(score >= 0 for score in by_id.values()) / len(by_id)
        kept = [row["score"] for row in want if row["keep"] and row["score"] is not None]
        assert done.mean_score_kept == pytest.approx(sum(kept) / len(kept))
        assert done.manifest.provenance["unscored"] == {"samples": done.unscored, "are": unscored}
    types = {"id": "int64" if kind == "int" else "string", "keep": "bool", "score": "double", "scorings": "int32"}
    types |= {"relative_weight": "double", "votes_keep": "int32", "votes": "int32", "reason": "string"}
    types |= {"label": "int64", "predicted": "int64"}
    assert {field.name: str(field.type) for field in table.schema} == types


def test_what_it_was_made_of_is_noted(tmp_path):
    notes = {"score_kind": "own", "data": {"samples": 4}}
    rows = {"id": ["a", "b", "c"], "score": [1.0, -0.5, 0.0]}
    run = write_ledger(tmp_path / "scores", rows, configs={"scorer": "x"}, notes=notes)
    done = curate(tmp_path / "scores", Threshold(), tmp_path / "out")
    said = dict(done.manifest.provenance)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", said.pop("created"))
    ledger = {"directory": str(tmp_path / "scores"), "run": run, "config": {"scorer": "x"}, "checkpoints": None}
    assert said == {
        "package_version": __version__, "ledger": ledger | notes, "filter": "Threshold()", "facts": {}, "pool": None,
        "unscored": {"samples": 0, "are": "fail"}, "corrections": None, "lost": [], "samples": 3, "kept": 3,
        "share_kept": 2 / 3,
        "mean_score": {"all": 0.5 / 3, "kept": 0.5 / 3}, "quality": None, "wrong_share": None, "verdict": None,
        "diagnosis": "The reference was not diagnosed",
    }  # fmt: skip


def test_samples_without_a_score_stop_it_unless_told_what_becomes_of_them(tmp_path):
    flags = ["ok", "zero_direction", "overflow"]
    write_ledger(tmp_path / "scores", {"id": [4, 5, 6], "score": [1.0, None, None], "flag": flags})
    message = (
        "no decision on 2 of 3 samples, such as 5 (no score: zero_direction). "
        "`unscored='keep'` keeps them, `unscored='drop'` drops them."
    )
    with pytest.raises(CurationError, match=f"^{re.escape(message)}$"):
        curate(tmp_path / "scores", None, tmp_path / "out")
    with pytest.raises(CurationError, match=r"^`unscored` is 'kep'; nearest: 'keep'"):
        curate(tmp_path / "scores", None, tmp_path / "out", unscored="kep")
    assert sorted(os.listdir(tmp_path)) == ["scores", "temporary"]


def test_a_ledger_without_any_score_is_refused(tmp_path):
    write_ledger(tmp_path / "scores", {"id": [4, 5]})
    with pytest.raises(CurationError, match=f"^{re.escape(str(tmp_path / 'scores'))}: none of its samples has a score"):
        curate(tmp_path / "scores", unscored="keep")


def test_a_sample_that_was_only_alone_in_its_batch_is_not_said_to_be_never_scored(tmp_path):
    write_ledger(tmp_path / "scores", {"id": [4, 5], "score": [1.0, 2.0], "flag": ["ok", "alone"], "batch": [0, 1]})
    rows = curate(tmp_path / "scores", Threshold(), unscored="drop").manifest.table().to_pylist()
    assert {row["id"]: row["scorings"] for row in rows} == {4: 1, 5: 1}
    assert [row["reason"] for row in rows if row["id"] == 5] != ["never scored"]


def test_exports_lie_beside_the_manifest(tmp_path):
    write_scores(tmp_path / "scores", [1.0, -1.0], ids=[UID(5), UID(9)], label=3, predicted=4)
    exports = ["cleanlab", "datacomp", "csv"]
    done = curate(tmp_path / "scores", None, tmp_path / "a" / "b", exports=exports)
    names = ["kept.npy", "label_issues.csv", "manifest.csv", "manifest.parquet"]
    assert done.files == tuple(tmp_path / "a" / "b" / name for name in names)
    assert sorted(os.listdir(tmp_path / "a" / "b")) == names
    assert np.load(done.files[0]).tolist() == [(0, 5)]
    assert oct((tmp_path / "a" / "b").stat().st_mode & 0o777) == "0o755"


@pytest.mark.parametrize(
    ("exports", "message"),
    [
        (["cvs"], "`exports`: 'cvs'; nearest: 'csv'."),
        (["datacomp"], "DataComp's ids are 32 hexadecimal digits, and these are whole numbers."),
        (["cleanlab"], "cleanlab's table shows labels, and none were recorded. Let training_step return a dict"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_the_work(exports, message, tmp_path):
    write_scores(tmp_path / "scores", [1.0, -1.0])
    with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
        curate(tmp_path / "scores", Raises(), tmp_path / "out", exports=exports)


def test_a_directory_that_holds_something_is_refused_and_left_alone(tmp_path):
    write_scores(tmp_path / "scores", [1.0, -1.0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        message = f"`out`: {tmp_path / name} is there already; name another directory, or delete it."
        with pytest.raises(CurationError, match=f"^{re.escape(message)}$"):
            curate(tmp_path / "scores", None, tmp_path / name)
    assert os.listdir(tmp_path / "full") == ["mine"]
    (tmp_path / "empty").mkdir()
    assert curate(tmp_path / "scores", None, tmp_path / "empty").files == (tmp_path / "empty" / "manifest.parquet",)


def test_what_came_into_the_directory_meanwhile_is_not_lost(tmp_path, temporary):
    write_scores(tmp_path / "scores", [1.0, -1.0])

    def progress(what, share):
        if what == "writing":
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "mine").write_text("x")

    message = f"{tmp_path}/out was not written: {tmp_path}/out is there already; name"
    with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
        curate(tmp_path / "scores", None, tmp_path / "out", progress=progress)
    assert os.listdir(tmp_path / "out") == ["mine"]
    assert sorted(os.listdir(tmp_path)) == ["out", "scores", "temporary"]
    assert os.listdir(temporary) == []


def test_without_a_directory_the_files_go_with_the_result(tmp_path, temporary):
    write_scores(tmp_path / "scores", [1.0, -1.0])
    done = curate(tmp_path / "scores", exports=["csv"])
    assert [path.exists() for path in done.files] == [True, True]
    assert [path.parent.parent for path in done.files] == [temporary, temporary]
    del done
    gc.collect()
    assert os.listdir(temporary) == []


class Raises(Filter):
    def vote(self, table):
        raise RuntimeError("on purpose")


class Quoting(Filter):
    def vote(self, table):
        return Vote("CASE WHEN id > 4 THEN score > 1 END", "it's low")


def test_a_filter_of_ones_own_decides_and_says_why(tmp_path):
    write_scores(tmp_path / "scores", [3.0, 2.0, 1.0], ids=[4, 5, 6])
    done = curate(tmp_path / "scores", Quoting(), unscored="drop")
    rows = [tuple(row.values()) for row in done.manifest.table().select(["id", "keep", "reason"]).to_pylist()]
    assert rows[:2] == [(6, False, "it's low"), (5, True, None)]
    assert (rows[2][:2], done.unscored) == ((4, False), 1)


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["filter", "export", "write_batch", "rename"])
def test_a_failure_leaves_nothing_behind(place, tmp_path, temporary, monkeypatch):
    write_scores(tmp_path / "scores", [1.0, -1.0])
    if place == "export":
        export = Export("manifest.csv", full_disk, lambda database, table: None)
        monkeypatch.setitem(EXPORTS, "csv", export)
    elif place == "write_batch":
        monkeypatch.setattr(pq.ParquetWriter, "write_batch", full_disk)
    elif place == "rename":
        monkeypatch.setattr(os, "replace", full_disk)
    threads = set(threading.enumerate())
    for out in (tmp_path / "out",) if place == "rename" else (tmp_path / "out", None):
        with pytest.raises((CurationError, RuntimeError), match=r"was not written: No space left|on purpose") as info:
            curate(tmp_path / "scores", Raises() if place == "filter" else Sign(), out, exports=["csv"], progress=print)
        time.sleep(0.5)  # whoever watches a query sees that it is gone, also while the error is looked at
        assert info.value.__traceback__ is not None  # which holds the frames
        assert set(threading.enumerate()) <= threads
        assert sorted(os.listdir(tmp_path)) == ["scores", "temporary"]
        assert os.listdir(temporary) == []


def test_an_interruption_leaves_nothing_behind_wherever_it_comes(tmp_path, temporary):
    write_scores(tmp_path / "scores", [[1.0, -1.0]] * 2)
    calls = 0

    def interrupt(at):
        def progress(what, share):
            nonlocal calls
            if threading.current_thread() is threading.main_thread():
                calls += 1
                if calls == at:
                    raise KeyboardInterrupt

        return progress

    curate(tmp_path / "scores", None, tmp_path / "whole", exports=["csv"], progress=interrupt(-1))
    many, before = calls, sorted(os.listdir(tmp_path))
    for at in range(1, max(many, 9) + 1):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            curate(tmp_path / "scores", None, tmp_path / "out", exports=["csv"], progress=interrupt(at))
        assert sorted(os.listdir(tmp_path)) == before
        assert os.listdir(temporary) == []


def test_progress_says_what_is_done_and_how_far_it_is(tmp_path):
    write_scores(tmp_path / "scores", [1.0, -1.0])
    pq.write_table(pa.table({"id": [0, 1]}), tmp_path / "pool.parquet")
    told, pool = [], tmp_path / "pool.parquet"
    curate(tmp_path / "scores", pool=pool, exports=["csv"], progress=lambda what, share: told.append((what, share)))
    stages = list(dict.fromkeys(what for what, _ in told))
    first, last = "checking data, summarising data, reading the pool", "combining, writing, exporting csv"
    assert ", ".join(stages) == f"{first}, {last}"
    for stage in stages:
        shares = [share for what, share in told if what == stage]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert shares[0] == (1.0 if stage == "checking data" else 0.0)


def test_a_damaged_ledger_is_refused_or_said_to_be_partial(tmp_path):
    write_ledger(tmp_path / "scores", {"id": [1, 2, 3], "score": [1.0, -1.0, 2.0], "part": [0, 0, 1]})
    part = sorted((tmp_path / "scores").glob("*n2.parquet"))[0]
    content = bytearray(part.read_bytes())
    content[40] ^= 1
    part.write_bytes(content)
    with pytest.raises(LedgerError, match=r"1 of 2 parts are damaged: .* `allow_partial=True` reads the rest\."):
        curate(tmp_path / "scores", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = curate(tmp_path / "scores", None, tmp_path / "out", allow_partial=True)
    assert done.manifest.table()["id"].to_pylist() == [3]
    assert [each.split(":")[0] for each in done.lost] == [f"{part.name} (2 rows"]
    assert done.manifest.provenance["lost"] == list(done.lost)


def test_memory_is_told_in_words_that_the_database_knows(tmp_path, temporary):
    write_scores(tmp_path / "scores", [1.0])
    with pytest.raises(CurationError, match=r"^`memory` is 'much'; say it like '2GB' \("):
        curate(tmp_path / "scores", None, tmp_path / "out", memory="much")
    assert os.listdir(temporary) == []
    assert not (tmp_path / "out").exists()
