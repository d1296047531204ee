"""The studies behind the tables of docs/: choices on some seeds, reports on others, as Hydra multiruns.

    python -m scripts.studies demo
    python -m scripts.studies paper --data cifar10 --parts probe quality data.root=/data

A run that is done is not done again: after an interrupt the same command goes on, and with more seeds it adds them.
What is not an option of its own (key=value) goes to Hydra, for every run.
"""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console

from scripts.provenance import write_section
from scripts.studies import paper
from scripts.studies.lab import StudyError
from scripts.studies.study import Study, carry_out
from scripts.studies.tables import markdown, show, write

STUDIES = (
    "demo", "aligned", "start", "depth", "curation", "reference_quality", "weak_references",
    "diagnosis", "clip", "pairs", "paper",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--parts", nargs="+", help="of the study; all, if left out")
    parser.add_argument("--data", choices=paper.DATA, default="digits", help="of the study `paper` (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the report")
    parser.add_argument("--out", type=Path, help="goes on with what it holds (outputs/studies/STUDY)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (%(default)s)")
    parser.add_argument("--markdown", type=Path, help="a page whose section on this study is written anew")
    more = [word for word in sys.argv[1:] if "=" in word and not word.startswith("--")]
    arguments = parser.parse_args([word for word in sys.argv[1:] if word not in more])
    study: Study = (
        paper.study(arguments.data)
        if arguments.study == "paper"
        else import_module(f"scripts.studies.{arguments.study}").STUDY
    )
    name = arguments.study if arguments.study != "paper" else f"paper_{arguments.data}"
    parts = arguments.parts or list(study.parts)
    if unknown := [part for part in parts if part not in study.parts]:
        parser.error(f"--parts: {', '.join(unknown)}: {arguments.study} has {', '.join(study.parts)}")
    out, console = arguments.out or Path("outputs/studies") / name, Console()
    for part in parts:
        folder = out / "tables" / part
        try:
            outcome = carry_out(study, part, out, arguments.seeds, arguments.jobs, more, console)
        except StudyError as error:
            parser.error(str(error))
        show(outcome.tables, console)
        for path in write(outcome.tables, outcome.facts, folder):
            console.print(f"  {path}", highlight=False)
        if arguments.markdown:
            write_section(arguments.markdown, f"study {name} {part}", markdown(outcome.tables, outcome.facts))


if __name__ == "__main__":
    main()
