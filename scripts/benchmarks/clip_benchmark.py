"""Measure what scoring image-text pairs costs: a CLIP with GradMimic beside plain training.

Every method is a process of its own, of some 5 GiB at a batch of 16; fewer --methods at a time where memory is short:

    python -m scripts.benchmarks clip --rounds 8 --methods again projections

On a GPU, whose memory holds all methods at once:

    python -m scripts.benchmarks clip --device cuda --precision bf16-mixed --batch-size 1024 --rounds 40

The contrastive loss alone, whose memory grows with the pairs of all ranks:

    python -m scripts.benchmarks clip --loss --pairs 4096 8192 16384 --ranks 1 2 --rounds 3
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch

from lightning_mimic import Aligned, GradMimic
from lightning_mimic.models import CLIP
from scripts.benchmarks import clip_loss, training_steps
from scripts.benchmarks.benchmark_report import Report
from scripts.benchmarks.short_fits import save_reference
from scripts.benchmarks.training_steps import Made, Method

PROJECTIONS = ["towers.visual.proj", "towers.text_projection"]
#: By name: what is scored.
METHODS = {
    "plain": None,
    "again": None,
    "projections": PROJECTIONS,
    "mlp": "towers.visual.transformer.resblocks.11.mlp.c_proj.weight",
    "aligned": PROJECTIONS,
}
NOTE = (
    "again: plain training again, the noise. projections: both, towards weights as they are. mlp: the last MLP of "
    "the image tower. aligned: both projections, in a step in which the reference runs, one in ten once enough "
    "pairs are in."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    training_steps.add_options(parser, rounds=10, batch_size=16)
    clip_loss.add_options(parser)


def make(method: Method, folder: Path, batch_size: int) -> Made:
    clip, callbacks = CLIP(open_clip.create_model(method.model), warmup_steps=0), []
    if METHODS[method.name] is not None:
        saved = save_reference(clip, folder / "reference.pt")
        reference = Aligned(saved, every=1) if method.name == "aligned" else saved
        # The reference's diagnosis is over after 512 pairs.
        callbacks = [GradMimic(reference, METHODS[method.name], diagnose_reference=False)]
    size = open_clip.get_model_config(method.model)["vision_cfg"]["image_size"]
    return clip, callbacks, (torch.randn(batch_size, 3, size, size), torch.randint(1, 49408, (batch_size, 77)))


def measure(options: argparse.Namespace) -> Iterator[Report]:
    if options.loss:
        return clip_loss.measure(options)
    methods = [
        Method(options.model, "–" if METHODS[name] is None else name, name, make)
        for name in dict.fromkeys(["plain", *options.methods])
    ]
    return training_steps.measure_steps("clip", [(methods, options.rounds)], options, NOTE)
