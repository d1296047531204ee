"""The mimic score (Huang et al., arXiv 2501.06708, section 3)."""

from torch import Tensor

from lightning_mimic.scorers.products import Need, Products


class MimicScore:
    """``mᵢ = −⟨gᵢ, v⟩ / ‖v‖``: how much a descent step on sample *i* moves the weights to the reference.

    It is the directional derivative ``−d/dε ℓᵢ(θ + ε v/‖v‖)`` at 0. Unit: loss per unit of weight distance;
    positive: towards the reference.

    Example:
        >>> import torch
        >>> dot = torch.tensor([-8.0, 8.0])
        >>> MimicScore()(Products(dot, dot=dot, direction_norm=torch.tensor(4.0)))
        tensor([ 2., -2.])
    """

    needs: frozenset[Need] = frozenset({"dot"})

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``; not finite where ``‖v‖`` is 0."""
        return -products.dot / products.direction_norm
