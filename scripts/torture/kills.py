"""Kill a run just before each of its file operations, or at a random moment, and look at what is left."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.torture.commands import Command, copy_of
from scripts.torture.processes import Child, Ending, FileOperations
from scripts.torture.tries import Tries


def kill_commands(folder: Path, commands: Sequence[Command], count: int, seed: int, only: str) -> Iterator[Tries]:
    """Kill each command at file operations, and fits also at random moments, about half of the kills each.

    Args:
        folder: For everything that is written; made.
        commands: What is run.
        count: Kills in all, about.
        seed: Of the choice among more file operations than that, and of the moments.
        only: Names that contain this text.
    """
    places, moments = "kill at a file operation", "kill at a random moment"
    chosen = [command for command in commands if only in command.name]
    fits = [command for command in chosen if command.name == "fit"]
    for command in chosen:
        with Arena(folder / "places", command) as arena:
            total = arena.operations()
            share = min(total, max(1, count // 2 // max(1, len(chosen))))
            tries = Tries(places, f"{command.name} ({total} operations)")
            for place in sorted(random.Random(seed).sample(range(total), share)):
                arena.attack(tries, place, place=place)
            yield tries
    for command in fits:
        with Arena(folder / "moments", command) as arena:
            draws, kills = random.Random(seed), 0
            tries = Tries(moments, command.name)
            while kills < count // 2:
                shares = [draws.random() for _ in range(draws.randint(1, 4))]
                arena.attack(tries, tries.count, moments=shares)
                kills += len(shares)
            tries.name += f" ({kills} kills)"
            yield tries


class Arena:
    """A place in which one command runs, is killed, and runs again.

    Args:
        folder: Made, and removed at the end.
        command: What is run.
    """

    def __init__(self, folder: Path, command: Command) -> None:
        self._folder, self._command = folder, command
        self._template, self._work = folder / "template", folder / "work"
        # Not within the folder, where a process that is to be killed would be when it writes it.
        self._answer, self._system = folder.with_name(f"{folder.name}.answer"), folder / "system"

    def __enter__(self) -> "Arena":
        for each in (self._template, self._system):
            each.mkdir(parents=True, exist_ok=True)
        self._before, tempfile.tempdir = tempfile.tempdir, str(self._system)
        self._end(Child(lambda: self._command.prepare(self._template), self._answer))
        copy_of(self._template, self._work)
        begin = time.monotonic()
        self._end(self._run("out"))
        self._seconds = time.monotonic() - begin
        self._whole = self._content("out")
        if self._whole is None:
            raise RuntimeError(f"{self._command.name} has written nothing")
        return self

    def __exit__(self, *_: object) -> None:
        tempfile.tempdir = self._before
        shutil.rmtree(self._folder, ignore_errors=True)

    def operations(self) -> int:
        """Number of the command's file operations."""
        operations = FileOperations(self._folder)

        def count() -> int:
            self._command.act(self._work, "out")
            return operations.count

        copy_of(self._template, self._work)
        return int(Child(count, self._answer, operations.begin).wait().value)

    def attack(self, tries: Tries, number: int, place: int | None = None, moments: Sequence[float] = ()) -> None:
        """Kill the command once or several times, let it end, and count what came of it.

        Args:
            tries: Is added to.
            number: Of this try.
            place: File operation before which it is killed; or
            moments: of each kill, as a share of the time that the command takes.
        """
        tries.count += 1
        copy_of(self._template, self._work)
        if place is not None:
            self._run("out", FileOperations(self._folder, place)).wait()
        for moment in moments:
            child = self._run("out")
            time.sleep(moment * self._seconds)
            child.kill()
            child.wait()
        problem = self._problem()
        if problem:
            tries.fail(number, problem)
        else:
            tries.held += 1

    def _problem(self) -> str:
        """What is wrong after a kill and after the next runs; empty, if nothing is."""
        left = self._content("out")
        if isinstance(left, Ending):
            return f"after the kill: {left.value}"
        if not (left is None or left == self._whole or (self._command.grows and set(left) <= set(self._whole))):
            return "after the kill: neither what was there before nor what is there after the whole run"
        again = self._run("out").wait()
        if again.kind != "value" and not (again.kind == "refused" and left == self._whole):
            return f"run again: {again.kind}: {again.value}"
        if self._content("out") != self._whole:
            return f"run again: not what a whole run writes, {_difference(self._content('out'), self._whole)}"
        following = self._run("next").wait()
        if following.kind != "value" or self._content("next") != self._whole:
            return f"the run after it: {following.kind}: {following.value}"
        names = [str(path.relative_to(self._folder)) for path in self._work.rglob("*")]
        remain = [name for name in names if Path(name).name.startswith(".") or name.endswith((".tmp", ".part"))]
        # fsspec, by which Lightning saves checkpoints, leaves files named tmp... there.
        remain += [name for name in os.listdir(self._system) if not name.startswith("tmp")]
        return f"left behind: {remain}" if remain else ""

    def _run(self, name: str, operations: FileOperations | None = None) -> Child:
        first = None if operations is None else operations.begin
        return Child(lambda: self._command.act(self._work, name), self._answer, first)

    def _content(self, name: str) -> Any:
        """The output's content, read in a process of its own; an :class:`Ending` if it cannot be read."""
        ending = Child(lambda: self._command.content(self._work, name), self._answer).wait()
        return ending.value if ending.kind == "value" else ending

    def _end(self, child: Child) -> None:
        ending = child.wait()
        if ending.kind != "value":
            raise RuntimeError(f"{self._command.name} cannot run undisturbed: {ending.kind}: {ending.value}")


def _difference(found: Any, whole: Any) -> str:
    if not isinstance(found, list) or len(found) != len(whole):
        return f"{found!r:.200}"
    return next(
        (f"{one!r:.120} for {other!r:.120}" for one, other in zip(found, whole, strict=True) if one != other), ""
    )
