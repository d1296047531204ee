"""Scorers, formulas from products with per-sample gradients to scores, and weightings, from scores to weights."""

from lightning_mimic.scorers.agra import Agra
from lightning_mimic.scorers.cosine import CosineSimilarity
from lightning_mimic.scorers.declarations import validate_needs, validate_scores
from lightning_mimic.scorers.grad_match import GradMatch
from lightning_mimic.scorers.grad_norm import GradNorm
from lightning_mimic.scorers.head import EndpointScore, HeadReferenceLoss, HeadRhoLoss, ReferencePart
from lightning_mimic.scorers.influence import Influence
from lightning_mimic.scorers.mimic import MimicScore
from lightning_mimic.scorers.products import (
    HEAD_NEEDS,
    NEEDS,
    WEIGHT_NEEDS,
    MakesWeights,
    Need,
    Products,
    Scorer,
    UsesLoader,
)
from lightning_mimic.scorers.reference_loss import ReferenceLoss
from lightning_mimic.scorers.rho_loss import RhoLoss
from lightning_mimic.scorers.uniform import Uniform
from lightning_mimic.scorers.weighting import (
    BatchWeights,
    KeepsState,
    Posterior,
    RunWeighting,
    ShareWeighting,
    SoftmaxWeighting,
    Temperature,
    Weighting,
    choose_weighting,
    normalised_weights,
    validate_weights,
)

__all__ = [
    "HEAD_NEEDS",
    "NEEDS",
    "WEIGHT_NEEDS",
    "Agra",
    "BatchWeights",
    "CosineSimilarity",
    "EndpointScore",
    "GradMatch",
    "GradNorm",
    "HeadReferenceLoss",
    "HeadRhoLoss",
    "Influence",
    "KeepsState",
    "MakesWeights",
    "MimicScore",
    "Need",
    "Posterior",
    "Products",
    "ReferenceLoss",
    "ReferencePart",
    "RhoLoss",
    "RunWeighting",
    "Scorer",
    "ShareWeighting",
    "SoftmaxWeighting",
    "Temperature",
    "Uniform",
    "UsesLoader",
    "Weighting",
    "choose_weighting",
    "normalised_weights",
    "validate_needs",
    "validate_scores",
    "validate_weights",
]
