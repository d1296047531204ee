"""The mimic score without the gradient's length."""

import torch
from torch import Tensor

from lightning_mimic.scorers.products import Need, Products


class CosineSimilarity:
    """``−⟨gᵢ, v⟩ / (‖gᵢ‖ ‖v‖)``: the cosine between a descent step on sample *i* and the direction to the reference.

    Between −1 and 1, without a unit; positive: towards the reference. A sample with no gradient scores 0. Unlike
    the mimic score it gives a confident and a doubtful sample the same say, as in gradient-agreement filters
    (Sedova, Zellinger and Roth, *Learning with Noisy Labels by Adaptive Gradient-Based Outlier Removal*, arXiv
    2306.04502).

    Example:
        >>> dot, norms = torch.tensor([-8.0, 0.0]), torch.tensor([2.0, 0.0])
        >>> CosineSimilarity()(Products(dot, dot=dot, norms=norms, direction_norm=torch.tensor(4.0)))
        tensor([1., 0.])
    """

    needs: frozenset[Need] = frozenset({"dot", "norms"})

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``; not finite where ``‖v‖`` is 0."""
        still = products.norms == 0
        norms = torch.where(still, torch.ones_like(products.norms), products.norms)
        cosine = (-products.dot / (norms * products.direction_norm)).clamp(-1, 1)  # rounding may lead beyond
        return torch.where(still, torch.zeros_like(cosine), cosine)
