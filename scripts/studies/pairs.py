"""A small CLIP on scenes with up to 1,800 different captions: which mismatched pairs are found, and what is learnt."""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import open_clip
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from lightning_mimic import Aligned, GradMimic, Ledger, WithIds, collate_with_ids
from lightning_mimic.models import CLIP
from lightning_mimic.scorers import Posterior
from scripts.studies.lab import Lab
from scripts.studies.scenes import CAPTIONS, LENGTH, SIDE, WORDS, Scenes, scenes
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table

PROJECTIONS = ["towers.visual.head.proj", "towers.text_projection"]
PAIRS, HELD_OUT = 900, 300
#: Added to a seed for the reference, its pairs, and those that are held out.
OTHER_START, HELD = 1000, 5000
#: As in experiment=clip_digits.
TEMPERATURE = 0.1
METHODS: Mapping[str, dict[str, Any]] = {
    "plain": {"weighting": Posterior(), "reweight": "none"},
    "mimic": {"temperature": TEMPERATURE},
    "posterior": {"weighting": Posterior()},
}


@dataclass(frozen=True)
class Setting:
    """What a row of the tables is about.

    Attributes:
        name: The row.
        methods: Which are trained.
        wrong: Share of mismatched pairs.
        captions: Different captions.
        reference_pairs: On which the reference is trained.
        reference_epochs: For which it is.
        epochs: Of the training.
        batch: Size of its batches.
    """

    name: str
    methods: tuple[str, ...]
    wrong: float = 0.4
    captions: int = CAPTIONS
    reference_pairs: int = 500
    reference_epochs: int = 30
    epochs: int = 8
    batch: int = 32


ALL = ("plain", "mimic", "posterior")
SETTINGS = (
    Setting("1,800 captions", ALL),
    Setting("1,800 captions, none wrong", ALL, wrong=0.0),
    Setting("1,800 captions, a weak reference (200 pairs)", ("plain", "posterior"), reference_pairs=200),
    Setting(
        "1,800 captions, an overfitted one (120 pairs, 120 epochs)",
        ("plain",),
        reference_pairs=120,
        reference_epochs=120,
    ),
    Setting("10 captions", ("plain", "posterior"), captions=10),
    Setting("1,800 captions, batches of 128", ("plain",), batch=128),
    Setting("1,800 captions, 3 epochs", ("plain",), epochs=3),
)


