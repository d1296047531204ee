"""Adapters that put the engine into Lightning's training loop."""

from lightning_mimic.callbacks.at_checkpoints import AtCheckpoints
from lightning_mimic.callbacks.grad_mimic import GradMimic
from lightning_mimic.callbacks.suspicious_images import SuspiciousImages

__all__ = ["AtCheckpoints", "GradMimic", "SuspiciousImages"]
