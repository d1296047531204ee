"""Curation in partitions, in one process or in shares: the same decisions to the last id and the last bit."""

import shutil
import sys
from collections import namedtuple

import numpy as np
import pytest

from lightning_mimic.cli.curate import curate_main, partition_main, summarise_main
from lightning_mimic.curation import (
    CurationError,
    Ensemble,
    KMeans,
    Manifest,
    Mixture,
    Posterior,
    Sign,
    Threshold,
    TopK,
    curate,
    partition_share,
    scores,
    summarise_partition,
)
from lightning_mimic.database import Database
from lightning_mimic.ledger import LedgerError
from support.cases import case, for_each
from support.ledgers import write_ledger

FILTERS = [
    *(Sign(), Posterior(), Threshold(), KMeans(), Mixture(), TopK(fraction=0.3), TopK(count=5, per_class=True)),
    *(Ensemble(by="majority"), Ensemble(), Ensemble([Sign(), TopK(fraction=0.5)], by="majority")),
]


def write_run(folder, *, named=False, seed=0, samples=120, epochs=5):
    """A run resumed within an epoch, on two ranks whose sampler repeats samples; some rows have no score."""
    random = np.random.default_rng(seed)
    wrong, rows = random.random(samples) < 0.4, []
    for epoch in range(epochs):
        for attempt in (0, 1) if epoch == 2 else (0,) if epoch < 2 else (1,):
            order = [*random.permutation(samples), *random.permutation(samples)[:3]]
            for place, sample in enumerate(order[: samples // 2] if (epoch, attempt) == (2, 0) else order):
                score = random.normal() * 10.0 ** random.integers(-9, 2) + (-1 if wrong[sample] else 1)
                found = random.random() < 0.95 and sample != 7
                rows.append({
                    "id": f"x/{sample}" if named else int(sample), "epoch": epoch, "attempt": attempt,
                    "step": 40 * epoch + (20 if attempt else 0) + place // 16, "batch": place // 16,
                    "rank": place % 2, "position": place // 2 % 8, "part": place // 50,
                    "score": score if found else None, "weight": random.random() / 8, "batch_size": 16,
                    "flag": "ok" if found else "nonfinite_loss", "label": int(sample % 3), "predicted": int(epoch),
                    "posterior": random.random() if found else None,
                })  # fmt: skip
    write_ledger(folder, rows, starts=(0, 95))
    return folder


def decided(done):
    """The manifest's rows, and what the provenance says of them, less what differs between any two runs."""
    facts = done.manifest.provenance
    kept = {name: facts[name] for name in ("filter", "facts", "samples", "kept", "share_kept", "unscored", "pool")}
    return done.manifest.table(), kept


def split(monkeypatch, count):
    monkeypatch.setattr(scores, "partition_count", lambda parts, memory: count)


def in_shares(ledger, folder, shares=3, partitions=4, **how):
    for share in range(shares):
        partition_share(ledger, folder, share, shares, partitions, **how)
    for number in range(partitions):
        summarise_partition(folder, number)
    return folder


@for_each("named", [False, True])
def test_the_number_of_partitions_and_of_processes_changes_nothing(named, tmp_path, monkeypatch):
    ledger = write_run(tmp_path / "scores", named=named)
    shared = in_shares(ledger, tmp_path / "shared")
    ids = [f"x/{k}" if named else str(k) for k in [*range(140), 3]]
    (tmp_path / "pool.csv").write_text("\n".join(["id", *ids, ""]))
    for one in FILTERS[::3] if named else FILTERS:
        options = {"unscored": "drop", "pool": None if one == FILTERS[0] else tmp_path / "pool.csv"}
        split(monkeypatch, 1)
        table, facts = decided(curate(ledger, one, **options))
        with case(one, "in shares"):
            assert decided(curate(ledger, one, partitioned=shared, **options)) == (table, facts)
        for count in (2, 7) if one == FILTERS[0] else (5,):
            split(monkeypatch, count)
            with case(one, count):
                assert decided(curate(ledger, one, **options)) == (table, facts)
        assert 0 < facts["kept"] < facts["samples"]


def test_partitions_without_samples_are_none(tmp_path, monkeypatch):
    write_ledger(tmp_path / "scores", {"id": [3, 4], "score": [1.0, -1.0]})
    split(monkeypatch, 40)
    pool = tmp_path / "pool.csv"
    pool.write_text("id\n3\n4\n5\n")
    found = curate(tmp_path / "scores", pool=pool, unscored="keep").manifest.table()
    assert found.select(["id", "keep"]).to_pydict() == {"id": [4, 3, 5], "keep": [False, True, True]}
    pool.write_text("id\n5\n")
    with pytest.raises(CurationError, match=r" has scores of 2 samples that `pool` .* does not list, such as [34]\."):
        curate(tmp_path / "scores", pool=pool, unscored="keep")
    shared = in_shares(tmp_path / "scores", tmp_path / "shared", shares=4)  # more than there are files
    assert curate(tmp_path / "scores", partitioned=shared).kept == 1


@for_each("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_a_mean_does_not_depend_on_the_order_of_its_rows(order, tmp_path):
    values = [-(2.0**-70), 1.0, -1.0]
    rows = {"id": [1, 1, 1, 2], "epoch": [0, 1, 2, 0], "score": [*(values[k] for k in order), 3.0]}
    write_ledger(tmp_path, rows)
    with Database() as database:
        found = database.rows(f"SELECT score FROM {scores.Scores(tmp_path, database).samples} ORDER BY id")
    assert found == [(-(2.0**-70) / 3,), (3.0,)]


def test_a_killed_worker_is_run_again_and_a_missing_one_is_named(tmp_path):
    ledger = write_run(tmp_path / "scores")
    shared, split_again = in_shares(ledger, tmp_path / "shared"), tmp_path / "again"
    for share in (0, 2):
        partition_share(ledger, split_again, share, 3, 4)
    killed = split_again / f".share-1-of-3.{'0' * 32}.tmp"
    (killed / "rows" / "partition=0").mkdir(parents=True)
    (killed / "rows" / "partition=0" / "data_0.parquet").write_bytes(b"half")
    for call in (lambda: summarise_partition(split_again, 0), lambda: curate(ledger, partitioned=split_again)):
        with pytest.raises(CurationError, match=r"1 of 3 shares are missing: share-1-of-3\. Run mimic-partition for"):
            call()
    partition_share(ledger, split_again, 1, 3, 4)
    assert not killed.exists()
    for number in (0, 1, 3):
        summarise_partition(split_again, number)
    with pytest.raises(CurationError, match=r"1 of 4 partitions are missing: partition-2-of-4\. Run mimic-summarise "):
        curate(ledger, partitioned=split_again)
    summarise_partition(split_again, 2)
    before = {path: path.stat().st_mtime_ns for path in split_again.rglob("*")}
    partition_share(ledger, split_again, 1, 3, 4)  # what is complete stays
    summarise_partition(split_again, 2)
    assert {path: path.stat().st_mtime_ns for path in split_again.rglob("*")} == before
    both = [decided(curate(ledger, partitioned=each, unscored="keep")) for each in (shared, split_again)]
    assert both[0] == both[1]


def test_what_does_not_go_together_is_refused(tmp_path, monkeypatch):
    ledger, folder = write_run(tmp_path / "scores", samples=20, epochs=3), tmp_path / "shared"
    in_shares(ledger, folder, 2, 2)
    with pytest.raises(
        CurationError, match=r"share-0-of-2 already exists with another number of partitions: 2 instead of 3\."
    ):
        partition_share(ledger, folder, 0, 2, 3)
    other = write_run(tmp_path / "other", samples=20, epochs=3)
    with pytest.raises(CurationError, match=r"does not belong to .*/other, or that ledger has changed"):
        curate(other, partitioned=folder)
    with pytest.raises(CurationError, match=r"another run of the ledger: "):
        partition_share(other, folder, 1, 2, 2)
    with pytest.raises(
        CurationError, match=r"^`out` is memory://.*, on an object store; expected a folder on a shared"
    ):
        partition_share(ledger, "memory://shared")
    with pytest.raises(CurationError, match=r"`partition` is 2; expected a whole number from 0 to 1\."):
        summarise_partition(folder, 2)
    for place, call in (
        (folder / "partition-1-of-2" / "samples.parquet", lambda: curate(ledger, partitioned=folder)),
        (next((folder / "share-1-of-2").rglob("*.parquet")), lambda: curate(ledger, partitioned=folder)),
    ):
        content = place.read_bytes()
        place.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
        with (
            case(place),
            pytest.raises(CurationError, match=f"^{place} is missing or does not match its checksum; remove "),
        ):
            call()
        place.write_bytes(content)
    with monkeypatch.context() as patched:
        patched.setattr("lightning_mimic.curation.shares.database_version", lambda: "9.9")
        with pytest.raises(CurationError, match=r"but 9\.9 is installed, which may hash ids differently"):
            curate(ledger, partitioned=folder)
    partition_share(ledger, folder, 0, 3, 2)
    with pytest.raises(
        CurationError, match="mixes shares of two runs of mimic-partition, share-0-of-2 and share-0-of-3;"
    ):
        curate(ledger, partitioned=folder)
    part = next(ledger.glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(LedgerError, match=r"1 parts are damaged: .* `allow_partial=true` reads the rest\."):
        partition_share(ledger, tmp_path / "damaged")
    shared = in_shares(ledger, tmp_path / "partial", 2, 2, allow_partial=True)
    with pytest.raises(LedgerError, match=f"1 of .* parts are damaged: {part.name}"):
        curate(ledger, partitioned=shared)
    options = {"allow_partial": True, "unscored": "drop"}
    assert decided(curate(ledger, partitioned=shared, **options)) == decided(curate(ledger, **options))


def test_too_small_a_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    ledger = write_run(tmp_path / "scores", samples=20, epochs=3)
    split(monkeypatch, 2)
    usage = namedtuple("usage", ["total", "used", "free"])(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CurationError, match=r"^curating data needs about .* GB of disk in .*, which has 1e-06 GB left\."
    ):
        curate(ledger)
    with pytest.raises(CurationError, match=r"^share 0 needs about "):
        partition_share(ledger, tmp_path / "shared")
    assert not [*(tmp_path / "shared").iterdir()]


def test_hydra_runs_the_shares_and_the_partitions(tmp_path, monkeypatch, capsys):
    ledger = write_run(tmp_path / "scores", samples=20, epochs=3)
    monkeypatch.chdir(tmp_path)
    for main, *words in (
        (partition_main, "ledger=scores", "shares=2", "partitions=3", "share=range(0,2)", "--multirun"),
        (summarise_main, "partitioned=partitions", "partition=range(0,3)", "--multirun"),
        (curate_main, "ledger=scores", "partitioned=partitions", "unscored=keep"),
    ):
        monkeypatch.setattr(sys, "argv", ["command", *words])
        main()
    names = [line for line in capsys.readouterr().out.splitlines() if line.startswith("partitions/")]
    assert names == [
        *(f"partitions/share-{k}-of-2" for k in (0, 1)),
        *(f"partitions/partition-{k}-of-3" for k in range(3)),
    ]
    found = Manifest("curated/manifest.parquet").table()
    assert found == decided(curate(ledger, unscored="keep"))[0]
    monkeypatch.setattr(sys, "argv", ["command", "ledger=scores", "share=2", "shares=2"])
    with pytest.raises(SystemExit, match=r"^mimic-partition: `share` is 2, but there are 2 shares, numbered from 0"):
        partition_main()
