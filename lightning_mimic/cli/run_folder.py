"""Folders of runs: each has the experiment's name and the time, and belongs to one run alone."""

import itertools
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_mimic.cli.errors import UserError
from lightning_mimic.errors import MimicError
from lightning_mimic.stores import path_of

#: What a run leaves in its folder besides its configuration.
_RESULTS = ("checkpoints", "logs", "scores")


def new_run_folder(experiment: str | None) -> str:
    """Create a folder for one run or sweep: ``outputs/EXPERIMENT/DATE_TIME``, with ``-2`` where another run has that.

    Args:
        experiment: Name of the experiment, or a list of names as text; ``None``: the folder is named ``train``.

    Returns:
        The folder, relative to the current one.

    Raises:
        MimicError: A launcher has started several processes, each of which would get a folder of its own.
        OSError: It cannot be created.
    """
    if _is_launched_with_others():
        raise MimicError(
            "`hydra.run.dir` is not given, and this process is one of several that a launcher has started; each would "
            "get a folder of its own. Give the same one to all: hydra.run.dir=runs/NAME"
        )
    name = re.sub(r"[^\w.,-]+", "-", str(experiment or "train")).strip("-")
    parent = Path("outputs") / name
    parent.mkdir(parents=True, exist_ok=True)
    started = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for number in itertools.count(1):
        folder = parent / (started if number == 1 else f"{started}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return str(folder)
    raise AssertionError


# Cached, so that all jobs of a sweep and all settings that name the folder get the same one.
OmegaConf.register_new_resolver("new_run_folder", new_run_folder, use_cache=True, replace=True)


class KeepEarlierRun(Callback):
    """Refuse a folder that holds an earlier run, unless that run is resumed."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look into the run's folder before anything is written there.

        Raises:
            SystemExit: It holds results of an earlier run.
        """
        # Processes that belong to this run may have written already.
        if config.hydra.output_subdir is None or _is_launched_with_others() or config.get("resume") is not None:
            return
        folder = path_of(config.hydra.run.dir, "hydra.run.dir")
        found = next((folder / name for name in _RESULTS if (folder / name).exists()), None)
        if found is not None:
            raise UserError(
                "mimic-train",
                f"`hydra.run.dir`: {found} is there already, of an earlier run. Name another folder, "
                "delete this one, or resume that run (resume=CHECKPOINT).",
            )


def _is_launched_with_others() -> bool:
    """Whether torchrun or SLURM has started this process together with others."""
    counts = [os.environ.get(name) for name in _COUNTS if _COUNTS[name] in os.environ]
    return any(count is not None and count.isdigit() and int(count) > 1 for count in counts)


#: Variables that hold the number of processes, and those that hold this one's place among them.
_COUNTS = {"WORLD_SIZE": "RANK", "SLURM_NTASKS": "SLURM_PROCID"}
