"""A run that is written: started or continued in a ledger's folder, and locked until it is closed."""

import contextlib
import errno
import os
import platform
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from lightning_mimic.errors import LedgerError, join_names
from lightning_mimic.files import remove_leftovers
from lightning_mimic.ledger.columns import schema
from lightning_mimic.ledger.description import (
    META_FILE,
    SCHEMA_VERSION,
    as_json,
    batch_differences,
    class_names_in,
    config_hash,
    differences,
    is_torn,
    last_attempt,
    meaning,
    meta_path,
    next_meta_path,
    read_meta,
    write_meta,
)
from lightning_mimic.ledger.reader import Ledger
from lightning_mimic.ledger.writer import LedgerWriter
from lightning_mimic.stores import as_store_path, path_of

#: Held while a run is written. The file stays; the system ends the lock with the process.
LOCK_FILE = "_lock"

#: What a file system without locks answers.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds of the run that it is of.

    Attributes:
        attempt: That saved it.
        scored: Epoch, step and batch of the last micro-batch that this attempt had scored; ``None``: of none.
        unwritten: Rows of its first rank that could not be written then (:meth:`LedgerWriter.pending_rows`).
        token: Of that attempt; ``None``: an earlier release saved it.
    """

    attempt: int
    scored: tuple[int, int, int] | None = None
    unwritten: bytes | None = None
    token: str | None = None


class OpenRun:
    """An attempt that is being written, made by :func:`open_run`. No other process can open the run until it is closed.

    A store has no locks: a process that opens the run there goes on with it, and this attempt ends with its next part.

    Attributes:
        run: The run's id.
        attempt: The attempt's number.
        token: Random text that no other attempt has, not even one of the same number in a copy of the ledger.
        ids: ``"int"`` or ``"str"``, the kind of the ids that the run has so far; ``None`` where that is not known.
    """

    def __init__(self, directory: Path, meta: Mapping[str, Any], lock: FileLock | None) -> None:
        self._directory = directory
        self._lock = lock
        self.run: str = meta["run"]
        self.attempt = len(meta["attempts"]) - 1
        self.token: str = meta["attempts"][-1]["token"]
        attempts = meta["attempts"] if meta["attempts"][-1].get("continues", 0) is not None else []
        self.ids: str | None = next((facts["ids"] for facts in reversed(attempts) if "ids" in facts), None)

    def note(self, notes: Mapping[str, Any]) -> None:
        """Add to the description what is known of the attempt only once it runs.

        Args:
            notes: As for :func:`open_run`.

        Raises:
            LedgerError: The description was removed or replaced while the run was writing, as on a store by another
                process that goes on with the run; or it cannot hold the notes or be written.
        """
        path = meta_path(self._directory)  # looked up before it is read, so that it is not newer
        meta = read_meta(self._directory)
        if meta is None:
            raise LedgerError(f"`ledger`: {path} was removed while the run was writing.")
        if meta["run"] != self.run or len(meta["attempts"]) != self.attempt + 1:
            raise LedgerError(
                f"`ledger`: {path} was replaced while the run was writing: it describes {len(meta['attempts'])} "
                f"attempts of run {meta['run']}, and this is attempt {self.attempt} of run {self.run}."
            )
        _note(meta, notes)
        _warn_of_other_data(self._directory, meta, notes)
        following = next_meta_path(path, self._directory)
        try:
            write_meta(following, meta, exclusive=following != path)
        except FileExistsError as error:
            raise LedgerError(
                f"`ledger`: {path} was replaced while the run was writing, by another process."
            ) from error
        except OSError as error:
            raise _cannot_write(self._directory, error) from error

    def close(self) -> None:
        """Let others open the run; can be called again."""
        _release(self._lock)


def open_run(
    directory: str | Path,
    config: Mapping[str, Any],
    start_step: int,
    run: str | None,
    notes: Mapping[str, Any],
    checkpoint: Checkpoint | None = None,
) -> OpenRun:
    """Start an attempt in a ledger; called by one rank alone, before any writer.

    Rows of the attempt that it continues are superseded from ``start_step`` on, as are all rows of other attempts. None
    is ever deleted.

    Args:
        directory: The ledger, or its URL; made if it is not there.
        config: What decides the meaning of scores; attempts that differ in it are not mixed.
        start_step: Optimizer steps done before this attempt.
        run: The run that is continued (a resumed checkpoint's, or an earlier fit's of the same object), or
            ``None`` for a new one.
        notes: More for the description, without such weight. ``class_names``, names in the order of the labels, is kept
            once for all attempts. A reader looks at ``ranks``, the number of ranks that write, and, once all have
            written their last row, at ``rows``, how many each of them has written.
        checkpoint: That is resumed; if it is not known, the run's last attempt is continued.

    Raises:
        LedgerError: The directory is being written by another process, holds another run, or one with other class
            names, or lacks rows that the checkpoint has trained on; or it cannot be written.

    Warns:
        UserWarning: The run goes on with other settings; it starts again, because it was killed before its first
            checkpoint; its earlier rows are in another directory; or the file system has no locks.
    """
    directory = path_of(directory, "ledger")
    ours = f"run {run}, resumed at step {start_step}" if run else "a new run"
    with contextlib.ExitStack() as failed:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = _locked(directory, ours)
            failed.callback(_release, lock)
            remove_leftovers(directory)
            path = meta_path(directory)  # looked up before it is read, so that it is not newer
            torn = is_torn(directory)
            meta = _known(directory, torn)
            parts = sorted(path.name for path in directory.glob("*.parquet"))
            facts = {"start_step": start_step, "config": as_json(dict(config))}
            facts["config_hash"] = config_hash(facts["config"])
            if meta is None:
                if run is not None and start_step > 0:
                    _warn(f"{directory} is new, and this is {ours}: the rows before that step are elsewhere.")
                    facts["elsewhere"] = True
                meta = {"schema_version": SCHEMA_VERSION, "run": run or uuid.uuid4().hex[:12], "attempts": []}
            elif run is None and start_step == 0 and _can_start_again(meta, facts, notes):
                _warn(
                    f"{directory} holds {len(parts)} parts of run {meta['run']}, which ended before its first "
                    f"checkpoint. It starts again as attempt {len(meta['attempts'])}: the earlier rows stay on the "
                    "disk, and no reader counts them."
                )
                facts["continues"] = None
            elif meta["run"] != run:
                raise LedgerError(
                    f"`ledger`: {directory} already holds {len(parts)} parts of run {meta['run']} (started "
                    f"{meta['attempts'][0]['started']}), and this is {ours.split(',')[0]}. Give another directory, or "
                    "resume that run from one of its checkpoints (`ckpt_path=`); if it is over and not needed, delete "
                    "the directory."
                )
            else:
                facts |= _continuation(directory, meta, facts, checkpoint)
            _warn_of_running(directory, meta)
            _begin(meta, facts, notes)
            _warn_of_other_data(directory, meta, notes)
            _write_begun(directory, path, meta, torn)
        except LedgerError:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise _cannot_write(directory, error) from error
        failed.pop_all()
    return OpenRun(directory, meta, lock)


def _locked(directory: Path, ours: str) -> FileLock | None:
    """Return the lock of a run, held if the file system has locks; ``None`` on a store."""
    if as_store_path(directory):
        return None
    # Not the kind of lock that is a file to be removed, which would outlive a killed process.
    lock = FileLock(directory / LOCK_FILE, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise LedgerError(
            f"`ledger`: {directory} is being written by {_writer(directory)}, and this is {ours}. Wait for its end, or "
            "end it (in the same process: call `close()`), or give another directory."
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        _warn(
            f"the file system of {directory} has no locks ({error}), so that nothing keeps a second process from "
            "writing the same run. Start none."
        )
    return lock


def _release(lock: FileLock | None) -> None:
    if lock is not None:
        lock.release()


def _writer(directory: Path) -> str:
    """Who holds the lock, as a phrase."""
    try:
        meta = read_meta(directory)
    except LedgerError:
        meta = None
    if meta is None:
        return "another run, which is just starting"
    return last_attempt(meta)


def _known(directory: Path, torn: bool) -> dict[str, Any] | None:
    """Return the description of a run that was started before; ``None`` in a new directory."""
    meta = None if torn else read_meta(directory)
    part = next(directory.glob("*.parquet"), None)
    if meta is None and part is not None:
        why = f"{meta_path(directory).name} is empty or damaged" if torn else f"no {META_FILE}"
        raise LedgerError(f"`ledger`: {directory} holds {part.name} but {why}; give another directory.")
    return meta


def _can_start_again(meta: Mapping[str, Any], facts: Mapping[str, Any], notes: Mapping[str, Any]) -> bool:
    """Whether a run was killed, or scored nothing, before a checkpoint was saved, and is now started as it was."""
    last = meta["attempts"][-1]
    # Earlier releases did not note whether there are checkpoints.
    none_saved = all(attempt.get("checkpointed") is False for attempt in meta["attempts"])
    same = last["config_hash"] == facts["config_hash"] and last.get("data") == as_json(notes.get("data"))
    return none_saved and same and not any(last.get("rows", ()))


def _continuation(
    directory: Path,
    meta: Mapping[str, Any],
    facts: Mapping[str, Any],
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
    """Return what an attempt notes of the one that it continues, after comparing the two."""
    latest = len(meta["attempts"]) - 1
    before = meta["attempts"][latest if checkpoint is None else min(checkpoint.attempt, latest)]
    changed = differences([meaning(before["config"]), meaning(facts["config"])])
    if changed:
        _warn(f"{directory} goes on with other settings ({changed}); a reader will not mix the two.")
    if checkpoint is None:
        return {}
    tokens = {checkpoint.token, before.get("token")}
    if checkpoint.attempt <= latest and len(tokens - {None}) > 1:
        raise LedgerError(
            f"`ledger`: attempt {checkpoint.attempt} of run {meta['run']} in {directory} is not the one that saved the "
            "checkpoint, which wrote to another directory; its rows are of another training. Give the directory that "
            "it wrote to, or a new one."
        )
    if checkpoint.scored is None:
        return {"continues": checkpoint.attempt}
    _check_rows(directory, checkpoint, checkpoint.scored)
    return {"continues": checkpoint.attempt, "scored": list(checkpoint.scored)}


def _check_rows(directory: Path, checkpoint: Checkpoint, scored: tuple[int, int, int]) -> None:
    """Raise ``LedgerError`` if rows are not there that a checkpoint has trained on, and that it does not hold."""
    (epoch, step, batch), attempt = scored, checkpoint.attempt
    ledger = Ledger(directory)
    behind = ledger.behind(attempt, scored)
    if checkpoint.unwritten is not None and 0 in behind:
        parts = len(ledger.parts_without_gap(attempt, 0))
        writer = LedgerWriter(directory, ledger.meta["run"], attempt, 0, parts=parts)
        writer.append_rows(checkpoint.unwritten)
        writer.commit()
        behind = ledger.behind(attempt, scored)
    if behind:
        raise LedgerError(
            f"`ledger`: the checkpoint has trained on what attempt {attempt} scored up to step {step} (epoch {epoch}, "
            f"batch {batch}), and {directory} lacks some of these rows: {'; '.join(behind.values())}. Resume from an "
            "earlier checkpoint, or give another directory as `ledger`."
        )


def _begin(meta: dict[str, Any], facts: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Add an attempt to the description."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    begun = {
        "attempt": len(meta["attempts"]),
        "token": uuid.uuid4().hex[:12],
        "started": started,
        "host": f"{platform.node()}, process {os.getpid()}",
    }
    columns = schema(pa.string()).names
    meta["attempts"].append({**begun, **facts, "columns": columns, "checkpointed": False})
    _note(meta, notes)


def _write_begun(directory: Path, path: Path, meta: Mapping[str, Any], torn: bool) -> None:
    """Write the description of a run whose last attempt was just added.

    Args:
        directory: The ledger.
        path: Path of the description so far.
        meta: The new one.
        torn: The one so far is damaged.
    """
    first = len(meta["attempts"]) == 1
    following = next_meta_path(directory / META_FILE if first else path, directory)
    try:
        write_meta(following, meta, exclusive=following != path or (first and not torn))
    except FileExistsError as error:  # on a store, and where the file system has no locks
        raise LedgerError(f"`ledger`: another run started in {directory} just now. Give each its own.") from error


def _note(meta: dict[str, Any], notes: Mapping[str, Any]) -> None:
    """Put notes into the description: class names once for the run, the rest with the last attempt."""
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
    meta["attempts"][-1] |= rest


def _shown(names: tuple[str, ...] | None) -> str:
    return join_names(names or (), most=4)


def _warn_of_other_data(directory: Path, meta: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Warn if the last attempt goes on with other data or batches of another size, as is noted just now."""
    attempts = meta["attempts"]
    before = attempts[-1].get("continues", len(attempts) - 2)
    if before is None or before < 0:
        return
    data = [attempts[each].get("data") for each in (before, -1)]
    changed = "" if "data" not in notes or None in data else differences(data)
    if changed:
        _warn(f"{directory} goes on with other data ({changed}); samples of one id are put together.")
    changed = batch_differences([attempts[before], attempts[-1]], notes.keys())
    if changed:
        _warn(
            f"{directory} goes on with other settings ({changed}): scores mean the same, weights are over batches of "
            "another size."
        )


def _warn_of_running(directory: Path, meta: Mapping[str, Any]) -> None:
    """Warn if the last attempt may still run, as on a store nothing shows whether it does."""
    if as_store_path(directory) and meta["attempts"] and "rows" not in meta["attempts"][-1]:
        _warn(
            f"{last_attempt(meta)} in {directory} has not ended. If its process still runs, it stops when it writes "
            "its next part, as this one goes on with the run."
        )


def _warn(message: str) -> None:
    warnings.warn(f"`ledger`: {message}", stacklevel=4)


def _cannot_write(directory: Path, error: Exception) -> LedgerError:
    return LedgerError(f"`ledger`: cannot write to {directory}: {error}.")
