"""Ledger of one run across all its ranks."""

import contextlib
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_mimic import distributed
from lightning_mimic.errors import LedgerError
from lightning_mimic.ledger import Checkpoint, Ledger, LedgerWriter, OpenRun, open_run
from lightning_mimic.ledger.completeness import listed
from lightning_mimic.reweighting.recorder import Position, ScoreRecorder
from lightning_mimic.version import __version__


class RunLedger:
    """Manage the ledger of one run across all ranks: the first rank opens it, and all ranks finish it together.

    Args:
        directory: Folder of the ledger.
        config: Settings that determine the meaning of the scores.
        step: Number of optimizer steps done before.
        progress: State from :meth:`progress` of the run to resume; only its ``run`` if that run left no state; empty
            for a new run.
        notes: Further facts for the ledger's description.

    Attributes:
        writer: Writer of this rank's rows.

    Raises:
        LedgerError: The run cannot be opened; see :func:`~lightning_mimic.ledger.open_run`. Raised on all ranks.

    Warns:
        UserWarning: The hosts of some ranks do not share the first rank's folder.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        step: int,
        progress: Mapping[str, Any],
        notes: Mapping[str, Any],
    ) -> None:
        # Stored for the whole run, because the process group may be destroyed before the run ends.
        self._ranks = distributed.world_size()
        self._opened: OpenRun | None = None
        facts: tuple[str, int, str, str | None] | str = ""
        if distributed.rank() == 0:
            try:
                self._opened = open_run(
                    directory,
                    config,
                    step,
                    progress.get("run"),
                    {"package_version": __version__, "ranks": self._ranks, **notes},
                    _checkpoint(progress),
                )
                facts = self._opened.run, self._opened.attempt, self._opened.token, self._opened.ids
            except LedgerError as error:
                facts = str(error)
        facts = distributed.broadcast(facts)
        if isinstance(facts, str):
            raise LedgerError(facts)
        self._run, self._attempt, self._token, ids = facts
        self._rank = distributed.rank()
        if self._ranks > 1:
            _check_folder(directory, self._token)
        self.writer = LedgerWriter(directory, self._run, self._attempt, self._rank, ids, token=self._token)
        self._scored: tuple[int, int, int] | None = None
        # Whether a state was returned for a checkpoint. The description notes the checkpoint at the next scored batch,
        # as it has been saved by then.
        self._state_given = False
        self._checkpointed = False
        # Numbers of rows by rank in the ledger's description.
        self._noted: list[int] = []

    def scored(self, position: Position) -> None:
        """Remember the position of the last scored micro-batch, for :meth:`progress`."""
        self._note_checkpoint()
        self._scored = position.epoch, position.step, position.batch

    def progress(self, recorder: ScoreRecorder) -> dict[str, Any]:
        """Write this rank's scores so far, and return the progress of the run, for a checkpoint.

        A checkpoint holds only the first rank's state. If the first rank cannot write its rows, even after a retry, the
        state contains them, and they are written to the ledger when the run is resumed.

        Raises:
            MimicError: Another rank cannot write its rows.

        Warns:
            UserWarning: The first rank cannot write its rows.
        """
        state: dict[str, Any] = {"run": self._run, "attempt": self._attempt, "token": self._token}
        try:
            recorder.commit()
        except LedgerError as error:
            if self._rank != 0 or not isinstance(error.__cause__, OSError):
                raise
            state["unwritten"] = torch.frombuffer(bytearray(self.writer.pending_rows()), dtype=torch.uint8)
            warnings.warn(f"{error} A checkpoint that is saved now contains these rows.", stacklevel=4)
        self._state_given = True
        return state if self._scored is None else state | {"scored": list(self._scored)}

    def note(self, notes: Mapping[str, Any]) -> None:
        """Add facts about the run to the ledger's description; on other ranks and after closing, do nothing."""
        if self._opened is not None:
            self._opened.note(notes)

    def finish(self, recorder: ScoreRecorder) -> None:
        """Write the last scores of all ranks, then record each rank's number of rows. Must be called on every rank.

        Raises:
            MimicError: A rank could not write its scores. Raised on all ranks.
        """
        if distributed.world_size() != self._ranks:
            recorder.commit()
            warnings.warn(
                f"this run began on {self._ranks} ranks and ends with a process group of {distributed.world_size()}, "
                "so its ledger cannot record that all ranks have written their rows. End the `with` block (or call "
                "`finish()`) before the process group is destroyed.",
                stacklevel=5,
            )
            return
        rows = distributed.on_all_ranks(recorder.commit, "could not write its last scores")
        by_rank = distributed.gather_objects(rows)
        distributed.on_all_ranks(lambda: self._note_rows(by_rank), "could not complete the ledger's description")

    def close(self, recorder: ScoreRecorder) -> None:
        """Write the last scores of this rank, and release the run so that others can open it. Can be called repeatedly.

        It does not wait for other ranks, which may have ended after an error.
        """
        try:
            rows = recorder.commit()
            self._note_checkpoint()
            if self._ranks == 1:
                self._note_rows([rows])
        finally:
            opened, self._opened = self._opened, None
            if opened is not None:
                opened.close()

    def _note_checkpoint(self) -> None:
        """Record in the ledger that a checkpoint to resume from exists, unless it is recorded already."""
        if self._state_given and not self._checkpointed:
            self.note({"checkpointed": True})
            self._checkpointed = True

    def _note_rows(self, by_rank: list[int]) -> None:
        """Record each rank's number of rows in the ledger, which marks it complete, unless that is recorded already."""
        if by_rank != self._noted:
            self.note({"rows": by_rank})
        self._noted = by_rank


