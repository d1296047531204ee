"""Which parameters to score when a network trains from scratch: the last layer or all; beside the other scorers."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from digits_runs import (
    MAX_EPOCHS,
    Curve,
    Work,
    at_work,
    best_choice,
    cell,
    curves_of,
    detection,
    parsed,
    parser_of,
    reference_run,
    run,
)
from rich.console import Console
from rich.table import Table

from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
TEMPERATURES = (1.0, 0.3, 0.1, 0.03)  # of equals, the first: the one that trusts the scores least
# Of a width of 16 or 64 and a network of linear layers, the most accurate on validation images in plain training.
NETWORK = "model.backbone.width=16"
# Configurations of conf/mimic, by what the table calls them.
SCORERS = {
    "grad_mimic": "mimic, last layer",
    "all_parameters": "mimic, all",
    "cosine": "cosine, last layer",
    "grad_norm": "norm, last layer",
    "rho_loss": "RHO loss",
    "reference_loss": "reference's loss",
}
WITHOUT_NORM = [scorer for scorer in SCORERS if scorer != "grad_norm"]  # which asks no reference
FIGURES = ("last_accuracy", "best_accuracy", "auroc", "first_auroc")


class Start(Curve):
    """Keeps the weights before the first step, too."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


@dataclass(frozen=True)
class Training:
    """One run; folders are named after it.

    Attributes:
        out: Folder of the seed.
        seed: Of weights, split, noise and order.
        noise_rate: Share of wrong labels.
        shifted: The reference's images are shifted by up to one pixel while it is trained.
        mimic: Configuration of conf/mimic, ``"reference"`` for the run that makes one.
        start: ``"same"`` or ``"other"``: the weights from which the reference began.
        chooses: The run serves a choice: it is watched on 50 trusted images, and its reference saw the other 150.
        rate: Learning rate.
        epochs: Of a run on wrong labels.
        temperature: Of the weights.
    """

    out: Path
    seed: int
    noise_rate: float
    shifted: bool
    mimic: str = "reference"
    start: str = "same"
    chooses: bool = False
    rate: float = 0.0
    epochs: int = 0
    temperature: float = 1.0

    @property
    def reference(self) -> Path:
        return self.out / f"reference_{self.start}{'_for_choice' * self.chooses}.ckpt"


def trained(training: Training) -> dict[str, Any]:
    """Does it, and returns its figures."""
    t = training
    digits = DigitsDataModule(seed=t.seed, noise=SymmetricNoise(t.noise_rate, seed=t.seed))
    digits.setup()
    curve = Start(*next(iter(digits.val_dataloader() if t.chooses else digits.test_dataloader())))
    weights = t.reference.with_suffix(".start.pt")
    if t.mimic == "reference":
        # The seed of the weights alone: both references see the same images in the same order.
        seeds = [f"seed={t.seed + 1000 * (t.start == 'other')}", f"data.seed={t.seed}"]
        images = [f"data.train={'trusted_fit' if t.chooses else 'trusted'}", f"data.augment={t.shifted}"]
        run(curve, t.out, *reference_run(t.seed, t.reference), *seeds, *images, NETWORK)
        torch.save(curve.weights, weights)
        return figures(t, curve)
    out = t.out / f"{t.mimic}_{t.start}_{t.temperature:g}{'_for_choice' * t.chooses}"
    run(curve, out, *noisy_run(t))
    if t.mimic == "none":
        return figures(t, curve)
    began = torch.load(weights, weights_only=True)
    same = all(torch.equal(began[name], tensor) for name, tensor in curve.weights.items())
    assert same == (t.start == "same"), f"{t.mimic}: the reference began elsewhere than this name says"
    return figures(t, curve) | detection(digits, out / "scores")


def figures(t: Training, curve: Curve) -> dict[str, Any]:
    return {
        "method": t.mimic,
        "start": t.start,
        "seed": t.seed,
        "temperature": t.temperature,
        "learning_rate": t.rate,
        "images": "validation" if t.chooses else "test",
        "last_accuracy": curve.accuracy[-1],
        "best_accuracy": max(curve.accuracy),
        "accuracy_by_epoch": curve.accuracy,
        "auroc": None,
        "first_auroc": None,
    }


def noisy_run(t: Training) -> list[str]:
    """Overrides of a run on wrong labels."""
    overrides = [
        "experiment=digits_scratch",
        f"mimic={t.mimic}",
        f"seed={t.seed}",
        f"data.noise.rate={t.noise_rate}",
        f"paths.reference={t.reference}",
        f"model.optimizer.lr={t.rate}",
        f"trainer.max_epochs={t.epochs}",
        NETWORK,
    ]
    return overrides if t.mimic == "none" else [*overrides, f"mimic.temperature={t.temperature}"]


