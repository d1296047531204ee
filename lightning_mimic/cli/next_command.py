"""The command that follows a run, with paths and settings quoted for Hydra and the shell."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lightning_mimic.stores import as_store_path, hide_secrets

#: Settings that mimic-train and mimic-score share; words that set others are left out of a command that follows.
_SHARED = {"experiment", "data", "model", "mimic", "trainer", "paths", "reference", "seed", "features"}


def current_words() -> list[str]:
    """Return the settings on the current job's command line; none outside a command."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def shell_line(program: str, *words: str) -> str:
    """Return a command that can be pasted into a shell.

    Args:
        program: Name of the command.
        words: Its words, as :func:`setting` returns them, or as they were given.

    Example:
        >>> shell_line("mimic-curate", setting("ledger", "my scores"), "out=curated")
        "mimic-curate 'ledger=my scores' out=curated"
    """
    return shlex.join([program, *words])


def setting(name: str, value: Any) -> str:
    """Return a word of a command line that Hydra reads as this setting.

    Args:
        name: Name of the setting, with dots.
        value: Text, a path, a number, a truth value, ``None``, or lists and mappings of these.

    Example:
        >>> setting("out", "run 1/curated"), setting("out", "7"), setting("data.trusted", ["a", 0.5, None])
        ('out=run 1/curated', "out='7'", 'data.trusted=[a,0.5,null]')
    """
    return f"{name}={_hydra_value(value)}"


def short_path(path: str | Path) -> str:
    """Return a path relative to the current folder, where that is shorter; without a URL's signature."""
    if (isinstance(path, str) and "://" in path) or as_store_path(path):
        return hide_secrets(str(path))
    return min((os.fspath(path), os.path.relpath(path)), key=len)


def new_path(path: Path) -> Path:
    """Return a path where nothing is: the given one, or else with the first number behind it that is free."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def shared_words(words: Sequence[str], *without: str) -> list[str]:
    """Return the words of a command that describe data, model and training.

    Args:
        words: Words of the command line, as Hydra keeps them.
        without: Settings to leave out, with all below them.

    Example:
        >>> shared_words(["experiment=digits_noisy", "mimic=none", "save_to=a.ckpt", "data.train=trusted"], "mimic")
        ['experiment=digits_noisy', 'data.train=trusted']
    """

    def names(word: str) -> list[str]:
        key = re.split("[=@]", word.lstrip("+~"))[0].replace("/", ".")
        parts = key.split(".")
        return [".".join(parts[: length + 1]) for length in range(len(parts))]

    left_out = {"mimic.ledger", *without}
    return [word for word in words if names(word)[0] in _SHARED and not left_out & set(names(word))]


def _hydra_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_hydra_value(name)}:{_hydra_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_hydra_value, value)) + "]"
    text = os.fspath(value)
    return text if _is_plain(text) else _quoted(text)


def _is_plain(text: str) -> bool:
    """Whether Hydra reads a text as itself, also within a list."""
    try:
        read = OverridesParser.create().parse_override(f"x=[{text}]").value()
    except HydraException:
        return False
    return bool(read == [text]) and "${" not in text


def _quoted(text: str) -> str:
    """Put a text in quotes for Hydra, which takes backslashes for such only in front of a quote or of ``$``."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return "'" + escaped.replace("${", r"\${") + "'"
