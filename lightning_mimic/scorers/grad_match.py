"""GRAD-MATCH (Killamsetty et al., arXiv 2103.00123): few samples whose weighted gradients stand for all."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.errors import MimicError
from lightning_mimic.scorers.products import Need, Products


class GradMatch:
    """The weight of each sample in a small choice whose gradients sum to nearly what those of the whole batch do.

    Orthogonal matching pursuit over the micro-batch of all ranks: to the choice comes the sample whose gradient points
    furthest along what is still missing, and the weights of all chosen are fitted anew, never negative, to
    ``‖Σᵢ gᵢ − Σ_chosen wᵢ gᵢ‖² + λ ‖w‖²``; until the choice is full or no gradient points that way. 0 for the samples
    that are not chosen; no unit. The choice imitates the batch, wrong labels and all: it saves samples and trusts none
    less. Needs the inner products of per-sample gradients: one ``nn.Linear`` as target.

    All is solved from the Gram matrix on the host, in float64, by SciPy's nnls, on every rank alike: one host sync per
    scored batch, and time that grows fast with the choice (10 ms for 10 of 32 samples, 0.4 s for 154 of 512).

    Args:
        fraction: Of the samples that count, rounded up, at most so many are chosen; above 0, at most 1.
        regularization: λ, in squared units of the gradients, 0 or more.

    Raises:
        MimicError: A setting out of its range, or no SciPy.

    Example:
        >>> gram = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
        >>> match = GradMatch(fraction=0.3, regularization=0.0)
        >>> match(Products(torch.zeros(3), gram=gram, own=slice(0, 3))).round(decimals=3)
        tensor([2., 0., 0.])

    Source: algorithm 2 of the paper, for the samples of a batch instead of a data set's.
    """

    needs: frozenset[Need] = frozenset({"gram"})

    def __init__(self, fraction: float = 0.3, regularization: float = 0.5) -> None:
        if not (isinstance(fraction, int | float) and 0 < fraction <= 1):
            raise MimicError(
                f"`fraction` is the share of a batch that is chosen, above 0 and at most 1, not {fraction!r}."
            )
        if not (isinstance(regularization, int | float) and math.isfinite(regularization) and regularization >= 0):
            raise MimicError(f"`regularization` must be a finite number, 0 or more, not {regularization!r}.")
        _nnls()
        self.fraction = float(fraction)
        self.regularization = float(regularization)

    def __call__(self, products: Products) -> Tensor:
        """The scores, shape ``(B,)``; NaN for samples that do not count."""
        assert products.gram is not None
        assert products.own is not None
        gram = products.gram.detach().to("cpu", torch.float64)
        counts = torch.isfinite(gram.diagonal())
        scores = torch.full((len(gram),), torch.nan, dtype=torch.float64)
        scores[counts] = self._match(gram[counts][:, counts])
        return scores[products.own].to(products.gram)

    def weigh(self, scores: Tensor) -> Tensor:
        """The scores are weights."""
        return scores

    def _match(self, gram: Tensor) -> Tensor:
        """The weights of all rows, given their inner products."""
        most = math.ceil(round(self.fraction * len(gram), 9))  # 0.07 * 100 is 7.000000000000001
        along = gram.sum(1)  # with the sum of all gradients
        # A matrix that was made in float32 may lack so much to be positive.
        rounding = 1e-6 * gram.trace()
        ridge = torch.maximum(rounding, torch.tensor(self.regularization, dtype=gram.dtype))
        weights, chosen = torch.zeros_like(along), torch.zeros(0, dtype=torch.int64)
        while len(chosen) < most:
            missing = (along - gram @ weights).index_fill(0, chosen, -torch.inf)
            best = missing.argmax()
            if missing[best] <= rounding * (1 + weights.max()):
                break
            chosen = torch.cat([chosen, best[None]])
            square = gram[chosen][:, chosen] + ridge * torch.eye(len(chosen), dtype=gram.dtype)
            # ‖Lᵀw − L⁻¹b‖² differs from what is to be least by a constant, for L Lᵀ = square and b = along.
            lower = torch.linalg.cholesky(square)
            goal = torch.linalg.solve_triangular(lower, along[chosen][:, None], upper=False)[:, 0]
            fitted, _ = _nnls()(lower.T.numpy(), goal.numpy())
            weights = torch.zeros_like(along).index_copy(0, chosen, torch.from_numpy(fitted))
        return weights


def _nnls() -> Any:
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise MimicError("GradMatch needs the package SciPy: pip install 'lightning-mimic[vision]'.") from error
    return nnls
