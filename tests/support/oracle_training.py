"""Training by loops over per-sample gradients, for the tests that compare the callback with it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import oracles
from support.toys import Toy, losses_of

Row = tuple[Tensor, Tensor]  # scores and weights of a micro-batch


def trained_by_oracle(
    module: Toy,
    batches: Sequence[Any],
    reference: dict[str, Tensor],
    *,
    tau: float = 0.7,
    reweight: str = "all",
    accumulate: int = 1,
    clip: float | None = None,
    targets: Sequence[str] = ("head.weight", "head.bias"),
    losses: Callable[[Toy, Any], Tensor] = losses_of,
    score: Callable[[Toy, Any, dict[str, Tensor]], Tensor] | None = None,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> list[Row]:
    """SGD on Σ wᵢ gᵢ; ``score`` in place of the mimic score, from module, batch and gradients, ``weigh`` in place
    of the softmax."""
    seen: list[Row] = []
    window: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        gradients = oracles.per_sample_gradients(module, losses, batch)
        if score is None:
            chosen = {name: module.get_parameter(name) for name in targets}
            scores = oracles.mimic_scores(gradients, reference, chosen)
        else:
            scores = score(module, batch, gradients)
        weights = oracles.softmax_weights(scores, tau) if weigh is None else weigh(scores)
        seen.append((scores, weights))
        uniform = torch.full_like(weights, 1 / len(weights))
        step = oracles.weighted_gradient(gradients, weights if reweight == "all" else uniform)
        if reweight == "target":
            step |= {n: g for n, g in oracles.weighted_gradient(gradients, weights).items() if n in targets}
        window = {n: window.get(n, 0) + g / accumulate for n, g in step.items()}
        if (index + 1) % accumulate == 0 or index + 1 == len(batches):
            norm = torch.stack([g.norm() for g in window.values()]).norm()
            shrink = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))  # as torch clips
            with torch.no_grad():
                for name, g in window.items():
                    module.get_parameter(name).sub_(module.lr * shrink * g)
            window = {}
    return seen
