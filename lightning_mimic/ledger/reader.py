"""Read a ledger back: whole parts only, each sample once per epoch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_mimic.ledger.schema import META_FILE, LedgerError, read_meta, schema
from lightning_mimic.ledger.writer import PART_NAME, differences


class Ledger:
    """The recorded scores of one run.

    Args:
        directory: What was given to the callback as ``ledger``.

    Raises:
        LedgerError: There is no ledger.

    Example:
        >>> Ledger("nowhere")
        Traceback (most recent call last):
            ...
        lightning_mimic.ledger.schema.LedgerError: nowhere holds no ledger (no meta.json in it).
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        meta = read_meta(self.directory)
        if meta is None:
            raise LedgerError(f"{self.directory} holds no ledger (no {META_FILE} in it).")
        #: The content of ``meta.json``: the run, and per attempt its configuration and first step.
        self.meta: dict[str, Any] = meta

    def table(self, *, deduplicate: bool = True, allow_partial: bool = False) -> pa.Table:
        """All rows that hold, in order of epoch, step, batch, rank and position.

        Rows of an attempt that a later one went over again are left out.

        Args:
            deduplicate: Keep the first row of a sample in an epoch: a distributed sampler repeats some to
                make ranks even, and a run resumed within an epoch starts that epoch's data again.
            allow_partial: Leave out damaged parts instead of refusing.

        Raises:
            LedgerError: No rows; damaged parts; or attempts whose configuration differs, which would mix
                scores of two meanings.
        """
        attempts = self.meta["attempts"]
        paths = sorted(self.directory.glob("*.parquet"))
        named = [(path, match) for path in paths if (match := PART_NAME.fullmatch(path.name))]
        foreign = sorted(path.name for path, match in named if match[1] != self.meta["run"])
        if foreign:
            raise LedgerError(f"{self.directory}: {foreign[0]} is of another run than its {META_FILE} describes.")
        written = {int(match[2]) for _, match in named}
        if written - set(range(len(attempts))):
            raise LedgerError(
                f"{self.directory}: parts of attempt {max(written)}, which its {META_FILE} does not know."
            )
        tables, damaged = [], _missing(named)
        for path, match in named:
            try:
                tables.append(_read(path, int(match[5])))
            except (OSError, ValueError, KeyError) as error:  # pyarrow's errors among them
                damaged.append(f"{path.name} ({match[5]} rows: {str(error).splitlines()[0]})")
        if damaged and not allow_partial:
            raise LedgerError(
                f"{self.directory}: {len(damaged)} of {len(named)} parts are damaged: {'; '.join(damaged[:3])}. "
                "`allow_partial=True` reads the rest."
            )
        if not tables:
            raise LedgerError(f"{self.directory} holds no rows.")
        if len({table.schema.field("id").type for table in tables}) > 1:
            raise LedgerError(f"{self.directory} mixes int and str ids; its ranks were given different ones.")
        table = pa.concat_tables(tables)
        for number in written:
            superseded = pc.and_(
                pc.less(table["attempt"], number), pc.greater_equal(table["step"], attempts[number]["start_step"])
            )
            table = table.filter(pc.invert(superseded))
        left = sorted(table["attempt"].unique().to_pylist())
        if len({attempts[number]["config_hash"] for number in left}) > 1:
            differing = differences([attempts[number]["config"] for number in left])
            raise LedgerError(
                f"{self.directory}: its attempts differ in {differing}; their scores are not mixed. Record a run "
                "with other settings in a directory of its own."
            )
        order = ["epoch", "step", "batch", "rank", "position"]
        table = table.sort_by([(name, "ascending") for name in order])
        return _first_per_epoch(table) if deduplicate else table


def _read(path: Path, rows: int) -> pa.Table:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read()
    # Checksums do not cover a part's own description.
    if not table.schema.equals(schema(table.schema.field("id").type)) or table.num_rows != rows:
        raise ValueError(f"holds {table.num_rows} rows of columns {', '.join(table.schema.names)}")
    return table


def _missing(named: Sequence[tuple[Path, re.Match[str]]]) -> list[str]:
    """Parts that were there once: each rank numbers its own without gaps."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for _, match in named:
        numbers.setdefault((match[2], match[3]), set()).add(int(match[4]))
    return [
        f"attempt {attempt}, rank {rank}, part {number} (missing)"
        for (attempt, rank), seen in numbers.items()
        for number in sorted(set(range(max(seen))) - seen)
    ]


def _first_per_epoch(table: pa.Table) -> pa.Table:
    numbered = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    first = numbered.group_by(["epoch", "id"]).aggregate([("row", "min")])["row_min"]
    return table.take(first.combine_chunks().sort())
