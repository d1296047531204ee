"""The paper's tables by one command: data x noise x method x seed, as Hydra multiruns that go on where they stopped.

    python scripts/reproduce.py --data digits
    python scripts/reproduce.py --data cifar10 --tables probe full data.root=/data

What is not an option of its own goes to Hydra, for every run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from digits_runs import columns
from reproduce_plan import TABLES, Plan, Sweep
from reproduce_report import show, write
from reproduce_tables import tables_of
from rich.console import Console
from rich.progress import Progress

DATA = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "conf" / "experiment" / "paper").glob("*.yaml")
    if path.stem not in ("official", "reference", "digits_pretrained")
)


def run(sweep: Sweep, out: Path, jobs: int, more: list[str], console: Console) -> None:
    """Does what is missing of a sweep."""
    said, settings = out / sweep.name / "settings.json", [*sweep.fixed, *more]
    begun = any(said.parent.rglob("result.json"))
    if begun and said.exists() and json.loads(said.read_text()) != settings:
        raise SystemExit(f"{said.parent} was run with other settings; name another --out, or delete it.")
    said.parent.mkdir(parents=True, exist_ok=True)
    said.write_text(json.dumps(settings, indent=2))
    folders = sweep.folders(out)
    if (done := finished(folders)) == len(folders):
        return
    several = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"] if jobs > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if jobs > 1 else None
    stopped = False
    with Progress(*columns("runs"), console=console) as progress:
        task = progress.add_task(sweep.name, total=len(folders), completed=done)
        with subprocess.Popen([*sweep.command(out), *several, *more], env=environment) as process:
            while process.poll() is None:
                try:
                    time.sleep(1)
                except KeyboardInterrupt:  # the sweep has got it, too, and ends
                    stopped = True
                progress.update(task, completed=finished(folders))
        progress.update(task, completed=finished(folders))
    if process.returncode or stopped:
        raise SystemExit(f"{sweep.name} stopped. What is done is kept; the same command goes on from there.")


def finished(folders: Iterable[Path]) -> int:
    """How many of these runs have their result."""
    return sum((folder / "result.json").exists() for folder in folders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="all, if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/reproduce"), help="goes on with what it holds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each if several (%(default)s)")
    more = [word for word in sys.argv[1:] if "=" in word and not word.startswith("--")]
    arguments = parser.parse_args([word for word in sys.argv[1:] if word not in more])
    console, out = Console(), arguments.out / arguments.data
    for sweep in Plan(arguments.data, arguments.seeds, out).sweeps(arguments.tables):
        run(sweep, out, arguments.jobs, more, console)
    tables = tables_of(arguments.data, arguments.tables, arguments.seeds, out)
    show(tables, console)
    for path in write(tables, out):
        console.print(f"  {path}", highlight=False)


if __name__ == "__main__":
    main()
