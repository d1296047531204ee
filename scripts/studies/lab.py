"""Runs what a study asks for: Hydra multiruns of job.py that go on where they stopped."""

import contextlib
import itertools
import json
import statistics
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.studies import job

#: Configuration groups among the keys of a sweep; a folder is named by the group's choice.
GROUPS = ("mimic", "reference", "data/noise", "model/backbone")
QUIET = (
    "logger=none",
    "trainer.enable_progress_bar=false",
    "trainer.enable_checkpointing=false",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)
#: Where a run saves its model.
MODEL = "save_to=${hydra:runtime.output_dir}/model.ckpt"


class StudyError(RuntimeError):
    """A study that mixes what it must keep apart."""


@dataclass(frozen=True)
class Run:
    """One run that is done.

    Attributes:
        values: Of the keys that were swept.
        folder: With its files.
        result: Its figures.
    """

    values: Mapping[str, Any]
    folder: Path
    result: Mapping[str, Any]


class Runs(list[Run]):
    """Runs in the order of their seeds."""

    def where(self, **values: object) -> "Runs":
        """Those of some values; a key is named by its last part, as ``lr`` for ``model.optimizer.lr``."""
        return Runs(
            run
            for run in self
            if all(
                value in [v for key, v in run.values.items() if key.split(".")[-1].lstrip("+") == name]
                for name, value in values.items()
            )
        )

    def values(self, figure: str | Callable[[Any], float | None]) -> list[float]:
        """A figure of every run, in %; those that do not have it are left out."""
        found = [run.result.get(figure) if isinstance(figure, str) else figure(run.result) for run in self]
        return [100 * value for value in found if value is not None]

    def mean(self, figure: str | Callable[[Any], float | None]) -> float:
        """The mean of a figure, in %."""
        return statistics.fmean(self.values(figure))


