"""Answers to ``--help`` and ``--version``, which need neither torch nor a composed configuration."""

import platform
import textwrap
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path

import yaml

from lightning_mimic.cli.conf_comments import ConfFile, read_conf
from lightning_mimic.version import __version__

#: Width of a help text in characters.
_WIDTH = 100
_MORE = {
    "--cfg job": "print the configuration that the words of the command line make, and do nothing",
    "--multirun": "run once for every combination of values that commas separate, as in seed=0,1,2",
    "--version": "print the versions of lightning_mimic, Python, torch and lightning",
    "--hydra-help": "print Hydra's own flags",
}


def conf_folder() -> Path:
    """Return the folder of the installed configuration files."""
    return Path(str(resources.files("lightning_mimic.conf")))


def options(group: str) -> list[str]:
    """Return the options of a group of settings, such as ``data`` or ``model/backbone``."""
    folder = conf_folder() / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    # An experiment may lie in a folder of experiments; a folder within another group is a group of its own.
    yield from folder.rglob("*.yaml") if folder.name == "experiment" else folder.glob("*.yaml")


def version_text() -> str:
    """Return the versions of the package and of what it stands on.

    Example:
        >>> version_text()
        'lightning_mimic ... (Python ..., torch ..., lightning ...)'
    """
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "lightning"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"lightning_mimic {__version__} ({', '.join(found)})"


def help_text(name: str, root: str) -> str:
    """Return the help of a command: purpose, examples, settings and groups of settings.

    Args:
        name: Name of the command.
        root: Name of its file in conf/, without suffix.

    Example:
        >>> print(help_text("mimic-select", "select").splitlines()[0])
        mimic-select: ...
    """
    path = conf_folder() / f"{root}.yaml"
    shown = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["help"]
    conf = read_conf(path)
    groups = [(group, option) for group, option in conf.defaults if group and "hydra/" not in group]
    kinds = "[GROUP=OPTION ...] [SETTING=VALUE ...]" if groups else "[SETTING=VALUE ...]"
    parts = [shown["header"].strip(), f"Usage: {name} {kinds}", "Examples:\n" + _examples(shown["template"])]
    parts.append("Settings:\n" + "\n".join(_settings(conf)))
    if groups:
        rows = [row for group, option in groups for row in _group(group, option)]
        parts.append("Groups (in brackets: the default):\n" + "\n".join(_columns(rows)))
        group = "mimic" if ("mimic", "grad_mimic") in groups else groups[0][0]
        parts.append(
            f"What an option sets: {name} {group}={options(group)[-1]} --cfg job --package {group}\n"
            "The settings of a group are written with its name in front, as in "
            + ("mimic.temperature=0.5." if group == "mimic" else f"{group}.NAME=VALUE.")
        )
    parts.append("Flags:\n" + "\n".join(_columns(list(_MORE.items()))))
    return "\n\n".join(parts)


def _examples(template: str) -> str:
    return "\n".join(f"  {line}" for line in template.strip().splitlines())


def _settings(conf: ConfFile) -> Iterator[str]:
    rows = []
    for each in conf.settings:
        default = "required" if each.default == "???" else each.default
        rows.append((each.key, f"{each.comment} [{default}]" if default else each.comment))
    yield from _columns(rows)


def _group(group: str, default: str | None) -> Iterator[tuple[str, str]]:
    """The options of a group and of the groups within it; of options in folders, the folders."""
    names = [name for name in options(group) if name != default]
    plain = [name for name in names if "/" not in name]
    folders = sorted({f"{name.partition('/')[0]}/..." for name in names if "/" in name})
    yield group, ", ".join([*([] if default in (None, "null") else [f"[{default}]"]), *plain, *folders])
    if group != "experiment":
        for inner in sorted(path.name for path in (conf_folder() / group).iterdir() if any(path.glob("*.yaml"))):
            yield from _group(f"{group}/{inner}", None)


def _columns(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Lay out names and texts in two columns."""
    first = max(len(name) for name, _ in rows) + 4
    for name, text in rows:
        head = f"  {name}".ljust(first)
        yield textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * first, break_on_hyphens=False)
