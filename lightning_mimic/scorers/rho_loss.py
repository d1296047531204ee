"""Reducible holdout loss (Mindermann et al., arXiv 2206.07137, equation 3)."""

from torch import Tensor

from lightning_mimic.scorers.products import Need, Products


class RhoLoss:
    """``ℓᵢ − ℓᵢ(reference)``: what the model has still to learn of sample *i*, less what cannot be learnt of it.

    Unit: that of the loss. High for samples that are not yet learnt and not noisy: of a wrong label the reference's
    loss is high too. The reference plays the part of the model trained on held-out data.

    Example:
        >>> import torch
        >>> losses = torch.tensor([3.0, 3.0])
        >>> RhoLoss()(Products(losses, losses=losses, reference_losses=torch.tensor([0.5, 4.0])))
        tensor([ 2.5000, -1.0000])
    """

    needs: frozenset[Need] = frozenset({"losses", "reference_losses"})

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``."""
        return products.losses - products.reference_losses
