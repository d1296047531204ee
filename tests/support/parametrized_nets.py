"""Small networks whose parameters meet the batch late, or not linearly."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from support.functional_nets import D
from support.gradient_checks import param


class GPT(nn.Module):
    """A language model whose positions are looked up once for all samples."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, D), nn.Embedding(6, D)
        self.block = nn.TransformerEncoderLayer(D, 2, 6, 0.0, batch_first=True)
        self.head = nn.Linear(D, 7, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.words(x) + self.positions(torch.arange(x.shape[1]))))


class Bert(GPT):
    """Positions and types of one row, with a norm over their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.types = nn.LayerNorm(D), nn.Embedding(2, D)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[None]
        embedded = self.words(x) + self.types(torch.zeros_like(places)) + self.positions(places)
        return self.head(self.block(self.norm(embedded)))


class Interpolated(nn.Module):
    """Positions of a grid that are resized to the picture's."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layer = param(1, D, 2, 2), nn.Conv2d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.mT[..., None].tanh()
        return self.layer(grid + F.interpolate(self.positions, grid.shape[2:], mode="bicubic"))


class LoRA(nn.Linear):
    """A frozen weight and a product of two small ones, merged before the batch is seen."""

    def __init__(self) -> None:
        super().__init__(D, D)
        self.weight.requires_grad_(False)
        self.a, self.b = param(2, D), param(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + 0.5 * self.b @ self.a, self.bias)


class Standardised(nn.Conv1d):
    """A convolution whose weight has mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return self._conv_forward(x.mT, weight / weight.std((1, 2), keepdim=True), self.bias)


class Biased(nn.Module):
    """Attention in two layers with one table of relative biases, as T5 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.out = nn.Embedding(4, 2), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        apart = (torch.arange(tokens)[:, None] - torch.arange(tokens)).clamp(-1, 2) + 1
        bias = self.table(apart).permute(2, 0, 1)[None]
        for _ in range(2):
            q, k, v = self.qkv(x).view(rows, tokens, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
            x = x + self.out(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x


class Recurrent(nn.Module):
    """A recurrent layer of which the outputs and the last states are used."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(D, D), kind(D, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.batch_first
        h = self.before(x)
        outputs, last = self.layer(h if first else h.transpose(0, 1))
        states = torch.cat(last, -1) if isinstance(last, tuple) else last
        return torch.cat(
            [(outputs if first else outputs.transpose(0, 1)).flatten(1), states.transpose(0, 1).flatten(1)], 1
        )


class Cells(nn.Module):
    """A recurrence by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.gru = nn.LSTMCell(D, 3), nn.GRUCell(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        state = h, h
        for step in x.unbind(1):
            state, h = self.cell(step, state), self.gru(step, h)
        return torch.cat([*state, h], 1)


class Decoder(nn.Module):
    """Learned queries that attend to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = param(2, D)
        self.layer = nn.TransformerDecoderLayer(D, 2, 6, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.queries.expand(len(x), -1, -1), x.sin())


class Frozen(nn.Sequential):
    """Spectral norm as in evaluation; in training every forward pass takes another step of its power iteration."""

    def __init__(self) -> None:
        super().__init__(parametrizations.spectral_norm(nn.Linear(D, D)))
        self.eval()


#: How a network of tokens ``(B, T, D)`` is made.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "gpt": GPT,
    "gpt, tied": lambda: GPT(tied=True),
    "bert": Bert,
    "interpolated positions": Interpolated,
    "lora": lambda: nn.Sequential(LoRA(), nn.Tanh(), LoRA()),
    "weight standardisation": lambda: Standardised(D, D, 1),
    "relative biases": Biased,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(D, D)), nn.Tanh(), nn.Linear(D, D)),
    "spectral norm": Frozen,
    "orthogonal": lambda: nn.Sequential(nn.Linear(D, D), parametrizations.orthogonal(nn.Linear(D, D))),
    "lstm": lambda: Recurrent(nn.LSTM, batch_first=True),
    "lstm, time first": lambda: Recurrent(nn.LSTM),
    "lstm, two layers and ways": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
    "lstm, projected": lambda: Recurrent(nn.LSTM, proj_size=2, bias=False),
    "lstm, dropout": lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.5, batch_first=True),
    "gru": lambda: Recurrent(nn.GRU, num_layers=2, batch_first=True),
    "rnn": lambda: Recurrent(nn.RNN, bidirectional=True),
    "cells": Cells,
    "decoder": Decoder,
}


def parametrized(kind: str, rows: int, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A network and a batch for it."""
    torch.manual_seed(0)
    net = NETWORKS[kind]().to(dtype)
    words = isinstance(net, GPT)
    return net, torch.randint(0, 7, (rows, tokens)) if words else torch.randn(rows, tokens, D, dtype=dtype)
