"""The score file format: what the callback writes and everything else reads."""

from lightning_mimic.errors import LedgerError
from lightning_mimic.ledger.reader import Ledger, Parts
from lightning_mimic.ledger.schema import Flag
from lightning_mimic.ledger.writer import LedgerWriter, note_run, open_run

__all__ = ["Flag", "Ledger", "LedgerError", "LedgerWriter", "Parts", "note_run", "open_run"]