def report(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """Every setting with every seed: what is found, what is known of the reference, and what is learnt."""
    given = [(place, seed) for place in range(len(SETTINGS)) for seed in lab.seeds]
    found, known, learnt = (dict[tuple[str, str], list[float]]() for _ in range(3))
    for (place, _), result in zip(given, lab.map("pairs", trained, given), strict=True):
        setting = SETTINGS[place]
        for key, figure in result["found"].items():
            *row, head = key.split(": ")
            if len(row) == 2:
                found.setdefault((f"{setting.name}; {': '.join(row)}", head), []).append(100 * figure)
            else:
                known.setdefault((setting.name, key), []).append(100 * figure)
        if len(setting.methods) > 1:
            for head, figure in result["learnt"].items():
                learnt.setdefault((setting.name, head), []).append(100 * figure)
    yield Table("pairs_found", "Which pairs do not match, by means over the epochs", "data; run: figure", found)
    yield Table("pairs_known", "What is known of the reference", "data", known)
    yield Table("pairs_learnt", "What is learnt: recall at 1 of 300 held-out pairs, mean of both ways", "data", learnt)


def trained(place: int, seed: int) -> dict[str, Any]:
    """All figures of one setting and seed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    setting = SETTINGS[place]
    reference = clip(seed + OTHER_START)
    clean = scenes(setting.reference_pairs, seed + OTHER_START, 0.0, setting.captions)
    fit(reference, clean, setting.reference_epochs, 32)
    reference.eval()
    pool = scenes(PAIRS, seed, setting.wrong, setting.captions)
    held = scenes(HELD_OUT, seed + HELD, 0.0, setting.captions)
    learnt, found = {"the reference": recall(reference, held)}, dict[str, float]()
    for method in setting.methods:
        with tempfile.TemporaryDirectory() as folder:
            model = clip(seed)
            aligned = Aligned(reference.towers, cache=True)
            callback = GradMimic(aligned, PROJECTIONS, ledger=folder, **METHODS[method])
            fit(model, pool, setting.epochs, setting.batch, callback)
            found |= figures(method, Ledger(folder), pool.mismatched)
        learnt[method] = recall(model, held)
    with torch.no_grad():
        own = (reference.encode_image(pool.images, True) * reference.encode_text(pool.tokens, True)).sum(1)
    if setting.wrong:
        found = {"reference's similarity: AUROC": auroc(own, pool.mismatched)} | found
    return {"found": found, "learnt": learnt}


def figures(method: str, ledger: Ledger, wrong: Tensor) -> dict[str, float]:
    """What the mean scores and posteriors of a run find."""
    rows = ledger.table().to_pandas()
    means = rows.groupby("id")[["score", "posterior"]].mean().reindex(range(len(wrong)))
    score, posterior = (torch.tensor(means[name].to_numpy()).float() for name in ("score", "posterior"))
    run = {"plain": "scored", "mimic": "weighted by mimic", "posterior": "weighted by posterior"}[method]
    found = {}
    for name, values, least in (("mimic score", score, 0.0), ("posterior", posterior, 0.5)):
        if values.isnan().all():
            continue
        if wrong.any():
            found[f"{run}: {name}: AUROC"] = auroc(values.nan_to_num(), wrong)
            found[f"{run}: {name}: wrong kept"] = (values[wrong] > least).float().mean().item()
        found[f"{run}: {name}: right kept"] = (values[~wrong] > least).float().mean().item()
    if method == "plain":
        known = ledger.meta["attempts"][-1]["calibration"]
        found["estimated share"] = known["wrong_share"]
        found["separation: reference"], found["separation: aligned"] = known["separation"], known["aligned_separation"]
    return found


def clip(seed: int) -> CLIP:
    """A CLIP of small towers."""
    torch.manual_seed(seed)
    vision = {"timm_model_name": "test_efficientnet_gn", "timm_model_pretrained": False, "timm_pool": "avg"}
    vision |= {"timm_proj": "linear", "image_size": SIDE}
    text = {"context_length": LENGTH, "vocab_size": len(WORDS), "width": 64, "heads": 2, "layers": 1}
    towers: nn.Module = open_clip.CLIP(64, vision, text)
    return CLIP(towers, optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1), warmup_steps=30)


def fit(model: CLIP, pairs: Scenes, epochs: int, batch: int, callback: GradMimic | None = None) -> None:
    """Train on pairs."""
    data = WithIds(TensorDataset(pairs.images, pairs.tokens))
    loader = DataLoader(data, batch, shuffle=True, drop_last=True, collate_fn=collate_with_ids)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[] if callback is None else [callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)


@torch.no_grad()
def recall(model: CLIP, pairs: Scenes) -> float:
    """Share of images whose nearest caption is right, and of captions whose nearest image is, of both the mean."""
    model.eval()
    similar = model.encode_image(pairs.images, True) @ model.encode_text(pairs.tokens, True).T
    same = pairs.captions[:, None] == pairs.captions
    ways = (similar, same), (similar.T, same.T)
    return sum(is_same.gather(1, s.argmax(1, keepdim=True)).float().mean().item() for s, is_same in ways) / 2


def auroc(values: Tensor, wrong: Tensor) -> float:
    """Of low values for wrong pairs."""
    return float(binary_auroc(-values, wrong.long()))


STUDY = Study("Pairs with many captions", {"scenes": Part(report)}, seeds=(50, 51), chosen_on=(40, 41, 42))
