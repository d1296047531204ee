"""User errors of the commands, as one-line messages."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lightning_mimic.errors import MimicError


@contextlib.contextmanager
def exit_on_user_error(command: str) -> Iterator[None]:
    """Print user errors as a one-line message, with exit status 1, instead of a traceback.

    Args:
        command: Name of the command.
    """
    try:
        yield
    except MissingMandatoryValue as error:
        raise SystemExit(f"{command}: `{error.full_key}` is missing; `{command} --help` shows what it takes.") from None
    except InstantiationException as error:
        if not isinstance(error.__cause__, MimicError):
            raise
        raise SystemExit(f"{command}: {error.__cause__}") from None
    except MimicError as error:
        raise SystemExit(f"{command}: {error}") from None


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
        if f"${{paths.{name}}}" in read and not Path(config.paths[name]).expanduser().exists():
            raise MimicError(f"`paths.{name}`: there is no {config.paths[name]}. It is made by: {command}")
