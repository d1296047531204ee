"""Gradients of weighted losses, formed from the output gradients of one reverse pass."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.functional_use import FunctionalUse
from lightning_mimic.gradients.layer_hooks import LayerCall
from lightning_mimic.gradients.nodes import gate_rows
from lightning_mimic.gradients.subgraph import End, Subgraph, SubgraphUse

#: A place where a parameter and the batch meet: a known layer's call, a known operation in the graph, or the first
#: tensor above it that has a row per sample.
Use = LayerCall | FunctionalUse | SubgraphUse


class OutputGradients:
    """The output gradients ``bᵢ`` at all uses of parameters, kept until ``Σ wᵢ bᵢ⊗aᵢ`` is formed from them.

    A use's part of that sum is what autograd computes of the rows ``wᵢ bᵢ`` for the parameters alone, so that it has
    autograd's own arithmetic and dtypes, and no activation's gradient is computed a second time.

    Args:
        parameters: By name; those that are frozen get no gradient.

    Example:
        >>> from lightning_mimic.gradients import Graph, ModelHooks, WholeModelGradients
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> parameters = dict(net.named_parameters())
        >>> hooks = ModelHooks(net, parameters)
        >>> with hooks.recording() as calls:
        ...     losses = net(torch.randn(4, 2)).squeeze(1)
        >>> graph, kept = Graph(losses.grad_fn), OutputGradients(parameters)
        >>> rows = WholeModelGradients(losses, hooks.uses(calls, graph, samples=4)[0], graph, 4)
        >>> dots = rows.dot(parameters, keep=kept)
        >>> weights = torch.softmax(dots.detach(), 0)
        >>> kept.attach(losses.mean(), weights, torch.zeros(4, dtype=torch.bool)).backward()
        >>> expected = torch.autograd.grad(losses @ weights, net[0].weight)
        >>> torch.testing.assert_close(net[0].weight.grad, *expected)
        >>> hooks.remove()
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        # Of a subgraph with several ends, or of the parameters of one operation.
        self._kept: dict[object, list[tuple[Use, Tensor]]] = {}

    def add(self, use: Use, gradient: Tensor) -> None:
        """Keep the gradient of a use's output."""
        if not self._parameters.keys().isdisjoint(use.names):
            key = use.subgraph if isinstance(use, SubgraphUse) else (type(use), use.node, use.shape, use.axis)
            self._kept.setdefault(key, []).append((use, gradient))

    def attach(self, loss: Tensor, scale: Tensor, masked: Tensor) -> Tensor:
        """Return the value of a loss that has ``Σ scaleᵢ gᵢ`` for its gradient, and nothing else.

        Can be called once, and its result differentiated once.

        Args:
            loss: A scalar.
            scale: Factor per sample, shape ``(B,)``.
            masked: Boolean, shape ``(B,)``; the rows of these samples count as zero, whatever they hold.
        """
        loss = loss.detach()
        # Each sum is a node of its own, so that gradients are exchanged between ranks while others are still computed.
        # They are formed from the loss downwards; the last node comes first.
        while self._kept:
            _, uses = self._kept.popitem()
            subgraph = self._subgraph([use for use, _ in uses])
            form = _WeightedSum(subgraph, uses, scale, masked)
            loss = _Attached.apply(loss, form, *subgraph.parameters.values())
        return loss

    def _subgraph(self, uses: list[Use]) -> Subgraph:
        """Return what lies between the output of uses of one kind and their trainable parameters."""
        first = uses[0]
        if isinstance(first, SubgraphUse):
            return first.subgraph
        names = [name for use in uses for name in use.names if name in self._parameters]
        # What is beside one parameter may be where another one enters.
        beside = [node for node in first.beside if all(node in use.beside for use in uses)]  # type: ignore[union-attr]
        parameters = {name: self._parameters[name] for name in names}
        return Subgraph(parameters, ((first.node, first.output_nr),), tuple(beside))


class _WeightedSum:
    """``Σ scaleᵢ gᵢ`` over the uses at the ends of one subgraph."""

    def __init__(self, subgraph: Subgraph, uses: list[tuple[Use, Tensor]], scale: Tensor, masked: Tensor) -> None:
        self._subgraph, self._uses = subgraph, uses
        self._scale, self._masked = scale, masked

    def __call__(self, factor: Tensor) -> list[Tensor | None]:
        seeds: dict[End, Tensor] = {}
        for use, gradient in self._uses:
            if (use.node, use.output_nr) in seeds:
                continue
            rows = gate_rows(gradient.reshape(use.shape).movedim(use.axis, 0), self._scale * factor, self._masked)
            seeds[use.node, use.output_nr] = rows.movedim(0, use.axis).reshape(gradient.shape)
        found = self._subgraph.gradients(seeds)
        return [found.get(name) for name in self._subgraph.parameters]


class _Attached(torch.autograd.Function):
    """Gives a value a gradient by parameters that is computed by a function."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, form: Callable[[Tensor], list[Tensor | None]], *parameters: Tensor) -> Tensor:
        ctx.form = form
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        form, ctx.form = ctx.form, None  # what it holds is no longer needed
        if form is None:
            raise MimicError(
                "`keep_output_gradients`: a second backward pass runs from the same loss, but the output gradients are "
                "kept for one. Run one pass from each loss."
            )
        return factor, None, *form(factor)
