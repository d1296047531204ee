"""Forked processes: their results, their deaths, and kills at a given file operation."""

import contextlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_mimic.errors import MimicError

#: Nothing here takes as long, unless it hangs.
SECONDS = 120.0
_WRITES = os.O_WRONLY | os.O_RDWR
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        kind: With a value, an error of the package, another error, by a signal, or not within the time.
        value: The value, or a description.
    """

    kind: Literal["value", "refused", "error", "killed", "hung"]
    value: Any = None


class Child:
    """A forked process that calls a function, with its output discarded.

    Args:
        act: The function; its value can be pickled.
        answer: File for the value.
        first: Called before.
    """

    def __init__(self, act: Callable[[], Any], answer: Path, first: Callable[[], None] | None = None) -> None:
        self._answer = answer
        answer.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            self._be_child(act, first)

    def _be_child(self, act: Callable[[], Any], first: Callable[[], None] | None) -> None:
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            if first is not None:
                first()
            try:
                kind, value = "value", act()
            except MimicError as error:
                kind, value = "refused", str(error)
            except SystemExit as error:
                kind, value = "refused", str(error.code)
            except BaseException as error:
                kind, value = "error", f"{type(error).__name__}: {error}"
            half = self._answer.with_suffix(".half")
            half.write_bytes(pickle.dumps((kind, value)))
            half.rename(self._answer)
        finally:
            os._exit(0)

    def wait(self, seconds: float = SECONDS) -> Ending:
        """Wait for its end; one that takes longer is killed."""
        end = time.monotonic() + seconds
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ending("hung", f"no end after {seconds:.0f} s")
            time.sleep(0.002)
        if not self._answer.exists():
            return Ending("killed", "the process was killed")
        kind, value = pickle.loads(self._answer.read_bytes())  # our own child's
        return Ending(kind, value)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class FileOperations:
    """Counts the file operations of this process that change something in a folder, and may kill it before one.

    Opening to write, renaming, linking, removing, making folders and syncing count.

    Args:
        folder: The folder.
        last: Number of the operation, from 0, before which the process is killed; ``None``: it is not.

    Attributes:
        count: Operations so far.
    """

    def __init__(self, folder: Path, last: int | None = None) -> None:
        self.count = 0
        self._folder, self._last = str(folder), last

    def begin(self) -> None:
        """Count from now on, for as long as the process lives."""
        real = os.fsync

        def fsync(descriptor: int) -> None:
            self._next()
            real(descriptor)

        os.fsync = fsync  # it has no audit event
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            if not isinstance(path, int) and flags & _WRITES and self._folder in os.fsdecode(path):
                self._next()
        elif event in _EVENTS and any(isinstance(each, str | Path) and self._folder in str(each) for each in given):
            self._next()

    def _next(self) -> None:
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
