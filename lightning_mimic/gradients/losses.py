"""Per-sample gradients of any parameters, from the unreduced losses alone."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.gradients.graph import Graph
from lightning_mimic.gradients.nodes import kind_of
from lightning_mimic.gradients.sample_gradients import DotOnly


class LossGradients(DotOnly):
    """The matrix G of the samples' own gradients ``∂ℓᵢ/∂θ``, never built.

    Exact for any parameters, also tied ones and those outside of layers, and for losses that depend on other samples
    (contrastive losses, batch normalisation): ``Jᵀu`` is linear in u, so that ``⟨Jᵀu, v⟩`` differentiated by
    u is ``J v``. Costs two reverse passes between the losses and the parameters, and no third: nothing else is
    differentiated.

    Args:
        losses: Shape ``(B,)``, with their graph.
        parameters: Name to parameter.
        between: Called between the two reverse passes, of which the first frees what is whole of a sharded model.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> losses = torch.tensor([[1.0, 0.0], [0.0, 3.0]]) @ weight
        >>> LossGradients(losses, {"w": weight}).dot({"w": torch.tensor([5.0, 1.0])})
        tensor([5., 3.])
    """

    def __init__(
        self, losses: Tensor, parameters: Mapping[str, nn.Parameter], *, between: Callable[[], object] = lambda: None
    ) -> None:
        self._losses = losses
        self._parameters = dict(parameters)
        self._between = between

    def check(self, graph: Graph) -> None:
        """Raises ``MimicError`` where the losses cannot be differentiated twice by every parameter.

        Args:
            graph: The graph below ``losses``.
        """
        unused = [name for name, p in self._parameters.items() if not graph.terminals(p)]
        if unused:
            raise MimicError(
                f"`parameters`: no path leads from the losses to {join_names(unused)}, or they are frozen."
            )
        fused = [n for n in graph.order if "ScaledDotProduct" in n.name()]
        if not fused:
            return
        above = {id(leaf.variable) for node in fused for leaf in Graph(node).leaves}  # type: ignore[attr-defined]
        below = [name for name, p in self._parameters.items() if id(p) in above]
        if below:
            raise MimicError(
                f"`parameters`: {join_names(below)} lie below fused attention ({kind_of(fused[0])}), which cannot be "
                "differentiated twice. Name parameters above it, or allow the slower attention that can with "
                "`math_attention=True`."
            )

    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """``⟨gᵢ, v⟩`` for every sample.

        Args:
            vectors: Parameter name to a tensor of its shape.

        Returns:
            Shape ``(B,)``, in the dtype of ``vectors`` or higher.
        """
        names = list(self._parameters)
        with torch.enable_grad(), torch.autocast(self._losses.device.type, enabled=False):
            # Any u does, because J v does not depend on it.
            u = torch.ones_like(self._losses, requires_grad=True)
            sums = torch.autograd.grad(self._losses, list(self._parameters.values()), u, create_graph=True)
            shares = []
            for name, gradient in zip(names, sums, strict=True):
                vector = vectors[name]
                shares.append((gradient.to(vector.dtype) * vector).sum())
            along = torch.stack(shares).sum()
            self._between()
            (dots,) = torch.autograd.grad(along, u)
        return dots.to(along.dtype)
