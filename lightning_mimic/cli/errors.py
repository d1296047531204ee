"""User errors of the commands, as one-line messages."""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from lightning_mimic.cli.extras import PACKAGE, extra_of
from lightning_mimic.cli.help import conf_folder, options
from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.stores import hide_secrets, path_of

_FULL_ERROR = "HYDRA_FULL_ERROR"


class UserError(SystemExit):
    """End of a command after a user's mistake: one line on stderr, exit status 2.

    Args:
        command: Name of the command.
        message: What was given, what was expected, and the fix.
    """

    def __init__(self, command: str, message: str) -> None:
        super().__init__(f"{command}: {' '.join(message.split())}")
        self.code = 2


@contextlib.contextmanager
def ends_in_one_line(command: str) -> Iterator[None]:
    """End a command after a user's mistake, after Ctrl-C and behind a closed pipe without a traceback.

    Args:
        command: Name of the command.
    """
    try:
        yield
        sys.stdout.flush()  # a closed pipe shows here, and not when the interpreter ends
    except MimicError as error:
        _say(UserError(command, str(error)))
    except UserError as error:
        _say(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning's trainer takes Ctrl-C, tidies up and exits with status 1.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        sys.stderr.write(f"{command}: interrupted; what was recorded until now is kept.\n")
        raise SystemExit(128 + signal.SIGINT) from None


@contextlib.contextmanager
def quits_at_once(command: str) -> Iterator[None]:
    """End the process at once at Ctrl-C, for imports, which may swallow an interruption or turn it into another error.

    Nothing is recorded before they are done.

    Args:
        command: Name of the command.
    """

    def quit_now(*_: object) -> NoReturn:
        os.write(2, f"{command}: interrupted; nothing was done yet.\n".encode())
        os._exit(128 + signal.SIGINT)

    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, quit_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _say(error: UserError) -> NoReturn:
    sys.stderr.write(f"{error}\n")
    raise error from None


@contextlib.contextmanager
def exit_on_user_error(command: str) -> Iterator[None]:
    """Turn errors that the user can mend into :class:`UserError`.

    They are the package's own, files and disks that cannot be used, packages that are not installed, trainers that do
    not work as set, and settings that cannot be resolved or from which nothing can be built. All other errors are bugs
    and keep their traceback, as do all but the package's own with ``HYDRA_FULL_ERROR=1``.

    Args:
        command: Name of the command.
    """
    full = os.environ.get(_FULL_ERROR) == "1"
    try:
        yield
    except MissingMandatoryValue as error:
        raise UserError(command, f"`{error.full_key}` is missing; `{command} --help` explains it.") from None
    except MimicError as error:
        raise UserError(command, str(error)) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, MimicError):
            raise UserError(command, str(cause)) from None
        if full or not _can_be_mended(error):
            raise
        raise UserError(command, in_one_line(error)) from None


def _can_be_mended(error: Exception) -> bool:
    """Whether an error follows from the user's settings or machine."""
    # Lightning's own class is not imported for this; it would take seconds.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    mended = OSError | ImportError | OmegaConfBaseException | InstantiationException
    return isinstance(error, mended) or "MisconfigurationException" in kinds


def in_one_line(error: Exception) -> str:
    """Return the message of an error, with the names that are nearest to one that does not exist.

    Args:
        error: Of Hydra, of OmegaConf, of Lightning or of the operating system.
    """
    cause: Any = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("object_type=", "See https://"))]
    if isinstance(error, InstantiationException):
        return _not_built(error)
    if isinstance(error, ImportError) and error.name:
        return _not_installed(error)
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if error.missing_cfg_file.startswith("experiment/"):  # the one group with options in folders
            group, _, option = error.missing_cfg_file.partition("/")
        known = options(group) if group else error.options
        return f"`{group}={option}`: {group} has no option {option!r}; {nearest_names(option, known)}."
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        return _no_setting(cause)
    if isinstance(error, InterpolationToMissingValueError) and (found := re.search(r"value: (\S+)", str(error))):
        return f"`{found[1]}` is missing; give {found[1]}=..."
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read as NAME=VALUE: {lines[0]}. A value with blanks, brackets, commas or "
            "equals signs needs quotes, as in 'name=\"two words\"'."
        )
    if lines and lines[0].startswith("Multiple values for"):
        return f"{lines[0].partition('.')[0]}; leave out the '+', which adds a group that is not there yet."
    return " ".join(lines) or type(error).__name__


def _not_built(error: InstantiationException) -> str:
    """Message for an object that could not be built from its settings."""
    cause: BaseException = error.__cause__ or error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ImportError) and cause.name:
        return _not_installed(cause)
    place = re.search(r"full_key: (\S+)", str(error))
    said = str(error).splitlines()[0] if cause is error else str(cause) or type(cause).__name__
    return f"`{place[1]}` cannot be built: {said}" if place else said


def _no_setting(cause: Any) -> str:
    """Message for a setting that does not exist."""
    parent, key = cause.parent_node, str(cause.key)
    names = [str(name) for name in parent if str(name) not in ("_target_", "hydra")]
    where = parent._get_full_key("")
    if not where:  # a group of which nothing is chosen is not among the settings
        names += [path.name for path in conf_folder().iterdir() if path.is_dir() and any(path.rglob("*.yaml"))]
        return f"there is no setting {key!r}; {nearest_names(key, names)}."
    return f"`{where}` has no setting {key!r}; {nearest_names(key, names)}."


def _not_installed(error: ImportError) -> str:
    """Message for a package that is not installed, with the extra that brings it."""
    package = str(error.name).partition(".")[0]
    extra = extra_of(package)
    if extra is None:
        return f"{error}; `mimic-doctor` lists what is installed."
    return f"{package} is not installed; it comes with: pip install '{PACKAGE}[{extra}]'"


def check_inputs_exist(config: DictConfig) -> None:
    """Check, before anything is built, that the files exist that are read and that another run writes.

    Args:
        config: With ``paths``, whose ``made_by`` has the commands that write a path.

    Raises:
        MimicError: One is not there; the message has the command.

    Example:
        >>> paths = {"reference": "none.ckpt", "made_by": {"reference": "mimic-train experiment=digits_reference"}}
        >>> check_inputs_exist(OmegaConf.create({"model": {"pretrained": "${paths.reference}"}, "paths": paths}))
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.MimicError: `paths.reference`: there is no none.ckpt. It is made by: mimic-train ...
    """
    from lightning_mimic.cli.follow_up import how_to_make  # loads pyarrow, which help does not need

    read = OmegaConf.to_yaml(OmegaConf.masked_copy(config, ["data", "model", "mimic"]))
    for name in dict.fromkeys(["reference", *config.paths.get("made_by", {})]):
        if f"${{paths.{name}}}" not in read or OmegaConf.is_missing(config.paths, name):
            continue
        place = config.paths[name]
        if not isinstance(place, str):
            raise MimicError(f"`paths.{name}` is {place!r}; expected a path. {how_to_make(config, name)}")
        if not place.startswith(_NO_FILE) and not path_of(place, f"paths.{name}").exists():
            raise MimicError(f"`paths.{name}`: there is no {hide_secrets(place)}. {how_to_make(config, name)}")


#: What a reference begins with that open_clip downloads.
_NO_FILE = "open_clip:"
