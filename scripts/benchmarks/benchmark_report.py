"""From measurements to a table in Markdown and a JSON file, both with the facts of the run."""

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """What a benchmark has found.

    Attributes:
        section: Name of the section in the Markdown file.
        heads: Of the table's columns; the first ``text`` of them are aligned to the left.
        rows: The table.
        caption: What must be known to read the table.
        results: Every single measurement, for JSON.
    """

    section: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    results: Any
    text: int = 1


def add_numbers(parser: argparse.ArgumentParser, **defaults: int) -> None:
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=" ")


def run_facts(options: argparse.Namespace, words: Sequence[str]) -> dict[str, str]:
    """Return what must be known to measure again: the machine, the versions and the command."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = [*(names[:1] or ["CPU"]), f"{len(os.sched_getaffinity(0))} cores"]
    machine += [f"{options.threads} threads"] if "threads" in options else []
    if getattr(options, "device", None) == "cuda":
        import torch  # not for benchmarks of what needs no torch

        machine.append(torch.cuda.get_device_name())
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": ", ".join(machine),
        "torch": version("torch"),
        "lightning": version("lightning"),
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "scripts/benchmarks", *words]),
    }


def as_markdown(report: Report, facts: Mapping[str, str]) -> str:
    rules = ["---" if number < report.text else "---:" for number in range(len(report.heads))]
    lines = [report.heads, rules, *([cell.replace("|", r"\|") for cell in row] for row in report.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    listed = [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in facts.items()]
    return "\n".join([*listed, "", *(f"| {line} |" for line in table), "", report.caption])


def write_json(path: str, report: Report, facts: Mapping[str, str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({**facts, "results": report.results}, indent=2) + "\n")


def write_section(path: str, report: Report, facts: Mapping[str, str]) -> None:
    """Put the report between the markers of its section, and leave the rest of the file as it is."""
    first, last = (f"<!-- benchmark {report.section}: {end} -->" for end in ("begin", "end"))
    text = Path(path).read_text() if Path(path).exists() else "# Benchmarks\n"
    if first not in text:
        text = f"{text.rstrip()}\n\n{first}{last}\n"
    before, _, rest = text.partition(first)
    Path(path).write_text(f"{before}{first}\n\n{as_markdown(report, facts)}\n\n{last}{rest.partition(last)[2]}")
