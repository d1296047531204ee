"""Weights and decisions with references of every quality, against every baseline, on the digits."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cleanlab.filter import find_label_issues
from torch import Tensor

from lightning_mimic import Aligned, Reweighter
from lightning_mimic.models import ImageClassifier
from lightning_mimic.scorers import (
    HeadReferenceLoss,
    HeadRhoLoss,
    MimicScore,
    Posterior,
    ReferenceLoss,
    ReferencePart,
    RhoLoss,
    Scorer,
)
from scripts.studies.lab import Lab
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Cell as Figures
from scripts.studies.tables import Table
from scripts.studies.weak_cells import Cell, Fit, Setting, accuracy, fit, found, make_cell

SETTINGS: dict[Setting, str] = {
    "frozen": "a linear layer on a shared frozen backbone",
    "scratch": "a network from scratch, with a reference of another start, aligned",
    "same_start": "a whole network from the reference's own start",
}
NOISES = {
    "0": "0 %",
    "20": "20 %",
    "40": "40 %",
    "60": "60 %",
    "pairs": "40 % next class",
    "instance": "40 % by difficulty",
}
REFERENCES = {
    "good": "good",
    "weak": "about 70 % accurate",
    "one_epoch": "stopped after one epoch",
    "overconfident": "overconfident",
    "n20": "from 20 images",
    "n50": "from 50 images",
    "smoothed": "with smoothed labels",
    "noised": "with noise on its weights",
}
CORE_NOISES = ("0", "20", "40", "60", "pairs")
CORE_REFERENCES = ("good", "weak", "one_epoch", "overconfident")
#: Methods of the cells beside the core.
FEW_METHODS = (
    "mimic",
    "mimic_auto",
    "mimic_start",
    "mimic_calibrated",
    "head_loss_calibrated",
    "posterior",
    "rho",
    "reference_loss",
)

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TEMPERATURES = (3.0, 1.0, 0.3, 0.1)
#: Of which cells the settings are chosen.
TRIED = (("0", "good"), ("40", "good"), ("pairs", "good"), ("40", "weak"))
FOLDS = 3


#: A cell of the tables: setting, noise and reference.
Place = tuple[Setting, str, str]
#: From cell, model and chosen temperatures to a reweighter.
Begin = Callable[[Cell, ImageClassifier, Mapping[str, float]], Reweighter]


@dataclass(frozen=True)
class Method:
    """A way to weight the samples.

    Attributes:
        title: In the tables.
        begin: Makes its reweighter.
        decides: By what it drops samples: ``"score"`` below 0, ``"posterior"`` below 0.5, or nothing.
        settings: In which it exists.
    """

    title: str
    begin: Begin
    decides: str | None = "score"
    settings: tuple[Setting, ...] = ("frozen", "scratch", "same_start")


def at_layer(temperature: str | None = None, scorer: Scorer | None = None, **settings: Any) -> Begin:
    """A reweighter of the last layer, and of the whole network where the start is the reference's.

    Args:
        temperature: The score whose chosen temperature is taken, or ``"auto"``.
        scorer: The mimic score, if left out.
        settings: Further ones of the reweighter.
    """

    def begin(cell: Cell, model: ImageClassifier, temperatures: Mapping[str, float]) -> Reweighter:
        reference = Aligned(cell.reference) if cell.setting == "scratch" else cell.reference
        parameters = "all" if cell.setting == "same_start" else "head"
        return Reweighter(
            model,
            reference,
            parameters,
            scorer=scorer,
            temperature=None if temperature is None else temperatures.get(temperature, temperature),
            diagnose_reference=False,
            **settings,
        )

    return begin


def of_network(name: str, scorer: Scorer) -> Begin:
    """A reweighter by the losses of the whole reference.

    Args:
        name: The score whose chosen temperature is taken.
        scorer: Reads the reference's losses.
    """

    def begin(cell: Cell, model: ImageClassifier, temperatures: Mapping[str, float]) -> Reweighter:
        temperature = temperatures[name]
        return Reweighter(model, cell.reference, scorer=scorer, temperature=temperature, diagnose_reference=False)

    return begin


LAYER: tuple[Setting, ...] = ("frozen", "scratch")
METHODS = {
    "mimic": Method("mimic score", at_layer("mimic")),
    "mimic_calibrated": Method(
        "mimic score, calibrated", at_layer("mimic", MimicScore(calibrated=True)), settings=LAYER
    ),
    "part": Method("reference's part, calibrated", at_layer("mimic", ReferencePart()), settings=LAYER),
    "mimic_auto": Method("mimic score, automatic τ", at_layer("auto")),
    "mimic_start": Method(
        "mimic score from the start, automatic τ", at_layer("auto", direction="start"), settings=("same_start",)
    ),
    "mimic_calibrated_auto": Method(
        "mimic score, calibrated, automatic τ", at_layer("auto", MimicScore(calibrated=True)), settings=LAYER
    ),
    "part_auto": Method("reference's part, calibrated, automatic τ", at_layer("auto", ReferencePart()), settings=LAYER),
    "head_rho": Method("RHO-loss at the layer", at_layer("rho", HeadRhoLoss()), settings=LAYER),
    "head_rho_calibrated": Method(
        "RHO-loss at the layer, calibrated", at_layer("rho", HeadRhoLoss(calibrated=True)), settings=LAYER
    ),
    "head_loss": Method("reference's loss at the layer", at_layer("reference_loss", HeadReferenceLoss()), None, LAYER),
    "head_loss_calibrated": Method(
        "reference's loss at the layer, calibrated",
        at_layer("reference_loss", HeadReferenceLoss(calibrated=True)),
        None,
        LAYER,
    ),
    "posterior": Method("posterior", at_layer(weighting=Posterior()), "posterior", LAYER),
    "rho": Method("RHO-loss, by the network", of_network("rho", RhoLoss())),
    "reference_loss": Method("reference's loss, by the network", of_network("reference_loss", ReferenceLoss()), None),
}
#: The method and the filter that are recommended, and those that the table compares with.
RECOMMENDED, RHO, LOSS = "posterior", "rho", "reference_loss"
#: Rows of the tables.
TITLES = {
    "plain": "plain training",
    **{name: method.title for name, method in METHODS.items()},
    "agreement": "what the reference agrees with",
    "cleanlab": f"cleanlab, {FOLDS} folds",
    "oracle": "the right labels alone",
    "reference": "the reference alone",
}


def baselines(setting: Setting, noise: str, seed: int, phase: str, learning_rate: float) -> dict[str, Any]:
    """What does not depend on the reference: plain training, cleanlab and the oracle."""
    cell = make_cell(setting, noise, "one_epoch", seed, phase)
    results = {"plain": fit(cell, cell.fresh(), learning_rate).figures()}
    probabilities = torch.empty(len(cell.train), 10)
    for held in torch.arange(len(cell.train)).chunk(FOLDS):
        others = torch.ones(len(cell.train), dtype=torch.bool).index_fill(0, held, False).nonzero().flatten()
        model = cell.fresh()
        fit(cell, model, learning_rate, rows=others)
        with torch.no_grad():
            probabilities[held] = model(cell.train.inputs[held]).softmax(1)
    own = probabilities.gather(1, cell.given[:, None])[:, 0]
    issues = torch.as_tensor(find_label_issues(cell.given.numpy(), probabilities.numpy(), n_jobs=1))
    for name, scores, dropped in (("cleanlab", own, issues), ("oracle", -cell.wrong.float(), cell.wrong)):
        results[name] = fit(cell, cell.fresh(), learning_rate, keep=~dropped).figures() | found(
            scores, dropped, cell.wrong
        )
        results[name]["estimate"] = float(dropped.float().mean())
    return results | {"truth": float(cell.wrong.float().mean())}


def methods(
    setting: Setting, noise: str, reference: str, seed: int, phase: str, chosen: Chosen, names: Sequence[str]
) -> dict[str, Any]:
    """What every method does in a cell."""
    cell, settings = make_cell(setting, noise, reference, seed, phase), chosen[setting]
    with torch.no_grad():
        logits = cell.reference(cell.train.inputs)
    losses = -F.cross_entropy(logits, cell.given, reduction="none")
    differs = logits.argmax(1) != cell.given
    alone = accuracy(cell.reference, cell.evaluation)
    results: dict[str, Any] = {"reference": {"last": alone, "best": alone} | found(losses, None, cell.wrong)}
    agreed = fit(cell, cell.fresh(), settings["learning_rate"], keep=~differs)
    results["agreement"] = agreed.figures() | found((~differs).float(), differs, cell.wrong)
    results["agreement"]["estimate"] = float(differs.float().mean())
    for name in names:
        model, method = cell.fresh(), METHODS[name]
        run = fit(cell, model, settings["learning_rate"], reweighter=method.begin(cell, model, settings))
        results[name] = run.figures() | judged(run, method, cell.wrong)
    return results


def judged(run: Fit, method: Method, wrong: Tensor) -> dict[str, Any]:
    """What a method's scores or posteriors find, and the share of wrong labels that it estimates."""
    values = run.posteriors if method.decides == "posterior" else run.scores
    dropped = None if method.decides is None else values < (0.5 if method.decides == "posterior" else 0.0)
    figures = found(values, dropped, wrong)
    # By the calibration, where there is one; else by the sign.
    estimate = run.wrong_share if run.wrong_share is not None else 1 - figures["kept"] if "kept" in figures else None
    return figures if estimate is None else figures | {"estimate": estimate}


