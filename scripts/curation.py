"""From scores to a data set: filters, calibrated quality, baselines and training on what is kept, on the digits."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from cleanlab.filter import find_label_issues
from digits_runs import Curve, are_wrong, at_work, cell, parsed, parser_of, reference_run, run
from hydra import compose, initialize_config_module
from rich.console import Console
from rich.table import Table

from lightning_mimic.cli.score import score
from lightning_mimic.curation import (
    Ensemble,
    KMeans,
    Manifest,
    Mixture,
    Sign,
    Threshold,
    TopK,
    compare,
    curate,
    detect,
    membership,
)
from lightning_mimic.curation.report import plot_quality
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise

RATES = (0.0, 0.1, 0.2, 0.4, 0.6)
SCRATCH = ["experiment=digits_scratch", "mimic=none", "model.optimizer.lr=1e-3", "trainer.max_epochs=20"]
#: On whose samples a network is trained from scratch.
TRAINED = ("everything", "sign", "gmm", "reference's loss, share known")
FIGURES = ("kept", "auroc", "precision", "recall", "f1")


@dataclass(frozen=True)
class Work:
    """One seed and rate of wrong labels; a reference where there is no rate.

    Attributes:
        out: Folder of the seed.
        seed: Of weights, split, noise and order.
        rate: Share of wrong labels.
        member: The run is one on membership.
    """

    out: Path
    seed: int
    rate: float | None = None
    member: bool = False


def done(work: Work) -> dict[str, Any]:
    """Does it."""
    if work.member:
        return members(work)
    if work.rate is None:
        images = DigitsDataModule(seed=work.seed)
        images.setup()
        curve = Curve(*next(iter(images.test_dataloader())))
        run(curve, work.out, *reference_run(work.seed, work.out / "reference.ckpt"), "data.train=trusted_fit")
        return {"seed": work.seed, "test_accuracy": curve.accuracy[-1]}
    return curated(work)


def curated(work: Work) -> dict[str, Any]:
    """Scores, curates and trains on what is kept."""
    assert work.rate is not None
    out, reference = work.out / f"{work.rate:g}", work.out / "reference.ckpt"
    digits = DigitsDataModule(seed=work.seed, noise=SymmetricNoise(work.rate, seed=work.seed))
    digits.setup()
    test = next(iter(digits.test_dataloader()))
    noisy = ["experiment=digits_curation", f"seed={work.seed}", f"paths.reference={reference}", f"paths.output={out}"]
    noise = f"data.noise.rate={work.rate}"
    saved = [f"save_epochs_to={out / 'epochs'}", "trainer.enable_checkpointing=true"]
    run(Curve(*test), out, *noisy, noise, *saved)
    checkpoints = f"checkpoints={out / 'epochs'}"
    scored(out / "at_checkpoints", *noisy, noise, checkpoints)
    held = [*noisy, checkpoints, "data.train=trusted_held"]
    scored(out / "trusted", *held, "data.noise.rate=0")
    others = [out / f"wrong_{shift}" for shift in range(1, 10)]
    for shift, ledger in enumerate(others, start=1):  # every wrong label once
        confusions = ",".join(f"{c}:{(c + shift) % 10}" for c in range(10))
        each = ["data/noise=asymmetric", "data.noise.rate=1", f"data.noise.confusions={{{confusions}}}"]
        scored(ledger, *held, *each)

    with torch.no_grad():
        tensors = torch.load(reference, weights_only=True)["state_dict"]
        logits = logits_of(tensors, digits.images(digits.noisy_ids), noisy)
    losses = F.cross_entropy(logits, digits.given_labels, reduction="none")
    filters = {
        "sign": Sign(),
        "threshold 1/B": Threshold(),
        "k-means": KMeans(),
        "gmm": Mixture(),
        "top k, share known": TopK(fraction=max(1 - work.rate, 1e-9)),
        "majority of signs": Ensemble([Sign()], by="majority"),
        "majority of all": Ensemble([Threshold(), KMeans(), Mixture()], by="majority"),
        "label model of all": Ensemble(),
    }
    found: dict[str, dict[str, float]] = {}
    quality = None
    for name, one in filters.items():
        first = name == "sign"
        calibrated = {"trusted": out / "trusted", "mislabelled": others} if first else {}
        curation = curate(out / "at_checkpoints", one, out / "manifests" / name.replace("/", ""), **calibrated)
        table = curation.manifest.table()
        scores, judged = torch.tensor(table["score"].to_pylist()), ~torch.tensor(table["keep"].to_pylist())
        found[name] = figures(scores, judged, are_wrong(digits, table["id"].to_pylist()))
        quality = curation.quality if first else quality
    stream = curate(out / "scores").manifest.table()
    scores = torch.tensor(stream["score"].to_pylist())
    found["sign, scores of training"] = figures(scores, scores < 0, are_wrong(digits, stream["id"].to_pylist()))
    highest = losses.argsort(descending=True)[: int(digits.wrong.sum())]
    by_share = torch.zeros_like(digits.wrong).index_fill(0, highest, True)
    found["reference's loss, share known"] = figures(-losses, by_share, digits.wrong)
    found["reference disagrees"] = figures(-losses, logits.argmax(1) != digits.given_labels, digits.wrong)
    issues = torch.as_tensor(find_label_issues(digits.given_labels.numpy(), logits.softmax(1).numpy(), n_jobs=1))
    found["cleanlab on the reference"] = figures(-losses, issues, digits.wrong)
    assert quality is not None

    by_loss = out / "manifests" / "reference_loss.parquet"
    pq.write_table(pa.table({"id": digits.noisy_ids.tolist(), "keep": (~by_share).tolist()}), by_loss)
    kept = dict(
        zip(
            TRAINED,
            (None, *(out / "manifests" / n / "manifest.parquet" for n in ("sign", "gmm")), by_loss),
            strict=True,
        )
    )
    accuracy = {}
    for name, manifest in kept.items():
        curve = Curve(*test)
        keep = [] if manifest is None else [f"data.keep='{manifest}'"]
        run(curve, out / "scratch", *SCRATCH, f"seed={work.seed}", noise, *keep)
        accuracy[name] = {"last": curve.accuracy[-1], "best": max(curve.accuracy)}
    return {
        "seed": work.seed,
        "rate": work.rate,
        "quality": asdict(quality),
        "truth": float((~digits.wrong).float().mean()),
        "filters": found,
        "accuracy": accuracy,
    }


def scored(ledger: Path, *overrides: str) -> None:
    """One run of mimic-score."""
    quiet = ["trainer.enable_progress_bar=false", f"paths.output={ledger.parent}"]
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        score(compose("score", overrides=[*quiet, *overrides, f"ledger={ledger}"]))


def logits_of(tensors: dict[str, torch.Tensor], images: torch.Tensor, overrides: Sequence[str]) -> torch.Tensor:
    """What the reference says of images."""
    from hydra.utils import instantiate

    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        model = instantiate(compose("train", overrides=list(overrides)).model)
    model.load_state_dict(tensors)
    return model.eval()(images)


def figures(scores: torch.Tensor, predicted_wrong: torch.Tensor, wrong: torch.Tensor) -> dict[str, float | None]:
    """Of :data:`FIGURES`; those on wrong labels are unknown where there are none."""
    if not bool(wrong.any()):
        return dict.fromkeys(FIGURES) | {"kept": float((~predicted_wrong).float().mean())}
    found = asdict(detect(scores, predicted_wrong, wrong))
    return {"kept": found["share_kept"]} | {name: found[name] for name in FIGURES[1:]}


def members(work: Work) -> dict[str, Any]:
    """A reference trained on a random half of the large part, whose labels are all right; who was in it?"""
    out = work.out / "membership"
    out.mkdir(parents=True, exist_ok=True)
    digits = DigitsDataModule(seed=work.seed)
    digits.setup()
    ids = digits.noisy_ids
    half = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(work.seed))[: len(ids) // 2]]
    inside = set(half.tolist())
    table = pa.table({"id": ids.tolist(), "keep": [each in inside for each in ids.tolist()]})
    pq.write_table(table, out / "half.parquet")
    reference = out / "reference.ckpt"
    test = next(iter(digits.test_dataloader()))
    only = ["data.train=noisy", f"data.keep={out / 'half.parquet'}", "data.augment=false"]
    run(Curve(*test), out, *reference_run(work.seed, reference), *only)
    noisy = ["experiment=digits_curation", f"seed={work.seed}", f"paths.reference={reference}", "data.noise.rate=0"]
    run(Curve(*test), out, *noisy)
    found = membership(curate(out / "scores").manifest, inside)
    return {"seed": work.seed} | {name: getattr(found, name) for name in ("auroc", "jaccard", "chance")}


def show(console: Console, rows: Sequence[dict[str, Any]], rates: Sequence[float]) -> None:
    """The tables: mean and standard deviation over seeds."""
    table = Table(title="quality, in %: mean (±) over seeds; error: per seed, in points")
    for head in ("wrong labels", "truly good", "kept by sign", "t", "f", "quality", "error", "interval holds it"):
        table.add_column(head, justify="right")
    for rate in rates:
        of = [row for row in rows if row["rate"] == rate]
        said = [row["quality"] for row in of]
        errors = " ".join(f"{100 * (row['quality']['estimate'] - row['truth']):+.1f}" for row in of)
        holds = sum(row["quality"]["low"] <= row["truth"] <= row["quality"]["high"] for row in of)
        names = ("share_kept", "kept_if_right", "kept_if_wrong", "estimate")
        cells = [cell([each[name] for each in said], " ") for name in names]
        truth = f"{100 * statistics.fmean(row['truth'] for row in of):.1f}"
        table.add_row(f"{rate:.0%}", truth, *cells, errors, f"{holds} of {len(of)}")
    console.print(table)
    for rate in rates:
        of = [row for row in rows if row["rate"] == rate]
        table = Table(title=f"{rate:.0%} wrong labels")
        for head in ("by", *FIGURES):
            table.add_column(head, justify="left" if head == "by" else "right", no_wrap=True)
        for name in of[0]["filters"]:
            table.add_row(name, *(cell([row["filters"][name][figure] for row in of], " ") for figure in FIGURES))
        console.print(table)
    table = Table(title="from scratch, 20 epochs, test accuracy in %: last epoch / best epoch")
    for head in ("trained on", *(f"{rate:.0%}" for rate in rates)):
        table.add_column(head, justify="left" if head == "trained on" else "right")
    for name in TRAINED:
        cells = []
        for rate in rates:
            of = [row["accuracy"][name] for row in rows if row["rate"] == rate]
            cells.append(f"{cell([each['last'] for each in of], ' ')} / {cell([each['best'] for each in of], ' ')}")
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    arguments = parsed(parser_of(__doc__, "outputs/curation", RATES))
    console, out = Console(width=160), arguments.out
    with at_work(console, done) as work:
        folders = {seed: out / f"seed{seed}" for seed in arguments.seeds}
        references = work("references", [Work(folder, seed) for seed, folder in folders.items()])
        jobs = [Work(folder, seed, rate) for seed, folder in folders.items() for rate in arguments.rates]
        rows = work("curating", jobs)
        found = work("membership", [Work(folder, seed, member=True) for seed, folder in folders.items()])
    result = {"references": references, "curation": rows, "membership": found}
    (out / "results.json").write_text(json.dumps(result, indent=2))
    show(console, rows, arguments.rates)
    console.print(
        "Membership, reference trained on a random half: "
        + ", ".join(f"{name} {cell([row[name] for row in found], ' ')}" for name in ("auroc", "jaccard", "chance"))
        + " (in %)"
    )
    first = arguments.seeds[0]
    manifests = {
        f"{rate:.0%} wrong": Manifest(folders[first] / f"{rate:g}" / "manifests" / "sign" / "manifest.parquet")
        for rate in arguments.rates
    }
    comparison = compare(manifests, {f"{rate:.0%} wrong": rate for rate in arguments.rates})
    plot_quality(out / "quality.png", comparison)
    console.print(f"Correlation of quality and truth, seed {first}: {comparison.pearson} (Pearson)")
    console.print(f"{out / 'results.json'}, {out / 'quality.png'}")


if __name__ == "__main__":
    main()
