"""What a study is: parts, each with a choice and a report, on seeds that never meet."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from scripts.provenance import facts
from scripts.studies.lab import Lab, StudyError
from scripts.studies.tables import Table

#: Settings that were chosen; what JSON can hold.
Chosen = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One question of a study.

    Attributes:
        report: Runs what the tables need, with the settings that were chosen.
        choose: Chooses them on validation data; ``None`` where nothing is chosen.
        seeds: Of the report, if they are not the study's.
    """

    report: Callable[[Lab, Chosen], Iterable[Table]]
    choose: Callable[[Lab], Chosen] | None = None
    seeds: Sequence[int] | None = None


@dataclass(frozen=True)
class Study:
    """A description that the runner carries out.

    Attributes:
        title: One line.
        parts: By name.
        seeds: Of the report.
        chosen_on: Seeds of the choice.
    """

    title: str
    parts: Mapping[str, Part]
    seeds: Sequence[int] = (0, 1, 2)
    chosen_on: Sequence[int] = (10, 11, 12)


@dataclass(frozen=True)
class Outcome:
    """What a part has found.

    Attributes:
        tables: In their order.
        facts: What must be known to obtain them again.
    """

    tables: Sequence[Table]
    facts: Mapping[str, str]


def carry_out(
    study: Study, name: str, out: Path, seeds: Sequence[int] | None, jobs: int, more: Sequence[str], console: Console
) -> Outcome:
    """Choose, and report.

    Args:
        study: What to do.
        name: Of the part.
        out: Folder of all parts; goes on with what it holds.
        seeds: Of the report, in place of the study's.
        jobs: Runs at a time.
        more: Overrides of every run.
        console: Shows the progress.

    Raises:
        StudyError: Seeds that both choose and report.
    """
    part, chosen, labs = study.parts[name], {}, []
    reported = list(seeds or part.seeds or study.seeds)
    said = {"seeds": ", ".join(map(str, reported))}
    if part.choose is not None:
        if both := sorted({*reported} & {*study.chosen_on}):
            raise StudyError(
                f"seeds {both} are among those that choose settings ({list(study.chosen_on)}); report others."
            )
        labs.append(Lab(out / "choose", "choose", study.chosen_on, jobs, more, console))
        chosen = dict(part.choose(labs[0]))
        (out / "choose" / f"{name}.json").write_text(json.dumps(chosen, indent=2))
        said[f"chosen on seeds {', '.join(map(str, study.chosen_on))}"] = json.dumps(chosen)
    labs.append(Lab(out / "report", "report", reported, jobs, more, console))
    # As from the file, so that a study cannot hand on anything else.
    tables = list(part.report(labs[-1], json.loads(json.dumps(chosen))))
    commits = Counter(commit for lab in labs for commit in lab.commits.values())
    ran = ", ".join(f"{commit} ({runs} runs)" for commit, runs in commits.items())
    return Outcome(tables, said | facts("scripts.studies") | {"commit": ran})
