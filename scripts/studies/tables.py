"""Tables of a study: on the terminal, and as Markdown and CSV."""

import csv
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

#: A figure per seed, in % or in points; or a word.
Cell = Sequence[float] | str


@dataclass(frozen=True)
class Table:
    """Figures of several seeds by row and column.

    Attributes:
        name: Of files and panels.
        title: What it is.
        corner: What the rows are.
        cells: Row and column to a figure per seed. What is not there is a dash.
        signed: Columns of differences.
        paper: What the paper has in some of the cells.
        source: Of the paper's figures.
    """

    name: str
    title: str
    corner: str
    cells: Mapping[tuple[str, str], Cell]
    signed: Sequence[str] = ()
    paper: Mapping[tuple[str, str], float] = field(default_factory=dict)
    source: str = ""

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.cells))

    def figures(self, row: str, column: str) -> list[float]:
        """Of every seed; none where the cell is a word."""
        cell = self.cells.get((row, column), ())
        return [] if isinstance(cell, str) else list(cell)

    def lines(self, between: str = " ") -> Iterator[list[str]]:
        """Heading and rows of text; beside a cell the paper's figure and ours less it, where the paper has one.

        Args:
            between: Mean and standard deviation.
        """
        compared = {column for _, column in self.paper} & set(self.columns)
        more = {column: [f"paper {column}", "ours - paper"] if column in compared else [] for column in self.columns}
        yield [self.corner, *itertools.chain.from_iterable([column, *more[column]] for column in self.columns)]
        for row in self.rows:
            line = [row]
            for column in self.columns:
                cell = self.cells.get((row, column), ())
                line.append(cell if isinstance(cell, str) else shown(cell, between, column in self.signed))
                if column in compared:
                    theirs, values = self.paper.get((row, column)), self.figures(row, column)
                    known = theirs is not None and values
                    line += [f"{theirs:.2f}", f"{statistics.fmean(values) - theirs:+.2f}"] if known else ["–", "–"]
            yield line

    def markdown(self) -> str:
        """The table under its title."""
        heading, *rows = self.lines()
        lines = [heading, ["---"] * len(heading), *rows]
        text = [f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)]
        return "\n".join([*text, "", self.source] if self.paper else text)


def shown(values: Sequence[float], between: str = " ", signed: bool = False) -> str:
    """Mean and standard deviation over the seeds.

    Example:
        >>> shown([90.0, 94.0]), shown([1.0], signed=True), shown([])
        ('92.0 ± 2.8', '+1.0', '–')
    """
    if not values:
        return "–"
    spread = f"{between}± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    mean = round(statistics.fmean(values), 1) + 0.0  # not -0.0
    return f"{mean:{'+' * signed}.1f}{spread}"


def percent(rate: float) -> str:
    """A share, as in a heading.

    Example:
        >>> percent(0.4)
        '40 %'
    """
    return f"{100 * rate:g} %"


def show(tables: Sequence[Table], console: Console) -> None:
    """On the terminal."""
    for table in tables:
        heading, *rows = table.lines("\n")
        view = RichTable(title=table.title)
        for place, text in enumerate(heading):
            view.add_column(text, justify="right" if place else "left", no_wrap=not place)
        for row in rows:
            view.add_row(*row)
        console.print(view)


def write(tables: Sequence[Table], facts: Mapping[str, str], out: Path) -> list[Path]:
    """Write all tables as Markdown and CSV, with what must be known to obtain them again.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(markdown(tables, facts))
    with (out / "tables.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        heads = ("table", "row", "column", "seeds", "mean", "standard_deviation", "word", "paper", "ours_minus_paper")
        writer.writerow(heads)
        for table in tables:
            for (row, column), cell in table.cells.items():
                values, theirs = table.figures(row, column), table.paper.get((row, column))
                mean = statistics.fmean(values) if values else None
                spread = statistics.stdev(values) if len(values) > 1 else None
                difference = None if mean is None or theirs is None else mean - theirs
                word = cell if isinstance(cell, str) else None
                writer.writerow([table.name, row, column, len(values), mean, spread, word, theirs, difference])
    return [out / "tables.md", out / "tables.csv"]


def markdown(tables: Sequence[Table], facts: Mapping[str, str]) -> str:
    """All tables and facts."""
    listed = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return "\n\n".join([*(table.markdown() for table in tables), listed]) + "\n"
