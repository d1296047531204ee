"""Two gloo processes on one machine, in which tests run their cases.

They are forked from a server that imports the large packages once for all of a worker's tests.
"""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

WORLD = 2
#: Imported once by the server from which all ranks are forked.
PRELOADED = [
    "lightning.pytorch",
    "lightning_mimic.callbacks",
    "lightning_mimic.models",
    "lightning_mimic.data",
    "pytest",
]
#: Where processes cannot be forked, each imports for itself.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def on_two_ranks(act: Callable[[int, Path], None], folder: Path, world: int = WORLD) -> Path:
    """Has both ranks (or more) act, each with its number and the folder; returns the folder."""
    if METHOD == "forkserver":
        multiprocessing.set_forkserver_preload(PRELOADED)
    # The server that they are forked from has the environment of its own start.
    arguments = (act, folder, world, dict(os.environ))
    torch.multiprocessing.start_processes(_run, arguments, nprocs=world, start_method=METHOD)
    return folder


def strategy(**options: Any) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", **options)


def two(world: int = WORLD) -> dict[str, Any]:
    """Of a Trainer on one of the ranks, whose batches are its own already."""
    return {"devices": world, "use_distributed_sampler": False, "plugins": [TorchElasticEnvironment()]}


def _run(rank: int, act: Callable[[int, Path], None], folder: Path, world: int, environment: dict[str, str]) -> None:
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world
    )
    act(rank, folder)
    torch.distributed.destroy_process_group()
