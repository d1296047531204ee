"""Measure what a ledger on an object store costs: seconds and requests, beside one on a disk.

The store is moto's S3 server on loopback, in a process of its own, so that there is no network and the server takes
processor time of the same machine. Disk and store take turns:

    OMP_NUM_THREADS=1 python -m scripts.benchmarks store --parts 100 --rows 10000 --rounds 5
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mimic import Ledger
from lightning_mimic.curation import curate
from lightning_mimic.ledger import LedgerWriter, open_run
from scripts.benchmarks.benchmark_report import Report, add_numbers
from scripts.benchmarks.paired_rounds import interleave

BUCKET, SEED = "bucket", 0
SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
#: The line that the server logs for a request.
REQUEST = re.compile(r'"(?:\x1b\[\d+m)?([A-Z]+) /\S+ HTTP/1.1')


def add_options(parser: argparse.ArgumentParser) -> None:
    add_numbers(parser, parts=100, rows=10_000, rounds=5)


@contextlib.contextmanager
def server(log: Path) -> Iterator[None]:
    """Run a server whose address is in the environment."""
    with log.open("w") as lines:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": lines, "text": True}
        with subprocess.Popen([sys.executable, "-c", SERVE], **pipes) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            host, port = process.stdout.readline().split()
            address = f"http://{host}:{port}"
            os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
            os.environ |= {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "secret"}
            urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"))
            yield
            process.stdin.close()


def write(folder: str, options: argparse.Namespace) -> None:
    """Write a ledger whose parts each hold one epoch of the same samples."""
    drawn = np.random.default_rng(SEED)
    run = open_run(folder, {"scorer": "MimicScore"}, 0, None, {"ranks": 1})
    writer, size = LedgerWriter(folder, run.run, run.attempt, 0, token=run.token), options.rows
    for part in range(options.parts):
        places = {"epoch": [part] * size, "step": [part] * size, "batch": [0] * size, "position": range(size)}
        values = {name: drawn.standard_normal(size) for name in ("score", "loss")}
        constant = {"weight": [1 / size] * size, "batch_size": [size] * size, "flag": ["ok"] * size}
        writer.append({"id": np.arange(size)} | places | values | constant)
        writer.commit()
    run.note({"rows": [writer.rows]})
    run.close()


def measure(options: argparse.Namespace) -> Iterator[Report]:
    with tempfile.TemporaryDirectory() as folder, server(Path(folder) / "log"):
        places = {"disk": folder, "disk again: the noise": f"{folder}/again", "store": f"s3://{BUCKET}"}
        number = iter(range(10**6))
        requests: dict[str, Counter[str]] = {}
        times: dict[tuple[str, str], list[float]] = {}

        def timed(where: str, what: str, act: Callable[[], Any]) -> None:
            before = logged(Path(folder))
            started = time.perf_counter()
            act()
            times.setdefault((what, where), []).append(time.perf_counter() - started)
            if where == "store":
                requests[what] = logged(Path(folder)) - before

        def once(where: str) -> float:
            ledger = f"{places[where]}/{next(number)}"
            timed(where, "write", lambda: write(ledger, options))
            timed(where, "read: `Ledger.table()`", lambda: Ledger(ledger).table())
            timed(where, "curate by the sign", lambda: curate(ledger, out=f"{ledger}-curated"))
            return 0.0

        interleave("ledgers", {where: partial(once, where) for where in places}, options.rounds)
    rows = []
    for (what, where), values in times.items():
        counted = requests[what] if where == "store" else Counter[str]()
        cells = [", ".join(f"{count} {name}" for name, count in sorted(counted.items())) or "–"]
        rows.append(
            [what, where, f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}", *cells]
        )
    rows.sort(key=lambda row: ["write", "read: `Ledger.table()`", "curate by the sign"].index(row[0]))
    caption = (
        f"Medians over {options.rounds} rounds; {options.parts} parts of {options.rows:,} rows each. The server is on "
        "loopback and shares the processor; a real store adds its latency to every request, of which 16 are made at "
        "once where parts are read."
    )
    heads = ("what", "where", "seconds", "from least to most", "requests")
    found = {f"{what}, {where}": values for (what, where), values in times.items()}
    yield Report("store", heads, rows, caption, {"seconds": found, "requests": requests}, text=2)


def logged(folder: Path) -> Counter[str]:
    """Return how many requests the server has answered, by their method."""
    return Counter(REQUEST.findall((folder / "log").read_text()))
