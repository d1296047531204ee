"""LightningModules to train, and the backbones they stand on."""

from lightning_mimic.models.backbones import SmallConvNet, torchvision_backbone
from lightning_mimic.models.image_classifier import ImageClassifier

__all__ = ["ImageClassifier", "SmallConvNet", "torchvision_backbone"]
