"""Checkpoints of small modules, and the ledger of scoring at each of them."""

import torch
import torch.multiprocessing
from safetensors.torch import save_file
from torch import nn

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.callbacks import AtCheckpoints
from support.toys import FEATURES, HIDDEN, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer


class Moody(Toy):
    """Is another network while it trains."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.body(x)))))


class MoodyWithLosses(Moody, WithLosses):
    pass


def toy_at(kind, k):
    """The module of checkpoint k; its running statistics are no longer those of a fresh one."""
    module = toy(kind, seed=10 + k)
    module(1 + torch.randn(20, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(k)))
    return module.eval()


def checkpoints(folder, kind=Moody, count=3):
    """Files in several formats."""
    paths = [folder / f"{kind.__name__}{k}{('.ckpt', '.safetensors', '.pt')[k % 3]}" for k in range(count)]
    for k, path in enumerate(paths):
        state = toy_at(kind, k).state_dict()
        if path.suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({"state_dict": state, "epoch": 7} if path.suffix == ".ckpt" else state, path)
    return paths


def scored(folder, module, paths, *, data=None, trainer_options=None, more=(), **options):
    """Rows of the ledger, in order of epoch and id."""
    data = toy_data(14) if data is None else data
    settings = {"reference": parameters_of(toy(type(module), seed=1)), "parameters": "head", "reweight": "none"}
    mimic = GradMimic(ledger=folder / "scores", **(settings | options))
    fit = trainer(mimic, AtCheckpoints(paths), *more, epochs=len(paths), **(trainer_options or {}))
    fit.fit(module, loader(data, shuffle=True, generator=torch.Generator().manual_seed(3)))
    return Ledger(folder / "scores").table(deduplicate=False).sort_by([("epoch", "ascending"), ("id", "ascending")])


def column(rows, name, epoch):
    picked = [row[name] for row in rows.to_pylist() if row["epoch"] == epoch]
    return torch.tensor([float("nan") if value is None else value for value in picked], dtype=torch.float64)
