"""The Lightning callbacks, and nothing else that knows Lightning's training loop."""

from lightning_mimic.callbacks.grad_mimic import GradMimic

__all__ = ["GradMimic"]
