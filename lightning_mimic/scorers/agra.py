"""AGRA (Sedova, Zellinger and Roth, *Learning with Noisy Labels by Adaptive Gradient-Based Outlier Removal*)."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_mimic.scorers.cosine import CosineSimilarity
from lightning_mimic.scorers.products import validate_loader


class Agra(CosineSimilarity):
    """``⟨gᵢ, ḡ⟩ / (‖gᵢ‖ ‖ḡ‖)``: the agreement of a sample's gradient with the mean one of a reference batch.

    Between −1 and 1, without a unit. Samples that agree (more than 0) share the step equally, the others are left out;
    where none agrees, the batch has no gradient. v = −ḡ, the direction of a step on the reference batch, takes the
    place of the direction to a reference. Needs the norms of per-sample gradients: one ``nn.Linear`` as target.

    Args:
        loader: Reference batches as the module's ``sample_losses`` takes them, one for every scored batch, begun again
            at its end; in AGRA they come from the noisy training data themselves
            (:func:`~lightning_mimic.data.comparison.comparison_loader`).

    Raises:
        MimicError: The loader is empty, or can be iterated over only once.

    Example:
        >>> import torch
        >>> from lightning_mimic.scorers import Products
        >>> agra = Agra([(torch.zeros(2, 3), torch.tensor([0, 1]))])
        >>> dot, norms = torch.tensor([-8.0, 8.0]), torch.tensor([2.0, 4.0])
        >>> scores = agra(Products(dot, dot=dot, norms=norms, direction_norm=torch.tensor(4.0)))
        >>> scores, agra.weigh(scores)
        (tensor([ 1.0000, -0.5000]), tensor([1., 0.]))

    Source: arXiv 2306.04502, section 3 and algorithm 1; without its alternative label for samples that disagree.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = validate_loader(loader, "Agra")

    def weigh(self, scores: Tensor) -> Tensor:
        """Return 1 where a sample agrees, 0 elsewhere."""
        return (scores > 0).to(scores.dtype)
