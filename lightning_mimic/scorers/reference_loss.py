"""The simplest baseline: the reference's own loss on the given label."""

from torch import Tensor

from lightning_mimic.scorers.products import Need, Products


class ReferenceLoss:
    """``−ℓᵢ(reference)``: the reference's loss on the given label, turned so that higher is better.

    Unit: that of the loss, never positive for a cross-entropy. It does not change while the model learns. Known as
    the small-loss criterion, with the loss of a trusted model in place of the model's own (Jiang et al., *MentorNet*,
    arXiv 1712.05055).

    Example:
        >>> import torch
        >>> losses = torch.tensor([0.5, 4.0])
        >>> ReferenceLoss()(Products(losses, reference_losses=losses))
        tensor([-0.5000, -4.0000])
    """

    needs: frozenset[Need] = frozenset({"reference_losses"})
    #: A positive score does not mean a good sample.
    signed = False

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``."""
        return -products.reference_losses
