"""Offline: from recorded scores to decisions. Knows the ledger, not the training."""

from lightning_mimic.curation.compare import Comparison, DataSet, compare
from lightning_mimic.curation.curate import Curation, curate
from lightning_mimic.curation.detection import Detection, detect
from lightning_mimic.curation.ensemble import Ensemble
from lightning_mimic.curation.filters import KMeans, Mixture, Sign, Threshold, TopK
from lightning_mimic.curation.manifest import Manifest
from lightning_mimic.curation.membership import Membership, membership
from lightning_mimic.curation.metrics import DataQuality, MislabelAUROC, MislabelAveragePrecision
from lightning_mimic.curation.quality import Quality, estimate_quality
from lightning_mimic.curation.selection import Recipe, select
from lightning_mimic.errors import CurationError

__all__ = [
    "Comparison",
    "Curation",
    "CurationError",
    "DataQuality",
    "DataSet",
    "Detection",
    "Ensemble",
    "KMeans",
    "Manifest",
    "Membership",
    "MislabelAUROC",
    "MislabelAveragePrecision",
    "Mixture",
    "Quality",
    "Recipe",
    "Sign",
    "Threshold",
    "TopK",
    "compare",
    "curate",
    "detect",
    "estimate_quality",
    "membership",
    "select",
]
