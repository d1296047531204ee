"""Figures of the pages in docs/evidence, drawn from the tables of the same pages.

python -m scripts.studies.figures            # all of them, into docs/images

Nothing is computed here: a figure shows means and standard deviations over the seeds as its page has them. At the width
of a README, 830 pixels, the smallest text is 11 pixels high. Colours are Okabe and Ito's; marks and line styles
differ as well.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "evidence"
#: 830 pixels are 8.3 inches on the page, so that a point is 1.4 pixels.
WIDTH = 8.3
SEEDS = "3 seeds: mean ± standard deviation"
#: Colour, mark and line of a method, the same in every figure.
STYLES = {
    "RHO-loss": ("#0072b2", "s", "-"),
    "Grad-Mimic": ("#d55e00", "o", "-"),
    "reference's loss": ("#009e73", "^", "-"),
    "plain": ("#000000", "D", "--"),
    "AGRA": ("#cc79a7", "v", "-."),
    "Grad-Match": ("#56b4e9", "P", ":"),
    "influence": ("#7f7f7f", "X", ":"),
    "the reference": ("#7f7f7f", "", ":"),
}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float


def table_after(page: str, title: str) -> dict[tuple[str, str], str]:
    """Return the cells, as text by row and column, of the first table after a text in a page.

    Args:
        page: Name of the page in docs/evidence.
        title: The text, such as the table's title.
    """
    _, found, rest = (PAGES / f"{page}.md").read_text().partition(title)
    table = re.search(r"^\|.*\n\|[ :|-]+\n((?:\|.*\n)+)", rest, re.MULTILINE)
    if not found or table is None:
        raise ValueError(f"{page}.md has no table after {title!r}")
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
    return {(row[0], column): cell for row in rows for column, cell in zip(head[1:], row[1:], strict=True)}


def spread(cell: str) -> Spread | None:
    """Return the figures of a cell ``94.8 ± 0.6``; ``None`` for one that has no figures."""
    match = re.match(r"([-+\d.]+)(?: ± ([\d.]+))?", cell)
    return None if match is None else Spread(float(match[1]), float(match[2] or 0))


def spreads(page: str, title: str) -> dict[tuple[str, str], Spread]:
    """Return the figures of a table, without cells that have none."""
    cells = {place: spread(cell) for place, cell in table_after(page, title).items()}
    return {place: each for place, each in cells.items() if each is not None}


def _names(cells: Mapping[tuple[str, str], Spread], part: int) -> list[str]:
    return list(dict.fromkeys(place[part] for place in cells))


def _figure(height: float, panels: int = 1, *, shared: bool = True) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, panels, sharey=shared, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9)
        each.grid(axis="y", alpha=0.25)
    return figure, list(axes)


def _label_ends(axes: Axes, ends: Mapping[str, float], x: float, gap: float) -> None:
    """Write names beside the ends of lines, moved apart so that they do not overlap."""
    low = -float("inf")
    for name, y in sorted(ends.items(), key=lambda each: each[1]):
        low = max(y, low + gap)
        axes.annotate(name, (x, y), (x + 0.12, low), va="center", fontsize=9, color=STYLES[name][0])


def paper_accuracy() -> Figure:
    """Test accuracy by share of wrong labels, with a reference from trusted images."""
    figure, panels = _figure(4.2, 2)
    for axes, kind in zip(panels, ("Linear probe", "Full fine-tuning"), strict=True):
        title = f"**{kind} with a reference from trusted images: test accuracy by share of wrong labels**"
        cells = spreads("paper_digits", title)
        rates, ends = _names(cells, 1), {}
        for name, (colour, mark, line) in STYLES.items():
            points = [cells[name, rate] for rate in rates]
            look = {"color": colour, "marker": mark, "linestyle": line, "markersize": 6, "capsize": 3}
            axes.errorbar(range(len(rates)), [p.mean for p in points], [p.deviation for p in points], **look)
            ends[name] = points[-1].mean
        _label_ends(axes, ends, len(rates) - 1, 0.62)
        axes.set_xticks(range(len(rates)), rates)
        axes.set_xlim(-0.2, len(rates) + 0.15)
        axes.set_title(kind, fontsize=11)
        axes.set_xlabel("wrong labels", fontsize=10)
    panels[0].set_ylabel("test accuracy in %", fontsize=10)
    figure.supxlabel(f"1,097 digits; {SEEDS}. The gradient norm (56 to 76 %) lies below the figure.", fontsize=9)
    return figure


def paper_detection() -> Figure:
    """How well each score finds wrong labels."""
    cells = spreads(
        "paper_digits",
        "**Linear probe with a reference from trusted images: AUROC of finding wrong labels by a low mean score**",
    )
    return _ranking(
        {name: cells[name, "40 %"] for name in _names(cells, 0) if name != "Grad-Mimic, floor"},
        "AUROC of finding 40 % wrong labels in % (50: chance)",
        f"linear probe on 1,097 digits, a reference from trusted images; {SEEDS}",
        chance=50,
    )


def paper_filters() -> Figure:
    """How well each filter finds wrong labels."""
    cells = spreads(
        "paper_digits",
        "**Linear probe with a reference from trusted images: F1 of wrong labels by filter on the mimic scores**",
    )
    return _ranking(
        {name: cells[name, "40 %"] for name in _names(cells, 0)},
        "F1 of finding 40 % wrong labels in %",
        f"filters on the mimic scores of a linear probe, 1,097 digits, a reference from trusted images; {SEEDS}",
    )


def _ranking(figures: Mapping[str, Spread], what: str, caption: str, chance: float | None = None) -> Figure:
    """Dots with intervals, the best on top, each with its figure."""
    best_last = sorted(figures.items(), key=lambda each: each[1].mean)
    figure, (axes,) = _figure(1.4 + 0.34 * len(figures))
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", alpha=0.25)
    for place, (name, each) in enumerate(best_last):
        ours = name in ("Grad-Mimic", "sign")
        colour, mark = (STYLES["Grad-Mimic"][0], "o") if ours else (STYLES["RHO-loss"][0], "s")
        axes.errorbar(each.mean, place, xerr=each.deviation, color=colour, marker=mark, markersize=7, capsize=4)
        beside = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        axes.annotate(f"{each.mean:.1f}", (each.mean, place), **beside)
    if chance is not None:
        axes.axvline(chance, color="#7f7f7f", linestyle=":")
    axes.set_yticks(range(len(best_last)), [name for name, _ in best_last], fontsize=10)
    axes.set_ylim(-0.5, len(best_last) - 0.3)
    axes.set_xlabel(what, fontsize=10)
    figure.supxlabel(caption, fontsize=9)
    return figure


#: Panels of the figure about references: what is trained, and what was done to the reference.
_REFERENCES = {
    "a new head on its backbone": ("noise on the reference's head",),
    "from scratch, aligned": ("noise on all its weights", "epochs it was trained for"),
}


def reference_quality() -> Figure:
    """What is found and learnt with worse and worse references."""
    cells = spreads("reference_quality", "**40 % wrong labels**")
    panels = [(model, done) for model, ways in _REFERENCES.items() for done in ways]
    figure, drawn = _figure(4.4, len(panels))
    best = cells["plain training, best epoch", "the model"].mean
    for axes, (model, done) in zip(drawn, panels, strict=True):
        start = f"{model}; {done}: "
        amounts = [row.removeprefix(start) for row in _names(cells, 0) if row.startswith(start)]
        for head, (colour, mark, line), label in (
            ("AUROC", ("#d55e00", "o", "-"), "AUROC of finding wrong labels"),
            ("the model", ("#0072b2", "s", "--"), "accuracy of the trained model"),
            ("the reference", ("#000000", "X", ":"), "accuracy of the reference"),
        ):
            points = [cells[start + amount, head] for amount in amounts]
            look = {"color": colour, "marker": mark, "linestyle": line, "markersize": 6, "capsize": 3, "label": label}
            axes.errorbar(range(len(amounts)), [p.mean for p in points], [p.deviation for p in points], **look)
        if model == "from scratch, aligned":
            axes.axhline(best, color="#7f7f7f", linewidth=1, label="best epoch of plain training")
        axes.set_xticks(range(len(amounts)), amounts)
        axes.set_title(model, fontsize=11)
        axes.set_xlabel(done, fontsize=10)
    drawn[0].set_ylabel("%", fontsize=10)
    handles, labels = drawn[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=2, loc="outside upper center")
    figure.supxlabel(f"digits, 40 % wrong labels; {SEEDS}. Noise in standard deviations of each tensor.", fontsize=9)
    return figure


def quality() -> Figure:
    """Estimated share of good samples against the truth, for each seed."""
    cells = table_after("curation", "# ")
    figure, (axes,) = _figure(4.6)
    calibrated: list[tuple[float, float]] = []
    by_sign: list[tuple[float, float]] = []
    for rate in dict.fromkeys(row for row, _ in cells):
        truth, kept = (float(cells[rate, column].split(" ± ")[0]) for column in ("truly good", "kept"))
        calibrated += [(truth, truth + float(e)) for e in cells[rate, "error of each seed, points"].split(",")]
        by_sign.append((truth + 0.9, kept))  # beside the others
    for points, colour, mark, label in (
        (calibrated, "#0072b2", "o", "quality, calibrated by trusted samples (each seed)"),
        (by_sign, "#d55e00", "X", "share with a score of 0 or more (mean over the seeds)"),
    ):
        axes.plot(*zip(*points, strict=True), mark, color=colour, alpha=0.8, label=label)
    axes.plot([35, 100], [35, 100], color="#7f7f7f", linestyle=":", label="the truth")
    axes.set_xlabel("samples with a right label in %", fontsize=10)
    axes.set_ylabel("estimate in %", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.supxlabel("1,097 digits with 0, 10, 20, 40 and 60 % wrong labels, 50 trusted ones; 3 seeds", fontsize=9)
    return figure


FIGURES: Mapping[str, Callable[[], Figure]] = {
    "paper_accuracy": paper_accuracy,
    "paper_detection": paper_detection,
    "paper_filters": paper_filters,
    "reference_quality": reference_quality,
    "quality": quality,
}


def main() -> None:
    """Draw the figures that the command line names."""
    parser = argparse.ArgumentParser(description="Draw the figures of docs/evidence from the tables of its pages.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)}; all, if none is given")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder (%(default)s)")
    options = parser.parse_args()
    unknown = set(options.names) - set(FIGURES)
    if unknown:
        parser.error(f"no figures {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or FIGURES:
        FIGURES[name]().savefig(options.out / f"{name}.png", dpi=160)
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
