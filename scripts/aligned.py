"""The headline of `make demo`: a network from scratch on wrong labels, with a reference that began elsewhere."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from digits_runs import (
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
# Overrides of mimic-train by the name of a network.
NETWORKS = {
    "cnn": ["model.backbone.width=32", "model.backbone.features=256"],
    "mlp": ["model/backbone=mlp"],
    "vit": [
        "model/backbone=timm",
        "model.backbone.name=vit_tiny_patch16_224",
        "model.backbone.in_chans=1",
        *(f"+model.backbone.{option}" for option in ("img_size=8", "patch_size=2", "embed_dim=64", "depth=2")),
        *(f"+model.backbone.{option}" for option in ("num_heads=4", "global_pool=avg", "weight_init=jax")),
    ],
}
METHODS = {
    "reference": "the reference he had",
    "none": "plain",
    "grad_mimic": "Grad-Mimic, not aligned",
    "aligned": "Grad-Mimic, aligned",
    "reference_loss": "weights by its loss",
}
FIGURES = ("last_accuracy", "best_accuracy", "auroc")


@dataclass(frozen=True)
class Training:
    """One run; folders are named after it.

    Attributes:
        out: Folder of the seed.
        seed: Of weights, split, noise and order.
        model: Of :data:`NETWORKS`, what is trained on wrong labels.
        teacher: Of :data:`NETWORKS`, the reference.
        method: Of :data:`METHODS`.
        noise_rate: Share of wrong labels.
        chooses: The run serves a choice: it is watched on 50 trusted images, and its reference saw the other 150.
        epochs: Of a run on wrong labels.
        rate: Learning rate, from which it falls to 0 along a cosine.
        temperature: Of the weights.
    """

    out: Path
    seed: int
    model: str
    teacher: str
    method: str = "reference"
    noise_rate: float = 0.0
    chooses: bool = False
    epochs: int = 15
    rate: float = 0.0
    temperature: float = 1.0

    @property
    def reference(self) -> Path:
        return self.out / f"reference{'_for_choice' * self.chooses}.ckpt"


def trained(t: Training) -> dict[str, Any]:
    """Does it, and returns its figures."""
    digits = DigitsDataModule(seed=t.seed, noise=SymmetricNoise(t.noise_rate, seed=t.seed))
    digits.setup()
    curve = Curve(*next(iter(digits.val_dataloader() if t.chooses else digits.test_dataloader())))
    out = t.out / f"{t.method}_{t.noise_rate:g}_{t.temperature:g}{'_for_choice' * t.chooses}"
    found: dict[str, Any] = {"auroc": None}
    if t.method == "reference":
        images = f"data.train={'trusted_fit' if t.chooses else 'trusted'}"
        began = [f"seed={t.seed + 1000}", f"data.seed={t.seed}", "data.augment=false"]
        run(curve, out, *reference_run(t.seed, t.reference), *began, images, *NETWORKS[t.teacher])
    else:
        run(curve, out, *noisy_run(t))
        if t.method != "none" and 0 < t.noise_rate < 1:
            found = detection(digits, out / "scores")
    return {
        "method": t.method,
        "seed": t.seed,
        "noise_rate": t.noise_rate,
        "temperature": t.temperature,
        "learning_rate": t.rate,
        "images": "validation" if t.chooses else "test",
        "last_accuracy": curve.accuracy[-1],
        "best_accuracy": max(curve.accuracy),
        "accuracy_by_epoch": curve.accuracy,
    } | found


def noisy_run(t: Training) -> list[str]:
    """Overrides of a run on wrong labels."""
    overrides = [
        "experiment=digits_scratch",
        f"seed={t.seed}",
        f"data.noise.rate={t.noise_rate}",
        f"paths.reference={t.reference}",
        f"model.optimizer.lr={t.rate}",
        f"model.scheduler={{_target_:torch.optim.lr_scheduler.CosineAnnealingLR,_partial_:true,T_max:{t.epochs}}}",
        f"trainer.max_epochs={t.epochs}",
        *NETWORKS[t.model],
    ]
    if t.method == "none":
        return [*overrides, "mimic=none"]
    overrides.append(f"mimic.temperature={t.temperature}")
    if t.model == t.teacher:
        return [*overrides, f"mimic={t.method}"]
    # Of another architecture: the same groups, where the reference's module is made.
    made = (
        o.replace("model/backbone=", "model/backbone@mimic.reference.reference.module.backbone=").replace(
            "model.backbone.", "mimic.reference.reference.module.backbone."
        )
        for o in NETWORKS[t.teacher]
    )
    return [*overrides, "mimic=aligned_architecture", *made]


def choose_plain(work: Work, seeds: Sequence[Training]) -> float:
    """The learning rate whose best epoch is best for *plain* training on the trusted images."""
    plain = [replace(s, method="none", chooses=True) for s in seeds]
    rows = work("choosing for plain", [replace(p, rate=rate) for rate in LEARNING_RATES for p in plain])
    return best_choice(curves_of(rows))[0]


def choose_temperature(work: Work, seeds: Sequence[Training]) -> float:
    """The aligned method's temperature best on the same images, at plain training's learning rate."""
    tried = [replace(s, method="aligned", temperature=t, chooses=True) for t in TEMPERATURES for s in seeds]
    accuracy: dict[float, list[float]] = {temperature: [] for temperature in TEMPERATURES}
    for row in work("choosing a temperature", tried):
        accuracy[row["temperature"]].append(row["last_accuracy"])
    return max(TEMPERATURES, key=lambda temperature: statistics.fmean(accuracy[temperature]))


def compare(work: Work, seeds: Sequence[Training], temperature: float) -> list[dict[str, Any]]:
    """All methods at one rate of wrong labels; the aligned one at the default temperature and at the chosen one."""
    # Weights and losses can be asked only of a reference of the model's own architecture.
    same = ["grad_mimic", "reference_loss"] if seeds[0].model == seeds[0].teacher else []
    runs = [replace(s, method=method) for method in ("none", *same) for s in seeds]
    runs += [replace(s, method="aligned", temperature=t) for t in dict.fromkeys((1.0, temperature)) for s in seeds]
    return work("comparing", runs)


def show(console: Console, results: list[dict[str, Any]], chosen: float, title: str) -> None:
    """The table: mean and standard deviation over seeds."""
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for head in ("\nτ", "test\nlast", "test\nbest", "over\nplain", "over\nref.", "\nAUROC"):
        table.add_column(head, justify="right", no_wrap=True)
    of = {(r["method"], r["temperature"], r["seed"]): r for r in results}
    seeds = sorted({r["seed"] for r in results})
    for method, temperature in dict.fromkeys((r["method"], r["temperature"]) for r in results):
        rows = [of[method, temperature, seed] for seed in seeds]
        over = {
            baseline: [row["last_accuracy"] - of[baseline, 1.0, row["seed"]][figure] for row in rows]
            for baseline, figure in (("none", "best_accuracy"), ("reference", "last_accuracy"))
        }
        table.add_row(
            METHODS[method],
            "–" if method in ("reference", "none") else f"{temperature:g}{'*' * (temperature == chosen != 1)}",
            *(cell([row[figure] for row in rows]) for figure in FIGURES[:2]),
            *("–" if method in (baseline, "reference") else cell(gaps) for baseline, gaps in over.items()),
            cell([row["auroc"] for row in rows]),
        )
    console.print(table)


def main() -> None:
    parser = parser_of(__doc__, "outputs/aligned", rates=(0.4, 0.6))
    parser.add_argument("--model", choices=NETWORKS, default="cnn", help="what is trained (%(default)s)")
    parser.add_argument("--reference", choices=NETWORKS, default="cnn", help="what is trusted (%(default)s)")
    parser.add_argument("--epochs", type=int, default=15, help="on wrong labels (%(default)s)")
    arguments = parsed(parser)
    console, out, started = Console(), arguments.out, time.monotonic()
    trained_how = {"model": arguments.model, "teacher": arguments.reference, "epochs": arguments.epochs}
    seeds = [Training(out / f"seed{seed}", seed, **trained_how) for seed in arguments.seeds]
    written = []
    with at_work(console, trained) as work:
        references = work("references", seeds)
        work("first references", [replace(s, chooses=True) for s in seeds])
        for noise_rate in arguments.rates:
            noisy = [replace(s, noise_rate=noise_rate) for s in seeds]
            rate = choose_plain(work, noisy)
            noisy = [replace(s, rate=rate) for s in noisy]
            temperature = choose_temperature(work, noisy)
            results = [*references, *compare(work, noisy, temperature)]
            written.append({"noise_rate": noise_rate, "temperature": temperature, "results": results})
            title = f"{noise_rate:.0%} wrong labels, {arguments.model} from scratch, reference: {arguments.reference} "
            title += f"of another start; learning rate {rate:g}"
            show(console, results, temperature, title)
    (out / "results.json").write_text(json.dumps(written, indent=2))
    console.print(
        "In %, mean and standard deviation over seeds. The learning rate was chosen for plain training's best epoch, "
        "on trusted images, and on the same images the temperature marked *; 1 is the default. Best: the best epoch "
        "on the test images, which no one can know. Over plain, over ref.: the last epoch less plain training's best, "
        "and less the reference's accuracy. AUROC: finding the wrong labels by a low mean score; 50 is chance, and "
        "under 50 they score high.",
        style="dim",
    )
    console.print(f"\nWritten in {time.monotonic() - started:.0f} s: {out / 'results.json'}", highlight=False)


if __name__ == "__main__":
    main()
