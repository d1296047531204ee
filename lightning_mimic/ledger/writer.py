"""Append scores to a ledger: one file per rank and flush, complete or not there."""

import hashlib
import json
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mimic.errors import LedgerError, join_names
from lightning_mimic.files import atomic_write, write_json
from lightning_mimic.ledger.columns import nullable_columns, schema
from lightning_mimic.ledger.schema import (
    META_FILE,
    SCHEMA_VERSION,
    class_names_in,
    read_meta,
)

#: run, attempt, rank, number, rows: the count in the name tells what a damaged part has lost.
PART_NAME = re.compile(r"part-(\w+)-a(\d+)-r(\d+)-(\d+)-n(\d+)\.parquet")


def open_run(
    directory: str | Path, config: Mapping[str, Any], start_step: int, run: str | None, notes: Mapping[str, Any]
) -> tuple[str, int]:
    """Starts an attempt in a ledger; called by one rank alone, before any writer.

    Rows of earlier attempts from ``start_step`` on are superseded, never deleted.

    Args:
        directory: The ledger, made if it is not there.
        config: What decides the meaning of scores and weights; attempts that differ in it are not mixed.
        start_step: Optimizer steps done before this attempt.
        run: The run that is continued (a resumed checkpoint's, or an earlier fit's of the same object), or
            ``None`` for a new one.
        notes: More for ``meta.json``, without such weight. ``class_names``, names in the order of the labels, is kept
            once for all attempts. A reader looks at ``ranks``, the number of ranks that write, and, once all have
            written their last row, at ``rows``, how many each of them has written.

    Returns:
        The run's id and the attempt's number.

    Raises:
        LedgerError: The directory holds another run, or one with other class names, or cannot be written.
    """
    directory = Path(directory)
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode()).hexdigest()[:16]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        meta = read_meta(directory)
        parts = sorted(p.name for p in directory.glob("*.parquet"))
        if meta is None and parts:
            raise LedgerError(f"`ledger`: {directory} holds {parts[0]} but no {META_FILE}; give another directory.")
        if meta is not None and meta["run"] != run:
            ours = f"run {run}" if run else "a new run"
            raise LedgerError(
                f"`ledger`: {directory} already holds {len(parts)} parts of run {meta['run']} (started "
                f"{meta['attempts'][0]['started']}), and this is {ours}. Give another directory, or resume that run "
                "from one of its checkpoints (`ckpt_path=`); if it is over and not needed, delete the directory."
            )
        fresh = meta is None
        if meta is None:
            meta = {"schema_version": SCHEMA_VERSION, "run": run or uuid.uuid4().hex[:12], "attempts": []}
        if meta["attempts"] and meta["attempts"][-1]["config_hash"] != digest:
            changed = differences([meta["attempts"][-1]["config"], config])
            warnings.warn(
                f"`ledger`: {directory} goes on with other settings ({changed}); a reader will not mix the two.",
                stacklevel=2,
            )
        attempt = len(meta["attempts"])
        started = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"start_step": start_step, "config": dict(config), "config_hash": digest}
        facts["columns"] = schema(pa.string()).names
        meta["attempts"].append({"attempt": attempt, "started": started, **facts})
        _note(meta, attempt, notes)
        try:
            write_json(directory / META_FILE, meta, exclusive=fresh)
        except FileExistsError as error:
            raise LedgerError(f"`ledger`: another run started in {directory} just now. Give each its own.") from error
    except OSError as error:
        raise LedgerError(f"`ledger`: cannot write to {directory}: {error}.") from error
    return str(meta["run"]), attempt


def note_run(directory: str | Path, attempt: int, notes: Mapping[str, Any]) -> None:
    """Add to ``meta.json`` what is known of an attempt only once it runs; ``class_names`` as in :func:`open_run`."""
    directory = Path(directory)
    meta = read_meta(directory)
    if meta is None:
        raise LedgerError(f"`ledger`: {directory / META_FILE} was removed while the run was writing.")
    _note(meta, attempt, notes)
    write_json(directory / META_FILE, meta)


def _note(meta: dict[str, Any], attempt: int, notes: Mapping[str, Any]) -> None:
    """Put notes into the description: class names once for the run, the rest with the attempt."""
    rest = dict(notes)
    given, known = rest.pop("class_names", None), class_names_in(meta)
    names = class_names_in({"class_names": list(given) if isinstance(given, tuple) else given})
    if None not in (names, known) and names != known:
        raise LedgerError(
            f"`ledger`: run {meta['run']} began with classes {_shown(known)} and goes on with {_shown(names)}, so that "
            "its labels would change their meaning. Go on with the same classes in the same order, or record a run of "
            "its own in another directory."
        )
    if names is not None:
        meta["class_names"] = list(names)
    meta["attempts"][attempt] |= rest


