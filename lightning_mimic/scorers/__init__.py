"""What the per-sample gradients are worth: scores, and the weights made of them."""

from lightning_mimic.scorers.mimic import mimic_score
from lightning_mimic.scorers.weighting import BatchWeights, SoftmaxWeighting

__all__ = ["BatchWeights", "SoftmaxWeighting", "mimic_score"]
