"""Pages of the commands and of their groups of settings, made from the files of conf/."""

import ast
import configparser
from pathlib import Path

from markdown.extensions.toc import slugify
from omegaconf import OmegaConf

from lightning_mimic.cli.conf_comments import ConfFile, Setting, read_conf
from lightning_mimic.cli.help import options

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
#: Groups whose files set anything, instead of one object of the group's name.
GLOBAL = ("experiment", "reference")


def pages() -> dict[str, str]:
    """Return the pages' Markdown by path relative to docs/, with `commands/SUMMARY.md` for the navigation."""
    commands = {name: CONF / f"{name.removeprefix('mimic-').replace('-', '_')}.yaml" for name in _entry_points()}
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir() and any(path.rglob("*.yaml")))
    made = {f"commands/{name}.md": _command(name, path) for name, path in commands.items() if path.exists()}
    made |= {f"commands/{name}.md": _plain_command(name) for name, path in commands.items() if not path.exists()}
    made |= {f"commands/{group}.md": _group(group) for group in groups}
    made["commands/index.md"] = _index(commands, groups)
    links = ["* [Overview](index.md)", *(f"* [{name}]({name}.md)" for name in commands)]
    links += ["* Groups of settings", *(f"    * [{group}]({group}.md)" for group in groups)]
    return made | {"commands/SUMMARY.md": "\n".join(links) + "\n"}


def _entry_points() -> dict[str, str]:
    """Names of the commands, with the module and function of each."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    return {name.strip(): function.strip() for name, _, function in (line.partition("=") for line in lines)}


def _index(commands: dict[str, Path], groups: list[str]) -> str:
    purposes = {name: _purpose(path) if path.exists() else _first_line(name) for name, path in commands.items()}
    rows = [f"| [{name}]({name}.md) | {purpose} |\n" for name, purpose in purposes.items()]
    listed = ", ".join(f"[{group}]({group}.md)" for group in groups)
    return (
        "# Commands\n\nEvery command takes settings as `key=value`, and groups of settings as `group=option`. "
        "A relative path is relative to the folder in which the command was started, also in sweeps. "
        "`--help` shows examples and all settings, `--cfg job` the configuration that a command line makes.\n\n"
        "| command | purpose |\n| --- | --- |\n" + "".join(rows) + f"\nGroups of settings: {listed}.\n\n"
        "Put settings that the shell would read itself in quotes: `'exports=[csv,cleanlab]'`. "
        "`--multirun` runs a command once for every combination of values that are separated by commas "
        "(`mimic.temperature=0.5,1,2`). For a sweeper that looks for the best setting, such as Hydra's for Optuna, "
        "`optimized_metric=val/accuracy` names the logged figure.\n"
    )


def _purpose(path: Path) -> str:
    header = OmegaConf.load(path).hydra.help.header.strip()
    purpose = header.partition(": ")[2]
    return purpose[0].upper() + purpose[1:]


def _plain_command(name: str) -> str:
    return f"# {name}\n\n{_first_line(name)}\n\n```console\n{name}\n```\n\nIt has no settings.\n"


def _first_line(name: str) -> str:
    """The first line of the module of a command without a configuration."""
    module = _entry_points()[name].partition(":")[0]
    docstring = ast.get_docstring(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())) or ""
    purpose = docstring.partition("\n")[0].partition(": ")[2]
    return purpose[0].upper() + purpose[1:]


def _examples(path: Path) -> str:
    template: str = OmegaConf.to_container(OmegaConf.load(path).hydra.help, resolve=False)["template"]
    return template.strip()


def _command(name: str, path: Path) -> str:
    conf = read_conf(path)
    chosen = [(group, option) for group, option in conf.defaults if group and "hydra/" not in group]
    rows = [f"| [{group}]({group}.md) | {_default(option)} | {_options(group)} |\n" for group, option in chosen]
    groups = "## Groups\n\n| group | default | options |\n| --- | --- | --- |\n" + "".join(rows) if rows else ""
    return (
        f"# {name}\n\n{_purpose(path)}\n\n```console\n{_examples(path)}\n```\n\n"
        f"## Settings\n\n{_table(conf.settings)}\n{groups}"
    )


def _default(option: str) -> str:
    return f"`{option}`" if option != "null" else "none"


def _options(group: str) -> str:
    return ", ".join(f"`{name}`" for name in options(group))


def _group(group: str) -> str:
    groups = [group]
    if group not in GLOBAL:
        inner = (path for path in (CONF / group).rglob("*") if path.is_dir() and any(path.glob("*.yaml")))
        groups += sorted(path.relative_to(CONF).as_posix() for path in inner)
    chosen = [(each, option) for each in groups for option in options(each)]
    rows = "".join(_row(*each) for each in chosen)
    sections = "\n".join(_option(*each) for each in chosen)
    return f"# {group}\n\n| option | what it is |\n| --- | --- |\n{rows}\n{sections}"


def _row(group: str, option: str) -> str:
    name = f"{group}={option}"
    return f"| [{name}](#{slugify(name, '-')}) | {read_conf(CONF / group / f'{option}.yaml').summary} |\n"


def _option(group: str, option: str) -> str:
    conf = read_conf(CONF / group / f"{option}.yaml")
    prefix = "" if group in GLOBAL else group.replace("/", ".") + "."
    table = _table(conf.settings, prefix) if conf.settings else ""
    return f"## {group}={option}\n\n{conf.summary}\n\n{_built_on(conf, group)}{table}"


def _built_on(conf: ConfFile, group: str) -> str:
    parts = []
    for key, option in conf.defaults:
        name = option.removeprefix("/experiment/").partition("@")[0]
        if not key and option != "_self_":
            parts.append(f"everything that `{group}={name}` sets")
        elif key:
            inner = key.removeprefix("override ")
            parts.append(f"`{inner.removeprefix('/') if inner.startswith('/') else f'{group}/{inner}'}={option}`")
    sentences = [f"Builds `{conf.target}`."] if conf.target else []
    if parts:
        sentences.append(f"Sets {', '.join(parts)}{' and:' if conf.settings else '.'}")
    return " ".join(sentences) + "\n\n"


def _table(settings: list[Setting], prefix: str = "") -> str:
    rows = [f"| `{prefix}{each.key}` | {_cell(each.default)} | {_escaped(each.comment)} |\n" for each in settings]
    return "| setting | default | meaning |\n| --- | --- | --- |\n" + "".join(rows)


def _cell(default: str) -> str:
    if default == "???":
        return "required"
    return f"`{_escaped(default)}`" if default else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
