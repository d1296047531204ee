"""Measure memory and time of the contrastive loss by numbers of pairs and of ranks, on gloo processes of this machine.

Of each rank: how much it grows over training's forward and backward pass of the loss alone (without towers), and over
these with the scores of the pairs' own gradients.

    python -m scripts.benchmarks contrastive                        4,096 to 16,384 pairs, one to four ranks
    python -m scripts.benchmarks contrastive --pairs 4096 --ranks 1 --block-size 4096
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.multiprocessing
from torch import nn

from lightning_mimic.gradients import LossGradients
from lightning_mimic.models import global_pair_losses
from lightning_mimic.models.contrastive import BLOCK_SIZE
from scripts.benchmarks.benchmark_report import Report, add_numbers
from scripts.benchmarks.paired_rounds import own_memory

WIDTH = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 8192, 16384], help="of all ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help=" ")
    add_numbers(parser, block_size=BLOCK_SIZE)


def act(rank: int, world: int, pairs: int, block_size: int, folder: str) -> None:
    """Measure one rank; write what it has found."""
    torch.set_num_threads(max(1, 2 // world))
    file = Path(folder) / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.manual_seed(rank)
    towers = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("images", "texts")})
    scale = nn.Parameter(torch.tensor(20.0))
    inputs = {name: torch.randn(pairs // world, WIDTH) for name in towers}
    parameters = {f"{name}.weight": tower.weight for name, tower in towers.items()}

    def losses() -> torch.Tensor:
        embedded = (towers[name](inputs[name]) for name in towers)
        return global_pair_losses(*embedded, scale, block_size=block_size)

    found = {}
    for what in ("training", "scores"):
        before, started = own_memory("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the greatest memory is counted from here
        made = losses()
        if what == "scores":
            LossGradients(made, parameters).dot({name: torch.ones_like(p) for name, p in parameters.items()})
        made.mean().backward()
        found[what] = {"seconds": time.perf_counter() - started, "GiB": (own_memory("VmHWM") - before) / 2**30}
        del made
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def measure(options: argparse.Namespace) -> Iterator[Report]:
    rows, results = [], []
    for pairs in options.pairs:
        for world in options.ranks:
            with tempfile.TemporaryDirectory() as folder:
                arguments = (world, pairs, options.block_size, folder)
                torch.multiprocessing.start_processes(act, arguments, nprocs=world, start_method="spawn")
                of_ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
            results.append({"pairs": pairs, "ranks": world, "of_ranks": of_ranks})
            row = [f"{pairs:,}", str(world)]
            for what in ("training", "scores"):
                row.append(f"{max(each[what]['GiB'] for each in of_ranks):.2f}")
                row.append(f"{max(each[what]['seconds'] for each in of_ranks):.1f}")
            rows.append(row)
            caption = (
                f"Growth of the largest rank, in GiB, and seconds of the slowest, all ranks on the same cores; "
                f"embeddings of {WIDTH} float32, blocks of {options.block_size:,} pairs."
            )
            heads = ("pairs", "ranks", "training, GiB", "seconds", "with scores, GiB", "seconds")
            yield Report("contrastive", heads, rows, caption, results, text=0)