def rated(setting: Setting, noise: str, seed: int, phase: str) -> dict[str, Any]:
    """Plain training's accuracy at every learning rate."""
    cell = make_cell(setting, noise, "one_epoch", seed, phase)
    return {f"{rate:g}": fit(cell, cell.fresh(), rate).accuracies[-1] for rate in LEARNING_RATES}


def heated(
    setting: Setting, noise: str, reference: str, seed: int, phase: str, rates: Mapping[str, float]
) -> dict[str, Any]:
    """The accuracy of each score at every temperature."""
    cell, results = make_cell(setting, noise, reference, seed, phase), {}
    for name, temperature in itertools.product(("mimic", RHO, LOSS), TEMPERATURES):
        model = cell.fresh()
        reweighter = METHODS[name].begin(cell, model, {name: temperature})
        results[f"{name} {temperature:g}"] = fit(cell, model, rates[setting], reweighter=reweighter).accuracies[-1]
    return results


def choose(lab: Lab) -> Chosen:
    """Plain training's learning rate in every setting, and then each score's temperature, on validation data."""
    given = list(itertools.product(LAYER, CORE_NOISES, lab.seeds))
    results = lab.map("learning_rates", rated, given, lab.phase)
    rates: dict[str, float] = {}
    for setting in LAYER:
        of = [result for (where, *_), result in zip(given, results, strict=True) if where == setting]
        rates[setting] = max(LEARNING_RATES, key=lambda rate: statistics.fmean(each[f"{rate:g}"] for each in of))
    tried = [(setting, *place, seed) for setting, seed, place in itertools.product(LAYER, lab.seeds, TRIED)]
    heats = lab.map("temperatures", heated, tried, lab.phase, rates)
    chosen: dict[str, Any] = {}
    for setting in LAYER:
        of = [result for (where, *_), result in zip(tried, heats, strict=True) if where == setting]
        chosen[setting] = {"learning_rate": rates[setting]}
        for name in ("mimic", RHO, LOSS):
            # Of equals the first, which trusts the scores least.
            mean = {t: statistics.fmean(each[f"{name} {t:g}"] for each in of) for t in TEMPERATURES}
            chosen[setting][name] = max(TEMPERATURES, key=lambda t: mean[t])
    # A network is trained as from scratch; its scores have another unit, so that τ stays the default.
    chosen["same_start"] = chosen["scratch"] | {"mimic": 1.0}
    return chosen


