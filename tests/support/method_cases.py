"""Modules for every scoring method, each with the method that must be chosen for it."""

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_mimic.reweighting.methods import DoubleBackward, InBackward, ReversePass, ScoringMethod
from support.toys import CLASSES, FEATURES, HIDDEN, Tokens, Toy, WithLosses


class Residual(Toy):
    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) + hidden[:, :CLASSES]


class Scaled(Toy):
    """A scalar parameter after the head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + torch.rand(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class Tied(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, FEATURES)
        self.head.weight = self.body.weight


class CalledTwice(Toy):
    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) + self.head(2 * hidden)


class TokenAndPosition(Toy):
    """A class token, a position embedding and a projection, as vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        del self.head
        self.token = nn.Parameter(torch.randn(1, 1, HIDDEN))
        self.position = nn.Parameter(torch.randn(1, 3, HIDDEN))
        self.projection = nn.Parameter(torch.randn(HIDDEN, CLASSES))

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        tokens = torch.cat([self.token.expand(len(x), -1, -1), hidden[:, None], 2 * hidden[:, None]], 1)
        return torch.tanh(tokens + self.position).mean(1) @ self.projection


class InPlace(Tokens):
    """The head's output on tokens is used and then changed in place."""

    def forward(self, x):
        outputs = self.head(torch.tanh(self.body(x)).view(len(x), 4, HIDDEN))
        before = 3 * outputs
        return (before + outputs.mul_(2)).mean(1)


class Attention(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 4 * HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)

    def forward(self, x):
        tokens = torch.tanh(self.body(x)).view(len(x), 4, HIDDEN)
        return self.head((tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1))


class BodyOnlyBySum(Toy):
    """The loss branches before any layer: two terms on the same logits."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return 0.5 * F.cross_entropy(logits, batch[1]) + 0.5 * F.cross_entropy(logits, batch[1])


class Recomputed(Toy):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Mixed(WithLosses):
    """A contrastive loss, its temperature included: every loss depends on every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(2 + torch.rand(()))

    def sample_losses(self, batch: Any) -> Tensor:
        left, right = F.normalize(self.head(torch.tanh(self.body(batch[0])))), F.normalize(self.body(batch[0])[:, :3])
        logits = self.scale * left @ right.T
        here = torch.arange(len(logits))
        return (F.cross_entropy(logits, here, reduction="none") + F.cross_entropy(logits.T, here, reduction="none")) / 2


class ByHand(WithLosses):
    """Tied by hand; the losses alone can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, HIDDEN)
        self.head = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(self.body(x), self.head.weight)))


class Normalised(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x))))


class NormalisedLosses(WithLosses, Normalised):
    pass


def own_losses(module: Any, batch: Any) -> Tensor:
    return module.sample_losses(batch)


class Regularised(WithLosses):
    """A regulariser within the samples' own losses, where it is a part of every sample's gradient."""

    def sample_losses(self, batch):
        return super().sample_losses(batch) + 0.1 * self.head.weight.square().sum()


class Beside(WithLosses):
    """The head's weight is used a second time, through a function of it."""

    def sample_losses(self, batch):
        x, y = batch
        hidden = torch.tanh(self.body(x))
        logits = self.head(hidden) + F.linear(hidden.sin(), self.head.weight.square())
        return F.cross_entropy(logits, y, reduction="none")


# name: module, parameters, the method that must be chosen
CASES: dict[str, tuple[type[Toy], Any, type[ScoringMethod]]] = {
    "all": (Toy, "all", ReversePass),
    "all, with sample_losses": (WithLosses, "all", ReversePass),
    "deep": (Toy, "body", ReversePass),
    "deep, with sample_losses": (WithLosses, "body", ReversePass),
    "weights only": (Toy, ["*.weight"], ReversePass),
    "residual around the layer": (Residual, "head", ReversePass),
    "residual, all": (Residual, "all", ReversePass),
    "parameter behind the layer": (Scaled, "head", ReversePass),
    "scalar": (Scaled, "all", ReversePass),
    "tied": (Tied, "all", ReversePass),
    "called twice": (CalledTwice, "head", ReversePass),
    "tokens": (Tokens, "head", InBackward),
    "tokens, changed in place": (InPlace, "head", InBackward),
    "tokens, changed in place, all": (InPlace, "all", ReversePass),
    "functional": (TokenAndPosition, "all", ReversePass),
    "without the functional": (TokenAndPosition, ["all", "!token", "!position"], ReversePass),
    "attention": (Attention, "all", ReversePass),
    "attention alone": (Attention, "attention", ReversePass),
    "two terms": (BodyOnlyBySum, "all", ReversePass),
    "two terms, one layer": (BodyOnlyBySum, "head", InBackward),
    "recomputed": (Recomputed, "all", ReversePass),
    "contrastive": (Mixed, "head", DoubleBackward),
    "contrastive, all": (Mixed, "all", DoubleBackward),
    "contrastive, temperature": (Mixed, "scale", DoubleBackward),
    "tied by hand": (ByHand, "head", ReversePass),
    "regularised by sample": (Regularised, "head", ReversePass),
    "used beside": (Beside, "head", ReversePass),
}
