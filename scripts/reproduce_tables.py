"""The tables of scripts/reproduce.py, from the results of its runs."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from paper_figures import linear_probe
from reproduce_plan import (
    ALL_RATES,
    CORRUPTED,
    FLOOR_TEMPERATURES,
    FLOORS,
    FRACTIONS,
    RATES,
    REFERENCES,
    STARTS,
    TEMPERATURES,
    methods_of,
)
from torchmetrics.functional import pearson_corrcoef

NAMES = {
    "none": "plain",
    "official": "Grad-Mimic",
    "grad_mimic": "Grad-Mimic, floor",
    "grad_norm": "gradient norm",
    "rho_loss": "RHO-loss",
    "reference_loss": "reference's loss",
    "agra": "AGRA",
    "grad_match": "Grad-Match",
    "influence": "influence",
}
KINDS = {"seen": "a reference that has seen the scored images", "trusted_split": "a reference from trusted images"}
Values = list[float]


@dataclass(frozen=True)
class Table:
    """Figures of several seeds by row and column, in %.

    Attributes:
        name: Of files and panels.
        title: What it is.
        corner: What the rows are.
        cells: Row and column to a figure per seed.
        across: What the columns are, where they are numbers; a picture then has them on its axis.
        paper: What the paper has in some of the cells.
    """

    name: str
    title: str
    corner: str
    cells: Mapping[tuple[str, str], Values]
    across: str = ""
    paper: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.cells))

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
                line.append(shown(values := self.cells.get((row, column), []), between))
                if column in compared:
                    theirs = self.paper.get((row, column))
                    known = theirs is not None and values
                    line += [f"{theirs:.2f}", f"{statistics.fmean(values) - theirs:+.2f}"] if known else ["–", "–"]
            yield line


def shown(values: Values, between: str) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return "–"
    spread = f"{between}± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


class Results:
    """Of all runs, by sweep.

    Args:
        out: Folder of all runs.
        seeds: Others are left out.
    """

    def __init__(self, out: Path, seeds: Sequence[int]) -> None:
        self.out = out
        self.seeds = seeds

    def values(self, *folder: object, of: Callable[[Any], float | None]) -> Values:
        """A figure of every seed, in %, from the runs in a folder."""
        paths = [self.out.joinpath(*map(str, folder), str(seed), "result.json") for seed in self.seeds]
        found = [of(json.loads(path.read_text())) for path in paths if path.exists()]
        return [100 * value for value in found if value is not None]

    def references(self, setting: str, kind: object, of: Callable[[Any], float | None]) -> Values:
        """A figure of the references of every seed, in %."""
        paths = [self.out / "references" / setting / str(seed) / str(kind) / "result.json" for seed in self.seeds]
        return [100 * of(json.loads(path.read_text())) for path in paths if path.exists()]


def accuracy(result: Any) -> float:
    """On the test images, after the last epoch."""
    return float(result["accuracy"])


def found(figure: str, filter: str = "sign") -> Callable[[Any], float | None]:
    """A figure of a run's wrong labels as one filter finds them; unknown where there are none."""
    return lambda result: result["filters"].get(filter, {}).get(figure)


def percent(rate: float) -> str:
    """As in a heading."""
    return f"{100 * rate:g} %"


def tables_of(data: str, tables: Sequence[str], seeds: Sequence[int], out: Path) -> list[Table]:
    """The tables that were asked for, from the results that are there."""
    makers = {
        "probe": lambda: [*accuracies("probe", data, results), *detections("probe", data, results)],
        "full": lambda: [*accuracies("full", data, results), *detections("full", data, results)],
        "quality": lambda: qualities(results),
        "efficiency": lambda: [efficiency(results)],
        "temperature": lambda: temperatures(results),
        "reference_quality": lambda: [reference_quality(results)],
        "floor": lambda: floors(results),
    }
    results = Results(out, seeds)
    return [table for name in makers if name in tables for table in makers[name]()]


def accuracies(setting: str, data: str, results: Results) -> Iterator[Table]:
    """Test accuracy by method and rate."""
    whole = {"probe": "Linear probe", "full": "Full fine-tuning"}[setting]
    for kind in REFERENCES:
        cells = {("the reference", percent(rate)): results.references(setting, kind, accuracy) for rate in RATES}
        for method, rate in itertools.product(methods_of(data, kind), RATES):
            cells[NAMES[method], percent(rate)] = results.values(f"{setting}_{kind}", kind, method, rate, of=accuracy)
        # The paper's reference has seen the images.
        paper = linear_probe(data) if (setting, kind) == ("probe", "seen") else {}
        title = f"{whole} with {KINDS[kind]}: test accuracy by share of wrong labels"
        yield Table(f"{setting}_{kind}", title, "method", cells, "wrong labels", paper)


