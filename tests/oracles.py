"""Slow and obviously right versions of what the package computes fast. Imports torch and nothing else."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Losses = Callable[[nn.Module, Any], Tensor]  # (module, batch) -> the unreduced losses, shape (B,)
Named = Mapping[str, Tensor]


def per_sample_gradients(module: nn.Module, losses_of: Losses, batch: Any) -> dict[str, Tensor]:
    """``gᵢ`` of every trainable parameter, name to ``(B, *shape)``: one `autograd.grad` per unreduced loss."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses_of(module, batch).unbind()
    ]
    return {name: torch.stack(parts) for name, parts in zip(named, zip(*rows, strict=True), strict=True)}


def contributions(net: nn.Sequential, losses_of: Callable[[Any, Any], Tensor], batch: Any) -> dict[str, Tensor]:
    """Sample i's part in the gradient of ``Σℓ``: row i goes through its own copy i of all parameters.

    Layer by layer and row by row; only a batch normalisation in training mode sees the other rows, and it too
    scales and shifts row i by copy i. ``losses_of`` gets a function of the inputs in the module's place.
    """
    names = {id(p): name for name, p in net.named_parameters()}
    copies: list[dict[str, Tensor]] = []

    def row_by_row(rows: Tensor) -> Tensor:
        copies.extend({n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()} for _ in rows)
        for layer in net:
            normalises = isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
            if normalises:
                rows = F.batch_norm(rows, None, None, training=True, eps=layer.eps)
            done = []
            for row, copy in zip(rows, copies, strict=True):
                own = {part: copy[names[id(p)]] for part, p in layer.named_parameters()}
                if normalises:
                    weight, bias = (own[part].view(-1, *[1] * (row.ndim - 1)) for part in ("weight", "bias"))
                    done.append(weight * row + bias)
                else:
                    done.append(torch.func.functional_call(layer, own, (row[None],))[0])
            rows = torch.stack(done)
        return rows

    total = losses_of(row_by_row, batch).sum()
    rows = [
        torch.autograd.grad(total, list(copy.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for copy in copies
    ]
    return {name: torch.stack(parts) for name, parts in zip(names.values(), zip(*rows, strict=True), strict=True)}


def mimic_scores(gradients: Named, reference: Named, parameters: Named) -> Tensor:
    """``−⟨gᵢ, v⟩ / ‖v‖`` in float64, ``v = reference − parameters`` over the names of ``parameters``."""
    dot, square = 0.0, 0.0
    for name, parameter in parameters.items():
        v = reference[name].detach().double() - parameter.detach().double()
        dot = dot + (gradients[name].double() * v).reshape(len(gradients[name]), -1).sum(1)
        square = square + (v * v).sum()
    return -dot / square**0.5


def finite_difference_scores(
    module: nn.Module, losses_of: Losses, batch: Any, reference_state: Named, names: list[str], eps: float
) -> Tensor:
    """``−(ℓᵢ(θ + ε v/‖v‖) − ℓᵢ(θ − ε v/‖v‖)) / 2ε`` by moving the named weights, which are put back."""
    parameters = {name: module.get_parameter(name) for name in names}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    v = {name: reference_state[name].detach().to(p) - p for name, p in before.items()}
    norm = sum((t * t).sum() for t in v.values()) ** 0.5
    losses = {}
    with torch.no_grad():
        for sign in (+1, -1):
            for name, p in parameters.items():
                p.copy_(before[name] + sign * eps * v[name] / norm)
            losses[sign] = losses_of(module, batch).detach().double()
        for name, p in parameters.items():
            p.copy_(before[name])
    return -(losses[+1] - losses[-1]) / (2 * eps)


def softmax_weights(scores: Tensor, tau: float) -> Tensor:
    """``exp(mᵢ/τ) / Σⱼ exp(mⱼ/τ)`` in float64; uniform for an infinite τ."""
    powers = torch.exp((scores.double() - scores.double().max()) / tau)
    return powers / powers.sum()


def weighted_gradient(gradients: Named, weights: Tensor) -> dict[str, Tensor]:
    """``Σᵢ wᵢ gᵢ`` by name, from ``(B, *shape)`` gradients and ``(B,)`` weights."""
    return {name: sum(w * row for w, row in zip(weights, g, strict=True)) for name, g in gradients.items()}


def smallest_temperature(scores: Tensor, tau: float, min_ess: float) -> float:
    """The smallest T ≥ τ with ``1/Σw² ≥ min_ess·B``, from above within 0.07 %; ``inf`` if none below 2²⁴τ."""
    for step in range(24_000):
        temperature = tau * 2 ** (step / 1000)
        weights = softmax_weights(scores, temperature)
        if float(1 / (weights * weights).sum()) >= min_ess * len(scores) * (1 - 1e-9):
            return temperature
    return float("inf")


def flat(gradients: Named, names: Sequence[str]) -> Tensor:
    """The named gradients of shape ``(B, *shape)`` as vectors of one row each, ``(B, P)`` in float64."""
    return torch.cat([gradients[name].double().flatten(1) for name in names], 1)


def mean_gradient(module: nn.Module, losses_of: Losses, batch: Any, names: Sequence[str]) -> Tensor:
    """``ḡ`` as one vector: the gradient of the mean loss of a module in evaluation mode, which is left as it was."""
    was = module.training
    losses = losses_of(module.eval(), batch)
    module.train(was)
    found = torch.autograd.grad(losses.mean(), [module.get_parameter(name) for name in names])
    return torch.cat([each.double().flatten() for each in found])


def agreements(rows: Tensor, vector: Tensor) -> Tensor:
    """The cosine of each of ``(B, P)`` with a vector, one after the other."""
    return torch.stack([row @ vector / (math.sqrt(row @ row) * math.sqrt(vector @ vector)) for row in rows])


def agra_weights(scores: Tensor) -> Tensor:
    """Who agrees has an equal share, who does not has none; if nobody does, none at all."""
    agrees = [i for i, score in enumerate(scores.tolist()) if score > 0]
    return torch.tensor([1 / len(agrees) if i in agrees else 0.0 for i in range(len(scores))], dtype=torch.float64)


def nonnegative_fit(rows: Tensor, target: Tensor, ridge: float) -> Tensor:
    """``argmin ‖target − Σ wᵢ rowᵢ‖² + ridge ‖w‖²`` over w ≥ 0, by trying every support."""
    best, least = torch.zeros(len(rows), dtype=torch.float64), float(target @ target)
    for size in range(1, len(rows) + 1):
        for support in map(list, combinations(range(len(rows)), size)):
            some = rows[support]
            fitted = torch.linalg.lstsq(some @ some.T + ridge * torch.eye(size).double(), some @ target).solution
            missing = target - fitted @ some
            cost = float(missing @ missing + ridge * fitted @ fitted)
            if bool((fitted >= 0).all()) and cost < least:
                best, least = (
                    torch.zeros(len(rows), dtype=torch.float64).index_copy(0, torch.tensor(support), fitted),
                    cost,
                )
    return best


def matched(rows: Tensor, most: int, ridge: float, fit: Callable[..., Tensor] = nonnegative_fit) -> Tensor:
    """Orthogonal matching pursuit of ``Σ rowᵢ`` on the vectors themselves: a weight per row, 0 if it is not chosen."""
    target, chosen, weights = rows.sum(0), [], torch.zeros(len(rows), dtype=torch.float64)
    while len(chosen) < most:
        missing = target - weights @ rows
        along = {i: float(rows[i] @ missing) for i in range(len(rows)) if i not in chosen}
        best = max(along, key=lambda i: along[i])
        if along[best] <= 1e-6 * max(map(abs, (rows @ target).tolist())):
            break
        chosen.append(best)
        weights = torch.zeros_like(weights).index_copy(0, torch.tensor(chosen), fit(rows[chosen], target, ridge))
    return weights


def label_posteriors(logits: Tensor, labels: Tensor, wrong_share: float) -> Tensor:
    """The probability that each label is right, where wrong ones are drawn evenly from the other classes."""
    rows = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        top = max(row)
        q = math.exp(row[label] - top) / sum(math.exp(each - top) for each in row)
        right, wrong = (1 - wrong_share) * q, wrong_share * (1 - q) / (len(row) - 1)
        rows.append(right / (right + wrong))
    return torch.tensor(rows, dtype=logits.dtype)


def head_products(layer: nn.Linear, reference: Named, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits of a last layer and of the reference's on the same features, and the losses of both."""
    outputs = features @ layer.weight.T + layer.bias
    theirs = features @ reference["weight"].T + reference["bias"]
    losses = {"losses": F.cross_entropy(outputs, labels, reduction="none")}
    losses["reference_losses"] = F.cross_entropy(theirs, labels, reduction="none")
    return {"outputs": outputs.detach(), "reference_outputs": theirs, **{n: t.detach() for n, t in losses.items()}}
