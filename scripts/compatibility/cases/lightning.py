"""Lightning's own demos."""

import torch
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer

from scripts.compatibility.case import Case
from scripts.compatibility.data import batches_of

WORDS, LENGTH = 20, 6


def text(size: int):
    words = torch.randint(0, WORDS, (8, LENGTH + 1))
    return batches_of((words[:, :-1].contiguous(), words[:, 1:].contiguous()), size)


def small_lstm() -> LightningLSTM:
    module = LightningLSTM(WORDS)
    module.model = type(module.model)(WORDS, ninp=8, nhid=8, nlayers=2)
    module.prepare_data = lambda: None  # it would download its text
    return module


def small_transformer() -> LightningTransformer:
    module = LightningTransformer(WORDS)
    module.model = type(module.model)(WORDS, ninp=8, nhid=8)
    module.prepare_data = lambda: None  # it would download its text
    return module


class DemoModelOfSamples(DemoModel):
    def sample_losses(self, batch):
        return self(batch).sum(1)

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


CASES = [
    Case("`BoringModel`", BoringModel, lambda size: batches_of(torch.randn(8, 32), size), "layer"),
    Case(
        "`DemoModel` (a sum)",
        DemoModel,
        lambda size: batches_of(torch.randn(8, 32), size),
        "l1",
        plain=False,
        fixed=DemoModelOfSamples,
    ),
    Case("`LightningTransformer`", small_transformer, text, "model.decoder"),
    Case("`LightningLSTM`", small_lstm, text, "model.decoder"),
]
