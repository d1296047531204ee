"""What the per-sample gradients are worth: scores, and the weights made of them."""

from lightning_mimic.scorers.cosine import CosineSimilarity
from lightning_mimic.scorers.grad_norm import GradNorm
from lightning_mimic.scorers.mimic import MimicScore
from lightning_mimic.scorers.products import Need, Products, Scorer
from lightning_mimic.scorers.reference_loss import ReferenceLoss
from lightning_mimic.scorers.rho_loss import RhoLoss
from lightning_mimic.scorers.uniform import Uniform
from lightning_mimic.scorers.weighting import BatchWeights, SoftmaxWeighting

__all__ = [
    "BatchWeights",
    "CosineSimilarity",
    "GradNorm",
    "MimicScore",
    "Need",
    "Products",
    "ReferenceLoss",
    "RhoLoss",
    "Scorer",
    "SoftmaxWeighting",
    "Uniform",
]
