"""From scores to a data set: filters, calibrated quality, baselines and training on what is kept, on the digits."""

import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from cleanlab.filter import find_label_issues

from lightning_mimic.curation import (
    CurationError,
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
from lightning_mimic.curation.plots import plot_quality
from lightning_mimic.random_streams import torch_generator
from scripts.studies.digits import EACH_EPOCH, SPLIT, noisy_digits, path_of, reference_logits, references
from scripts.studies.lab import Lab
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table, percent, shown

RATES = (0.0, 0.1, 0.2, 0.4, 0.6)
SCORED = "experiment=digits_curation"
SCRATCH = ["experiment=digits_scratch", "mimic=none", "model.optimizer.lr=1e-3", "trainer.max_epochs=20"]
#: By whose decision a network is trained from scratch, and where that decision lies.
TRAINED = {
    "everything": None,
    "kept by the sign": "sign",
    "kept by the mixture": "mixture",
    "kept by the reference's loss, share known": "reference_loss",
}
LOSS = "baseline: reference's loss, share known"


def curated(seed: int, rate: float, runs: Path) -> dict[str, Any]:
    """What every filter and baseline finds in one run's scores, and the estimate of quality; writes the manifests."""
    digits, place = noisy_digits(seed, rate), f"{rate}/{seed}/ledger"
    folder = runs / "manifests" / f"{rate}" / f"{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of one that was broken off
    trusted = runs / "trusted" / place
    others = [runs / f"wrong_{shift}" / place for shift in range(1, 10)]
    wrong_of = dict(zip(digits.noisy_ids.tolist(), digits.wrong.tolist(), strict=True))
    filters = {
        "sign": Sign(),
        "mixture": Mixture(),
        "top k, share known": TopK(fraction=max(1 - rate, 1e-9)),
        "threshold 1/B": Threshold(),
        "k-means": KMeans(),
        "signs of all epochs, majority": Ensemble([Sign()], by="majority"),
        "threshold, k-means, mixture: majority": Ensemble([Threshold(), KMeans(), Mixture()], by="majority"),
        "threshold, k-means, mixture: label model": Ensemble(),
    }
    found, quality = {}, None
    for name, one in filters.items():
        calibrated = {"trusted": trusted, "mislabelled": others} if name == "sign" else {}
        try:
            curation = curate(runs / "at_checkpoints" / place, one, folder / name.replace("/", ""), **calibrated)
        except CurationError:  # a label model that says the opposite of its voters
            found[name] = {}
            continue
        quality = curation.quality or quality
        table = curation.manifest.table()
        wrong = torch.tensor([wrong_of[each] for each in table["id"].to_pylist()])
        found[name] = figures(torch.tensor(table["score"].to_pylist()), ~torch.tensor(table["keep"].to_pylist()), wrong)
    stream = curate(runs / "training" / f"{rate}" / f"{seed}" / "scores", accept_verdict=True).manifest.table()
    scores = torch.tensor(stream["score"].to_pylist())
    wrong = torch.tensor([wrong_of[each] for each in stream["id"].to_pylist()])
    found["sign, scores recorded while training"] = figures(scores, scores < 0, wrong)

    logits = reference_logits(runs / "references" / f"{seed}" / "model.ckpt", digits.images(digits.noisy_ids))
    losses = F.cross_entropy(logits, digits.given_labels, reduction="none")
    highest = losses.argsort(descending=True)[: int(digits.wrong.sum())]
    by_share = torch.zeros_like(digits.wrong).index_fill(0, highest, True)
    pq.write_table(
        pa.table({"id": digits.noisy_ids.tolist(), "keep": (~by_share).tolist()}), folder / "reference_loss.parquet"
    )
    issues = torch.as_tensor(find_label_issues(digits.given_labels.numpy(), logits.softmax(1).numpy(), n_jobs=1))
    found[LOSS] = figures(-losses, by_share, digits.wrong)
    found["baseline: the reference disagrees"] = figures(-losses, logits.argmax(1) != digits.given_labels, digits.wrong)
    found["baseline: cleanlab on the reference's predictions"] = figures(-losses, issues, digits.wrong)
    truth = float((~digits.wrong).float().mean())
    return {"seed": seed, "rate": rate, "quality": asdict(quality), "truth": truth, "found": found}


def figures(scores: torch.Tensor, judged_wrong: torch.Tensor, wrong: torch.Tensor) -> dict[str, float]:
    """The share that is kept and, where there are wrong labels, how well they are found."""
    kept = {"kept": float((~judged_wrong).float().mean())}
    return kept | (asdict(detect(scores, judged_wrong, wrong)) if bool(wrong.any()) else {})


def report(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """Quality, detection, and training on what is kept."""
    references(lab, "references", train="trusted_fit")
    each = {"data.noise.rate": RATES, "seed": lab.seeds}
    given = [SCORED, path_of(lab, "references"), SPLIT]
    saved = ["save_epochs_to=${hydra:runtime.output_dir}/epochs", "trainer.enable_checkpointing=true"]
    lab.sweep("training", each, *given, *saved, EACH_EPOCH)
    score = [*given, "ledger=${hydra:runtime.output_dir}/ledger"]
    lab.sweep("at_checkpoints", each, *score, f"checkpoints={lab.out}/training/${{data.noise.rate}}/${{seed}}/epochs")
    # The held images of one run: once with true labels, and so that each has every wrong one.
    held = [*score, "data.train=trusted_held"]
    of_run = {"+study.rate": RATES, "seed": lab.seeds}
    where = f"checkpoints={lab.out}/training/${{study.rate}}/${{seed}}/epochs"
    lab.sweep("trusted", of_run, *held, where, "data.noise.rate=0")
    for shift in range(1, 10):
        confusions = ",".join(f"{c}:{(c + shift) % 10}" for c in range(10))
        noise = ["data/noise=asymmetric", "data.noise.rate=1", f"data.noise.confusions={{{confusions}}}"]
        lab.sweep(f"wrong_{shift}", of_run, *held, where, *noise)
    results = lab.map("curated", curated, [(seed, rate) for rate in RATES for seed in lab.seeds], lab.out)
    yield from (qualities(lab, results), *detections(results))

    cells = {}
    for name, place in TRAINED.items():
        manifest = f"{lab.out}/manifests/${{data.noise.rate}}/${{seed}}/{place}"
        manifest += ".parquet" if place == "reference_loss" else "/manifest.parquet"
        keep = [] if place is None else [f"data.keep='{manifest}'"]
        runs = lab.sweep(f"scratch/{place}", each, *SCRATCH, *keep, SPLIT, EACH_EPOCH)
        for rate in RATES:
            of = runs.where(rate=rate)
            cells[name, percent(rate)] = f"{shown(of.values('accuracy'))} ({of.mean('best_accuracy'):.1f})"
    title = "From scratch, 20 epochs: test accuracy in the last epoch, and in brackets in the best, by wrong labels"
    yield Table("curation_scratch", title, "trained on", cells)


def qualities(lab: Lab, results: list[dict[str, Any]]) -> Table:
    """The estimate of quality beside the truth."""
    cells = {}
    for rate in RATES:
        of, row = [r for r in results if r["rate"] == rate], percent(rate)
        cells[row, "truly good"] = f"{100 * statistics.fmean(r['truth'] for r in of):.1f}"
        for head, name in (
            ("kept", "share_kept"),
            ("t", "kept_if_right"),
            ("f", "kept_if_wrong"),
            ("quality", "estimate"),
        ):
            cells[row, head] = [100 * r["quality"][name] for r in of]
        errors = (f"{100 * (r['quality']['estimate'] - r['truth']):+.1f}" for r in of)
        cells[row, "error of each seed, points"] = ", ".join(errors)
        holds = sum(r["quality"]["low"] <= r["truth"] <= r["quality"]["high"] for r in of)
        cells[row, "95 % interval holds the truth"] = f"{holds} of {len(of)}"
    place = f"{lab.seeds[0]}/sign/manifest.parquet"
    manifests = {f"{percent(rate)} wrong": Manifest(lab.out / "manifests" / f"{rate}" / place) for rate in RATES}
    comparison = compare(manifests, {f"{percent(rate)} wrong": rate for rate in RATES})
    plot_quality(lab.out / "quality.png", comparison)
    title = f"Quality; correlation with the truth, seed {lab.seeds[0]}: {comparison.pearson:.4f}"
    return Table("curation_quality", title, "wrong labels", cells)


def detections(results: list[dict[str, Any]]) -> Iterator[Table]:
    """F1 and AUROC of all filters and baselines."""
    for figure, title in (("f1", "F1 of what is dropped; at 0 % the share that is kept"), ("auroc", "AUROC")):
        cells = {}
        for name in results[0]["found"]:
            for rate in RATES if figure == "f1" else RATES[1:]:
                of = [r["found"][name] for r in results if r["rate"] == rate]
                values = [100 * each[figure if rate else "kept"] for each in of if each]
                refused = f" (refused for {len(of) - len(values)} of {len(of)})"
                head = percent(rate) if rate else "0 %: kept"
                cells[name, head] = values if len(values) == len(of) else shown(values) + refused
        if figure == "auroc":  # the scores are the same for all filters
            cells = {place: values for place, values in cells.items() if place[0] in ("sign", LOSS)}
        yield Table(f"curation_{figure}", title, "by", cells)


def report_members(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """A reference trained on a random half of the large part, whose labels are all right: who was in it?"""
    halves = {}
    for seed in lab.seeds:
        ids = noisy_digits(seed, 0.0).noisy_ids
        drawn = torch.randperm(len(ids), generator=torch_generator(seed, "random selection"))[: len(ids) // 2]
        halves[seed] = set(ids[drawn].tolist())
        table = pa.table({"id": ids.tolist(), "keep": [each in halves[seed] for each in ids.tolist()]})
        lab.folder("halves").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, lab.folder("halves", f"{seed}.parquet"))
    keep = [f"data.keep={lab.out}/halves/${{seed}}.parquet", "data.augment=false"]
    references(lab, "members", *keep, train="noisy")
    runs = lab.sweep(
        "membership", {"seed": lab.seeds}, SCORED, path_of(lab, "members"), SPLIT, "data.noise.rate=0", EACH_EPOCH
    )
    cells: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        found = membership(curate(run.folder / "scores", accept_verdict=True).manifest, halves[run.values["seed"]])
        for name in ("auroc", "jaccard", "chance"):
            cells.setdefault(("mean score", name), []).append(100 * getattr(found, name))
    yield Table("membership", "Who trained the reference: a random half of the images", "by", cells)


STUDY = Study("From scores to a data set", {"filters": Part(report), "membership": Part(report_members)})
