"""What all commands share: Hydra, the folder in which paths are meant, the processes of a job, user errors."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, read_write
from omegaconf.errors import OmegaConfBaseException

from lightning_mimic.cli.arguments import arranged, settle, words_of_job
from lightning_mimic.cli.errors import exit_on_user_error, in_one_line
from lightning_mimic.cli.settings import check_types

_FULL_ERROR = "HYDRA_FULL_ERROR"


def command(
    name: str, config_name: str, first: str | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a command of a function of a configuration.

    Args:
        name: Of the command.
        config_name: Of the root in ``conf``.
        first: Setting that a first word without a name stands for.

    Returns:
        A decorator. What the function returns is what a sweeper optimises.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            full = os.environ.get(_FULL_ERROR)
            sys.argv[1:] = arranged(sys.argv[1:], first)
            started = []

            @functools.wraps(task)
            def job(config: DictConfig) -> Any:
                started.append(config)
                with _environment(_FULL_ERROR, full), exit_on_user_error(name), _one_job():
                    settle(config)
                    check_types(config)
                    return task(config)

            composed = hydra.main(version_base="1.3", config_path="pkg://lightning_mimic.conf", config_name=config_name)
            try:
                with _environment(_FULL_ERROR, "1"):  # so that Hydra raises its errors
                    composed(job)()
            except (CompactHydraException, OmegaConfBaseException, OSError, ValueError) as error:
                # Hydra's own folder may not be writable, its flags and words not go together.
                its_own = isinstance(error, CompactHydraException | OmegaConfBaseException) or not started
                if full == "1" or not its_own:
                    raise
                raise SystemExit(f"{name}: {in_one_line(error)}") from None

        return main

    return decorate


@contextlib.contextmanager
def _environment(variable: str, value: str | None) -> Iterator[None]:
    """Set a variable of the environment within the context; ``None`` takes it out."""
    before = os.environ.pop(variable, None)
    if value is not None:
        os.environ[variable] = value
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


@contextlib.contextmanager
def _one_job() -> Iterator[None]:
    """Run a job where the command was started, so that relative paths mean the same in every job, and by itself.

    Of a sweep, the processes that Lightning starts by the words of the command line run this job alone and into its
    folder; when it ends, the next one starts processes of its own.
    """
    with contextlib.chdir(get_original_cwd()):
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            yield
            return
        words, environment, settings = sys.argv[1:], dict(os.environ), HydraConfig.get()
        sys.argv[1:] = words_of_job()
        with read_write(cast(DictConfig, settings)):
            settings.run.dir = settings.runtime.output_dir
        try:
            yield
        finally:
            sys.argv[1:] = words
            os.environ.clear()
            os.environ.update(environment)
            if "torch" in sys.modules:
                from lightning_mimic import distributed

                distributed.end_process_group()
