"""Comparison of the products of whole models with a slow loop over samples."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic.gradients import Graph, ModelHooks, WholeModelGradients
from oracles import per_sample_gradients

Oracle = Callable[[nn.Module, Any, Any], Mapping[str, Tensor]]


class Ad(nn.Module):
    """A net whose forward is a function of it and the inputs."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def losses_of(net: Any, x: Tensor) -> Tensor:
    """Independent losses, each of a curved function of all its outputs."""
    outputs = net(x).flatten(1)
    return outputs.sin().mean(1) + torch.logsumexp(outputs, 1)


def contrastive(net: Any, x: Tensor) -> Tensor:
    """Own losses as CLIP has them, symmetric over rows and columns; every loss depends on every sample."""
    features = torch.nn.functional.normalize(net(x).flatten(1), dim=1)
    logits = 3 * features @ features.roll(1, 1).T
    return -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()) / 2


def vectors_of(net: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """A random direction for every trainable parameter, or for the named ones."""
    generator = torch.Generator().manual_seed(11)
    drawn = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in net.named_parameters()}
    chosen = [name for name, p in net.named_parameters() if p.requires_grad] if names is None else names
    return {name: drawn[name].to(net.get_parameter(name).dtype) for name in chosen}


def looped(gradients: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> Tensor:
    """``⟨gᵢ, v⟩`` from gradients of shape ``(B, *shape)``."""
    return torch.stack(
        [(gradients[name] * v).reshape(len(gradients[name]), -1).sum(1) for name, v in vectors.items()]
    ).sum(0)


def traced(
    net: nn.Module, losses_of: Callable, batch: Any, names: Iterable[str], seed: Tensor | None = None
) -> tuple[Tensor, WholeModelGradients, dict[str, str]]:
    """The losses of one forward pass, the gradients' rows, and what was not seen."""
    hooks = ModelHooks(net, {name: net.get_parameter(name) for name in names})
    with hooks.recording() as calls:
        losses = losses_of(net, batch)
    graph = Graph(losses.grad_fn)
    uses, unseen = hooks.uses(calls, graph, len(losses))
    hooks.remove()
    return losses, WholeModelGradients(losses, uses, graph, len(losses), seed), unseen


def unknown(rows: WholeModelGradients, unseen: dict[str, str], oracle: Oracle = per_sample_gradients) -> dict[str, str]:
    """What is not scored: unseen, or used where the rows are not the samples although the losses are independent."""
    mixing = rows.rows_that_mix_samples() if oracle is per_sample_gradients else []
    return unseen | dict.fromkeys(mixing, "the rows are not the samples")


def assert_exact(
    net: nn.Module,
    batch: Any,
    *,
    losses_of: Callable = losses_of,
    names: Iterable[str] | None = None,
    unseen: Iterable[str] | None = (),
    oracle: Oracle = per_sample_gradients,
    rtol: float = 1e-9,
) -> WholeModelGradients:
    """Exactly ``unseen`` (globs; ``None``: whatever it likes) is reported, and the rest agrees with the oracle."""
    vectors = vectors_of(net, names)
    torch.manual_seed(7)  # dropout
    found = unknown(*traced(net, losses_of, batch, vectors)[1:], oracle)
    if unseen is not None:
        assert set(found) == {name for name in vectors if any(fnmatch.fnmatchcase(name, glob) for glob in unseen)}, (
            found
        )
    assert all(found.values())
    if found:
        vectors = {name: v for name, v in vectors.items() if name not in found}
        torch.manual_seed(7)
        assert unknown(*traced(net, losses_of, batch, vectors)[1:], oracle) == {}
    torch.manual_seed(7)
    rows = traced(net, losses_of, batch, vectors)[1]
    dot = rows.dot(vectors)
    torch.manual_seed(7)
    if vectors:
        expected = looped(oracle(net, losses_of, batch), vectors)
        scale = float(expected.abs().max())
        assert scale > 1e-4, "a check that could not fail"
        assert dot.dtype == expected.dtype
        torch.testing.assert_close(dot, expected, rtol=rtol, atol=rtol * scale)
    assert all(p.grad is None for p in net.parameters())
    return rows


def assert_near_under_autocast(net: nn.Module, x: Tensor) -> None:
    """The products of a forward pass in bfloat16 are in float32, and near those of the exact one."""
    vectors = vectors_of(net)

    def autocast(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of(net, x).float()

    dot = traced(net, autocast, x, vectors)[1].dot(vectors)
    assert dot.dtype == torch.float32
    expected = looped(per_sample_gradients(net, losses_of, x), vectors)
    assert float((dot - expected).norm() / expected.norm()) < 0.05
