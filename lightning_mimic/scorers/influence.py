"""The influence of a step on a sample on the loss of trusted ones (TracIn: Pruthi et al., arXiv 2002.08484)."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_mimic.scorers.products import Need, Products, validate_loader


class Influence:
    """``⟨gᵢ, ḡ⟩``: how fast a descent step on sample *i* lowers the mean loss of a trusted reference batch.

    Unit: squared loss per squared weight distance, which times the learning rate is a loss; positive: the trusted loss
    falls. It is TracIn's influence at one state of the model, to first order; the mean of a ledger's scores over the
    epochs is TracInCP up to the learning rate. ``ḡ`` is the trusted batch's mean gradient; the direction −ḡ takes the
    place of the direction to a reference.

    Args:
        loader: Trusted batches as the module's ``sample_losses`` takes them, one for every scored batch, begun again
            at its end; never of the test set (:func:`~lightning_mimic.data.comparison.trusted_loader`).

    Raises:
        MimicError: The loader is empty, or can be iterated over only once.

    Example:
        >>> import torch
        >>> influence = Influence([(torch.zeros(2, 3), torch.tensor([0, 1]))])
        >>> dot = torch.tensor([-8.0, 8.0])
        >>> influence(Products(dot, dot=dot, direction_norm=torch.tensor(4.0)))
        tensor([ 8., -8.])
    """

    needs: frozenset[Need] = frozenset({"dot"})

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = validate_loader(loader, "Influence")

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``."""
        return -products.dot
