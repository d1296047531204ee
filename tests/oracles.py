"""Slow and obviously right versions of what the package computes fast. Imports torch and nothing else."""

from collections.abc import Callable, Mapping
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
