"""Parts that all commands share: help, Hydra, the folder of relative paths, the processes of a job, exit statuses."""

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

from lightning_mimic.cli import run_folder  # noqa: F401, which registers the resolver that names run folders
from lightning_mimic.cli.arguments import arranged, settle, words_of_job
from lightning_mimic.cli.errors import UserError, ends_in_one_line, exit_on_user_error, in_one_line, quits_at_once
from lightning_mimic.cli.help import help_text, version_text
from lightning_mimic.cli.settings import check_types
from lightning_mimic.cli.words import check_words, wants_help
from lightning_mimic.errors import MimicError

_FULL_ERROR = "HYDRA_FULL_ERROR"


def command(
    name: str, config_name: str, first: str | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a command of a function that takes a configuration.

    The command ends with exit status 0; 2 after a user's mistake, with one line on stderr; 130 after Ctrl-C; and with a
    traceback and status 1 after an error of the package itself.

    Args:
        name: Name of the command.
        config_name: Name of its root configuration in ``conf``.
        first: Setting that a first word without a name stands for.

    Returns:
        A decorator. The function's return value is the figure that a sweeper optimises.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            words = sys.argv[1:]
            with ends_in_one_line(name):
                if wants_help(words):
                    print(help_text(name, config_name))  # noqa: T201
                elif "--version" in words:
                    print(version_text())  # noqa: T201
                else:
                    check_words(name, config_name, words, first)
                    sys.argv[1:] = arranged(words, first)
                    _run(name, config_name, task)

        return main

    return decorate


def _run(name: str, config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Compose the configuration of the command line and run the task with it, once or as a sweep."""
    full = os.environ.get(_FULL_ERROR)
    started = []

    @functools.wraps(task)
    def job(config: DictConfig) -> Any:
        started.append(config)
        with _environment(_FULL_ERROR, full), exit_on_user_error(name), _one_job():
            settle(config)
            with quits_at_once(name):  # imports what the settings name
                check_types(config)
            return task(config)

    composed = hydra.main(version_base="1.3", config_path="pkg://lightning_mimic.conf", config_name=config_name)
    try:
        with _environment(_FULL_ERROR, "1"):  # so that Hydra raises its errors
            composed(job)()
    except MimicError as error:
        raise UserError(name, str(error)) from None
    except (CompactHydraException, OmegaConfBaseException, OSError, ValueError) as error:
        # Hydra's own folder may not be writable, its flags and words not go together.
        its_own = isinstance(error, CompactHydraException | OmegaConfBaseException) or not started
        if full == "1" or not its_own:
            raise
        raise UserError(name, in_one_line(error)) from None


@contextlib.contextmanager
def _environment(variable: str, value: str | None) -> Iterator[None]:
    """Set a variable of the environment within the context; ``None`` removes it."""
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
    """Run a job by itself, in the folder where the command was started, so that relative paths mean the same in each.

    The processes that Lightning starts by the words of the command line run this job alone, not the whole sweep, and
    write into its folder. When the job ends, the next one starts processes of its own.
    """
    with contextlib.chdir(get_original_cwd()):
        settings = HydraConfig.get()
        with read_write(cast(DictConfig, settings)):
            settings.run.dir = settings.runtime.output_dir
        if settings.mode != RunMode.MULTIRUN:
            yield
            return
        words, environment = sys.argv[1:], dict(os.environ)
        sys.argv[1:] = words_of_job()
        try:
            yield
        finally:
            sys.argv[1:] = words
            os.environ.clear()
            os.environ.update(environment)
            if "torch" in sys.modules:
                from lightning_mimic import distributed

                distributed.end_process_group()