def _check_folder(directory: Path, token: str) -> None:
    """Create the folder on hosts that do not share the first rank's folder, and warn of them on the first rank."""

    def shared() -> bool:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"`ledger`: {directory} cannot be created on {platform.node()}: {error}.") from error
        with contextlib.suppress(LedgerError):
            return bool(Ledger(directory).meta["attempts"][-1].get("token") == token)
        return False

    is_shared = distributed.on_all_ranks(shared, "has no folder for the ledger")
    seen = distributed.gather_objects((is_shared, platform.node()))
    unshared = [f"rank {rank} on {host}" for rank, (sees, host) in enumerate(seen) if not sees]
    if unshared and distributed.rank() == 0:
        warnings.warn(
            f"`ledger`: {directory} is not shared by all ranks: {listed(unshared)} cannot see the files that rank 0 on "
            f"{seen[0][1]} writes there. Each host stores the rows of its own ranks. To read the ledger or to resume "
            "the run, copy the files of each host's folder into the folder of rank 0. A folder shared by all hosts, or "
            "a URL such as s3://bucket/run, needs no copying.",
            stacklevel=6,
        )


def _checkpoint(progress: Mapping[str, Any]) -> Checkpoint | None:
    if "attempt" not in progress:
        return None
    attempt, token = progress["attempt"], progress.get("token")
    scored, rows = progress.get("scored"), progress.get("unwritten")
    known = {
        "run": isinstance(progress.get("run"), str),
        "attempt": _is_count(attempt),
        "token": token is None or isinstance(token, str),
        "scored": scored is None or (isinstance(scored, list) and len(scored) == 3 and all(map(_is_count, scored))),
        "unwritten": rows is None or (isinstance(rows, torch.Tensor) and rows.dtype == torch.uint8),
    }
    wrong = next((name for name, is_right in known.items() if not is_right), None)
    if wrong is not None:
        raise LedgerError(
            f"`ledger`: the checkpoint's state of the run is damaged: its `{wrong}` is {progress.get(wrong)!r}. Resume "
            "from another checkpoint."
        )
    return Checkpoint(
        attempt,
        None if scored is None else (scored[0], scored[1], scored[2]),
        None if rows is None else rows.cpu().numpy().tobytes(),
        token,
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