class Results:
    """Figures of all methods by cell, in % of every seed.

    Args:
        seeds: In the order of the figures.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self._found: dict[Place, dict[int, Mapping[str, Any]]] = {}

    def add(self, cell: Place, seed: int, results: Mapping[str, Any]) -> None:
        """Take in what all methods did in a cell with a seed."""
        self._found.setdefault(cell, {})[seed] = results

    @property
    def cells(self) -> list[Place]:
        """Setting, noise and reference."""
        return list(self._found)

    @property
    def rows(self) -> dict[str, str]:
        """Methods and baselines that were run, with their titles."""
        ran = {name for of_seeds in self._found.values() for results in of_seeds.values() for name in results}
        return {name: title for name, title in TITLES.items() if name in ran}

    def figures(self, cell: Place, name: str, figure: str) -> list[float]:
        """One for every seed; none where a seed has none, as of clean labels there is no AUROC."""
        values = [self._found[cell][seed].get(name, {}).get(figure) for seed in self.seeds]
        return [] if any(value is None for value in values) else [100 * value for value in values]

    def truth(self, cell: Place) -> list[float]:
        """The true shares of wrong labels."""
        return [100 * self._found[cell][seed]["truth"] for seed in self.seeds]

    def gaps(self, cell: Place, name: str, other: str, figure: str = "last") -> list[float]:
        """One method's figure less another's, seed by seed."""
        return less(self.figures(cell, name, figure), self.figures(cell, other, figure))

    def mean(self, cells: Sequence[Place], name: str, figure: str) -> list[float]:
        """A figure's mean over the cells that have it, for every seed."""
        return averaged([self.figures(cell, name, figure) for cell in cells])


