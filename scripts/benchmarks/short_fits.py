"""Fits of a few steps: a loader that repeats one batch, a quiet trainer, a counter of arithmetic, a reference."""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

NOISE = 0.01  # between a model and its reference


class FlopCount(L.Callback):
    """Counts the arithmetic of chosen steps, their backward passes and hooks included; ``flops`` by step."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = set(steps)
        self.flops: dict[int, int] = {}
        self.counter = FlopCounterMode(display=False)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, step: int) -> None:
        if step in self.steps:
            self.counter.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, step: int
    ) -> None:
        if step in self.steps:
            self.counter.__exit__(None, None, None)
            self.flops[step] = self.counter.get_total_flops()


def repeated(batch: Any, times: int) -> DataLoader:
    return DataLoader([batch] * times, batch_size=None)


def quiet_trainer(*callbacks: L.Callback, device: str = "cpu", **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    accelerator = "gpu" if device == "cuda" else "cpu"
    settings = {"max_epochs": 1, "devices": 1, "accelerator": accelerator, **quiet, **options}
    return L.Trainer(callbacks=list(callbacks), **settings)


def silence() -> None:
    """Keep Lightning's notes out of the table."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def save_reference(net: nn.Module, path: Path) -> Path:
    """Save a checkpoint that differs from the model by a little noise."""
    generator = torch.Generator().manual_seed(1)
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=NOISE)
    torch.save(state, path)
    return path
