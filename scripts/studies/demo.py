"""The first job of `make demo`: a new head trained on digits with wrong labels, plainly and with Grad-Mimic."""

import csv
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from lightning_mimic.curation import curate, detect
from lightning_mimic.curation import report as make_report
from lightning_mimic.curation.plots import plot_scores
from scripts.studies.digits import (
    EACH_EPOCH,
    SPLIT,
    choose_plain,
    gaps,
    noisy_digits,
    path_of,
    reference_logits,
    references,
)
from scripts.studies.lab import Lab
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table, percent

RATES = (0.2, 0.4, 0.6)
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
MAX_EPOCHS = 10
DETECTION = ("auroc", "share_kept", "share_right", "f1")
HEADS = {"accuracy": "test, last", "best_accuracy": "test, best", "auroc": "AUROC", "share_kept": "kept"}
HEADS |= {"share_right": "truly right", "f1": "F1"}


def choose(lab: Lab) -> Chosen:
    """Learning rate and epochs for plain training, at each share of wrong labels."""
    references(lab, "references")
    fixed = ["experiment=digits_noisy", path_of(lab, "references")]
    return {
        f"{rate:g}": choose_plain(
            lab, f"plain_{rate:g}", LEARNING_RATES, MAX_EPOCHS, [*fixed, f"data.noise.rate={rate}"]
        )
        for rate in RATES
    }


def report(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """A table for each share of wrong labels."""
    trusted = references(lab, "references")
    for rate in RATES:
        learning_rate, epochs = chosen[f"{rate:g}"]
        fixed = ["experiment=digits_noisy", path_of(lab, "references"), f"data.noise.rate={rate}", SPLIT, EACH_EPOCH]
        fixed += [f"model.optimizer.lr={learning_rate}", f"trainer.max_epochs={epochs}"]
        runs = lab.sweep(f"noisy_{rate:g}", {"mimic": ["none", "grad_mimic"], "seed": lab.seeds}, *fixed)
        plain, mimic = runs.where(mimic="none"), runs.where(mimic="grad_mimic")
        cells = {}
        for name, of in (("reference", trusted), ("plain", plain), ("Grad-Mimic", mimic)):
            for figure in ("accuracy", "best_accuracy"):
                cells[name, HEADS[figure]] = of.values(figure)
        cells["Grad-Mimic", "over plain's best"] = gaps(mimic, plain, "best_accuracy")
        found = {"Grad-Mimic": [run.result["filters"]["sign"] for run in mimic], "reference's loss": []}
        for seed, reference in zip(lab.seeds, trusted, strict=True):
            digits = noisy_digits(seed, rate)
            logits = reference_logits(reference.folder / "model.ckpt", digits.images(digits.noisy_ids))
            losses = F.cross_entropy(logits, digits.given_labels, reduction="none")
            disagrees = logits.argmax(1) != digits.given_labels
            found["reference's loss"].append(asdict(detect(-losses, disagrees, digits.wrong)))
        for name, of_seeds in found.items():
            for figure in DETECTION:
                cells[name, HEADS.get(figure, figure)] = [100 * each[figure] for each in of_seeds]
        title = f"{percent(rate)} wrong labels; learning rate {learning_rate:g}, {epochs} epochs"
        yield Table(f"demo_{rate:g}", title, "method", cells, signed=["over plain's best"])
        if rate == 0.4:
            write_files(lab.out / "files", lab.seeds[0], rate, mimic[0].folder / "scores")


def write_files(out: Path, seed: int, rate: float, ledger: Path) -> None:
    """What a user has of one run: the manifest, the report, a picture, and here the truth."""
    digits = noisy_digits(seed, rate)
    shutil.rmtree(out, ignore_errors=True)  # of an earlier report
    out.mkdir(parents=True)
    curated = curate(ledger, out=out / "curated", exports=["csv"]).manifest
    page = {"title": f"{len(digits.noisy_ids):,} handwritten digits, {percent(rate)} wrong labels"}
    make_report(curated, digits, out / "report", ledger=ledger, **page)
    manifest = curated.table().to_pylist()
    with (out / "noise.csv").open("w", newline="") as file:
        columns = (digits.noisy_ids, digits.true_labels, digits.given_labels, digits.wrong.long())
        writer = csv.writer(file)
        writer.writerow(["id", "true_label", "given_label", "wrong"])
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
    wrong = dict(zip(digits.noisy_ids.tolist(), digits.wrong.tolist(), strict=True))
    lowest = manifest[:10]
    plot_scores(
        out / "scores.png",
        torch.tensor([row["score"] for row in manifest]),
        torch.tensor([wrong[row["id"]] for row in manifest]),
        [digits.images(torch.tensor(row["id"])) for row in lowest],
        [f"given {row['label']}\npredicted {row['predicted']}" for row in lowest],
        f"{len(manifest)} handwritten digits, {percent(rate)} wrong labels",
    )


STUDY = Study("A new head on the reference's backbone", {"noisy": Part(report, choose)})
