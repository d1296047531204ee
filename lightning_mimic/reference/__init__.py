"""The reference checkpoint: read, matched to the model."""

from lightning_mimic.reference.match import fingerprint, match_reference
from lightning_mimic.reference.read import ReferenceLoadError, ReferenceSource, read_reference

__all__ = ["ReferenceLoadError", "ReferenceSource", "fingerprint", "match_reference", "read_reference"]
