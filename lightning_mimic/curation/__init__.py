"""Offline: from recorded scores to decisions. Knows the ledger, not the training."""

from lightning_mimic.curation.curate import Curation, curate
from lightning_mimic.curation.database import CurationError
from lightning_mimic.curation.detection import Detection, detect
from lightning_mimic.curation.ensemble import Ensemble
from lightning_mimic.curation.filters import KMeans, Mixture, Sign, Threshold, TopK
from lightning_mimic.curation.manifest import Manifest
from lightning_mimic.curation.quality import Quality, estimate_quality
from lightning_mimic.curation.summary import summarise

__all__ = [
    "Curation",
    "CurationError",
    "Detection",
    "Ensemble",
    "KMeans",
    "Manifest",
    "Mixture",
    "Quality",
    "Sign",
    "Threshold",
    "TopK",
    "curate",
    "detect",
    "estimate_quality",
    "summarise",
]
