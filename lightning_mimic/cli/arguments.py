"""Words of a command line, and the configuration that they make, as their writer meant them."""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

_MULTIRUN = frozenset({"-m", "--multirun"})

#: Settings that are paths or names, also where they look like numbers.
_TEXT = frozenset({"ledger", "out", "output", "reference", "pretrained", "resume", "save_to", "save_epochs_to"})
_TEXT |= {"keep", "root", "path", "dir", "checkpoints", "default_root_dir", "plot", "shards", "partitioned"}
_TEXT |= {"manifest", "title", "corrections", "page", "spotlight"}
#: Those that are paths at the root alone; below a model, features are counted.
_TEXT_AT_ROOT = frozenset({"features"})

_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:[^{}]*\}")
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def arranged(words: Sequence[str], first: str | None = None) -> list[str]:
    """Return the words of a command line so that Hydra reads them as they were meant.

    ``--multirun`` comes first, because Hydra takes no setting after it from the processes that Lightning starts; values
    that are not of Hydra's grammar, such as the paths of Lightning's own checkpoints, are quoted.

    Args:
        words: The words.
        first: Setting that the first word stands for, if it is no flag and has no ``=``.

    Example:
        >>> arranged(["resume=epoch=0-step=35.ckpt", "trainer.max_epochs=2", "--multirun"])
        ['--multirun', "resume='epoch=0-step=35.ckpt'", 'trainer.max_epochs=2']
    """
    if first is not None and words and "=" not in words[0] and not words[0].startswith(("-", "~", "+")):
        words = [f"{first}={words[0]}", *words[1:]]
    flags = [word for word in words if word in _MULTIRUN]
    return [*flags, *(_readable(word, sweeps=bool(flags)) for word in words if word not in _MULTIRUN)]


def _readable(word: str, *, sweeps: bool) -> str:
    key, sign, value = word.partition("=")
    if not sign or word.startswith("-") or _is_readable(word):
        return word
    if value.startswith("[") and value.endswith("]"):
        quoted = "[" + ",".join(_quoted(key, each) for each in value[1:-1].split(",")) + "]"
    else:
        quoted = ",".join(_quoted(key, each) for each in (value.split(",") if sweeps else [value]))
    made = f"{key}={quoted}"
    return made if _is_readable(made) else word  # Hydra names the mistake


def _quoted(key: str, value: str) -> str:
    if _is_readable(f"{key}={value}") and "," not in value:
        return value
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"


def _is_readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def words_of_job() -> list[str]:
    """Return the words that start the current job alone, which may be one of a sweep."""
    overrides = HydraConfig.get().overrides
    several = ("hydra.mode=", "hydra.sweep.", "hydra.sweeper.", "hydra.launcher.", "hydra/sweeper=", "hydra/launcher=")
    flags = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("~") and word not in _MULTIRUN]
    return [*flags, *overrides.task, *(word for word in overrides.hydra if not word.lstrip("+").startswith(several))]


def settle(config: DictConfig) -> None:
    """Take numbers from the environment for numbers, as on the command line, and paths of digits for text.

    Args:
        config: Changed in place.

    Example:
        >>> import os
        >>> os.environ["TAU"] = "5e-1"
        >>> config = OmegaConf.create({"temperature": "${oc.env:TAU}", "ledger": 2024})
        >>> settle(config)
        >>> config
        {'temperature': 0.5, 'ledger': '2024'}
    """
    for path, name, raw in list(_leaves(OmegaConf.to_container(config, resolve=False), "")):
        if name in _TEXT or path in _TEXT_AT_ROOT:
            if isinstance(raw, int | float) and not isinstance(raw, bool):
                OmegaConf.update(config, path, str(raw))
        elif isinstance(raw, str) and _FROM_ENVIRONMENT.fullmatch(raw):
            OmegaConf.update(config, path, _typed(OmegaConf.select(config, path)))


def _leaves(value: Any, path: str, name: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{path}.{key}" if path else str(key), str(key))
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _leaves(each, f"{path}.{place}", name)
    else:
        yield path, name, value


def _typed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if _INTEGER.fullmatch(value):
        return int(value)
    if _NUMBER.fullmatch(value) and not value.isdigit():
        return float(value)
    return {"true": True, "false": False, "null": None}.get(value.lower(), value)
