"""Curation: decide offline, from recorded scores, which samples to keep.

Curation reads ledgers and is independent of training.

Importing this package loads neither torch nor Lightning; its names are imported on first use.
"""

from typing import TYPE_CHECKING

from lightning_mimic.lazy import lazy_front

if TYPE_CHECKING:
    from lightning_mimic.curation.comparison import Comparison, DataSet, compare
    from lightning_mimic.curation.ensemble import Ensemble
    from lightning_mimic.curation.filters import KMeans, Mixture, Posterior, Sign, Threshold, TopK
    from lightning_mimic.curation.pipeline import Curation, curate
    from lightning_mimic.curation.reference_facts import WrongShare
    from lightning_mimic.curation.report_page import report
    from lightning_mimic.curation.selection import Recipe, select
    from lightning_mimic.curation.shares import partition_share, summarise_partition
    from lightning_mimic.errors import CurationError
    from lightning_mimic.manifest import Manifest
    from lightning_mimic.metrics import (
        DataQuality,
        Detection,
        Membership,
        MislabelAUROC,
        MislabelAveragePrecision,
        Quality,
        detect,
        estimate_quality,
        membership,
    )
else:
    __getattr__, __dir__ = lazy_front(
        __name__,
        {
            "lightning_mimic.curation.comparison": ["Comparison", "DataSet", "compare"],
            "lightning_mimic.curation.ensemble": ["Ensemble"],
            "lightning_mimic.curation.filters": ["KMeans", "Mixture", "Posterior", "Sign", "Threshold", "TopK"],
            "lightning_mimic.curation.pipeline": ["Curation", "curate"],
            "lightning_mimic.curation.reference_facts": ["WrongShare"],
            "lightning_mimic.curation.report_page": ["report"],
            "lightning_mimic.curation.selection": ["Recipe", "select"],
            "lightning_mimic.curation.shares": ["partition_share", "summarise_partition"],
            "lightning_mimic.errors": ["CurationError"],
            "lightning_mimic.manifest": ["Manifest"],
            "lightning_mimic.metrics": [
                "DataQuality",
                "Detection",
                "Membership",
                "MislabelAUROC",
                "MislabelAveragePrecision",
                "Quality",
                "detect",
                "estimate_quality",
                "membership",
            ],
        },
    )

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
    "Posterior",
    "Quality",
    "Recipe",
    "Sign",
    "Threshold",
    "TopK",
    "WrongShare",
    "compare",
    "curate",
    "detect",
    "estimate_quality",
    "membership",
    "partition_share",
    "report",
    "select",
    "summarise_partition",
]
