"""From measurements to a table in Markdown and a JSON file, both with the facts of the run."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


def as_markdown(report: Report, facts: Mapping[str, str]) -> str:
    rules = ["---" if number < report.text else "---:" for number in range(len(report.heads))]
    lines = [report.heads, rules, *([cell.replace("|", r"\|") for cell in row] for row in report.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    listed = [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join([*listed, "", *(f"| {line} |" for line in table), "", report.caption])


def write_json(path: str, report: Report, facts: Mapping[str, str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({**facts, "results": report.results}, indent=2) + "\n")