class Lab:
    """What a study runs in: for one phase, its seeds and a folder.

    Args:
        out: Folder of all runs of the phase.
        phase: ``"choose"``, where the test split cannot be read, or ``"report"``.
        seeds: Of the phase.
        jobs: Runs at a time, one thread each if several.
        more: Overrides of every run.
        console: Shows the progress.
    """

    def __init__(
        self, out: Path, phase: str, seeds: Sequence[int], jobs: int, more: Sequence[str], console: Console
    ) -> None:
        self.out = out.absolute()
        self.phase = phase
        self.seeds = list(seeds)
        self.jobs = jobs
        self.more = list(more)
        self.console = console
        #: Folder of a run to the commit of the code that ran it.
        self.commits: dict[Path, str] = {}

    def sweep(self, name: str, each: Mapping[str, Sequence[object]], *fixed: str) -> Runs:
        """Every combination of some values, as runs of mimic-train, or of mimic-score where ``checkpoints`` are given.

        Args:
            name: Folder of the sweep, below the one of the phase.
            each: Override to its values; a run's folder is named by them.
            fixed: Overrides of all.

        Raises:
            StudyError: The folder has runs of other settings.
        """
        settings = [*fixed, *self.more, f"+study.phase={self.phase}"]
        self._settle(name, settings)
        runs = {self.folder(name, *values): values for values in itertools.product(*each.values())}
        missing = [folder for folder in runs if not (folder / "result.json").exists()]
        if missing:
            with self._progress(name, list(runs)):
                self._launch(name, each, settings)
        if left := [folder for folder in runs if not (folder / "result.json").exists()]:
            raise SystemExit(
                f"{name}: {len(left)} of {len(runs)} runs stopped. What is done is kept; the same command goes on."
            )
        results = {folder: json.loads((folder / "result.json").read_text()) for folder in runs}
        self.commits |= {folder: result["commit"] for folder, result in results.items()}
        return Runs(
            Run(dict(zip(each, values, strict=True)), folder, results[folder]) for folder, values in runs.items()
        )

    def map(
        self, name: str, work: Callable[..., dict[str, Any]], given: Iterable[tuple[Any, ...]], *common: object
    ) -> list[dict[str, Any]]:
        """What a function returns for every tuple of arguments, in processes of their own; kept, as runs are.

        Args:
            name: Folder below the one of the phase.
            work: Importable; returns what JSON can hold.
            given: Tuples of its arguments, which name the results.
            common: Further arguments, the same for all.
        """
        self._settle(name, [f"{work.__module__}.{work.__qualname__}", *map(str, common)])
        paths = {self.folder(name, *arguments) / "result.json": arguments for arguments in given}
        missing = {path: arguments for path, arguments in paths.items() if not path.exists()}
        if missing:
            with self._progress(name, [path.parent for path in paths]):
                Parallel(self.jobs)(
                    delayed(_kept)(path, work, (*arguments, *common)) for path, arguments in missing.items()
                )
        results = {path.parent: json.loads(path.read_text()) for path in paths}
        self.commits |= {folder: result["commit"] for folder, result in results.items()}
        return list(results.values())

    def folder(self, name: str, *values: object) -> Path:
        """Of one run."""
        return self.out.joinpath(name, *map(str, values))

    def _settle(self, name: str, settings: Sequence[str]) -> None:
        """Refuses a folder whose runs have other settings."""
        said = self.out / name / "settings.json"
        settings = [word.replace(str(self.out), "OUT") for word in settings]  # a folder may be moved
        others = said.exists() and json.loads(said.read_text()) != settings
        if others and any(said.parent.rglob("result.json")):
            raise StudyError(f"{said.parent} was run with other settings; name another --out, or delete it.")
        said.parent.mkdir(parents=True, exist_ok=True)
        said.write_text(json.dumps(settings, indent=2))

    def _launch(self, name: str, each: Mapping[str, Sequence[object]], settings: Sequence[str]) -> None:
        names = [f"hydra:runtime.choices.{key}" if key in GROUPS else key.lstrip("+") for key in each]
        swept = [f"{key}={','.join(map(str, values))}" for key, values in each.items()]
        where = [
            f"hydra.sweep.dir={self.out / name}",
            "hydra.sweep.subdir=" + ("/".join(f"${{{n}}}" for n in names) or "."),
        ]
        several = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={self.jobs}"] if self.jobs > 1 else []
        scored = any(word.startswith("checkpoints=") for word in settings)
        quiet = [
            word for word in QUIET if not (scored and word.startswith(("logger", "trainer.enable_ch", "hydra/job")))
        ]
        argv = ["job", *(["--config-name=score"] if scored else []), "--multirun", *where, *several, *swept, *quiet]
        before, sys.argv = sys.argv, [*argv, *settings]
        try:
            job.main()
        except KeyboardInterrupt:
            raise SystemExit(f"{name} stopped. What is done is kept; the same command goes on.") from None
        finally:
            sys.argv = before

    @contextlib.contextmanager
    def _progress(self, name: str, folders: Sequence[Path]) -> Iterator[None]:
        """A bar that counts the results."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        done = threading.Event()
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(f"{self.phase}: {name}", total=len(folders))

            def count() -> None:
                bar.update(task, completed=sum((folder / "result.json").exists() for folder in folders))

            def watch() -> None:
                while not done.wait(1):
                    count()

            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            try:
                yield
            finally:
                done.set()
                watcher.join()
                count()


def _kept(path: Path, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    job.silence()
    job.write_result(path, work(*arguments))


def best(curves: Mapping[Any, Sequence[Sequence[float]]]) -> tuple[Any, int]:
    """The setting and the number of epochs of the highest mean accuracy; of equals, the shortest, and then the first.

    Args:
        curves: Setting to the accuracies after every epoch, of every seed.

    Example:
        >>> best({0.1: [[0.5, 0.9], [0.5, 0.7]], 1.0: [[0.8, 0.6], [0.8, 0.6]]})
        (0.1, 2)
    """
    mean = {
        (setting, epoch): statistics.fmean(values)
        for setting, of_seeds in curves.items()
        for epoch, values in enumerate(zip(*of_seeds, strict=True), start=1)
    }
    return max(mean, key=lambda choice: (mean[choice], -choice[1]))