def less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Differences, seed by seed; none where either has none."""
    return [a - b for a, b in zip(values, others, strict=True)] if values and others else []


def averaged(of_cells: Sequence[Sequence[float]]) -> list[float]:
    """Means over cells for every seed; a cell without figures is left out."""
    return [statistics.fmean(values) for values in zip(*(each for each in of_cells if each), strict=True)]


def error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 of a single value.

    Example:
        >>> error([1.0, 3.0])
        1.0
    """
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def difference(values: Sequence[float]) -> str:
    """Mean and standard error of paired differences.

    Example:
        >>> difference([1.0, 3.0]), difference([])
        ('+2.0 (1.0)', '–')
    """
    return f"{statistics.fmean(values):+.1f} ({error(values):.1f})" if values else "–"


def measured(
    lab: Lab, folder: str, chosen: Chosen, cells: Sequence[Place], names: Sequence[str] = tuple(METHODS)
) -> Results:
    """Run what is missing, and return all figures.

    Args:
        lab: Runs it.
        folder: Of the methods' results.
        chosen: Settings.
        cells: Setting, noise and reference.
        names: Of the methods.
    """
    results = Results(lab.seeds)
    # A process keeps what all cells of a seed share.
    for setting in dict.fromkeys(setting for setting, *_ in cells):
        here = [cell for cell in cells if cell[0] == setting]
        noises = list(dict.fromkeys(noise for _, noise, _ in here))
        given = [(setting, noise, seed) for seed in lab.seeds for noise in noises]
        plain = lab.map(f"baselines_{setting}", baselines, given, lab.phase, chosen[setting]["learning_rate"])
        of_all = dict(zip(given, plain, strict=True))
        tasks = [(*cell, seed) for seed in lab.seeds for cell in here]
        mine = [name for name in names if setting in METHODS[name].settings]
        for task, result in zip(
            tasks, lab.map(f"{folder}_{setting}", methods, tasks, lab.phase, chosen, mine), strict=True
        ):
            results.add(task[:3], task[3], of_all[task[0], task[1], task[3]] | result)
    return results


@dataclass(frozen=True)
class Criterion:
    """What the recommended method must show in every cell, or on average.

    Attributes:
        text: As the table has it.
        values: From results and cells to a figure per cell, the mean over its seeds.
        least: The least figure that meets it.
    """

    text: str
    values: Callable[[Results, Sequence[Place]], Mapping[str, float]]
    least: float

    def row(self, results: Results, cells: Sequence[Place]) -> dict[str, Figures]:
        """The worst cell, its figure, and whether that is enough."""
        values = self.values(results, cells)
        if not values:
            return {"worst cell": "–", "figure": "–", "met": "not measured"}
        worst = min(values, key=lambda cell: values[cell])
        met = values[worst] >= self.least
        return {"worst cell": worst, "figure": f"{values[worst]:+.2f}", "met": "yes" if met else "**no**"}


