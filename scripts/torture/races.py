"""Several writers of one output at once."""

import functools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.torture.commands import Command, copy_of
from scripts.torture.processes import Child
from scripts.torture.tries import Tries

WRITERS = 3


def race(folder: Path, commands: Sequence[Command], count: int, seed: int, only: str) -> Iterator[Tries]:
    """Start each command several times at about the same moment, with one output.

    Args:
        folder: For everything that is written; made.
        commands: What is run.
        count: Races in all, about.
        seed: Of the moments at which they start.
        only: Names that contain this text.
    """
    chosen = [command for command in commands if only in command.name]
    for command in chosen:
        yield _races(folder, command, max(1, count // len(chosen)), seed)


def _act(command: Command, work: Path, gate: int, held: int, pause: float) -> None:
    """Run a command in a child, once nobody holds the gate's other end any more, and a pause later."""
    os.close(held)
    os.read(gate, 1)
    time.sleep(pause)
    command.act(work, "out")


def _races(folder: Path, command: Command, count: int, seed: int) -> Tries:
    tries, draws = Tries(f"{WRITERS} at once", command.name), random.Random(seed)
    template, work, system = folder / "template", folder / "work", folder / "system"
    for each in (template, system):
        each.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(system)
    answers = [folder / f"{number}.answer" for number in range(WRITERS)]
    try:
        Child(lambda: command.prepare(template), answers[0]).wait()
        copy_of(template, work)
        Child(lambda: command.act(work, "out"), answers[0]).wait()
        whole = Child(lambda: command.content(work, "out"), answers[0]).wait().value
        for number in range(count):
            tries.count += 1
            copy_of(template, work)
            children, (gate, held) = [], os.pipe()
            for answer in answers:
                act = functools.partial(_act, command, work, gate, held, draws.choice((0, 0, 0.01, 0.05)))
                children.append(Child(act, answer))
            os.close(held)  # all of them begin now: forking a large process takes longer than a short command
            os.close(gate)
            endings = [child.wait() for child in children]
            bad = [f"{ending.kind}: {ending.value}" for ending in endings if ending.kind not in ("value", "refused")]
            done = sum(ending.kind == "value" for ending in endings)
            content = Child(lambda: command.content(work, "out"), answers[0]).wait().value
            tries.refused += any(ending.kind == "refused" for ending in endings)
            if bad or content != whole or not done or (command.exclusive and done > 1):
                tries.fail(number, f"{done} of {WRITERS} succeeded; {'; '.join(bad) or 'the output is another one'}")
            else:
                tries.held += 1
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder)
    return tries
