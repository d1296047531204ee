"""The mimic score for PyTorch Lightning: weight and select samples by how they move a model to a reference.

Importing the package loads neither torch nor Lightning; its names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from lightning_mimic.lazy import lazy_front
from lightning_mimic.version import __version__

if TYPE_CHECKING:
    from lightning_mimic.callbacks import AtCheckpoints, GradMimic, SuspiciousImages
    from lightning_mimic.data import WithIds, collate_with_ids
    from lightning_mimic.errors import LedgerError, MimicError, ReferenceLoadError
    from lightning_mimic.ledger import Ledger
    from lightning_mimic.models.token_losses import token_losses
    from lightning_mimic.reference import Aligned, Diagnosis, diagnose
    from lightning_mimic.reweighting import Reweighter
else:
    __getattr__, __dir__ = lazy_front(
        __name__,
        {
            "lightning_mimic.callbacks": ["AtCheckpoints", "GradMimic", "SuspiciousImages"],
            "lightning_mimic.data": ["WithIds", "collate_with_ids"],
            "lightning_mimic.errors": ["LedgerError", "MimicError", "ReferenceLoadError"],
            "lightning_mimic.ledger": ["Ledger"],
            "lightning_mimic.models.token_losses": ["token_losses"],
            "lightning_mimic.reference": ["Aligned", "Diagnosis", "diagnose"],
            "lightning_mimic.reweighting": ["Reweighter"],
        },
    )

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
    "SuspiciousImages",
    "WithIds",
    "__version__",
    "collate_with_ids",
    "diagnose",
    "token_losses",
]
