"""Layers of a user's own, with their rules."""

import torch
from torch import nn

from lightning_mimic.gradients import LayerRule


class Modulate(nn.Module):
    """Two inputs, three parameters of its own names, one of them added along axis 1, and a part without parameters."""

    runs = 0

    def __init__(self, features=3):
        super().__init__()
        self.gain, self.mix = nn.Parameter(torch.randn(features)), nn.Parameter(torch.randn(features, features))
        self.offset = nn.Parameter(torch.randn(features))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, condition, *, power=1):
        type(self).runs += 1
        self.seen += 1
        return (x**power * condition).mT.mul(self.gain).mT + (x.mT @ self.mix).mT + self.offset[:, None] + x.sin()


def modulate(layer, parameters, x, condition, *, power=1):
    output = (x**power * condition).mT.mul(parameters["gain"]).mT + (x.mT @ parameters["mix"]).mT
    return output + parameters["offset"][:, None] if "offset" in parameters else output


NAMES = ("gain", "mix", "offset")
RIGHT = LayerRule(modulate, NAMES, added=("offset",), sample_axes=2)


def call(dtype=torch.float64, rows=4):
    torch.manual_seed(0)
    layer = Modulate().to(dtype)
    x, condition = torch.randn(rows, 3, 5, dtype=dtype), torch.randn(rows, 1, 5, dtype=dtype)
    return layer, (x, condition), torch.randn(rows, 3, 5, dtype=dtype)


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.weight.square()


SCALE = LayerRule(lambda layer, p, x: x * p["weight"], ("weight",))
