"""GraNd (Paul, Ganguli and Dziugaite, *Deep Learning on a Data Diet*, arXiv 2107.07075, definition 2.1)."""

from torch import Tensor

from lightning_mimic.scorers.products import Need, Products


class GradNorm:
    """``‖gᵢ‖``: how much a step on sample *i* would move the chosen parameters, wherever to.

    Unit: loss per unit of weight distance, never negative. Hard samples score high, and so do wrong labels: on
    noisy data its high end is the part to look at, not to train on. GraNd is its expectation over several
    initialisations early in training; a ledger of one run holds one of them.

    Example:
        >>> import torch
        >>> norms = torch.tensor([1.0, 2.0])
        >>> GradNorm()(Products(norms, norms=norms))
        tensor([1., 2.])
    """

    needs: frozenset[Need] = frozenset({"norms"})
    #: A positive score does not mean a good sample.
    signed = False

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``."""
        return products.norms
