"""Settings of the files in conf/ with their comments, for help texts and the documentation."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One setting of a configuration file.

    Args:
        key: Dotted path within the file.
        default: Value as it is written in the file; empty for an object or list of objects written in several lines.
        comment: Comment on its line; empty if there is none.
    """

    key: str
    default: str
    comment: str


@dataclass(frozen=True)
class ConfFile:
    """Content of a configuration file.

    Args:
        summary: Comment at the head of the file, in one line, without Hydra's ``@package`` directive.
        settings: Settings in the file's order, without Hydra's own (``defaults``, ``hydra`` and ``_target_`` etc.).
        comments: Comments by key, also of the settings of files that this file builds on.
        defaults: Options that the file chooses, by group; the files that it builds on have the group ``""``.
        target: Import path of the class or function that the file builds; empty if it builds none.
    """

    summary: str
    settings: list[Setting]
    comments: dict[str, str] = field(default_factory=dict)
    defaults: list[tuple[str, str]] = field(default_factory=list)
    target: str = ""


def read_conf(path: Path) -> ConfFile:
    r"""Read a configuration file with its comments.

    A setting without a comment that overrides one of a file that this file builds on, in the same group, gets the
    comment from there.

    Args:
        path: A YAML file of conf/.

    Returns:
        Its content.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mlp.yaml"
        >>> _ = path.write_text("# A perceptron.\n_target_: Net\nwidth: 64 # of the hidden layer\n")
        >>> read_conf(path).settings
        [Setting(key='width', default='64', comment='of the hidden layer')]
    """
    import yaml

    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return ConfFile(_head(text), [])
    defaults, target = [], ""
    for key, value in root.value:
        if key.value == "defaults":
            defaults = [_default(each) for each in value.value]
        elif key.value == "_target_":
            target = value.value
    bases = [read_conf(path.with_name(f"{name}.yaml")) for name in _bases(defaults)]
    comments = {key: comment for base in bases for key, comment in base.comments.items()}
    settings = list(_settings(root, "", text.splitlines()))
    comments |= {each.key: each.comment for each in settings if each.comment}
    settings = [replace(each, comment=comments.get(each.key, "")) for each in settings]
    return ConfFile(_head(text), settings, comments, defaults, target or next((base.target for base in bases), ""))


def _bases(defaults: list[tuple[str, str]]) -> list[str]:
    return [name for group, name in defaults if not group and name != "_self_" and not name.startswith("/")]


def _head(text: str) -> str:
    comments = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            comments.append(line.lstrip("# "))
    return " ".join(comments)


def _default(node: Any) -> tuple[str, str]:
    if node.id == "mapping":
        [(group, option)] = node.value
        return group.value, option.value
    return "", node.value


def _settings(node: Any, prefix: str, lines: list[str]) -> Iterator[Setting]:
    for key, value in node.value:
        if key.value.startswith("_") or (not prefix and key.value in ("defaults", "hydra")):
            continue
        path = prefix + key.value
        if value.id == "mapping" and not value.flow_style:
            comment = _comment(lines, key.end_mark)
            if comment:
                yield Setting(path, "", comment)
            yield from _settings(value, f"{path}.", lines)
        elif value.id == "sequence" and not value.flow_style:
            yield Setting(path, "", _comment(lines, key.end_mark))
        else:
            written = lines[value.start_mark.line][value.start_mark.column : value.end_mark.column]
            yield Setting(path, written or "null", _comment(lines, value.end_mark))


def _comment(lines: list[str], mark: Any) -> str:
    line: str = lines[mark.line]
    return line[int(mark.column) :].partition("# ")[2].strip()
