"""Read a ledger back: whole parts only, each sample once per epoch."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_mimic.errors import LedgerError
from lightning_mimic.ledger.schema import META_FILE, read_meta, schema
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
        lightning_mimic.errors.LedgerError: nowhere holds no ledger (no meta.json in it).
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        meta = read_meta(self.directory)
        if meta is None:
            raise LedgerError(f"{self.directory} holds no ledger (no {META_FILE} in it).")
        #: The content of ``meta.json``: the run, and per attempt its configuration and first step.
        self.meta: dict[str, Any] = meta

    def parts(
        self,
        columns: Sequence[str] | None = None,
        *,
        allow_partial: bool = False,
        advance: Callable[[int, int], None] | None = None,
    ) -> "Parts":
        """The files that hold, each read through once, so that no damaged page goes unnoticed.

        Args:
            columns: Those whose pages are checked; ``None``: all.
            allow_partial: Leave out damaged parts instead of refusing.
            advance: Told how many parts of how many are checked.

        Raises:
            LedgerError: No rows; damaged parts; ids of two types; or attempts whose configuration differs, which would
                mix scores of two meanings.
        """
        attempts = self.meta["attempts"]
        paths = sorted(self.directory.glob("*.parquet"))
        named = [(path, match) for path in paths if (match := PART_NAME.fullmatch(path.name))]
        foreign = sorted(path.name for path, match in named if match[1] != self.meta["run"])
        if foreign:
            raise LedgerError(f"{self.directory}: {foreign[0]} is of another run than its {META_FILE} describes.")
        written = sorted({int(match[2]) for _, match in named})
        if set(written) - set(range(len(attempts))):
            raise LedgerError(
                f"{self.directory}: parts of attempt {max(written)}, which its {META_FILE} does not know."
            )
        whole: list[tuple[Path, int, _Seen]] = []
        lost = _missing(named)
        with ThreadPoolExecutor(_READERS) as pool:
            looks = [pool.submit(_look, path, int(match[5]), columns) for path, match in named]
            for done, ((path, match), look) in enumerate(zip(named, looks, strict=True), start=1):
                try:
                    whole.append((path, int(match[2]), look.result()))
                except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                    lost.append(f"{path.name} ({match[5]} rows: {str(error).splitlines()[0]})")
                if advance is not None:
                    advance(done, len(named))
        if lost and not allow_partial:
            raise LedgerError(
                f"{self.directory}: {len(lost)} of {len(named)} parts are damaged: {'; '.join(lost[:3])}. "
                "`allow_partial=True` reads the rest."
            )
        if not whole:
            raise LedgerError(f"{self.directory} holds no rows.")
        if len({seen.id_type for _, _, seen in whole}) > 1:
            raise LedgerError(f"{self.directory} mixes int and str ids; its ranks were given different ones.")
        # From this step on a later attempt went over an earlier one's rows again.
        until = {
            number: min((attempts[later]["start_step"] for later in written if later > number), default=math.inf)
            for number in written
        }
        left = sorted({n for _, n, seen in whole if seen.first_step < until[n]})
        if not left:
            raise LedgerError(f"{self.directory} holds no rows that a later attempt did not go over again.")
        if len({attempts[number]["config_hash"] for number in left}) > 1:
            differing = differences([attempts[number]["config"] for number in left])
            raise LedgerError(
                f"{self.directory}: its attempts differ in {differing}; their scores are not mixed. Record a run "
                "with other settings in a directory of its own."
            )
        return Parts(
            paths=tuple(path for path, _, _ in whole),
            id_type=whole[0][2].id_type,
            until={number: int(step) for number, step in until.items() if step < math.inf},
            has_classes=any(seen.has_classes for _, _, seen in whole),
            attempts=tuple(left),
            lost=tuple(lost),
        )

    def table(self, *, deduplicate: bool = True, allow_partial: bool = False) -> pa.Table:
        """All rows that hold, in order of epoch, step, batch, rank and position, in memory.

        Rows of an attempt that a later one went over again are left out.

        Args:
            deduplicate: Keep the first row of a sample in an epoch: a distributed sampler repeats some to
                make ranks even, and a run resumed within an epoch starts that epoch's data again.
            allow_partial: Leave out damaged parts instead of refusing.

        Raises:
            LedgerError: As for :meth:`parts`.
        """
        parts = self.parts(allow_partial=allow_partial)
        table = pa.concat_tables(pq.read_table(path, partitioning=None) for path in parts.paths)
        for number, step in parts.until.items():
            superseded = pc.and_(pc.equal(table["attempt"], number), pc.greater_equal(table["step"], step))
            table = table.filter(pc.invert(superseded))
        order = ["epoch", "step", "batch", "rank", "position"]
        table = table.sort_by([(name, "ascending") for name in order])
        return _first_per_epoch(table) if deduplicate else table


@dataclass(frozen=True)
class Parts:
    """A ledger's whole files, and which of their rows hold.

    Attributes:
        paths: Of the files.
        id_type: ``int64`` or ``string``.
        until: By attempt, the step from which on its rows were gone over again by a later one.
        has_classes: Some row has a ``label`` or a ``predicted``.
        attempts: Those that have rows which hold.
        lost: What is damaged or missing, with the rows it held.
    """

    paths: tuple[Path, ...]
    id_type: pa.DataType
    until: Mapping[int, int]
    has_classes: bool
    attempts: tuple[int, ...]
    lost: tuple[str, ...]


#: Reading waits for the disk, and checksums are computed outside the interpreter's lock.
_READERS = 2


@dataclass(frozen=True)
class _Seen:
    id_type: pa.DataType
    first_step: int
    has_classes: bool


def _look(path: Path, rows: int, columns: Sequence[str] | None) -> _Seen:
    """Reads a part through, verifying every page's checksum, without keeping it."""
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        form = file.schema_arrow
        if not form.equals(schema(form.field("id").type)) or file.metadata.num_rows != rows:
            raise ValueError(f"holds {file.metadata.num_rows} rows of columns {', '.join(form.names)}")
        wanted = form.names if columns is None else sorted({*columns, "step", "label", "predicted"})
        read, first_step, has_classes = 0, math.inf, False
        for batch in file.iter_batches(batch_size=1 << 16, columns=wanted, use_threads=False):
            read += batch.num_rows
            first_step = min(first_step, pc.min(batch["step"]).as_py())
            has_classes = has_classes or any(batch[name].null_count < batch.num_rows for name in ("label", "predicted"))
    if read != rows:
        raise ValueError(f"holds {read} rows")
    return _Seen(form.field("id").type, int(first_step), has_classes)


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
