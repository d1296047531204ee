"""Which parameters to score when a network trains from scratch: the last layer or all; beside the other scorers."""

import statistics
from collections.abc import Iterator
from functools import partial

from scripts.studies.digits import EACH_EPOCH, OTHER_START, SPLIT, choose_plain, gaps, path_of, references
from scripts.studies.lab import Lab, Runs, StudyError
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
TEMPERATURES = (1.0, 0.3, 0.1, 0.03)  # of equals, the first: the one that trusts the scores least
MAX_EPOCHS = 10
RATE = "data.noise.rate=0.4"
# Of a width of 16 or 64 and a network of linear layers, the most accurate on validation images in plain training.
NETWORK = "model.backbone.width=16"
SCORERS = {
    "grad_mimic": "mimic, last layer",
    "all_parameters": "mimic, all",
    "cosine": "cosine, last layer",
    "grad_norm": "norm, last layer",
    "rho_loss": "RHO loss",
    "reference_loss": "reference's loss",
}
WITHOUT_NORM = [scorer for scorer in SCORERS if scorer != "grad_norm"]  # which asks no reference
FIGURES = {"accuracy": "test, last", "best_accuracy": "test, best", "auroc": "AUROC", "first_auroc": "AUROC, 1st epoch"}


def make_references(lab: Lab, shifted: bool, start: str) -> Runs:
    """References from the runs' initial weights, or from others."""
    more = OTHER_START if start == "other" else 0
    return references(lab, f"references_{start}_{shifted}", f"data.augment={shifted}", NETWORK, more=more)


def fixed(lab: Lab, shifted: bool, start: str = "same") -> list[str]:
    more = OTHER_START if start == "other" else 0
    return ["experiment=digits_scratch", path_of(lab, f"references_{start}_{shifted}", more), RATE, NETWORK]


def choose(shifted: bool, lab: Lab) -> Chosen:
    """Plain training's learning rate and epochs, and then each scorer's temperature."""
    make_references(lab, shifted, "same")
    plain = ["experiment=digits_scratch", RATE, NETWORK]
    rate, epochs = choose_plain(lab, "plain", LEARNING_RATES, MAX_EPOCHS, plain)
    given = [f"model.optimizer.lr={rate}", f"trainer.max_epochs={epochs}", SPLIT, EACH_EPOCH]
    each = {"mimic": list(SCORERS), "mimic.temperature": TEMPERATURES, "seed": lab.seeds}
    tried = lab.sweep(f"temperatures_{shifted}", each, *fixed(lab, shifted), *given)
    temperatures = {
        scorer: max(
            TEMPERATURES, key=lambda t: statistics.fmean(tried.where(mimic=scorer, temperature=t).values("accuracy"))
        )
        for scorer in SCORERS
    }
    return {"learning rate": rate, "epochs": epochs, "temperatures": temperatures}


def report(shifted: bool, lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """Every scorer with the default temperature and its own, and without a common start."""
    given = [
        f"model.optimizer.lr={chosen['learning rate']}",
        f"trainer.max_epochs={chosen['epochs']}",
        SPLIT,
        EACH_EPOCH,
    ]
    plain = lab.sweep(
        "plain", {"mimic": ["none"], "seed": lab.seeds}, "experiment=digits_scratch", RATE, NETWORK, *given
    )
    cells: dict[tuple[str, str], list[float]] = {}

    def add(row: str, runs: Runs) -> None:
        for figure, head in FIGURES.items():
            cells[row, head] = runs.values(figure)
        if not row.endswith(": the reference") and row != "plain":
            cells[row, "over plain's best"] = gaps(runs, plain, "best_accuracy")

    add("plain", plain)
    for start in ("same", "other"):
        trusted = make_references(lab, shifted, start)
        scorers = ["uniform", *SCORERS] if start == "same" else WITHOUT_NORM
        each = {"mimic": scorers, "seed": lab.seeds}
        runs = lab.sweep(f"{start}_{shifted}", each, *fixed(lab, shifted, start), *given)
        check_start(runs, trusted, start == "same")
        add(f"{start} start: the reference", trusted)
        for scorer in scorers:
            add(f"{start} start, {SCORERS.get(scorer, scorer)}", runs.where(mimic=scorer))
    for scorer, temperature in chosen["temperatures"].items():
        if temperature != 1:
            name, more = f"{scorer}_{temperature:g}_{shifted}", [f"mimic={scorer}", f"mimic.temperature={temperature}"]
            runs = lab.sweep(name, {"seed": lab.seeds}, *fixed(lab, shifted), *given, *more)
            add(f"same start, {SCORERS[scorer]}, τ = {temperature:g}*", runs)
    how = "shifted by up to one pixel" if shifted else "as they are"
    title = f"40 % wrong labels, from scratch; references from trusted images {how}"
    yield Table(f"depth_{shifted}", title, "scores", cells, signed=["over plain's best"])


def check_start(runs: Runs, trusted: Runs, same: bool) -> None:
    """A reference began where the table says."""
    starts = [run.result["start"] for run in trusted]
    for run in runs:
        began = starts[list(dict.fromkeys(r.values["seed"] for r in runs)).index(run.values["seed"])]
        if (began == run.result["start"]) != same:
            raise StudyError(f"{run.folder}: the reference began {'elsewhere' if same else 'from the same weights'}")


STUDY = Study(
    "From scratch: which parameters to score",
    {
        "shifted": Part(partial(report, True), partial(choose, True)),
        "unshifted": Part(partial(report, False), partial(choose, False)),
    },
)
