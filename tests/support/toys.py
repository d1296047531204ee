"""Small modules and data for the tests of the callback; at module level, so that spawned processes find them."""

import dataclasses
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_mimic import GradMimic, WithIds, collate_with_ids

CLASSES, FEATURES, HIDDEN = 3, 6, 8


class Toy(pl.LightningModule):
    """An unmodified module as a user has it: a scalar loss, a tuple batch, nothing of ours."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class WithLosses(Toy):
    """The per-sample contract, and what the ledger takes from a training_step."""

    def sample_losses(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.sample_losses(batch).mean(), "label": batch[1], "predicted": batch[1] * 0}


class Residual(WithLosses):
    """The head is no cut, so that it is scored in a pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) + hidden[:, :CLASSES]


class Convolution(Toy):
    """The target is a convolution and the head a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 2 * 4 * 4)
        self.head = nn.Conv2d(2, CLASSES, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).view(-1, 2, 4, 4)).mean((2, 3))


class Tokens(Toy):
    """A head over tokens, one label per token."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 4 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).view(len(x), 4, HIDDEN)).mean(1)


def losses_of(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x), y, reduction="none")


def toy(kind: type[Toy] = Toy, seed: int = 0, dtype: torch.dtype = torch.float64) -> Toy:
    """A fresh module with weights of its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().to(dtype)


def toy_data(count: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator, dtype=dtype)
    return TensorDataset(x, torch.randint(0, CLASSES, (count,), generator=generator))


def loader(data: Dataset, batch_size: int = 4, ids: Any = None, **options: Any) -> DataLoader:
    return DataLoader(WithIds(data, ids), batch_size, collate_fn=collate_with_ids, **options)


def trainer(*callbacks: pl.Callback, epochs: int = 1, **options: Any) -> pl.Trainer:
    """A quiet Trainer on one CPU."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = quiet | {"max_epochs": epochs, "accelerator": "cpu", "devices": 1} | options
    return pl.Trainer(callbacks=list(callbacks), **settings)


def diagnosing(callback: GradMimic, samples: int) -> GradMimic:
    """The callback, which diagnoses its reference on so many samples."""
    callback.settings = dataclasses.replace(callback.settings, diagnosis_samples=samples)
    return callback


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}
