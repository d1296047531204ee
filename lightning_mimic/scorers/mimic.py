"""The mimic score (Huang et al., arXiv 2501.06708, section 3)."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class HasDot(Protocol):
    """Per-sample gradients that can be multiplied with a vector."""

    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """``⟨gᵢ, v⟩`` per sample, shape ``(B,)``."""


def mimic_score(gradients: HasDot, vectors: Mapping[str, Tensor], norm: Tensor) -> Tensor:
    """``mᵢ = −⟨gᵢ, v⟩ / ‖v‖``: how much a descent step on sample *i* moves the weights to the reference.

    It is the directional derivative ``−d/dε ℓᵢ(θ + ε v/‖v‖)`` at 0.

    Args:
        gradients: Per-sample gradients of the *unreduced* losses, with the product ``dot``.
        vectors: The direction ``v = θ_ref − θ``, by parameter name.
        norm: ``‖v‖`` over all of them.

    Returns:
        Shape ``(B,)``, loss per unit of weight distance; positive: towards the reference. NaN where
        ``norm`` is 0.

    Example:
        >>> import torch
        >>> from lightning_mimic.gradients import LayerGradients
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> rows = LayerGradients(layer, torch.tensor([[1.0], [1.0]]), torch.tensor([[-2.0], [2.0]]))
        >>> mimic_score(rows, {"weight": torch.tensor([[4.0]])}, torch.tensor(4.0))
        tensor([ 2., -2.])
    """
    return -gradients.dot(vectors) / norm
