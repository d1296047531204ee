"""Modules whose reference is diagnosed, and the comparison of two diagnoses."""

import collections
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from lightning_mimic.reference.diagnosis import Estimate
from support.toys import HIDDEN, WithLosses


class Moody(WithLosses):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x):
        return self.head(F.dropout(torch.tanh(self.norm(self.body(x))), 0.5, self.training))


class Noisy(Moody):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


Named = collections.namedtuple("Named", "x y")


class ByName(WithLosses):
    def sample_losses(self, batch):
        if isinstance(batch, torch.Tensor):
            batch = {"x": batch[:, :-1], "y": batch[:, -1].long()}
        return super().sample_losses((batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y))


def estimated(values):
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)), len(values))


def same(found, expected, **close):
    one, two = (dataclasses.asdict(diagnosis) for diagnosis in (found, expected))
    for field, value in two.items():
        torch.testing.assert_close(one[field], value, **(close or {"rtol": 1e-9, "atol": 1e-10}))
