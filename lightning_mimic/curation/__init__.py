"""Offline: from recorded scores to decisions. Knows the ledger, not the training."""

from lightning_mimic.curation.detection import Detection, detect
from lightning_mimic.curation.summary import summarise

__all__ = ["Detection", "detect", "summarise"]
