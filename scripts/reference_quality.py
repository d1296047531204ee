"""How good must a reference be: noise on its weights, and references of falling accuracy (the paper's ablation)."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits_runs import Curve, at_work, cell, detection, parsed, parser_of, reference_run, run
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_mimic import Ledger
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.reference import read_reference, reference_model

NOISE = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # over the standard deviation of each tensor
EPOCHS = (80, 20, 10, 5, 2, 1)  # of the reference's training
# As in the demo and in its headline; nothing is chosen here.
PROBE = ["experiment=digits_noisy", "model.optimizer.lr=1e-4", "trainer.max_epochs=4"]
NETWORK = ["model.backbone.features=256"]
SCRATCH = ["experiment=digits_scratch", "model.optimizer.lr=1e-3", "trainer.max_epochs=15", *NETWORK]
ALIGNED = [*SCRATCH, "mimic=aligned", "mimic.temperature=0.1"]
SERIES = {
    "probe": ("a new head on its backbone", "noise on the reference's head"),
    "noise": ("from scratch, aligned", "noise on all its weights"),
    "epochs": ("from scratch, aligned", "epochs it was trained for"),
}


@dataclass(frozen=True)
class Training:
    """One run.

    Attributes:
        out: Folder of the seed.
        seed: Of split, noise and order.
        noise_rate: Share of wrong labels.
        series: Of :data:`SERIES`; ``"reference"`` for the run that makes a reference, ``"plain"`` without one.
        amount: Of what is done to the reference; ``None`` for the probe's own reference.
    """

    out: Path
    seed: int
    noise_rate: float
    series: str
    amount: float | None = None

    @property
    def base(self) -> Path:
        """The reference as it was trained."""
        epochs = self.amount if self.series in ("epochs", "reference") else EPOCHS[0]
        return self.out / ("probe.ckpt" if self.series == "probe" or epochs is None else f"epochs_{epochs:g}.ckpt")


def made(t: Training) -> dict[str, Any]:
    """Makes a reference: that of the probe's backbone, or one of another start, trained for some epochs."""
    curve = Curve(*test_images(t)[1])
    other = [] if t.amount is None else [f"seed={t.seed + 1000}", f"data.seed={t.seed}", "data.augment=false", *NETWORK]
    epochs = [] if t.amount is None else [f"trainer.max_epochs={t.amount:g}"]
    run(curve, t.out, *reference_run(t.seed, t.base), *other, *epochs)
    return {}


def trained(t: Training) -> dict[str, Any]:
    """Trains with the reference, corrupted as it may be, and returns the figures."""
    digits, test = test_images(t)
    curve, out = Curve(*test), t.out / f"{t.series}_{t.amount}"
    reference = corrupted(t)
    common = [f"seed={t.seed}", f"data.noise.rate={t.noise_rate}", f"paths.reference={t.base}"]
    if t.series == "plain":
        trainer = run(curve, out, *SCRATCH, *common, "mimic=none")
        return {"series": t.series, "seed": t.seed, "accuracy": curve.accuracy[-1], "best": max(curve.accuracy)}
    given = f"mimic.reference={reference}" if t.series == "probe" else f"mimic.reference.reference={reference}"
    trainer = run(curve, out, *(PROBE if t.series == "probe" else ALIGNED), *common, given)
    with torch.no_grad():
        logits = reference_model(reference, trainer.lightning_module, "forward")(test[0])
    return {
        "series": t.series,
        "amount": t.amount,
        "seed": t.seed,
        "reference": float(multiclass_accuracy(logits, test[1], num_classes=10, average="micro")),
        "accuracy": curve.accuracy[-1],
        "verdict": Ledger(out / "scores").meta["attempts"][-1]["diagnosis"]["verdict"],
    } | detection(digits, out / "scores")


