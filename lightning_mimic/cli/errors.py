"""User errors of the commands, as one-line messages."""

import contextlib
import os
from collections.abc import Iterator
from importlib import resources
from typing import Any

from hydra.errors import InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.stores import hide_secrets, path_of


@contextlib.contextmanager
def exit_on_user_error(command: str) -> Iterator[None]:
    """Print user errors as a one-line message, with exit status 1, instead of a traceback.

    Those are the package's own, files and disks that cannot be used, and settings that cannot be resolved or that what
    they build does not take. ``HYDRA_FULL_ERROR=1`` shows the traceback of all but the package's own.

    Args:
        command: Name of the command.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        yield
    except MissingMandatoryValue as error:
        raise SystemExit(f"{command}: `{error.full_key}` is missing; `{command} --help` shows what it takes.") from None
    except InstantiationException as error:
        if isinstance(error.__cause__, MimicError):
            raise SystemExit(f"{command}: {error.__cause__}") from None
        if full:
            raise
        raise SystemExit(f"{command}: {in_one_line(error)}") from None
    except MimicError as error:
        raise SystemExit(f"{command}: {error}") from None
    except (OSError, OmegaConfBaseException) as error:
        if full:
            raise
        raise SystemExit(f"{command}: {in_one_line(error)}") from None


def in_one_line(error: Exception) -> str:
    """Return what an error says, with the names that are nearest to one that is not there.

    Args:
        error: Of Hydra, of OmegaConf or of the operating system.
    """
    cause: Any = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("object_type=", "See https://"))]
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return f"{lines[0]}; {nearest_names(error.missing_cfg_file.rpartition('/')[2], error.options)}."
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        parent = cause.parent_node
        # A group of which nothing is chosen is not among the settings.
        groups = [] if parent._get_parent() is not None else resources.files("lightning_mimic.conf").iterdir()
        names = [*map(str, parent), *(each.name for each in groups if each.is_dir())]
        return f"{lines[0].rstrip('.')}; {nearest_names(str(cause.key), names)}."
    if lines and lines[0].startswith("Multiple values for"):
        return f"{lines[0].partition('.')[0]}; leave out the '+', which adds a group that is not there yet."
    return " ".join(lines) or type(error).__name__


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
    read = OmegaConf.to_yaml(OmegaConf.masked_copy(config, ["data", "model", "mimic"]))
    for name, command in config.paths.get("made_by", {}).items():
        if f"${{paths.{name}}}" not in read:
            continue
        if not isinstance(config.paths[name], str):
            raise MimicError(f"`paths.{name}` is {config.paths[name]!r}; expected a path. It is made by: {command}")
        if not path_of(config.paths[name], f"paths.{name}").exists():
            raise MimicError(
                f"`paths.{name}`: there is no {hide_secrets(config.paths[name])}. It is made by: {command}"
            )
