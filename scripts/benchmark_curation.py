"""What curation costs on large ledgers: time and memory of each filter, beside reading the ledger once.

Ledgers are generated in the real format (ids in random order in every epoch, scores of two overlapping groups, weights
by the softmax over batches) and removed afterwards. Every run has a process of its own; the methods take turns.

    python scripts/benchmark_curation.py                           10^7 and 10^8 rows
    python scripts/benchmark_curation.py --ids 1e6 --rounds 5
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from benchmark_tables import processor
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_mimic.curation import Ensemble, Sign, Threshold, curate
from lightning_mimic.ledger import Ledger, LedgerWriter, open_run

BATCH = 256
WRONG = 0.4
METHODS = {"reading once": None, "sign": Sign(), "threshold": Threshold(), "ensemble": Ensemble()}


def generate(folder: Path, ids: int, epochs: int, rows_per_part: int, seed: int = 0) -> None:
    """A ledger of one rank."""
    run, _ = open_run(folder, {"generated": True, "seed": seed}, 0, None, {})
    writer, random = LedgerWriter(folder, run, 0, 0), np.random.default_rng(seed)
    wrong = random.random(ids) < WRONG
    for epoch in range(epochs):
        order = random.permutation(ids)
        for start in range(0, ids, rows_per_part):
            members = order[start : start + rows_per_part]
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
                }
            )
            writer.flush()


def measured(folder: Path, method: str, out: Path, memory: str) -> dict[str, Any]:
    """One run in this process: its seconds and its greatest memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    chosen = METHODS[method]
    kept = None
    if chosen is None:
        Ledger(folder).parts()
    else:
        kept = curate(folder, chosen, out, memory=memory).kept
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"method": method, "seconds": seconds, "kept": kept, "peak_gib": peak / 2**20, "start_gib": before / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=float, nargs="+", default=[1e6, 1e7], help="samples %(default)s")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--memory", default="2GB", help="of the database (%(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="for the ledgers; 15 GB for 10^9 rows")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_curation.json"))
    arguments = parser.parse_args()
    console, found = Console(), list[dict[str, Any]]()
    for ids in map(int, arguments.ids):
        folder = Path(tempfile.mkdtemp(prefix="ledger-", dir=arguments.folder))
        try:
            with console.status(f"generating {ids * arguments.epochs:,} rows"):
                generate(folder / "ledger", ids, arguments.epochs, rows_per_part=min(ids, 1_000_000))
            size = sum(path.stat().st_size for path in (folder / "ledger").iterdir())
            with Progress(console=console) as progress:
                for turn in progress.track(range(arguments.rounds), description=f"{ids * arguments.epochs:,} rows"):
                    for method in arguments.methods:
                        place = folder / f"out_{turn}"
                        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                            run = pool.submit(measured, folder / "ledger", method, place, arguments.memory).result()
                        found.append(run | {"ids": ids, "rows": ids * arguments.epochs, "ledger_bytes": size})
                        shutil.rmtree(place, ignore_errors=True)
        finally:
            shutil.rmtree(folder)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": processor(), "memory": arguments.memory, "runs": found}, indent=2))
    show(console, found)
    console.print(f"{processor()}; the database may hold {arguments.memory}. {arguments.out}")


def show(console: Console, found: list[dict[str, Any]]) -> None:
    """Medians, with the least and the most."""
    table = Table()
    for head in ("rows", "ledger", "method", "seconds", "of reading once", "peak memory, GiB"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for rows in dict.fromkeys(run["rows"] for run in found):
        of = [run for run in found if run["rows"] == rows]
        once = statistics.median(run["seconds"] for run in of if run["method"] == next(iter(METHODS)))
        for method in dict.fromkeys(run["method"] for run in of):
            seconds = [run["seconds"] for run in of if run["method"] == method]
            peak = max(run["peak_gib"] for run in of if run["method"] == method)
            middle = statistics.median(seconds)
            spread = f"{middle:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            size = f"{of[0]['ledger_bytes'] / 1e9:.2f} GB"
            table.add_row(f"{rows:,}", size, method, spread, f"{middle / once:.1f}", f"{peak:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
