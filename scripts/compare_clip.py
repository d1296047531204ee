"""A small CLIP on digits with captions, 40 % of them wrong: plain training, Grad-Mimic, curation, and their baselines.

Every run is one of mimic-train, on shards as mimic-make-shards writes them:

    python scripts/compare_clip.py
"""

import contextlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from digits_runs import Work, at_work, cell, parsed, parser_of, run
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from lightning_mimic.curation import curate, detect
from lightning_mimic.data.digit_pairs import write_digit_shards as write
from lightning_mimic.models import CLIP, pair_losses
from lightning_mimic.reference.procrustes import Rotation
from lightning_mimic.reference.running_statistics import RunningStatistics

STARTS = {"scratch": "from scratch", "locked": "locked towers"}
METHODS = {"plain": "plain", "weighted": "Grad-Mimic", "sign": "kept by sign", "baseline": "kept by baseline"}
TEMPERATURES = (0.3, 0.1, 0.05)
DIRECTIONS = {"aligned": "rotation and ridge", "ridge": "ridge only", "as_is": "weights as they are"}
PROJECTIONS = ("towers.visual.head.proj.weight", "towers.text_projection")


@dataclass(frozen=True)
class Training:
    """One run.

    Attributes:
        out: Folder of the seed, with its shards and its reference.
        seed: Of weights, split, captions and order.
        method: ``"reference"``, one of :data:`METHODS`, or ``"scored"``: short, for curation.
        start: Of :data:`STARTS`.
        temperature: Of the weights.
        direction: Of :data:`DIRECTIONS`.
        mismatched: Share of the pool's captions that name another digit.
    """

    out: Path
    seed: int
    method: str = "reference"
    start: str = "scratch"
    temperature: float = 0.3
    direction: str = "aligned"
    mismatched: float = 0.4

    @property
    def folder(self) -> Path:
        return self.out / self.start / f"{self.method}_{self.direction}_{self.temperature:g}"


class Curve(L.Callback):
    """After every epoch: zero-shot accuracy on validation and test images, and the loss of clean held-out pairs."""

    def __init__(self, t: Training) -> None:
        self.pairs, ids = pairs_of(t, "val")
        self.digits = torch.tensor([truth(t, "digit")[each] for each in ids])
        data = instantiate(composed(t).data, batch_size=500)
        data.setup()
        self.test = next(iter(data.test_dataloader()[1]))
        self.figures: dict[str, list[float]] = {"val_accuracy": [], "test_accuracy": [], "val_loss": [], "steps": []}

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CLIP)
        assert pl_module.zero_shot is not None
        pl_module.eval()
        classes = pl_module.zero_shot.weights(pl_module)
        images, texts = self.pairs
        embedded = pl_module.encode_image(images, normalize=True)
        losses = pair_losses(embedded, pl_module.encode_text(texts), pl_module.scale)
        right = (pl_module.encode_image(self.test[0], normalize=True) @ classes).argmax(1) == self.test[1]
        self.figures["val_accuracy"].append(float(((embedded @ classes).argmax(1) == self.digits).float().mean()))
        self.figures["test_accuracy"].append(float(right.float().mean()))
        self.figures["val_loss"].append(float(losses.mean()))
        self.figures["steps"].append(trainer.global_step)
        pl_module.train()


def done(t: Training) -> dict[str, Any]:
    """Does it, and returns its figures."""
    if t.method == "reference":
        write(t.out / "shards", t.seed, t.mismatched)
    curve = Curve(t)
    doubted = no_rotation() if t.direction == "ridge" else contextlib.nullcontext()
    with doubted:
        run(curve, t.folder, *overrides(t))
    last = {name: values[-1] for name, values in curve.figures.items()}
    figures = {"best_test_accuracy": max(curve.figures["test_accuracy"]), "by_epoch": curve.figures} | last
    if t.method == "reference":
        figures |= prepared(t)
    if t.method in ("scored", "weighted"):
        curation = curate(t.folder / "scores", None, t.folder / "curated", exports=["datacomp"])
        rows = curation.manifest.table()
        scores, wrong = torch.tensor(rows["score"].to_pylist()), mismatched(t, rows["id"].to_pylist())
        found = detect(scores, scores < 0, wrong)
        figures |= {"auroc": found.auroc, "f1": found.f1, "share_kept": found.share_kept, "truth": found.share_right}
    return {name: getattr(t, name) for name in ("method", "seed", "start", "temperature", "direction")} | figures


