"""A small CLIP on digits with captions, 40 % of them wrong: plain training, Grad-Mimic, curation, and baselines."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from lightning_mimic.curation import curate, detect
from lightning_mimic.data.digit_pairs import write_digit_shards
from scripts.studies.digits import EACH_EPOCH, OTHER_START, gaps
from scripts.studies.lab import Lab, Runs
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table

MISMATCHED = 0.4
STARTS = {"scratch": "from scratch", "locked": "locked towers"}
TEMPERATURES = (0.3, 0.1, 0.05)
#: How the reference's projections are given to a model of another start.
DIRECTIONS = {
    "rotation and ridge": [],
    "ridge only": ["mimic.reference.rotate=false"],
    "weights as they are": ["mimic=clip_same_start"],
}
PROJECTIONS = ("towers.visual.head.proj.weight", "towers.text_projection")
#: As many steps as training on everything has.
STEPS = 25 * 29


def shards(lab: Lab, more: int = 0) -> list[str]:
    """Overrides that name the shards of a run's seed, less ``more``."""
    folder = f"{lab.out}/shards/${{add:${{seed}},-{more}}}"
    return [
        f'data.shards="{folder}/pool/{{00000000..00000008}}.tar"',
        f'data.val_shards="{folder}/val/00000000.tar"',
        f'data.zero_shot.split_seed="${{add:${{seed}},-{more}}}"',
        f'+study.truth="{folder}/truth.parquet"',
        "++trainer.limit_val_batches=0",
        EACH_EPOCH,
    ]


def prepare(lab: Lab) -> Runs:
    """Shards, references from other initial weights, and what others need of them."""
    for seed in lab.seeds:
        if not (folder := lab.folder("shards", seed)).exists():
            write_digit_shards(folder, seed, MISMATCHED)
    pairs = f'data.shards="{lab.out}/shards/${{add:${{seed}},-{OTHER_START}}}/reference/{{00000000..00000002}}.tar"'
    saved = "paths.reference=${hydra:runtime.output_dir}/model.ckpt"
    seeds = {"seed": [seed + OTHER_START for seed in lab.seeds]}
    given = [word for word in shards(lab, OTHER_START) if not word.startswith("data.shards")]
    runs = lab.sweep("references", seeds, "experiment=clip_digits_reference", *given, pairs, saved)
    for seed, run in zip(lab.seeds, runs, strict=True):
        if not (run.folder / "locked.pt").exists():
            torch.manual_seed(seed)
            fresh = composed().state_dict()
            new = {name: fresh[name] for name in (*PROJECTIONS, "towers.logit_scale")}
            torch.save(torch.load(run.folder / "model.ckpt")["state_dict"] | new, run.folder / "locked.pt")
    return runs


def composed(part: str = "model", *overrides: str) -> Any:
    """A part of a run's configuration, made."""
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        config = compose("train", overrides=["experiment=clip_digits", *overrides])
    return instantiate(config[part])


def start_of(lab: Lab, start: str) -> list[str]:
    """Overrides of a run from scratch, or on the reference's own towers under projections that begin anew."""
    folder = f"{lab.out}/references/${{add:${{seed}},{OTHER_START}}}"
    reference = f'paths.reference="{folder}/model.ckpt"'
    locked = [f'model.pretrained="{folder}/locked.pt"', "model.locked=[image,text]"] if start == "locked" else []
    return [*shards(lab), reference, *locked]


def choose(lab: Lab) -> Chosen:
    """The temperature of each start: by validation images in the last epoch, and of equals by the held-out loss."""
    prepare(lab)
    chosen = {}
    for start in STARTS:
        each = {"mimic.temperature": TEMPERATURES, "seed": lab.seeds}
        tried = lab.sweep(f"weighted_{start}", each, "experiment=clip_digits", *start_of(lab, start))

        def merit(t: float, tried: Runs = tried) -> tuple[float, float]:
            of = tried.where(temperature=t)
            return of.mean("accuracy"), -of.mean(lambda result: result["curves"]["held_loss"][-1])

        chosen[start] = max(TEMPERATURES, key=merit)
    return chosen


