"""The reference checkpoint: read, matched to the model, aligned if it is unrelated."""

from lightning_mimic.errors import ReferenceLoadError
from lightning_mimic.reference.aligned import Aligned, AlignedDirection
from lightning_mimic.reference.aligned_towers import aligned_direction, has_towers
from lightning_mimic.reference.calibration import Calibration, calibrate, label_posteriors, noise_matrix
from lightning_mimic.reference.diagnose import diagnose, rest_trains, weight_similarity
from lightning_mimic.reference.diagnosis import Diagnosis
from lightning_mimic.reference.match import aliases_of, fingerprint, match_reference
from lightning_mimic.reference.model import reference_model, refuse_module_on_features
from lightning_mimic.reference.read import ReferenceSource, read_reference

__all__ = [
    "Aligned",
    "AlignedDirection",
    "Calibration",
    "Diagnosis",
    "ReferenceLoadError",
    "ReferenceSource",
    "aliases_of",
    "aligned_direction",
    "calibrate",
    "diagnose",
    "fingerprint",
    "has_towers",
    "label_posteriors",
    "match_reference",
    "noise_matrix",
    "read_reference",
    "reference_model",
    "refuse_module_on_features",
    "rest_trains",
    "weight_similarity",
]
