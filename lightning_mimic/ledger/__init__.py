"""The score file format: what the callback writes and everything else reads. Importing it does not load torch."""

from lightning_mimic.errors import LedgerError
from lightning_mimic.ledger.columns import COLUMNS, NO_CLASS, Column, nullable_columns, summarised_columns
from lightning_mimic.ledger.ids import id_array
from lightning_mimic.ledger.reader import CheckedPart, CheckedParts, Ledger, Parts
from lightning_mimic.ledger.run import Checkpoint, OpenRun, open_run
from lightning_mimic.ledger.schema import Flag
from lightning_mimic.ledger.writer import LedgerWriter

__all__ = [
    "COLUMNS",
    "NO_CLASS",
    "CheckedPart",
    "CheckedParts",
    "Checkpoint",
    "Column",
    "Flag",
    "Ledger",
    "LedgerError",
    "LedgerWriter",
    "OpenRun",
    "Parts",
    "id_array",
    "nullable_columns",
    "open_run",
    "summarised_columns",
]
