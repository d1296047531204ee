"""What the per-sample gradients are worth: scores, and the weights made of them."""

from lightning_mimic.scorers.agra import Agra
from lightning_mimic.scorers.cosine import CosineSimilarity
from lightning_mimic.scorers.grad_match import GradMatch
from lightning_mimic.scorers.grad_norm import GradNorm
from lightning_mimic.scorers.influence import Influence
from lightning_mimic.scorers.mimic import MimicScore
from lightning_mimic.scorers.products import Compares, Need, Products, Scorer, Weighs
from lightning_mimic.scorers.reference_loss import ReferenceLoss
from lightning_mimic.scorers.rho_loss import RhoLoss
from lightning_mimic.scorers.uniform import Uniform
from lightning_mimic.scorers.weighting import BatchWeights, ShareWeighting, SoftmaxWeighting, Weighting, weighting_of

__all__ = [
    "Agra",
    "BatchWeights",
    "Compares",
    "CosineSimilarity",
    "GradMatch",
    "GradNorm",
    "Influence",
    "MimicScore",
    "Need",
    "Products",
    "ReferenceLoss",
    "RhoLoss",
    "Scorer",
    "ShareWeighting",
    "SoftmaxWeighting",
    "Uniform",
    "Weighs",
    "Weighting",
    "weighting_of",
]