def each(
    value: Callable[[Results, Place], Sequence[float]],
    noises: Sequence[str] = CORE_NOISES,
    references: Sequence[str] = CORE_REFERENCES,
    errors: float = 0.0,
) -> Callable[[Results, Sequence[Place]], dict[str, float]]:
    """A figure of some cells.

    Args:
        value: One for every seed.
        noises: Of the cells.
        references: Of the cells.
        errors: Standard errors that are added in favour of the method.
    """

    def values(results: Results, cells: Sequence[Place]) -> dict[str, float]:
        figures = {cell: value(results, cell) for cell in cells if cell[1] in noises and cell[2] in references}
        return {name(cell): statistics.fmean(of) + errors * error(of) for cell, of in figures.items() if of}

    return values


def average(other: str) -> Callable[[Results, Sequence[Place]], dict[str, float]]:
    """The recommended method's accuracy less another's, over all cells."""

    def values(results: Results, cells: Sequence[Place]) -> dict[str, float]:
        return {"all": statistics.fmean(averaged([results.gaps(cell, RECOMMENDED, other) for cell in cells]))}

    return values


def name(cell: Place) -> str:
    """A cell in words."""
    setting, noise, reference = cell
    return f"{setting.replace('_', ' ')}, {NOISES[noise]}, {REFERENCES[reference]}"


def missed(results: Results, cell: Place) -> list[float]:
    """By how many points the estimated share of wrong labels is off, with a minus."""
    return [-abs(gap) for gap in less(results.figures(cell, RECOMMENDED, "estimate"), results.truth(cell))]


NOISY = tuple(noise for noise in CORE_NOISES if noise != "0")
CRITERIA = (
    Criterion(
        "share of clean data that the filter keeps, at least 97 %",
        each(lambda results, cell: results.figures(cell, RECOMMENDED, "kept"), noises=("0",)),
        97.0,
    ),
    Criterion(
        "accuracy less plain training's plus two standard errors, at least −0.5",
        each(lambda results, cell: results.gaps(cell, RECOMMENDED, "plain"), errors=2.0),
        -0.5,
    ),
    Criterion("accuracy less RHO-loss's on average, at least −0.3", average(RHO), -0.3),
    Criterion("accuracy less the reference's loss's on average, above 0", average(LOSS), 0.0),
    Criterion(
        "AUROC less that of the reference's own loss, at least −0.5",
        each(lambda results, cell: results.gaps(cell, RECOMMENDED, "reference", "auroc"), NOISY),
        -0.5,
    ),
    *(
        Criterion(
            f"AUROC with references {REFERENCES[reference]}, at least 95",
            each(lambda results, cell: results.figures(cell, RECOMMENDED, "auroc"), NOISY, (reference,)),
            95.0,
        )
        for reference in ("weak", "one_epoch")
    ),
    Criterion(
        "estimated minus true share of wrong labels, by at most 6 points (symmetric, good reference)",
        each(missed, ("0", "20", "40", "60"), ("good",)),
        -6.0,
    ),
    Criterion(
        "accuracy less that of the reference alone, at least −1",
        each(lambda results, cell: results.gaps(cell, RECOMMENDED, "reference")),
        -1.0,
    ),
)


def summary(results: Results) -> Iterator[Table]:
    """The criteria, and all methods over all cells of a setting."""
    cells: dict[tuple[str, str], Figures] = {}
    for criterion in CRITERIA:
        cells |= {(criterion.text, head): text for head, text in criterion.row(results, results.cells).items()}
    yield Table("weak_references_criteria", f"{TITLES[RECOMMENDED]}: what it must show", "figure", cells)
    cells = {}
    for setting in dict.fromkeys(setting for setting, *_ in results.cells):
        here = [cell for cell in results.cells if cell[0] == setting]
        head = setting.replace("_", " ")
        for row, title in results.rows.items():
            cells[title, f"{head}: accuracy"] = results.mean(here, row, "last")
            for other in ("plain", RHO, LOSS):
                gaps = averaged([results.gaps(cell, row, other) for cell in here])
                cells[title, f"{head}: less {TITLES[other]}"] = difference(gaps) if row != other else "–"
            cells[title, f"{head}: AUROC"] = results.mean(here, row, "auroc")
    title = "All cells: mean and standard deviation over the seeds; differences with their standard error in brackets"
    yield Table("weak_references", title, "method", cells)


