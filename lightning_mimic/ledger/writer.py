"""Append scores to a ledger: one file per rank and flush, complete or not there."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_mimic.errors import LedgerError
from lightning_mimic.files import atomic_write
from lightning_mimic.ledger.columns import NO_CLASS, nullable_columns, schema
from lightning_mimic.ledger.description import last_attempt, read_meta
from lightning_mimic.ledger.ids import id_array, unified
from lightning_mimic.stores import as_store_path, path_of

#: run, attempt, rank, number, rows: the count in the name tells what a damaged part has lost.
PART_NAME = re.compile(r"part-(\w+)-a(\d+)-r(\d+)-(\d+)-n(\d+)\.parquet")


class LedgerWriter:
    """Writes one rank's rows of one attempt.

    A part gets its final name only when it is complete on the disk, so a reader never sees half a file.

    Args:
        directory: The ledger that :func:`~lightning_mimic.ledger.open_run` made.
        run: The run's id.
        attempt: The attempt's number.
        rank: This process's rank.
        ids: ``"int"`` or ``"str"``, the kind of the run's ids so far; ``None``: there are none, or it is not known.
        parts: Number of parts that this rank has written in this attempt.
        token: Of the attempt, which must be the run's last one while it is written: on a store, nothing else keeps
            another process from going on with the run.

    Attributes:
        rows: Number of rows that are on the disk, or the store.
    """

    def __init__(
        self,
        directory: str | Path,
        run: str,
        attempt: int,
        rank: int,
        ids: str | None = None,
        *,
        parts: int = 0,
        token: str | None = None,
    ) -> None:
        self._directory = path_of(directory, "ledger")
        self._token = token
        self._run = run
        self._attempt = attempt
        self._rank = rank
        self.rows = 0
        # Of all ids so far: their kind, one below 0, and one above the signed range.
        self._kind = ids
        self._negative: int | None = None
        self._unsigned: int | None = None
        self._pending: list[pa.Table] = []
        self._parts = parts
        self._failed = False
        self._process = os.getpid()

    @property
    def pending(self) -> int:
        """Number of rows that are in memory only."""
        return sum(table.num_rows for table in self._pending)

    def check_ids(self, values: Any) -> pa.Array:
        """Return ids as an array, after checking that they go with all ids so far.

        Args:
            values: See :func:`~lightning_mimic.ledger.ids.id_array`.

        Raises:
            LedgerError: Ids that a ledger cannot hold, or not beside the earlier ones.
        """
        ids = id_array(values)
        if not len(ids):
            return ids
        kind = "str" if ids.type == pa.string() else "int"
        if self._kind not in (None, kind):
            raise LedgerError(
                f"the id {ids[0].as_py()!r} is {kind}, and the ids before were {self._kind}; a ledger holds one type "
                "of id."
            )
        negative, unsigned = self._negative, self._unsigned
        if kind == "int":
            lowest, highest = pc.min(ids).as_py(), pc.max(ids).as_py()
            negative = lowest if negative is None and lowest < 0 else negative
            unsigned = highest if unsigned is None and highest >= 2**63 else unsigned
        if None not in (negative, unsigned):
            raise LedgerError(
                f"the ids {negative} and {unsigned} do not go together: ids are signed or unsigned numbers of 64 bits."
            )
        self._kind, self._negative, self._unsigned = kind, negative, unsigned
        return ids

    def append(self, columns: Mapping[str, Any]) -> None:
        """Adds rows, kept in memory until :meth:`flush`.

        Args:
            columns: Columns but ``attempt`` and ``rank``, by name, as lists or arrays of one length; ids all int or all
                str. Nullable ones may be ``None`` or left out.

        Raises:
            LedgerError: See :meth:`check_ids`.
        """
        rows = len(columns["position"])
        if rows == 0:
            return
        ids = self.check_ids(columns["id"])
        ours = {"id": ids, "attempt": [self._attempt] * rows, "rank": [self._rank] * rows}
        nullable = nullable_columns()
        arrays = dict.fromkeys(nullable) | dict(columns) | ours
        form = schema(ids.type)
        made = [_column(arrays[f.name], f.type, rows, nullable=f.name in nullable) for f in form]
        self._pending.append(pa.Table.from_arrays(made, schema=form))

    def flush(self) -> None:
        """Commits what is in memory as one part.

        A failed write keeps its rows and is tried again at the next flush.

        Raises:
            LedgerError: The write failed twice in a row; another process goes on with the run; or this is a forked
                copy of the process that writes, whose parts would have the same names.
        """
        if not self._pending:
            return
        if os.getpid() != self._process:
            raise LedgerError(
                f"`ledger`: {self._directory} is written by process {self._process}, and this is {os.getpid()}, a "
                "forked copy of it. Score in the process that began the run, or begin one of its own in each."
            )
        table = self._table()
        name = f"part-{self._run}-a{self._attempt}-r{self._rank}-{self._parts:06d}-n{table.num_rows}.parquet"
        try:
            exclusive = as_store_path(self._directory) is not None
            with atomic_write(self._directory / name, exclusive=exclusive, tidy=False) as file:
                # No statistics: checksums do not cover them, and a query engine would believe them.
                pq.write_table(table, file, compression="zstd", write_page_checksum=True, write_statistics=False)
        except OSError as error:
            if self._failed:
                fix = "Restore the access to it" if as_store_path(self._directory) else "Free the disk"
                raise LedgerError(
                    f"`ledger`: {table.num_rows} rows could not be written to {self._directory}, twice in a row: "
                    f"{error}. {fix}, or train without a ledger."
                ) from error
            self._failed = True
            return
        self._failed = False
        self._parts += 1
        self.rows += table.num_rows
        self._pending.clear()
        self._check_not_replaced()

    def commit(self) -> None:
        """Commits the rest; what cannot be written is tried once more and then raised."""
        self.flush()
        self.flush()

    def pending_rows(self) -> bytes:
        """Return the rows that are in memory only, for :meth:`append_rows` of another writer."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._table().schema) as stream:
            stream.write_table(self._table())
        return bytes(sink.getvalue())

    def append_rows(self, rows: bytes) -> None:
        """Add rows, kept in memory until :meth:`flush`.

        Args:
            rows: From :meth:`pending_rows`, of the same attempt and rank.

        Raises:
            LedgerError: They are damaged, or of another attempt or rank.
        """
        try:
            table = pa.ipc.open_stream(rows).read_all()
            table = table.select(schema(pa.string()).names).cast(schema(table.schema.field("id").type))
            places = set(zip(table["attempt"].to_pylist(), table["rank"].to_pylist(), strict=True))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise LedgerError(f"`ledger`: the rows that the checkpoint holds are damaged: {error}.") from error
        if places != {(self._attempt, self._rank)}:
            raise LedgerError("`ledger`: the rows that the checkpoint holds are not of its own attempt.")
        self._pending.append(table)

    def _check_not_replaced(self) -> None:
        """Raise ``LedgerError`` if another process goes on with a run on a store; the rows of this one are there."""
        if self._token is None or not as_store_path(self._directory):
            return
        try:
            meta = read_meta(self._directory)
        except LedgerError:
            return  # the store may be away; the next part, or the end of the run, shows it
        if meta is not None and meta["attempts"][-1].get("token") != self._token:
            raise LedgerError(
                f"`ledger`: {last_attempt(meta)} goes on in {self._directory}, and this is attempt {self._attempt} of "
                f"run {self._run}, which ends here. Its rows stay there; of those that the other one goes over again, "
                "the other one's are read."
            )

    def _table(self) -> pa.Table:
        id_type = unified(table.schema.field("id").type for table in self._pending)
        return pa.concat_tables(table.cast(schema(id_type)) for table in self._pending)


def _column(values: Any, kind: pa.DataType, rows: int, *, nullable: bool) -> pa.Array:
    if values is None:
        return pa.nulls(rows, kind)
    # NaN stands for "no value" on the device; null is its name on disk.
    array = pa.array(values, from_pandas=True)
    if nullable and array.type == pa.int64():
        array = pc.if_else(pc.equal(array, NO_CLASS), None, array)
    return array.cast(kind)
