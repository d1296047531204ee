"""The tables of scripts/reproduce.py on the terminal, as Markdown, CSV and PNG."""

import csv
import itertools
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from paper_figures import SOURCE
from reproduce_tables import Table
from rich.console import Console
from rich.table import Table as RichTable

COLOURS = [f"C{k}" for k in range(10)] + ["black"]


def show(tables: Iterable[Table], console: Console) -> None:
    """On the terminal."""
    for table in tables:
        heading, *rows = table.lines("\n")
        view = RichTable(title=table.title)
        for place, text in enumerate(heading):
            view.add_column(text, justify="right" if place else "left")
        for row in rows:
            view.add_row(*row)
        console.print(view)


def write(tables: Sequence[Table], out: Path) -> list[Path]:
    """Writes all tables as Markdown, as CSV and as one picture; returns the files."""
    text = []
    for table in tables:
        heading, *rows = table.lines()
        lines = [heading, ["---"] * len(heading), *rows]
        text += [f"### {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""]
        text += [SOURCE, ""] if table.paper else []
    (out / "tables.md").write_text("\n".join(text))
    with (out / "tables.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        heads = ("table", "row", "column", "seeds", "mean", "standard_deviation", "paper", "ours_minus_paper")
        writer.writerow(heads)
        for table in tables:
            for (row, column), values in table.cells.items():
                spread = statistics.stdev(values) if len(values) > 1 else None
                mean, theirs = statistics.fmean(values) if values else None, table.paper.get((row, column))
                difference = None if mean is None or theirs is None else mean - theirs
                writer.writerow([table.name, row, column, len(values), mean, spread, theirs, difference])
    plot(tables, out / "tables.png")
    return [out / name for name in ("tables.md", "tables.csv", "tables.png")]


def plot(tables: Sequence[Table], path: Path) -> None:
    """One panel per table."""
    wide = 3
    high = -(-len(tables) // wide)
    figure = Figure(figsize=(5.5 * wide, 4.8 * high), layout="constrained")
    for axes, table in itertools.zip_longest(figure.subplots(high, wide, squeeze=False).flat, tables):
        if table is None:
            axes.set_axis_off()
            continue
        columns = [column for column in table.columns if column != "correlation"]
        for number, row in enumerate(table.rows):
            known = [(k, v) for k, c in enumerate(columns) if (v := table.cells.get((row, c)))]
            means = [statistics.fmean(values) for _, values in known]
            spread = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in known]
            line = {"marker": "osD^v<>ph*X"[number % 11], "markersize": 4, "linewidth": 1.2, "capsize": 2}
            line["color"] = COLOURS[number % len(COLOURS)]
            drawn = axes.errorbar([k for k, _ in known], means, spread, label=row, **line)
            theirs = {k: table.paper[row, c] for k, c in enumerate(columns) if (row, c) in table.paper}
            if theirs:
                like = {"color": drawn.lines[0].get_color(), "marker": line["marker"], "markerfacecolor": "none"}
                axes.plot(theirs.keys(), theirs.values(), linestyle=":", label=f"{row} in the paper", **like)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_xlabel(table.across)
        axes.set_ylabel("%")
        axes.set_title(textwrap.fill(table.title, 70), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        # Below the panel: among a dozen lines there is no room.
        axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, dpi=70)