def tables(results: Results) -> Iterator[Table]:
    """Of every setting and reference: accuracy, what is found, and the estimated share of wrong labels."""
    for setting, reference in dict.fromkeys((setting, reference) for setting, _, reference in results.cells):
        here = [cell for cell in results.cells if cell[0] == setting and cell[2] == reference]
        where = f"{SETTINGS[setting]}; the reference {REFERENCES[reference]}"
        place = f"weak_references_{setting}_{reference}"
        learnt = learnt_cells(results, here)
        yield Table(f"{place}_accuracy", f"Accuracy in the last epoch, by wrong labels: {where}", "method", learnt)
        yield Table(f"{place}_detection", f"Finding the wrong labels: {where}", "by", found_cells(results, here))
        title = f"Estimated share of wrong labels: {where}"
        yield Table(f"{place}_share", title, "by", estimated_cells(results, here))


def learnt_cells(results: Results, here: Sequence[Place]) -> dict[tuple[str, str], Figures]:
    """Accuracies of every method, and its differences from two others."""
    cells: dict[tuple[str, str], Figures] = {}
    for row, title in results.rows.items():
        cells |= {(title, NOISES[cell[1]]): results.figures(cell, row, "last") for cell in here}
        cells[title, "best epoch, mean"] = results.mean(here, row, "best")
        for other in ("plain", RHO):
            gaps = averaged([results.gaps(cell, row, other) for cell in here])
            cells[title, f"less {TITLES[other]}"] = difference(gaps) if row != other else "–"
    return cells


def found_cells(results: Results, here: Sequence[Place]) -> dict[tuple[str, str], Figures]:
    """How well every method finds the wrong labels, what it keeps of clean data, and how many samples have a say."""
    cells: dict[tuple[str, str], Figures] = {}
    clean = [cell for cell in here if cell[1] == "0"]
    for row, title in results.rows.items():
        cells |= {
            (title, f"AUROC, {NOISES[cell[1]]}"): results.figures(cell, row, "auroc")
            for cell in here
            if cell not in clean
        }
        for head, figure in (("average precision", "average_precision"), ("F1", "f1")):
            cells[title, head] = results.mean(here, row, figure)
        cells[title, "kept of clean data"] = results.mean(clean, row, "kept")
        cells[title, "effective sample size"] = results.mean(here, row, "ess")
    return {place: values for place, values in cells.items() if values}


def estimated_cells(results: Results, here: Sequence[Place]) -> dict[tuple[str, str], Figures]:
    """The share of wrong labels by every method, below the truth."""
    cells: dict[tuple[str, str], Figures] = {("the truth", NOISES[cell[1]]): results.truth(cell) for cell in here}
    for row, title in results.rows.items():
        cells |= {(title, NOISES[cell[1]]): results.figures(cell, row, "estimate") for cell in here}
    return {place: values for place, values in cells.items() if values}


def report_core(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """Both settings with every noise and reference of the core."""
    results = measured(lab, "core", chosen, list(itertools.product(LAYER, CORE_NOISES, CORE_REFERENCES)))
    yield from summary(results)
    yield from tables(results)


def report_extras(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """Other noise, other references, and a whole network from the reference's own start."""
    start: Setting = "same_start"
    cells: list[Place] = [
        *itertools.product(LAYER, ("instance",), CORE_REFERENCES),
        *itertools.product(LAYER, ("0", "40", "pairs"), ("n20", "n50", "smoothed", "noised")),
        *itertools.product([start], ("0", "40", "pairs"), ("good", "weak", "one_epoch")),
    ]
    yield from tables(measured(lab, "extras", chosen, cells, FEW_METHODS))


STUDY = Study(
    "Weights and decisions with references of every quality",
    {"core": Part(report_core, choose), "extras": Part(report_extras, choose, seeds=range(50, 55))},
    seeds=range(50, 60),
    chosen_on=range(40, 45),
)
