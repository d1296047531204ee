"""Measure time, memory and temporary files of each filter on large ledgers, beside reading the ledger once.

Ledgers are generated in the real format (ids in random order in every epoch, scores of two overlapping groups, weights
by the softmax over batches) and removed afterwards. Every run has a process of its own; the methods take turns.

    python -m scripts.benchmarks curation                                        10^6, 10^7 and 10^8 rows
    python -m scripts.benchmarks curation --ids 1e8 --rounds 1 --methods sign posterior       10^9 rows, 45 GB of disk
"""

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from lightning_mimic.curation import Ensemble, Posterior, Sign, Threshold, curate
from lightning_mimic.ledger import Ledger, LedgerWriter, open_run
from scripts.benchmarks.benchmark_report import Report, add_numbers
from scripts.benchmarks.paired_rounds import alone, interleave, own_memory, spread

BATCH = 256
WRONG = 0.4
METHODS = {
    "reading once": None,
    "reading once again: the noise": None,
    "sign": Sign(),
    "posterior": Posterior(),
    "threshold": Threshold(),
    "ensemble": Ensemble(),
}


def generate(folder: Path, ids: int, epochs: int, rows_per_part: int, seed: int = 0) -> None:
    """Write a ledger of one rank."""
    opened = open_run(folder, {"generated": True, "seed": seed}, 0, None, {})
    writer, random = LedgerWriter(folder, opened.run, 0, 0), np.random.default_rng(seed)
    wrong = random.random(ids) < WRONG
    for epoch in range(epochs):
        order = random.permutation(np.arange(ids, dtype=np.int32 if ids < 2**31 else np.int64))
        for start in range(0, ids, rows_per_part):
            members = order[start : start + rows_per_part].astype(np.int64)
            place = np.arange(start, start + len(members))
            score = np.where(wrong[members], -0.5, 0.5) + random.standard_normal(len(members))
            exponentials = np.exp(score)
            sums = np.add.reduceat(exponentials, np.arange(0, len(exponentials), BATCH))
            size = np.minimum(BATCH, len(exponentials) - BATCH * (np.arange(len(exponentials)) // BATCH))
            writer.append(
                {
                    "id": members,
                    "epoch": np.full(len(members), epoch),
                    "step": place // BATCH + epoch * -(-ids // BATCH),
                    "batch": place // BATCH,
                    "position": place % BATCH,
                    "score": score.astype(np.float32),
                    "weight": (exponentials / sums[np.arange(len(exponentials)) // BATCH]).astype(np.float32),
                    "loss": None,
                    "batch_size": size,
                    "flag": pa.DictionaryArray.from_arrays(np.zeros(len(members), np.int8), ["ok"]),
                    "label": members % 1000,
                    "predicted": members % 1000,
                    "posterior": (exponentials / (1 + exponentials)).astype(np.float32),
                }
            )
            writer.flush()


def run(method: str, folder: Path, memory: str) -> dict[str, float]:
    """Curate in this process; returns seconds, and memory and temporary files in GiB."""
    before, temporary = own_memory("VmRSS"), folder / "temporary"
    temporary.mkdir(exist_ok=True)
    tempfile.tempdir = str(temporary)
    with largest_size(temporary) as size:
        started, used = time.perf_counter(), time.process_time()
        chosen = METHODS[method]
        if chosen is None:
            Ledger(folder / "ledger").parts()
        else:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                curate(folder / "ledger", chosen, out, memory=memory)
        seconds, used = time.perf_counter() - started, time.process_time() - used
    peak, start = own_memory("VmHWM") / 2**30, before / 2**30
    return {"seconds": seconds, "cpu": used, "peak": peak, "start": start, "disk": max(size) / 2**30}


@contextlib.contextmanager
def largest_size(folder: Path) -> Iterator[list[int]]:
    """Look at the size of a folder, in bytes, several times a second; the list grows until the end."""
    over, sizes = threading.Event(), [0]

    def look() -> None:
        while not over.wait(0.2):
            with contextlib.suppress(FileNotFoundError):  # they come and go
                sizes.append(sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield sizes
    finally:
        over.set()
        watcher.join()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ids", type=float, nargs="+", default=[1e5, 1e6, 1e7], help="samples")
    add_numbers(parser, epochs=10, rounds=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--memory", default="2GB", help="of the database")
    parser.add_argument("--folder", type=Path, help="for ledgers and temporary files; 45 GB for 10^9 rows")


def measure(options: argparse.Namespace) -> Iterator[Report]:
    once, rows, results = next(iter(METHODS)), [], {}
    for ids in map(int, options.ids):
        count = ids * options.epochs
        with tempfile.TemporaryDirectory(prefix="ledger-", dir=options.folder) as name:
            folder = Path(name)
            generate(folder / "ledger", ids, options.epochs, rows_per_part=min(ids, 1_000_000))
            size = sum(path.stat().st_size for path in (folder / "ledger").iterdir())
            methods = dict.fromkeys([once, *options.methods])
            ways = {method: partial(alone, run, method, folder, options.memory) for method in methods}
            runs = interleave(f"{count:,} rows", ways, options.rounds)
        seconds = {method: [one["seconds"] for one in found] for method, found in runs.items()}
        for method, values in seconds.items():
            times = f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"
            peak, disk = (f"{max(one[each] for one in runs[method]):.2f}" for each in ("peak", "disk"))
            cpu = f"{statistics.median(one['cpu'] for one in runs[method]):.1f}"
            ratio = "–" if method == once else spread(values, seconds[once], 1)
            rows.append([method, f"{count:,}", f"{size / 1e9:.2f} GB", times, cpu, ratio, peak, disk])
        results[count] = {"bytes": size, "runs": runs}
        caption = (
            f"Median and range of {options.rounds} rounds; ratio to reading once: median and quartiles within rounds. "
            f"The database may hold {options.memory}; peak memory is the process's, "
            "disk the largest size of its temporary files."
        )
        heads = (
            "method",
            "rows",
            "ledger",
            "seconds (range)",
            "CPU seconds",
            "of reading once",
            "peak memory, GiB",
            "disk, GiB",
        )
        yield Report("curation", heads, rows, caption, results)
