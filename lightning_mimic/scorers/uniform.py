"""No preference: the baseline that every other scorer must beat."""

import torch
from torch import Tensor

from lightning_mimic.scorers.products import Need, Products


class Uniform:
    """The same score, 0, for every sample, so that the weights are 1/B and training is plain.

    Example:
        >>> Uniform()(Products(torch.ones(3)))
        tensor([0., 0., 0.])
    """

    needs: frozenset[Need] = frozenset()

    def __call__(self, products: Products) -> Tensor:
        """Return zeros, shape ``(B,)``."""
        return torch.zeros_like(products.samples)
