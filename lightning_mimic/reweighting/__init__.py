"""Scoring and reweighting in pure torch: one :class:`Reweighter` per run, one :class:`Step` per micro-batch."""

from lightning_mimic.reweighting.reweighter import Reweighter
from lightning_mimic.reweighting.step import Step
from lightning_mimic.reweighting.weigh import StepResult

__all__ = ["Reweighter", "Step", "StepResult"]
