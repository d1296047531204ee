"""From what the benchmark measured to its tables, on the terminal and in a Markdown file."""

import argparse
import datetime
import os
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from benchmark_methods import METHODS
from rich.console import Console
from rich.table import Table

TARGETS = {"last": "last layer", "mlp": "last MLP", "all": "all parameters"}
HEADS = ("method", "arithmetic", "time (quartiles)", "rounds", "peak memory")
WARM_UP = 3
SEED = 0


class Measured(Protocol):
    """What one method's process has found; ``seconds`` of every round, those of the warm-up first."""

    model: str
    target: str
    method: str
    seconds: list[float]
    memory: int | None
    flops: int | None
    failed: str | None


def rows_of(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The rows of what took turns, each beside the first, which is plain training."""
    plain, rows = measured[0], []
    for one in measured:
        pairs = zip(one.seconds[WARM_UP:], plain.seconds[WARM_UP:], strict=False)
        row = {name: getattr(one, name) for name in ("model", "target", "method", "failed", "memory", "flops")}
        row["seconds"] = one.seconds[WARM_UP:]
        row["time_ratio"] = quartiles([own / other for own, other in pairs])
        row["memory_ratio"] = one.memory / plain.memory if one.memory and plain.memory else None
        row["flops_ratio"] = one.flops / plain.flops if one.flops and plain.flops else None
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def target_of(row: dict[str, Any]) -> str:
    """What is scored."""
    if row["method"] in ("plain", "again"):
        return "–"
    return "last block" if (row["model"], row["target"]) == ("resnet50", "mlp") else TARGETS[row["target"]]


def cells(row: dict[str, Any]) -> list[str]:
    """Plain training's row has the amounts, the others' the ratios to them."""
    name = "plain again" if row["method"] == "again" else row["method"]
    if row["failed"] is not None:
        return [name, "–", row["failed"], "–", "–"]
    rounds = str(len(row["seconds"]) or "–")
    if name == "plain":
        seconds = statistics.median(row["seconds"]) if row["seconds"] else None
        gflop, gib = amount(row["flops"], 1e9, "GFLOP"), amount(row["memory"], 2**30, "GiB")
        return [name, gflop, amount(seconds, 1, "s"), rounds, gib]
    spread = "{1:.3f} ({0:.3f}–{2:.3f})".format(*row["time_ratio"]) if row["time_ratio"] else "–"
    return [name, amount(row["flops_ratio"], digits=4), spread, rounds, amount(row["memory_ratio"], digits=2)]


def amount(value: float | None, unit: float = 1, name: str = "", digits: int = 2) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f} {name}".rstrip()


def caption(options: argparse.Namespace) -> str:
    """What must be known to read the table."""
    text = (
        "plain's rows have amounts, the others ratios to it. Arithmetic: matrix products, convolutions and attention "
        "of one later step. Time: median over rounds of a method's step over plain's step in the same round, after "
        f"{WARM_UP} rounds of warm-up; vmap and loop run {options.slow_steps} rounds, beside a plain run of their own. "
        "Peak memory: "
    )
    if options.device == "cuda":
        text += "what torch allocated on the GPU."
    else:
        text += "growth of the process over three steps, alone, each freed tensor given back at once (--memory-only)."
    text += "".join(f" {name}: {METHODS[name]}." for name in ("ours", "vmap", "loop") if name in options.methods)
    if "resnet50" in options.models:
        text += (
            " resnet50 has no MLP; its last block stands for it. Its BatchNorm mixes samples: ours scores what a "
            "sample contributes to the batch's gradient, loop the gradient of its own loss."
        )
    return text


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """What must be known to measure it again."""
    return {
        "machine": machine(options),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "batch size": options.batch_size,
        "precision": options.precision,
        "optimizer": "AdamW",
        "seed": SEED,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
    }


def machine(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, threads per process: {options.threads}"


def processor() -> str:
    """What computes, without a GPU."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def show(console: Console, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table()
    for number, head in enumerate(("model", "target", *HEADS)):
        table.add_column(head, justify="right" if number > 2 else "left", overflow="fold")
    for row in rows:
        if row["method"] == "plain":
            table.add_section()
        table.add_row(row["model"], target_of(row), *cells(row))
    console.print(table)
    console.print(caption(options), style="dim", highlight=False)
    console.print("\n".join(f"{name}: {value}" for name, value in setting(options).items()), highlight=False)


def write_markdown(path: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Puts the table between the markers of this device, and leaves the rest of the file as it is."""
    lines = [["model", "target", *HEADS], ["---"] * 3 + ["---:"] * (len(HEADS) - 1)]
    lines += [[row["model"], target_of(row), *(cell.replace("|", r"\|") for cell in cells(row))] for row in rows]
    facts = [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in setting(options).items()]
    name = f"{options.device}{' memory' * options.memory_only}"
    first, last = f"<!-- benchmark {name}: begin -->", f"<!-- benchmark {name}: end -->"
    table = [f"| {' | '.join(line)} |" for line in lines]
    section = "\n".join([first, "", *facts, "", *table, "", caption(options), "", last])
    text = path.read_text() if path.exists() else "# Benchmarks\n"
    if first in text:
        before, _, rest = text.partition(first)
        text = before + section + rest.partition(last)[2]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
