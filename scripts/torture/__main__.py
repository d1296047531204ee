"""Try to lose, mix or falsify what this package has written: kills, damaged files, and several writers at once.

python -m scripts.torture --kills 500 --mutations 30000 --races 200 --markdown docs/guide/reliability.md

Prints a table of tries and failures, and ends with status 1 if there are any failures; 0 leaves an attack out. Every
try can be repeated: it depends on ``--seed`` and its own number alone, but for the moments at which the processes of a
race meet.
"""

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes must not wait for threads that they do not have

import torch

from scripts.benchmarks.benchmark_report import Report, add_numbers, as_markdown, write_json
from scripts.benchmarks.short_fits import silence
from scripts.provenance import facts, write_section
from scripts.torture.commands import COMMANDS
from scripts.torture.kills import kill_commands
from scripts.torture.mutations import mutate_files
from scripts.torture.races import race
from scripts.torture.tries import Tries

_CAPTION = """\
*refused*: ended in an error of this package. *held*: ended as without the attack; of mutations, the right values were
read (the change was in no value, or what was damaged was made anew). *undetected*: other values were read from a format
that has no checksum for them. *failures*: an error of another kind, a hang, a crash, other values in spite of a
checksum, a row that is lost, a mixture of old and new, or something that the next run did not clear away."""


def main() -> None:
    parser = argparse.ArgumentParser("python -m scripts.torture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_numbers(parser, kills=500, mutations=30_000, races=200, seed=0)
    parser.add_argument("--only", default="", help="names that contain this text")
    parser.add_argument("--out", help="JSON with every failure")
    parser.add_argument("--markdown", help="a file in which the table is replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    silence()
    warnings.simplefilter("ignore")
    known, found = facts("scripts.torture"), list[Tries]()
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        counts = {kill_commands: options.kills, mutate_files: options.mutations, race: options.races}
        for attack, count in counts.items():
            if not count:
                continue
            for tries in attack(folder / attack.__name__, COMMANDS, count, options.seed, options.only):
                found.append(tries)
                print(*_row(tries), *tries.failures[:3], sep="   ", flush=True)
    chosen = [name for name in ("kills", "mutations", "races") if getattr(options, name)]
    report = Report(
        " ".join(["torture", *chosen]),
        _HEADS,
        [_row(each) for each in found],
        _CAPTION,
        [vars(each) for each in found],
        text=2,
    )
    if options.out:
        write_json(options.out, report, known)
    print(as_markdown(report, known))
    if options.markdown:
        write_section(Path(options.markdown), report.section, as_markdown(report, known))
    sys.exit(any(each.failures for each in found))


_HEADS = ("attack", "on", "tries", "refused", "held", "undetected", "failures")


def _row(tries: Tries) -> list[str]:
    counts = (tries.count, tries.refused, tries.held, tries.undetected, len(tries.failures))
    return [tries.attack, tries.name, *(f"{count:,}" for count in counts)]


if __name__ == "__main__":
    main()