def overrides(t: Training) -> list[str]:
    """Of mimic-train."""
    shards = [
        f"data.shards='{t.out}/shards/pool/{{00000000..00000008}}.tar'",
        f"data.val_shards={t.out}/shards/val/00000000.tar",
        f"paths.reference={t.out}/reference.ckpt",
        "++trainer.limit_val_batches=0",
        f"seed={t.seed}",
    ]
    if t.method == "reference":  # of another start than the models that it is a reference for
        of_its_own = f"data.shards='{t.out}/shards/reference/{{00000000..00000002}}.tar'"
        return ["experiment=clip_digits_reference", *shards, of_its_own, f"seed={t.seed + 1000}"]
    locked = [f"model.pretrained={t.out}/locked.pt", "model.locked=[image,text]"] if t.start == "locked" else []
    if t.method == "scored":
        as_is = ["mimic=clip_same_start"] if t.direction == "as_is" else []
        return ["experiment=clip_digits_curation", *as_is, *shards, *locked]
    if t.method == "weighted":
        return ["experiment=clip_digits", *shards, *locked, f"mimic.temperature={t.temperature:g}"]
    plain = ["experiment=clip_digits", "mimic=none", *shards, *locked]
    if t.method == "plain":
        return plain
    # As many steps as training on everything has.
    steps = ["trainer.max_epochs=-1", f"++trainer.max_steps={25 * 29}"]
    scored = replace(t, method="scored").folder / "curated" / "manifest.parquet"
    return [*plain, *steps, f"data.keep={scored if t.method == 'sign' else t.out / 'baseline.parquet'}"]


def composed(t: Training) -> Any:
    """The whole configuration of a run."""
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        return compose("train", overrides=[*overrides(t), f"paths.output={t.folder}"])


def pairs_of(t: Training, part: str) -> tuple[tuple[torch.Tensor, torch.Tensor], list[str]]:
    """All pairs of a part's shards, ready for a model, and their ids."""
    data = instantiate(composed(t).data, val_shards=sorted(map(str, t.out.glob(f"shards/{part}/*.tar"))))
    data.setup()
    batches = list(data.val_dataloader()[0])
    ids = [each for batch in batches for each in batch.ids]
    images, texts = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return (images, texts), ids


def truth(t: Training, column: str) -> Mapping[str, Any]:
    """By id."""
    rows = pq.read_table(t.out / "shards" / "truth.parquet")
    return dict(zip(rows["id"].to_pylist(), rows[column].to_pylist(), strict=True))


def mismatched(t: Training, ids: Sequence[str]) -> torch.Tensor:
    """Which of these pairs do not match."""
    known = truth(t, "mismatched")
    return torch.tensor([known[each] for each in ids])


@torch.no_grad()
def prepared(t: Training) -> dict[str, Any]:
    """What others need of a reference: its towers under fresh projections, and what it says of the pool itself."""
    torch.manual_seed(t.seed)
    fresh, tensors = instantiate(composed(t).model).state_dict(), torch.load(t.out / "reference.ckpt")["state_dict"]
    new = {name: fresh[name] for name in (*PROJECTIONS, "towers.logit_scale")}
    torch.save(tensors | new, t.out / "locked.pt")
    model = instantiate(composed(t).model)
    model.load_state_dict(tensors)
    model.eval()
    (images, texts), ids = pairs_of(t, "pool")
    scores = (model.encode_image(images, normalize=True) * model.encode_text(texts, normalize=True)).sum(1)
    wrong = mismatched(t, ids)
    lowest = torch.zeros_like(wrong).index_fill(0, scores.argsort()[: int(wrong.sum())], True)
    pq.write_table(pa.table({"id": ids, "keep": (~lowest).tolist()}), t.out / "baseline.parquet")
    found = detect(scores, lowest, wrong)
    return {"auroc": found.auroc, "f1": found.f1}


def no_rotation() -> Any:
    """Takes the reference's embeddings in their own frame."""

    def identity(statistics: Sequence[RunningStatistics]) -> Rotation:
        one = torch.ones(())
        return Rotation(torch.eye(len(statistics[0].xy)), one, one > 0)

    return mock.patch("lightning_mimic.reference.aligned_towers.procrustes", identity)


