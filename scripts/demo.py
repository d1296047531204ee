"""The main job of `make demo`: a new head trained on digits with wrong labels, plainly and with Grad-Mimic."""

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits_runs import (
    MAX_EPOCHS,
    REFERENCE_EPOCHS,
    Curve,
    are_wrong,
    best_choice,
    cell,
    columns,
    parsed,
    parser_of,
    reference_run,
    run,
    silence,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_mimic.curation import curate, detect
from lightning_mimic.curation.report import plot_scores
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise

LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
METHODS = ("reference", "plain", "grad_mimic", "reference_loss")
FIGURES = ("test_accuracy", "best_test_accuracy", "auroc", "share_kept", "share_right", "precision", "recall", "f1")


def choose(out: Path, progress: Progress, seeds: Sequence[int], noise_rate: float) -> tuple[float, int]:
    """Learning rate and epochs best for *plain* training, on trusted images that a first reference has not seen."""
    curves: dict[float, list[list[float]]] = {rate: [] for rate in LEARNING_RATES}
    for seed in seeds:
        digits = DigitsDataModule(seed=seed)
        digits.setup()
        images, labels = next(iter(digits.val_dataloader()))
        reference = out / f"seed{seed}" / "reference_for_choice.ckpt"
        run(Curve(images, labels, progress), out, *reference_run(seed, reference), "data.train=trusted_fit")
        for rate in LEARNING_RATES:
            curve = Curve(images, labels, progress)
            run(curve, out, *noisy_run(seed, reference, noise_rate, rate, MAX_EPOCHS), "mimic=none")
            curves[rate].append(curve.accuracy)
    return best_choice(curves)


def noisy_run(seed: int, reference: Path, noise_rate: float, rate: float, epochs: int) -> list[str]:
    """Overrides of a run on wrong labels; the same with and without Grad-Mimic."""
    return [
        "experiment=digits_noisy",
        f"seed={seed}",
        f"data.noise.rate={noise_rate}",
        f"paths.reference={reference}",
        f"model.optimizer.lr={rate}",
        f"trainer.max_epochs={epochs}",
    ]


def compare(
    out: Path, progress: Progress, seed: int, noise_rate: float, rate: float, epochs: int
) -> list[dict[str, Any]]:
    """Reference, plain training and Grad-Mimic for one seed; writes the seed's files."""
    digits = DigitsDataModule(seed=seed, noise=SymmetricNoise(noise_rate, seed=seed))
    digits.setup()
    test, reference = next(iter(digits.test_dataloader())), out / "reference.ckpt"
    curves = {method: Curve(*test, progress) for method in ("reference", "plain", "grad_mimic")}
    trainer = run(curves["reference"], out, *reference_run(seed, reference))
    with torch.no_grad():
        logits = trainer.lightning_module.eval()(digits.images(digits.noisy_ids))
    run(curves["plain"], out, *noisy_run(seed, reference, noise_rate, rate, epochs), "mimic=none")
    run(curves["grad_mimic"], out, *noisy_run(seed, reference, noise_rate, rate, epochs))

    manifest = curate(out / "scores", out=out / "curated", exports=["csv"]).manifest
    summary = manifest.table()
    wrong = are_wrong(digits, summary["id"].to_pylist())
    scores = torch.tensor(summary["score"].to_pylist())
    loss = F.cross_entropy(logits, digits.given_labels, reduction="none")
    rows: dict[str, dict[str, float]] = {method: accuracies(curve) for method, curve in curves.items()}
    rows["grad_mimic"] |= asdict(detect(scores, ~torch.tensor(summary["keep"].to_pylist()), wrong))
    rows["reference_loss"] = asdict(detect(-loss, logits.argmax(1) != digits.given_labels, digits.wrong))
    write_files(out, digits, summary.to_pylist(), scores, wrong)
    return [{"method": method, "seed": seed} | dict.fromkeys(FIGURES) | rows[method] for method in METHODS]


def accuracies(curve: Curve) -> dict[str, float]:
    return {"test_accuracy": curve.accuracy[-1], "best_test_accuracy": max(curve.accuracy)}


def write_files(
    out: Path,
    digits: DigitsDataModule,
    summary: list[dict[str, Any]],
    scores: torch.Tensor,
    wrong: torch.Tensor,
) -> None:
    """The noise mask and the picture."""
    with (out / "noise.csv").open("w", newline="") as file:
        columns = (digits.noisy_ids, digits.true_labels, digits.given_labels, digits.wrong.long())
        writer = csv.writer(file)
        writer.writerow(["id", "true_label", "given_label", "wrong"])
        writer.writerows(zip(*(c.tolist() for c in columns), strict=True))
    lowest = summary[:10]
    plot_scores(
        out / "scores.png",
        scores,
        wrong,
        [digits.images(torch.tensor(row["id"])) for row in lowest],
        [f"given {row['label']}\npredicted {row['predicted']}" for row in lowest],
        f"{len(scores)} handwritten digits, {digits.noise.rate:.0%} wrong labels",
    )


def show(console: Console, results: list[dict[str, Any]], rate: float, epochs: int, noise_rate: float) -> None:
    """The table: mean and standard deviation over seeds."""
    names = {"grad_mimic": "Grad-Mimic", "reference_loss": "its loss"}
    title = f"{noise_rate:.0%} wrong labels; learning rate {rate:g} and {epochs} epochs"
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for head in ("test\nlast", "test\nbest", "\nAUROC", "\nkept", "truly\nright", "preci-\nsion", "\nrecall", "\nF1"):
        table.add_column(head, justify="right", no_wrap=True)
    for method in METHODS:
        rows = [row for row in results if row["method"] == method]
        table.add_row(names.get(method, method), *(cell([row[figure] for row in rows]) for figure in FIGURES))
    console.print(table)
    console.print(
        "In %, mean and standard deviation over seeds. Learning rate and epochs were chosen for plain training, on "
        "trusted images; Grad-Mimic has its defaults. kept: share judged right, beside the share that is. AUROC, "
        "precision, recall, F1: finding the wrong labels; Grad-Mimic judges wrong what has a negative mean score, its "
        "baseline, the loss of the reference, what the reference does not predict.",
        style="dim",
    )


def main() -> None:
    arguments = parsed(parser_of(__doc__, "outputs/demo"))
    silence()
    console, out, seeds, started = Console(), arguments.out, arguments.seeds, time.monotonic()
    with Progress(*columns("epochs"), console=console) as progress:
        per_seed = REFERENCE_EPOCHS + len(LEARNING_RATES) * MAX_EPOCHS
        task = progress.add_task("choosing for plain", total=len(seeds) * per_seed)
        rate, epochs = choose(out, progress, seeds, arguments.rate)
        progress.update(task, description="comparing", completed=0, total=len(seeds) * (REFERENCE_EPOCHS + 2 * epochs))
        results = [
            r for seed in seeds for r in compare(out / f"seed{seed}", progress, seed, arguments.rate, rate, epochs)
        ]
    (out / "results.json").write_text(json.dumps(results, indent=2))
    show(console, results, rate, epochs, arguments.rate)
    console.print(f"\nWritten in {time.monotonic() - started:.0f} s:")
    first = out / f"seed{seeds[0]}"
    for path, what in (
        (out / "results.json", "the figures above, per seed and method"),
        (first / "scores.png", "what the scores look like, and the ten lowest"),
        (first / "curated", "the manifest: which to keep, the most suspicious first; also as CSV"),
        (first / "noise.csv", "which labels are really wrong"),
        (first / "scores", "the ledger: every score of every epoch"),
    ):
        console.print(f"  {path}  [dim]{what}[/dim]", highlight=False)


if __name__ == "__main__":
    main()
