"""The score file format: what the callback writes and everything else reads. Importing it does not load torch."""

from lightning_mimic.errors import LedgerError
from lightning_mimic.ledger.columns import COLUMNS, Column, nullable_columns, summarised_columns
from lightning_mimic.ledger.reader import Ledger, Parts
from lightning_mimic.ledger.schema import Flag
from lightning_mimic.ledger.writer import LedgerWriter, note_run, open_run

__all__ = [
    "COLUMNS",
    "Column",
    "Flag",
    "Ledger",
    "LedgerError",
    "LedgerWriter",
    "Parts",
    "note_run",
    "nullable_columns",
    "open_run",
    "summarised_columns",
]
