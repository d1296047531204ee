"""What the scripts on the digits share: a run of mimic-train that is watched, its choice, its figures."""

import argparse
import contextlib
import logging
import multiprocessing
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow.compute as pc
import torch
from hydra import compose, initialize_config_module
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_mimic import Ledger
from lightning_mimic.cli.train import train
from lightning_mimic.curation import curate, detect
from lightning_mimic.data.digits import DigitsDataModule

MAX_EPOCHS = 10
REFERENCE_EPOCHS = 80
SEEDS = (0, 1, 2)
PROCESSES = 2
QUIET = ["test=false", "logger=none", "trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false"]


class Curve(L.Callback):
    """Accuracy after every epoch, on images that take no part in training."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> None:
        self.images, self.labels, self.progress = images, labels, progress
        self.accuracy: list[float] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.eval()
        logits = pl_module(self.images)
        pl_module.train()
        self.accuracy.append(float(multiclass_accuracy(logits, self.labels, num_classes=10, average="micro")))
        if self.progress is not None:
            self.progress.advance(self.progress.task_ids[0])


def run(curve: Curve, out: Path, *overrides: str) -> L.Trainer:
    """One run of mimic-train."""
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        config = compose("train", overrides=[*QUIET, f"paths.output={out}", *overrides])
    return train(config, [curve])


def reference_run(seed: int, checkpoint: Path) -> list[str]:
    """Overrides of the run that makes a reference."""
    epochs = f"trainer.max_epochs={REFERENCE_EPOCHS}"
    return ["experiment=digits_reference", f"seed={seed}", f"paths.reference={checkpoint}", epochs]


def curves_of(rows: Sequence[Mapping[str, Any]]) -> dict[float, list[list[float]]]:
    """Runs' accuracies after every epoch, by learning rate."""
    curves: dict[float, list[list[float]]] = {row["learning_rate"]: [] for row in rows}
    for row in rows:
        curves[row["learning_rate"]].append(row["accuracy_by_epoch"])
    return curves


def best_choice(curves: Mapping[float, Sequence[Sequence[float]]]) -> tuple[float, int]:
    """Learning rate and epochs of the highest mean accuracy; of each rate one curve per seed."""
    mean = {
        (rate, epoch): statistics.fmean(values)
        for rate, of_seeds in curves.items()
        for epoch, values in enumerate(zip(*of_seeds, strict=True), start=1)
    }
    # Of equals, the shorter run.
    return max(mean, key=lambda choice: (mean[choice], -choice[1]))


def are_wrong(digits: DigitsDataModule, ids: Sequence[int]) -> torch.Tensor:
    """Which of these samples have a wrong label."""
    place = {sample: k for k, sample in enumerate(digits.noisy_ids.tolist())}
    return digits.wrong[[place[sample] for sample in ids]]


def detection(digits: DigitsDataModule, ledger: Path) -> dict[str, Any]:
    """How well the mean scores, of all epochs and of each, find the wrong labels."""
    rows = Ledger(ledger).table()
    epochs = [rows.filter(pc.equal(rows["epoch"], epoch)) for epoch in pc.unique(rows["epoch"]).to_pylist()]
    auroc = []
    for part in (curate(ledger, unscored="keep").manifest.table(), *epochs):
        part = part.filter(pc.is_valid(part["score"]))  # before a reference is aligned there are none
        scores = torch.tensor(part["score"].to_pylist())
        auroc.append(detect(scores, scores < 0, are_wrong(digits, part["id"].to_pylist())).auroc)
    return {"auroc": auroc[0], "first_auroc": auroc[1], "auroc_by_epoch": auroc[1:]}


Work = Callable[[str, Sequence[Any]], list[dict[str, Any]]]


@contextlib.contextmanager
def at_work(console: Console, trained: Callable[[Any], dict[str, Any]]) -> Iterator[Work]:
    """Has two processes do what they are given, each with one thread."""
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(PROCESSES, spawn, _begin) as pool,
        Progress(*columns("runs"), console=console) as progress,
    ):
        yield lambda what, given: list(progress.track(pool.map(trained, given), len(given), description=what))


def _begin() -> None:
    silence()
    torch.set_num_threads(1)


def cell(values: Sequence[float | None], between: str = "\n") -> str:
    """Mean and standard deviation in %, or a dash where there is nothing to say."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    spread = f"{between}±{100 * statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{100 * statistics.fmean(known):.1f}{spread}"


def silence() -> None:
    """Keeps other packages' notes out of the table."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parser_of(what: str | None, out: str, rates: Sequence[float] = ()) -> argparse.ArgumentParser:
    """``--out``, ``--seeds``, and ``--rate``, or ``--rates`` where there are several."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--out", type=Path, default=Path(out), help="replaced by this run (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    if rates:
        parser.add_argument("--rates", type=float, nargs="+", default=rates, help="shares of wrong labels %(default)s")
    else:
        parser.add_argument("--rate", type=float, default=0.4, help="share of wrong labels (%(default)s)")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; empties the folder of an earlier run."""
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()) and not any(arguments.out.glob("seed*")):
        parser.error(f"--out {arguments.out} holds something else than an earlier run; name a new directory")
    shutil.rmtree(arguments.out, ignore_errors=True)
    return arguments


def columns(unit: str) -> tuple[ProgressColumn, ...]:
    """Of a progress bar."""
    return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn()