def detections(setting: str, data: str, results: Results) -> Iterator[Table]:
    """What each method's scores find, and each filter on the mimic scores."""
    whole = {"probe": "Linear probe", "full": "Full fine-tuning"}[setting]
    for kind in REFERENCES:
        scored = [method for method in methods_of(data, kind) if method != "none"]
        cells = {
            (NAMES[method], percent(rate)): results.values(f"{setting}_{kind}", kind, method, rate, of=found("auroc"))
            for method, rate in itertools.product(scored, RATES)
        }
        title = f"{whole} with {KINDS[kind]}: AUROC of finding wrong labels by a low mean score"
        yield Table(f"{setting}_{kind}_auroc", title, "scores", cells, "wrong labels")
        filters = ("sign", "threshold 1/B", "k-means", "mixture", "label model of the last three")
        cells = {
            (name, percent(rate)): results.values(f"{setting}_{kind}", kind, "official", rate, of=found("f1", name))
            for name, rate in itertools.product(filters, RATES)
        }
        title = f"{whole} with {KINDS[kind]}: F1 of wrong labels by filter on the mimic scores"
        yield Table(f"{setting}_{kind}_f1", title, "filter", cells, "wrong labels")


def qualities(results: Results) -> Iterator[Table]:
    """The share that a filter keeps against the share that is right."""
    cells: dict[tuple[str, str], Values] = {}
    for kind in REFERENCES:
        for name in ("sign", "label model of the last three"):
            row = f"{name}, {kind.replace('_', ' ')}"
            shares = {
                share: [results.values("quality", kind, "official", rate, of=found(share, name)) for rate in ALL_RATES]
                for share in ("share_kept", "share_right")
            }
            cells |= {(row, percent(r)): values for r, values in zip(ALL_RATES, shares["share_kept"], strict=True)}
            # Where a filter could not decide in one of the runs there is no correlation.
            if {len(values) for values in shares["share_kept"]} == {len(results.seeds)}:
                pairs = zip(*(torch.tensor(shares[share]).T for share in ("share_kept", "share_right")), strict=True)
                # Nor where it keeps the same of all.
                cells[row, "correlation"] = [100 * float(pearson_corrcoef(k, r)) for k, r in pairs if k.std() > 0]
    yield Table("quality", "Share kept, and its correlation with the share that is right (x 100)", "filter", cells)


def efficiency(results: Results) -> Table:
    """Accuracy of plain training on parts of the data."""
    cells: dict[tuple[str, str], Values] = {}
    for pick, name in (("mimic", "highest mimic scores"), ("random", "drawn blindly")):
        cells[name, "100 %"] = results.values("efficiency_all", of=accuracy)
        for fraction in FRACTIONS:
            cells[name, percent(fraction)] = results.values("efficiency", pick, fraction, of=accuracy)
    title = "Data efficiency, 40 % wrong labels: test accuracy of plain training on a share of the samples"
    title += f", chosen with {KINDS['trusted_split']}"
    return Table("efficiency", title, "samples", cells, "kept")


def temperatures(results: Results) -> Iterator[Table]:
    """Accuracy, and how many samples had a say."""
    for figure, of, what in (
        ("accuracy", accuracy, "test accuracy"),
        ("ess", lambda result: result["ess"], "effective sample size of a batch"),
    ):
        cells = {
            (f"{NAMES[method]}, {percent(rate)} wrong", f"{t:g}"): results.values("temperature", method, t, rate, of=of)
            for method, rate, t in itertools.product(("official", "grad_mimic"), (0.4, 0.6), TEMPERATURES)
        }
        title = f"Temperature, linear probe with {KINDS['trusted_split']}: {what}"
        yield Table(f"temperature_{figure}", title, "method", cells, "temperature")


def reference_quality(results: Results) -> Table:
    """What a reference from corrupted labels is worth."""
    cells: dict[tuple[str, str], Values] = {}
    for rate in (0.0, *CORRUPTED):
        run, column = ("reference_quality", rate, "official"), percent(rate)
        setting, kind = ("corrupted", rate) if rate else ("probe", "seen")
        cells["the reference", column] = results.references(setting, kind, accuracy)
        cells["Grad-Mimic with it", column] = results.values(*run, of=accuracy)
        cells["AUROC of its scores", column] = results.values(*run, of=found("auroc"))
        cells["plain", column] = results.values("reference_quality", 0.0, "none", of=accuracy)
    title = "Reference quality, 40 % wrong labels: references that learnt the scored images, with wrong labels"
    return Table("reference_quality", title, "figure", cells, "wrong labels in the reference's training")


def floors(results: Results) -> Iterator[Table]:
    """Full fine-tuning at 60 % with and without a floor on the effective sample size."""
    title = f"Full fine-tuning, 60 % wrong labels, with {KINDS['seen']}, by min_ess"
    runs = (
        ("same", "grad_mimic", "same start"),
        ("other", "official", "other start, head alone"),
        ("other", "grad_mimic", "other start"),
        ("other", "aligned", "other start, aligned"),
    )
    for figure, of, what in (
        ("accuracy", accuracy, "test accuracy"),
        ("ess", lambda result: result.get("ess"), "effective sample size of a batch"),
        ("auroc", lambda result: found("auroc")(result) if "filters" in result else None, "AUROC"),
    ):
        cells: dict[tuple[str, str], Values] = {}
        for floor in FLOORS:
            column = f"{floor:g}"
            if figure == "accuracy":
                cells["plain", column] = results.values("floor/plain", "none", of=of)
                for start in STARTS:
                    cells[f"reference, {start} start", column] = results.references(start, "seen", of)
            for (start, mimic, name), t in itertools.product(runs, FLOOR_TEMPERATURES):
                row = f"{name}, τ {t:g}"
                cells[row, column] = results.values(f"floor/{start}", mimic, t, floor, of=of)
        yield Table(f"floor_{figure}", f"{title}: {what}", "reference", cells, "min_ess")
