"""The mimic score for PyTorch Lightning: weight and select samples by how they move a model to a reference."""

from lightning_mimic.callbacks import AtCheckpoints, GradMimic
from lightning_mimic.data import WithIds, collate_with_ids
from lightning_mimic.errors import LedgerError, MimicError, ReferenceLoadError
from lightning_mimic.ledger import Ledger
from lightning_mimic.reference import Aligned, Diagnosis, diagnose
from lightning_mimic.reweighting import Reweighter
from lightning_mimic.version import __version__

__all__ = [
    "Aligned",
    "AtCheckpoints",
    "Diagnosis",
    "GradMimic",
    "Ledger",
    "LedgerError",
    "MimicError",
    "ReferenceLoadError",
    "Reweighter",
    "WithIds",
    "__version__",
    "collate_with_ids",
    "diagnose",
]
