"""Losses that are random compositions of torch's operations, and what a sample's part in them is."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 5

Operation = Callable[..., Tensor]

ELEMENTWISE: dict[str, Operation] = {
    "exp": lambda a: a.clamp(max=3).exp(),
    "tanh": torch.tanh,
    "abs": torch.abs,
    "square": torch.square,
    "neg": torch.neg,
    "relu": torch.relu,
    "softplus": F.softplus,
    "detach": torch.detach,
    "log1p": lambda a: a.abs().log1p(),
    "sqrt": lambda a: (a.abs() + 0.1).sqrt(),
    "halved": lambda a: a * 0.5,
    "shifted": lambda a: a + 3,
    "place among limits": lambda a: torch.bucketize(a, torch.linspace(-1, 1, 4).double()).to(a.dtype),
    "over seven": lambda a: a / 7,
    "over one of its own": lambda a: a / a.detach().abs().add(1),
}

COMBINED: dict[str, Operation] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: a / (b.abs() + 0.5),
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > b, a, b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "place among others": lambda a, b: torch.searchsorted(b.flatten().sort()[0], a).to(a.dtype),
    "cat 0": lambda a, b: torch.cat([a, b], 0),
    "cat 1": lambda a, b: torch.cat([a, b], 1),
    "stack 0": lambda a, b: torch.stack([a, b]),
    "stack 1": lambda a, b: torch.stack([a, b], 1),
    "mm": torch.matmul,
    "mm transposed": lambda a, b: a.mT @ b,
    "mm, second transposed": lambda a, b: a @ b.mT,
    "bmm": lambda a, b: a[:, None, :] @ b[:, :, None],
    "mse": F.mse_loss,
    "mse of each": lambda a, b: F.mse_loss(a, b, reduction="none"),
    "kl": lambda a, b: F.kl_div(a, b.softmax(-1), reduction="batchmean"),
    "bce": lambda a, b: F.binary_cross_entropy_with_logits(a, b.sigmoid()),
    "masked": lambda a, b: a[b > 0],
    "filled": lambda a, b: a.masked_fill(b > 0.3, 0.5),
    "times a number that was read": lambda a, b: a * b.sum().item(),
    "in place": lambda a, b: a.clone().mul_(b),
    "in place, a part": lambda a, b: _part(a, b),
    "zeroed by a mask": lambda a, b: _zeroed(a, b),
    "above the mean": lambda a, b: a * torch.where(a > b.mean(), 1.0, 0.0),
}

REDUCED: dict[str, Callable[..., Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "amax": torch.amax,
    "logsumexp": torch.logsumexp,
    "norm": lambda a, dim: (a + 0.1).norm(dim=dim),
    "var": lambda a, dim: a.var(dim, unbiased=False),
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "cumsum": torch.cumsum,
    "sort": lambda a, dim: a.sort(dim)[0],
    "topk": lambda a, dim: a.topk(min(2, a.shape[dim]), dim)[0],
    "argmax": lambda a, dim: a.argmax(dim).to(a.dtype),
    "unsqueeze": lambda a, dim: a.unsqueeze(dim),
    "first": lambda a, dim: a.select(dim, 0),
    "first half": lambda a, dim: a.chunk(2, dim)[0],
    "linear": lambda a, dim: F.linear(a, torch.linspace(-1, 1, 25).double().view(5, 5)),
    "layer norm": lambda a, dim: F.layer_norm(a, a.shape[-1:]),
}

SHAPED: dict[str, Operation] = {
    "transposed": lambda a: a.transpose(0, -1),
    "flat": torch.flatten,
    "in front": lambda a: a[None],
    "repeated": lambda a: a.expand(2, *a.shape),
    "last axis repeated": lambda a: a.repeat(*[1] * (a.ndim - 1), 2),
    "first axis repeated": lambda a: a.repeat(2, *[1] * (a.ndim - 1)),
    "repeated on a new axis": lambda a: a.repeat(2, *[1] * a.ndim),
    "two rows": lambda a: a.reshape(2, -1),
    "reversed axes": lambda a: a.permute(*reversed(range(a.ndim))),
}

#: Of some rows and the classes: losses and look-ups.
BY_CLASS: dict[str, Operation] = {
    "cross-entropy": F.cross_entropy,
    "cross-entropy of each": lambda a, y: F.cross_entropy(a, y, reduction="none"),
    "cross-entropy, summed": lambda a, y: F.cross_entropy(a, y, reduction="sum"),
    "cross-entropy, smoothed": lambda a, y: F.cross_entropy(a, y, label_smoothing=0.2),
    "nll": F.nll_loss,
    "gather": lambda a, y: a.gather(1, y[:, None]),
    "by index": lambda a, y: a[torch.arange(len(y)), y],
    "rows by class": lambda a, y: a[y.clamp(max=len(a) - 1)],
    "one-hot": lambda a, y: F.one_hot(y, CLASSES) * a,
    "over B": lambda a, y: a / len(y),
}

ENDS: dict[str, Operation] = {
    "mean": lambda a, y: a.double().mean(),
    "sum": lambda a, y: a.double().sum(),
    "sum over B": lambda a, y: a.double().sum() / len(y),
}


def _part(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[..., 0] = b[..., 0]
    return a


def _zeroed(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[b > 0] = 0.0
    return a


@dataclass(frozen=True)
class RandomLoss:
    """Some operations, each of two earlier results, and an end."""

    steps: tuple[tuple[Operation, str, float, float, int], ...]
    end: str

    @classmethod
    def drawn(cls, random: Random) -> "RandomLoss":
        kinds: list[dict[str, Any]] = [ELEMENTWISE, COMBINED, COMBINED, REDUCED, REDUCED, SHAPED, BY_CLASS]
        steps = []
        for _ in range(random.randint(2, 8)):
            kind = random.choice(kinds)
            name = random.choice(list(kind))
            steps.append((kind[name], name, random.random(), random.random(), random.choice([0, 1, -1, -2])))
        return cls(tuple(steps), random.choice([*ENDS, "mean"]))

    def __str__(self) -> str:
        return "; ".join(f"{name} {dim} of {one:.2f}, {two:.2f}" for _, name, one, two, dim in self.steps)

    def __call__(self, batch: dict[str, Tensor], done: list[int], only: list[int] | None = None) -> Tensor:
        """The loss.

        Args:
            batch: Scored rows, real values, weights and classes: ``rows``, ``real``, ``w``, ``y``.
            done: Gets the steps that fitted together; the others are left out.
            only: Takes these steps; one that no longer fits has no number for its result.
        """
        results = [batch["rows"], batch["real"], batch["w"], torch.linspace(-1, 1, CLASSES).double()]
        for place, (act, _, one, two, dim) in enumerate(self.steps):
            if only is not None and place not in only:
                continue
            a, b = (results[int(r * len(results))] if r < 0.7 else results[-1] for r in (one, two))
            try:
                result = act(*self._arguments(act, a, b, batch["y"], dim))
            except (RuntimeError, IndexError, TypeError, ValueError):
                if only is None:
                    continue
                result = torch.tensor(torch.nan).double()  # which shows, if the loss is made of it
            # Each has its number: a mask may take none of another batch's elements.
            if only is not None or 0 < result.numel() < 5000:
                results.append(result)
                done.append(place)
        return ENDS[self.end](results[-1], batch["y"])

    @staticmethod
    def _arguments(act: Operation, a: Tensor, b: Tensor, y: Tensor, dim: int) -> tuple[Any, ...]:
        if act in COMBINED.values():
            return a, b
        if act in BY_CLASS.values():
            return a, y
        return (a, dim) if act in REDUCED.values() else (a,)


def drawn_batch(samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What a random loss is made of."""
    return {
        "inputs": torch.randn(samples, CLASSES, generator=generator, dtype=torch.float64),
        "real": torch.randn(samples, CLASSES, generator=generator, dtype=torch.float64),
        "w": torch.rand(samples, generator=generator, dtype=torch.float64) + 0.1,
        "y": torch.randint(0, CLASSES, (samples,), generator=generator),
    }


def copies(batch: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """A batch of as many copies of one sample."""
    return {name: t[sample : sample + 1].expand(t.shape).clone() for name, t in batch.items()}