def choose_plain(work: Work, seeds: Sequence[Training]) -> tuple[float, int]:
    """Learning rate and epochs best for *plain* training on the trusted images."""
    plain = [replace(s, mimic="none", epochs=MAX_EPOCHS, chooses=True) for s in seeds]
    rows = work("choosing for plain", [replace(p, rate=rate) for rate in LEARNING_RATES for p in plain])
    return best_choice(curves_of(rows))


def choose_temperatures(work: Work, seeds: Sequence[Training]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Each scorer's temperature best on the same images, and what was seen there."""
    tried = [
        replace(s, mimic=scorer, temperature=temperature, chooses=True)
        for scorer in SCORERS
        for temperature in TEMPERATURES
        for s in seeds
    ]
    rows = work("choosing temperatures", tried)

    chosen = {}
    for scorer in SCORERS:
        accuracy: dict[float, list[float]] = {temperature: [] for temperature in TEMPERATURES}
        for row in rows:
            if row["method"] == scorer:
                accuracy[row["temperature"]].append(row["last_accuracy"])
        mean = {temperature: statistics.fmean(values) for temperature, values in accuracy.items()}
        chosen[scorer] = max(mean, key=mean.__getitem__)
    return chosen, rows


def compare(work: Work, seeds: Sequence[Training], temperatures: dict[str, float]) -> list[dict[str, Any]]:
    """Every scorer with the default temperature and its own, and without a common start."""
    runs = [replace(s, mimic=mimic) for mimic in ("none", "uniform") for s in seeds]
    for scorer, temperature in temperatures.items():
        tried = dict.fromkeys((1.0, temperature))  # once, if they are the same
        runs += [replace(s, mimic=scorer, temperature=each) for each in tried for s in seeds]
    runs += [replace(s, mimic=scorer, start="other") for scorer in WITHOUT_NORM for s in seeds]
    return work("comparing", runs)


def show(console: Console, results: list[dict[str, Any]], chosen: dict[str, float], title: str) -> None:
    """The table: mean and standard deviation over seeds."""
    table = Table(title=title)
    table.add_column("scores", no_wrap=True)
    for head in ("\nτ", "test\nlast", "test\nbest", "\nAUROC", "AUROC,\n1st epoch"):
        table.add_column(head, justify="right", no_wrap=True)
    names = {"reference": "the reference", "none": "plain"} | SCORERS
    for start in ("same", "other"):
        table.add_section()
        table.add_row(f"[dim]{start} start:[/dim]")
        kinds = dict.fromkeys((r["method"], r["temperature"]) for r in results if r["start"] == start)
        for method, temperature in kinds:
            rows = [r for r in results if (r["method"], r["temperature"], r["start"]) == (method, temperature, start)]
            own = (
                f"{temperature:g}{'*' * (chosen[method] == temperature and start == 'same')}"
                if method in chosen
                else "–"
            )
            cells = (cell([row[figure] for row in rows], " ") for figure in FIGURES)
            table.add_row(names.get(method, method), own, *cells)
    console.print(table)
    console.print(
        "In %, mean and standard deviation over seeds. Learning rate and epochs were chosen for plain training, on "
        "trusted images, and on the same images the temperatures marked *; 1 is the default. AUROC: finding the wrong "
        "labels by a low mean score, over all epochs and in the first; 50 is chance, and under 50 the wrong labels "
        "score high, which for the gradient's norm is as it should be. Other start: the reference began from other "
        "weights than the model.",
        style="dim",
    )


def main() -> None:
    parser = parser_of(__doc__, "outputs/depth")
    parser.add_argument("--unshifted", action="store_true", help="train the references on their images as they are")
    arguments = parsed(parser)
    console, out, started = Console(), arguments.out, time.monotonic()
    shifted = not arguments.unshifted
    seeds = [Training(out / f"seed{seed}", seed, arguments.rate, shifted) for seed in arguments.seeds]
    with at_work(console, trained) as work:
        results = work("references", [replace(s, start=start) for start in ("same", "other") for s in seeds])
        work("first references", [replace(s, chooses=True) for s in seeds])
        rate, epochs = choose_plain(work, seeds)
        seeds = [replace(s, rate=rate, epochs=epochs) for s in seeds]
        temperatures, tried = choose_temperatures(work, seeds)
        results += compare(work, seeds, temperatures)
    written = {"results": results, "temperatures": temperatures, "tried": tried}
    (out / "results.json").write_text(json.dumps(written, indent=2))
    title = f"{arguments.rate:.0%} wrong labels, reference {'un' * arguments.unshifted}shifted; "
    title += f"learning rate {rate:g} and {epochs} epochs"
    show(console, results, temperatures, title)
    console.print(f"\nWritten in {time.monotonic() - started:.0f} s: {out / 'results.json'}", highlight=False)


if __name__ == "__main__":
    main()
