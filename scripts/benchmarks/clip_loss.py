"""Memory and time of a contrastive loss over the pairs of all ranks, without towers."""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing
from torch import nn

from lightning_mimic.gradients import LossGradients
from lightning_mimic.models import global_pair_losses
from scripts.benchmarks.benchmark_report import Report
from scripts.benchmarks.paired_rounds import interleave, own_memory

WIDTH = 512  # of features and of embeddings
#: By name: whether the pairs are scored.
STEPS = {"training": False, "scores and training": True}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loss", action="store_true", help="the loss alone, by --pairs and --ranks; nothing else")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 8192, 16384], help="of all ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="processes on this machine, over gloo")
    parser.add_argument("--block-size", type=int, help="embeddings whose similarities are held at once")


def on_rank(rank: int, folder: Path, world: int, pairs: int, scored: bool, settings: dict[str, Any]) -> None:
    """Take two steps from features to the gradients of both projections; save the growth and the seconds."""
    torch.set_num_threads(settings.pop("threads"))
    limit = timedelta(hours=1)
    if world > 1:
        store = f"file://{folder / 'rendezvous'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    torch.manual_seed(rank)
    images, texts = torch.randn(2, pairs // world, WIDTH)
    weights = {name: nn.Parameter(torch.eye(WIDTH)) for name in ("image", "text")}
    vectors = {name: torch.randn(WIDTH, WIDTH) for name in weights}
    scale = nn.Parameter(torch.tensor(20.0))

    def step(images: torch.Tensor, texts: torch.Tensor) -> None:
        losses = global_pair_losses(images @ weights["image"], texts @ weights["text"], scale, **settings)
        if scored:
            LossGradients(losses, weights).dot(vectors)
        losses.mean().backward()

    step(images[:8], texts[:8])  # what torch loads once is no growth
    before, started = own_memory("VmRSS"), time.perf_counter()
    step(images, texts)
    seconds = time.perf_counter() - started
    torch.save([own_memory("VmHWM") - before, seconds], folder / f"{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def run(world: int, pairs: int, scored: bool, settings: dict[str, Any]) -> tuple[float, float]:
    """Measure in new processes; returns the greatest growth of one of them, in GiB, and the seconds of the slowest."""
    # Each freed tensor is given back at once, so that the peak is that of what was in use.
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, environment):
        folder = Path(name)
        arguments = (folder, world, pairs, scored, settings)
        torch.multiprocessing.start_processes(on_rank, arguments, nprocs=world, start_method="spawn")
        found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    return max(growth for growth, _ in found) / 2**30, max(seconds for _, seconds in found)


def measure(options: argparse.Namespace) -> Iterator[Report]:
    """Measure the loss for all numbers of pairs and of ranks."""
    rows, results = [], []
    heads = ["pairs", "ranks", "step", "growth of a rank, GiB", "seconds (range)"]
    given = {} if options.block_size is None else {"block_size": options.block_size}
    for pairs in options.pairs:
        for world in options.ranks:
            settings = given | {"threads": max(1, options.threads // world)}
            ways = {name: partial(run, world, pairs, scored, settings) for name, scored in STEPS.items()}
            found = interleave(f"{pairs} pairs, {world} ranks", ways, options.rounds)
            for name, runs in found.items():
                growth, seconds = statistics.median(g for g, _ in runs), sorted(s for _, s in runs)
                times = f"{statistics.median(seconds):.2f} ({seconds[0]:.2f}–{seconds[-1]:.2f})"
                rows.append([f"{pairs:,}", str(world), name, f"{growth:.2f}", times])
                results.append({"pairs": pairs, "ranks": world, "step": name, "growth and seconds": runs})
    caption = (
        f"Median of {options.rounds} rounds, each in new processes on one machine. Features and embeddings of {WIDTH} "
        "numbers, float32; scores of both projections."
    )
    yield Report("clip loss", heads, rows, caption, results, text=3)
