"""Metrics of scores: detection of wrong labels, the share of good samples, membership in the reference's training data.

Importing this package loads neither torch nor torchmetrics; its names are imported on first use.
"""

from typing import TYPE_CHECKING

from lightning_mimic.lazy import lazy_front

if TYPE_CHECKING:
    from lightning_mimic.metrics.data_quality import DataQuality
    from lightning_mimic.metrics.detection import Detection, detect, detection_scores
    from lightning_mimic.metrics.estimate import Quality, estimate_quality
    from lightning_mimic.metrics.membership_inference import Membership, membership
    from lightning_mimic.metrics.mislabel import MislabelAUROC, MislabelAveragePrecision
else:
    __getattr__, __dir__ = lazy_front(
        __name__,
        {
            "lightning_mimic.metrics.data_quality": ["DataQuality"],
            "lightning_mimic.metrics.detection": ["Detection", "detect", "detection_scores"],
            "lightning_mimic.metrics.estimate": ["Quality", "estimate_quality"],
            "lightning_mimic.metrics.membership_inference": ["Membership", "membership"],
            "lightning_mimic.metrics.mislabel": ["MislabelAUROC", "MislabelAveragePrecision"],
        },
    )

__all__ = [
    "DataQuality",
    "Detection",
    "Membership",
    "MislabelAUROC",
    "MislabelAveragePrecision",
    "Quality",
    "detect",
    "detection_scores",
    "estimate_quality",
    "membership",
]