def test_images(t: Training) -> tuple[DigitsDataModule, Any]:
    """The data, and its test images with their labels."""
    digits = DigitsDataModule(seed=t.seed, noise=SymmetricNoise(t.noise_rate, seed=t.seed))
    digits.setup()
    return digits, next(iter(digits.test_dataloader()))


def corrupted(t: Training) -> Path:
    """The reference with noise on its weights, where that is asked for."""
    if t.series not in ("probe", "noise"):
        return t.base
    generator = torch.Generator().manual_seed(t.seed)
    tensors = read_reference(t.base)
    for name, tensor in tensors.items():
        if name.startswith("head.") or t.series == "noise":
            tensors[name] = tensor + t.amount * tensor.std() * torch.randn(tensor.shape, generator=generator)
    path = t.out / f"{t.series}_{t.amount}.pt"
    torch.save(tensors, path)
    return path


def show(console: Console, path: Path, results: Sequence[dict[str, Any]], noise_rate: float) -> None:
    """The table, and the same as a picture."""
    table = Table(title=f"{noise_rate:.0%} wrong labels")
    table.add_column("what is trained; what was done to the reference")
    for head in ("", "reference", "AUROC", "model", "verdicts"):
        table.add_column(head, justify="right", no_wrap=True)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (series, (model, done)) in zip(figure.subplots(1, 3, sharey=True), SERIES.items(), strict=True):
        amounts = list(dict.fromkeys(r["amount"] for r in results if r["series"] == series))
        means = {"auroc": [], "accuracy": [], "reference": []}
        for amount in amounts:
            rows = [r for r in results if (r["series"], r.get("amount")) == (series, amount)]
            for figure_name, values in means.items():
                values.append(100 * sum(r[figure_name] for r in rows) / len(rows))
            cells = (cell([r[name] for r in rows], " ") for name in ("reference", "auroc", "accuracy"))
            verdicts = Counter(r["verdict"] for r in rows).most_common()
            said = ", ".join(f"{verdict} {count}" for verdict, count in verdicts)
            table.add_row(f"{model}; {done}" if amount == amounts[0] else "", f"{amount:g}", *cells, said)
        table.add_section()
        places = range(len(amounts))
        for name, colour, mark, label in (
            ("auroc", "#d55e00", "o", "finding wrong labels: AUROC"),
            ("accuracy", "#0072b2", "s", "the trained model's accuracy"),
            ("reference", "#444444", "x", "the reference's accuracy"),
        ):
            axes.plot(places, means[name], color=colour, marker=mark, label=label)
        plain = [r for r in results if r["series"] == "plain"]
        if series != "probe":
            best = 100 * sum(r["best"] for r in plain) / len(plain)
            axes.axhline(best, color="#0072b2", linestyle=":", linewidth=1, label="plain training's best epoch")
        axes.set_xticks(places, [f"{amount:g}" for amount in amounts])
        axes.set_title(model, fontsize=10)
        axes.set_xlabel(done)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("%")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)
    console.print(table)


def main() -> None:
    arguments = parsed(parser_of(__doc__, "outputs/reference_quality"))
    console, out, started = Console(width=120), arguments.out, time.monotonic()
    seeds = [(out / f"seed{seed}", seed, arguments.rate) for seed in arguments.seeds]
    references = [Training(*s, "reference", amount) for s in seeds for amount in (None, *EPOCHS)]
    corruptions = [("probe", NOISE), ("noise", NOISE), ("epochs", EPOCHS)]
    runs = [Training(*s, series, float(a)) for series, amounts in corruptions for a in amounts for s in seeds]
    with at_work(console, made) as work:
        work("references", references)
    with at_work(console, trained) as work:
        results = work("training", [*runs, *(Training(*s, "plain") for s in seeds)])
    (out / "results.json").write_text(json.dumps(results, indent=2))
    show(console, out / "reference_quality.png", results, arguments.rate)
    console.print(f"\nWritten in {time.monotonic() - started:.0f} s: {out}", highlight=False)


if __name__ == "__main__":
    main()
