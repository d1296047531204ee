"""The ledger of one run on all its ranks."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_mimic import distributed
from lightning_mimic.errors import LedgerError
from lightning_mimic.ledger import Checkpoint, LedgerWriter, OpenRun, open_run
from lightning_mimic.reweighting.recorder import Position, ScoreRecorder
from lightning_mimic.version import __version__


class RunLedger:
    """The ledger of one run on all its ranks: opened by the first for all, and ended by all together.

    Args:
        directory: The ledger.
        config: What decides the meaning of scores.
        step: Optimizer steps done before.
        progress: From :meth:`progress` of the run that is continued; its ``run`` alone of one that left no state; empty
            for a new one.
        notes: More for the ledger's description.

    Attributes:
        writer: Of this rank's rows.

    Raises:
        LedgerError: See :func:`~lightning_mimic.ledger.open_run`; on all ranks together.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        step: int,
        progress: Mapping[str, Any],
        notes: Mapping[str, Any],
    ) -> None:
        # Of the whole run: the process group may be gone when it ends.
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
        self.writer = LedgerWriter(directory, self._run, self._attempt, self._rank, ids, token=self._token)
        self._scored: tuple[int, int, int] | None = None
        # A state was given for a checkpoint; the description notes that when the run goes on, as it is saved by then.
        self._state_given = False
        self._checkpointed = False
        # Rows by rank, as the description has them.
        self._noted: list[int] = []

    def scored(self, position: Position) -> None:
        """Note that a micro-batch was scored, on the way to :meth:`progress`."""
        self._note_checkpoint()
        self._scored = position.epoch, position.step, position.batch

    def progress(self, recorder: ScoreRecorder) -> dict[str, Any]:
        """Write the scores of this rank so far, and return how far the run has come, for a checkpoint.

        A checkpoint has the first rank's state alone. If its rows cannot be written, although that is tried again, they
        are in this state, and the ledger gets them when the run is resumed.

        Raises:
            MimicError: Another rank cannot write its rows.

        Warns:
            UserWarning: The first rank cannot.
        """
        state: dict[str, Any] = {"run": self._run, "attempt": self._attempt, "token": self._token}
        try:
            recorder.commit()
        except LedgerError as error:
            if self._rank != 0 or not isinstance(error.__cause__, OSError):
                raise
            state["unwritten"] = torch.frombuffer(bytearray(self.writer.pending_rows()), dtype=torch.uint8)
            warnings.warn(f"{error} A checkpoint that is saved now holds them.", stacklevel=4)
        self._state_given = True
        return state if self._scored is None else state | {"scored": list(self._scored)}

    def note(self, notes: Mapping[str, Any]) -> None:
        """Add facts about the run to the ledger's description; on the first rank, until it is closed."""
        if self._opened is not None:
            self._opened.note(notes)

    def finish(self, recorder: ScoreRecorder) -> None:
        """Write the last scores of all ranks, then note how many rows each of them has written; on every rank.

        Raises:
            MimicError: Some rank could not; on all of them together.
        """
        if distributed.world_size() != self._ranks:
            recorder.commit()
            warnings.warn(
                f"this run began on {self._ranks} ranks and ends with a process group of {distributed.world_size()}, "
                "so that its ledger cannot note that all of them have written their rows. End the `with` block (or "
                "call `finish()`) before the process group is destroyed.",
                stacklevel=5,
            )
            return
        rows = distributed.on_all_ranks(recorder.commit, "could not write its last scores")
        by_rank = distributed.gather_objects(rows)
        distributed.on_all_ranks(lambda: self._note_rows(by_rank), "could not complete the ledger's description")

    def close(self, recorder: ScoreRecorder) -> None:
        """Write the last scores of this rank, and let others open the run; can be called again.

        It waits for no other rank, because after an error there may be none.
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
        """Note in the ledger that there is a checkpoint to resume from, unless that is known."""
        if self._state_given and not self._checkpointed:
            self.note({"checkpointed": True})
            self._checkpointed = True

    def _note_rows(self, by_rank: list[int]) -> None:
        """Note in the ledger that it is complete, unless that is known."""
        if by_rank != self._noted:
            self.note({"rows": by_rank})
        self._noted = by_rank


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
