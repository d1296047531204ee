"""Words of a command line that are no settings: what was probably meant, said before Hydra reads them."""

from collections.abc import Sequence

from lightning_mimic.cli.conf_comments import read_conf
from lightning_mimic.cli.help import conf_folder, options
from lightning_mimic.errors import MimicError, nearest_names

_HELP = frozenset({"--help", "-h", "-help", "help"})
#: Flags of Hydra, and of them those that take the next word.
_FLAGS = frozenset({"--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"})
_FLAGS |= {"--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"}
_FLAGS |= {"--config-dir", "-cd", "--experimental-rerun", "--info", "-i"}
_TAKE_A_WORD = frozenset({"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"})
_TAKE_A_WORD |= {"--config-dir", "-cd", "--experimental-rerun"}
_KINDS_OF_INFO = frozenset({"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"})


def wants_help(words: Sequence[str]) -> bool:
    """Return whether the words of a command line ask for help.

    Example:
        >>> wants_help(["experiment=digits_noisy", "--help"]), wants_help(["help"]), wants_help(["--hydra-help"])
        (True, True, False)
    """
    return words[:1] == ["help"] or any(word in _HELP and word != "help" for word in words)


def check_words(name: str, root: str, words: Sequence[str], first: str | None = None) -> None:
    """Refuse words that are neither settings nor Hydra's flags, and say what to type instead.

    Args:
        name: Name of the command.
        root: Name of its root configuration in ``conf``.
        words: Words of the command line.
        first: Setting that a first word without a name stands for.

    Raises:
        MimicError: Such a word.

    Example:
        >>> check_words("mimic-train", "train", ["digits_noisy"])
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.MimicError: 'digits_noisy' is an experiment; type: mimic-train experiment=digits_noisy
    """
    before = ""
    for place, word in enumerate(words):
        following = words[place + 1 :]
        of_a_flag = before in _TAKE_A_WORD or (before in ("--info", "-i") and word in _KINDS_OF_INFO)
        before = word
        if of_a_flag:
            continue
        if word.startswith("-"):
            if word.partition("=")[0] not in _FLAGS:
                raise MimicError(_flag(name, root, word, following))
        elif word.startswith("="):
            raise MimicError(f"{word!r} begins with '='; settings are written without spaces: {name} NAME=VALUE")
        elif word.endswith("=") and following and "=" not in following[0]:
            raise MimicError(f"there is a space after {word!r}; type: {name} {word}{following[0]}")
        elif "=" not in word and not word.startswith("~") and (place or first is None):
            raise MimicError(_word(name, root, word, following))


def _flag(name: str, root: str, word: str, following: Sequence[str]) -> str:
    """Message for a flag that there is not."""
    key, sign, value = word.lstrip("-").partition("=")
    key = key.replace("-", "_")
    value = value if sign else next((each for each in following[:1] if not each.startswith("-")), "VALUE")
    keys = _keys(root)
    if key not in keys:
        inner = next((path for path in _inner_keys(root) if path.rpartition(".")[2] == key), None)
        if inner is None:
            return f"there is no flag {word!r}; settings are written NAME=VALUE, and {name} --help lists them"
        key = inner
    return f"{word!r} is no flag; settings are written without dashes: {name} {key}={value}"


def _word(name: str, root: str, word: str, following: Sequence[str]) -> str:
    """Message for a word that is neither a setting nor a flag."""
    experiments = options("experiment") if "experiment" in _keys(root) else []
    if word in experiments:
        return f"{word!r} is an experiment; type: {name} experiment={word}"
    if word in _keys(root):
        after = [each.removeprefix("=") for each in following[:2] if each != "="]
        value = after[0] if after and "=" not in after[0] else "VALUE"
        return f"{word!r} needs a value, without spaces; type: {name} {word}={value}"
    known = [*experiments, *_keys(root)]
    near = f"; {nearest_names(word, known)}" if known else ""
    return f"{word!r} is no setting{near}. Settings are written NAME=VALUE, and {name} --help lists them"


def _keys(root: str) -> list[str]:
    """Settings and groups of a root configuration."""
    conf = read_conf(conf_folder() / f"{root}.yaml")
    return [*(each.key for each in conf.settings), *(group for group, _ in conf.defaults if group and "/" not in group)]


def _inner_keys(root: str) -> list[str]:
    """Settings of the options that a root configuration chooses, with the group's name in front."""
    found = []
    for group, option in read_conf(conf_folder() / f"{root}.yaml").defaults:
        path = conf_folder() / group / f"{option}.yaml"
        if group and path.is_file():
            found += [f"{group}.{each.key}" for each in read_conf(path).settings]
    return found