def steps_saved(plain: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Share of plain training's steps to its lowest held-out loss that another run does not need for the same loss."""
    losses, steps = plain["by_epoch"]["val_loss"], plain["by_epoch"]["steps"]
    lowest = min(losses)
    reached = [
        s for loss, s in zip(other["by_epoch"]["val_loss"], other["by_epoch"]["steps"], strict=True) if loss <= lowest
    ]
    return 1 - reached[0] / steps[losses.index(lowest)] if reached else None


def chosen_temperature(rows: Sequence[Mapping[str, Any]]) -> float:
    """The best on validation images in the last epoch, over seeds; of equals that with the lower held-out loss."""

    def merit(temperature: float) -> tuple[float, float]:
        of = [row for row in rows if row["temperature"] == temperature]
        accuracy = statistics.fmean(row["val_accuracy"] for row in of)
        return accuracy, -statistics.fmean(row["val_loss"] for row in of)

    return max(TEMPERATURES, key=merit)


def show(console: Console, results: list[dict[str, Any]], out: Path) -> dict[str, float]:
    """Two tables: what is learnt, and what is found; the temperatures that were chosen."""
    learnt, found = Table(title="What is learnt"), Table(title="Which pairs do not match")
    figures = ("val.\nlast", "test\nlast", "test\nbest", "over\nlast", "over\nbest", "steps\nsaved")
    for table, heads in (
        (learnt, ("method", "\nτ", *figures)),
        (found, ("by", "AUROC", "F1", "share kept", "truly good")),
    ):
        for head in heads:
            table.add_column(head, justify="left" if head in ("method", "by") else "right", no_wrap=True)
    seeds = sorted({row["seed"] for row in results})
    chosen = {}
    for start, name in STARTS.items():
        rows = [row for row in results if row["start"] == start and row["method"] != "reference"]
        temperature = chosen[start] = chosen_temperature([row for row in rows if row["method"] == "weighted"])
        plain = {row["seed"]: row for row in rows if row["method"] == "plain"}
        learnt.add_section()
        learnt.add_row(f"[bold]{name}[/]")
        for method, tau in dict.fromkeys(
            (row["method"], row["temperature"]) for row in rows if row["method"] in METHODS
        ):
            of = [
                next(r for r in rows if (r["method"], r["temperature"], r["seed"]) == (method, tau, s)) for s in seeds
            ]
            over = [
                [r["test_accuracy"] - plain[r["seed"]][f] for r in of] for f in ("test_accuracy", "best_test_accuracy")
            ]
            learnt.add_row(
                METHODS[method],
                f"{tau:g}{'*' * (tau == temperature)}" if method == "weighted" else "–",
                *(
                    cell([row[figure] for row in of])
                    for figure in ("val_accuracy", "test_accuracy", "best_test_accuracy")
                ),
                *("–" if method == "plain" else cell(gaps) for gaps in over),
                "–" if method == "plain" else cell([steps_saved(plain[row["seed"]], row) for row in of]),
            )
        found.add_section()
        found.add_row(f"[bold]{name}[/]")
        for direction, said in DIRECTIONS.items():
            of = [row for row in rows if row["method"] == "scored" and row["direction"] == direction]
            found.add_row(
                said, *(cell([row[figure] for row in of]) for figure in ("auroc", "f1", "share_kept", "truth"))
            )
    references = [row for row in results if row["method"] == "reference"]
    found.add_section()
    found.add_row("baseline, share known", *(cell([row[figure] for row in references]) for figure in ("auroc", "f1")))
    console.print(learnt)
    console.print(f"The reference: {cell([row['test_accuracy'] for row in references], ' ')}", highlight=False)
    console.print(found)
    return chosen


def main() -> None:
    arguments = parsed(parser_of(__doc__, "outputs/compare_clip"))
    console, out, started = Console(), arguments.out, time.monotonic()
    with at_work(console, done) as work:
        results = compared(
            work, [Training(out / f"seed{seed}", seed, mismatched=arguments.rate) for seed in arguments.seeds]
        )
    chosen = show(console, results, out)
    (out / "results.json").write_text(json.dumps({"chosen": chosen, "results": results}, indent=2))
    console.print(
        "In %, mean and standard deviation over seeds. *: chosen on 100 validation images. Test: zero-shot on 500 "
        "images; best: the best epoch on them, which no one can know. Over last, over best: the last epoch less plain "
        "training's last and best one. Kept by: plain training on what a filter keeps, as many steps. Steps saved: to "
        "the lowest loss of held-out pairs that plain training has. Locked towers: the reference's, under projections "
        "that begin anew. Found: by the mean score of a short run. Baseline: the reference's own similarity "
        "of the pair.",
        style="dim",
    )
    console.print(f"\nWritten in {time.monotonic() - started:.0f} s: {out / 'results.json'}", highlight=False)


def compared(work: Work, seeds: Sequence[Training]) -> list[dict[str, Any]]:
    """All runs, in the order in which they need each other."""
    results = work("references", seeds)
    weighted = [
        replace(s, method="weighted", start=start, temperature=t)
        for start in STARTS
        for t in TEMPERATURES
        for s in seeds
    ]
    scored = [
        replace(s, method="scored", start=start, direction=d) for start in STARTS for d in DIRECTIONS for s in seeds
    ]
    results += work("scoring", scored)
    results += work("training", [replace(s, method="plain", start=start) for start in STARTS for s in seeds] + weighted)
    filtered = [replace(s, method=m) for m in ("sign", "baseline") for s in seeds]
    return results + work("training on what is kept", filtered)


if __name__ == "__main__":
    main()