def _shown(names: tuple[str, ...] | None) -> str:
    return join_names(names or (), most=4)


def differences(configs: Sequence[Mapping[str, Any]]) -> str:
    """The settings in which configurations differ, as a phrase.

    Example:
        >>> differences([{"scope": "loss", "reweight": True}, {"scope": "target", "reweight": True}])
        'scope: loss, target'
    """
    shown = []
    for key in sorted({key for config in configs for key in config}):
        values = dict.fromkeys(str(config.get(key)) for config in configs)
        if len(values) > 1:
            shown.append(f"{key}: {', '.join(values)}")
    return "; ".join(shown)


class LedgerWriter:
    """Writes one rank's rows of one attempt.

    A part gets its final name only when it is complete on the disk, so a reader never sees half a file.

    Args:
        directory: The ledger that :func:`open_run` made.
        run: The run's id.
        attempt: The attempt's number.
        rank: This process's rank.

    Attributes:
        rows: Number of rows that are on the disk.
    """

    def __init__(self, directory: str | Path, run: str, attempt: int, rank: int) -> None:
        self._directory = Path(directory)
        self._run = run
        self._attempt = attempt
        self._rank = rank
        self.rows = 0
        self._id_type: pa.DataType | None = None
        self._pending: list[pa.Table] = []
        self._parts = 0
        self._failed = False

    @property
    def pending(self) -> int:
        """Number of rows that are in memory only."""
        return sum(table.num_rows for table in self._pending)

    def append(self, columns: Mapping[str, Any]) -> None:
        """Adds rows, kept in memory until :meth:`flush`.

        Args:
            columns: Columns but ``attempt`` and ``rank``, by name, as lists or arrays of one length; ids all int or all
                str. Nullable ones may be ``None`` or left out.

        Raises:
            LedgerError: Ids that are neither, or not of the run's type.
        """
        rows = len(columns["position"])
        if rows == 0:
            return
        ids = _ids(columns["id"])
        if self._id_type is not None and ids.type != self._id_type:
            raise LedgerError(f"ids were {self._id_type} and are now {ids.type}; a ledger holds one type of id.")
        self._id_type = ids.type
        ours = {"id": ids, "attempt": [self._attempt] * rows, "rank": [self._rank] * rows}
        arrays = dict.fromkeys(nullable_columns()) | dict(columns) | ours
        form = schema(ids.type)
        self._pending.append(pa.Table.from_arrays([_column(arrays[f.name], f.type, rows) for f in form], schema=form))

    def flush(self) -> None:
        """Commits what is in memory as one part.

        A failed write keeps its rows and is tried again at the next flush.

        Raises:
            LedgerError: The write failed twice in a row.
        """
        if not self._pending:
            return
        table = pa.concat_tables(self._pending)
        name = f"part-{self._run}-a{self._attempt}-r{self._rank}-{self._parts:06d}-n{table.num_rows}.parquet"
        try:
            with atomic_write(self._directory / name) as file:
                # No statistics: checksums do not cover them, and a query engine would believe them.
                pq.write_table(table, file, compression="zstd", write_page_checksum=True, write_statistics=False)
        except OSError as error:
            if self._failed:
                raise LedgerError(
                    f"`ledger`: {table.num_rows} rows could not be written to {self._directory}, twice in a row: "
                    f"{error}. Free the disk, or train without a ledger."
                ) from error
            self._failed = True
            return
        self._failed = False
        self._parts += 1
        self.rows += table.num_rows
        self._pending.clear()

    def close(self) -> None:
        """Commits the rest; what cannot be written is tried once more and then raised."""
        self.flush()
        self.flush()


def _ids(values: Any) -> pa.Array:
    try:
        ids = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise LedgerError(f"ids must be all int (below 2^63) or all str: {error}.") from error
    if ids.null_count:
        raise LedgerError(f"{ids.null_count} of {len(ids)} ids are missing (None); each sample needs one.")
    if pa.types.is_integer(ids.type):
        try:
            return ids.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise LedgerError(f"int ids must be below 2^63: {error}.") from error
    if pa.types.is_string(ids.type):
        return ids
    raise LedgerError(f"ids must be all int or all str, not {ids.type}.")


def _column(values: Any, kind: pa.DataType, rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(rows, kind)
    # NaN stands for "no value" on the device; null is its name on disk.
    array = pa.array(values, from_pandas=True)
    return array.cast(kind)
