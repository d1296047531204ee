"""The reference checkpoint: read, matched to the model."""

from lightning_mimic.reference.match import aliases_of, fingerprint, match_reference
from lightning_mimic.reference.model import reference_model
from lightning_mimic.reference.read import ReferenceLoadError, ReferenceSource, read_reference

__all__ = [
    "ReferenceLoadError",
    "ReferenceSource",
    "aliases_of",
    "fingerprint",
    "match_reference",
    "read_reference",
    "reference_model",
]
