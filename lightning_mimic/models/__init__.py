"""LightningModules for image classification and CLIP, their backbones, and losses per sample."""

from lightning_mimic.models.backbones import SmallConvNet, timm_backbone, torchvision_backbone
from lightning_mimic.models.clip import CLIP
from lightning_mimic.models.contrastive import global_pair_losses, pair_losses
from lightning_mimic.models.image_classifier import ImageClassifier
from lightning_mimic.models.token_losses import token_losses
from lightning_mimic.models.zero_shot import ZeroShot, recall_at_k

__all__ = [
    "CLIP",
    "ImageClassifier",
    "SmallConvNet",
    "ZeroShot",
    "global_pair_losses",
    "pair_losses",
    "recall_at_k",
    "timm_backbone",
    "token_losses",
    "torchvision_backbone",
]