def report(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """What is learnt, and which pairs are found."""
    trusted = prepare(lab)
    learnt: dict[tuple[str, str], list[float] | str] = {}
    found: dict[tuple[str, str], list[float]] = {}
    baseline = similarities(lab, trusted)
    for start, name in STARTS.items():
        given = start_of(lab, start)
        plain = lab.sweep(f"plain_{start}", {"seed": lab.seeds}, "experiment=clip_digits", "mimic=none", *given)
        temperature = f"mimic.temperature={chosen[start]}"
        runs = {
            "plain": plain,
            f"Grad-Mimic, τ = {chosen[start]:g}": lab.sweep(
                f"weighted_{start}", {"seed": lab.seeds}, "experiment=clip_digits", *given, temperature
            ),
        }
        for direction, words in DIRECTIONS.items():
            folder = f"scored_{start}/{direction.replace(' ', '_')}"
            of = lab.sweep(folder, {"seed": lab.seeds}, "experiment=clip_digits_curation", *words, *given)
            row = f"{name}: {direction}"
            for head, figure in (
                ("AUROC", "auroc"),
                ("F1 of the sign", "f1"),
                ("share kept by the sign", "share_kept"),
            ):
                found[row, head] = of.values(lambda result, figure=figure: result["filters"]["sign"][figure])
            if start == "scratch" and not words:
                for run in of:
                    shutil.rmtree(run.folder / "curated", ignore_errors=True)  # of an earlier report
                    curate(run.folder / "scores", None, run.folder / "curated", accept_verdict=True)
        if start == "scratch":
            kept = f"{lab.out}/scored_scratch/rotation_and_ridge/${{seed}}/curated/manifest.parquet"
            known = f"{lab.out}/references/${{add:${{seed}},{OTHER_START}}}/baseline.parquet"
            for what, manifest in (("sign", kept), ("baseline", known)):
                steps = ["trainer.max_epochs=-1", f"++trainer.max_steps={STEPS}", f'data.keep="{manifest}"']
                label = {"sign": "the sign keeps", "baseline": "the baseline keeps, the share known"}[what]
                runs[f"plain, on what {label}"] = lab.sweep(
                    f"kept_{what}", {"seed": lab.seeds}, "experiment=clip_digits", "mimic=none", *given, *steps
                )
        for method, of in runs.items():
            row = f"{name}: {method}"
            learnt[row, "last epoch"], learnt[row, "best epoch"] = of.values("accuracy"), of.values("best_accuracy")
            if method != "plain":
                learnt[row, "over plain's last"] = gaps(of, plain, "accuracy")
                learnt[row, "over plain's best"] = gaps(of, plain, "best_accuracy")
                saved = [steps_saved(a.result["curves"], b.result["curves"]) for a, b in zip(plain, of, strict=True)]
                learnt[row, "steps saved"] = "–" if None in saved else [100 * each for each in saved]
    learnt["the reference", "last epoch"] = trusted.values("accuracy")
    found |= baseline
    signed = ["over plain's last", "over plain's best"]
    yield Table("clip_learnt", "What is learnt: zero-shot accuracy on the test images", "method", learnt, signed=signed)
    yield Table("clip_found", "Which pairs do not match, by the mean score of a short run", "direction", found)


@torch.no_grad()
def similarities(lab: Lab, trusted: Runs) -> Mapping[tuple[str, str], list[float]]:
    """What the reference itself says of the pool: its similarity of each pair, with the share known."""
    row, cells = "baseline: the reference's similarity, the share known", dict[tuple[str, str], list[float]]()
    for seed, run in zip(lab.seeds, trusted, strict=True):
        folder = lab.folder("shards", seed)
        pool = sorted(map(str, (folder / "pool").glob("*.tar")))
        shown = f"[{','.join(pool)}]"
        words = [f"data.val_shards={shown}", f"data.shards={shown}", f"paths.output={run.folder}"]
        data, model = composed("data", *words), composed()
        model.load_state_dict(torch.load(run.folder / "model.ckpt")["state_dict"])
        model.eval()
        data.setup()
        batches = list(data.val_dataloader()[0])
        ids = [each for batch in batches for each in batch.ids]
        images, texts = (torch.cat(parts) for parts in zip(*batches, strict=True))
        scores = (model.encode_image(images, normalize=True) * model.encode_text(texts, normalize=True)).sum(1)
        wrong = mismatched(folder, ids)
        lowest = torch.zeros_like(wrong).index_fill(0, scores.argsort()[: int(wrong.sum())], True)
        pq.write_table(pa.table({"id": ids, "keep": (~lowest).tolist()}), run.folder / "baseline.parquet")
        found = detect(scores, lowest, wrong)
        for head, value in (("AUROC", found.auroc), ("F1 of the sign", found.f1)):
            cells.setdefault((row, head), []).append(100 * value)
    return cells


def mismatched(folder: Path, ids: list[str]) -> torch.Tensor:
    """Which of these pairs do not match."""
    rows = pq.read_table(folder / "truth.parquet")
    known = dict(zip(rows["id"].to_pylist(), rows["mismatched"].to_pylist(), strict=True))
    return torch.tensor([known[each] for each in ids])


def steps_saved(plain: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> float | None:
    """Share of plain training's steps to its lowest held-out loss that another run does not need for the same loss."""
    lowest = min(plain["held_loss"])
    reached = [steps for loss, steps in zip(other["held_loss"], other["steps"], strict=True) if loss <= lowest]
    return 1 - reached[0] / plain["steps"][plain["held_loss"].index(lowest)] if reached else None


STUDY = Study("A small CLIP on digits with captions", {"digits": Part(report, choose)})
