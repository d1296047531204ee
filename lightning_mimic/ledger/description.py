"""The description beside a ledger's parts: read, checked and written."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mimic.errors import LedgerError
from lightning_mimic.files import write_json
from lightning_mimic.stores import as_store_path

#: Raised by one whenever a reader of the older format would misread the newer.
SCHEMA_VERSION = 1

#: pandas and pyarrow, which read all files of a folder, pass over names that begin with an underscore.
META_FILE = "_meta.json"
#: Of ledgers that an earlier release began.
_EARLIER_META_FILE = "meta.json"
#: Of the descriptions on a store, each a file of its own that is named by its number; the last one holds.
_META_FOLDER = "_meta"
#: The key of the checksum over all else.
_CHECKSUM = "sha256"


def meta_path(directory: Path) -> Path:
    """Return the path of a ledger's description, be it there or not."""
    last = max((directory / _META_FOLDER).glob("[0-9]" * 6 + ".json"), key=_number, default=None)
    if last is not None:
        return last
    earlier, path = directory / _EARLIER_META_FILE, directory / META_FILE
    return earlier if earlier.is_file() and not (path.is_symlink() or path.exists()) else path


def next_meta_path(path: Path, directory: Path) -> Path:
    """Return the path of the description that follows another one: its own on a disk, a new one on a store.

    A store has no locks. Of several processes that write the next description at once, one succeeds, if all of them
    write it ``exclusive``; a copy of such a ledger goes on in the same way.

    Example:
        >>> next_meta_path(Path("run/_meta/000007.json"), Path("run")).name
        '000008.json'
    """
    if as_store_path(directory) or path.parent != directory:
        number = _number(path) if path.parent != directory else 0
        return directory / _META_FOLDER / f"{number + 1:06d}.json"
    return path


def _number(path: Path) -> int:
    return int(path.stem)


def read_meta(directory: Path) -> dict[str, Any] | None:
    """Read and check a ledger's description.

    Args:
        directory: The ledger.

    Returns:
        The description without its checksum, every field that is read anywhere being of its type; ``None`` where there
        is none.

    Raises:
        LedgerError: It cannot be read, was changed or damaged, or a newer version wrote it.
    """
    path = meta_path(directory)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise LedgerError(f"{path} is not a ledger's description: {error}.") from error
    if not isinstance(meta, dict) or "schema_version" not in meta:
        raise LedgerError(f"{path} is not a ledger's description: it has no schema_version.")
    version, checksum = meta["schema_version"], meta.pop(_CHECKSUM, None)
    if version != SCHEMA_VERSION or isinstance(version, bool | float):
        raise LedgerError(f"{path} has schema version {version!r}; this release reads version {SCHEMA_VERSION}.")
    if checksum is None and path.name != _EARLIER_META_FILE:
        raise LedgerError(f"{path} was damaged or changed: it has no checksum ({_CHECKSUM}).")
    if checksum is not None and checksum != _checksum(meta):
        raise LedgerError(
            f"{path} was damaged or changed: its content does not have the checksum {checksum!r} that it names. "
            "Restore the file from a copy."
        )
    problem = _problem(meta, complete=checksum is None)
    if problem:
        raise LedgerError(f"{path} is not a ledger's description: {problem}.")
    return meta


def is_torn(directory: Path) -> bool:
    """Whether the description is no JSON at all, as a system that failed while it was created leaves it."""
    try:
        json.loads(meta_path(directory).read_text(encoding="utf-8"))
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True
    return False


def write_meta(path: Path, meta: Mapping[str, Any], *, exclusive: bool = False) -> None:
    """Write a description with its checksum, if it is one that can be read back.

    Args:
        path: See :func:`meta_path`.
        meta: The description.
        exclusive: Fail if the file exists.

    Raises:
        LedgerError: Some value is none that the file can hold.
        FileExistsError: ``exclusive``, and the file exists.
        OSError: The file cannot be written.
    """
    try:
        plain = as_json(meta)
    except (TypeError, ValueError, RecursionError) as error:
        raise LedgerError(f"`ledger`: {path} cannot hold what was noted: {error}.") from error
    problem = _problem(plain, complete=False)
    if problem:
        raise LedgerError(f"`ledger`: {path} cannot hold what was noted: {problem}.")
    write_json(path, plain | {_CHECKSUM: _checksum(plain)}, exclusive=exclusive)


def as_json(value: Any) -> Any:
    """Return a value as it is read back from JSON."""
    return json.loads(json.dumps(value))


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the hash by which configurations are told apart."""
    return hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode()).hexdigest()[:16]


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration decides the meaning of scores.

    Earlier releases counted the number of ranks among it, which changes weights and not scores, and did not know of
    ``calibrated``.

    Example:
        >>> meaning({"scorer": "MimicScore", "scorer_settings": {"calibrated": False}, "world_size": 2})
        {'scorer': 'MimicScore'}
    """
    found = {name: value for name, value in config.items() if name != "world_size"}
    settings = found.get("scorer_settings")
    if isinstance(settings, dict) and settings.get("calibrated") is False:
        found["scorer_settings"] = {name: value for name, value in settings.items() if name != "calibrated"}
        if not found["scorer_settings"]:
            del found["scorer_settings"]
    return found


def differences(configs: Sequence[Mapping[str, Any]]) -> str:
    """The settings in which configurations differ, as a phrase.

    Example:
        >>> differences([{"scope": "loss", "reweight": True}, {"scope": "target", "reweight": True}])
        'scope: loss, target'
    """
    shown = []
    for key in sorted({key for config in configs for key in config}):
        values = dict.fromkeys(str(config.get(key)) for config in configs)
        if len(values) > 1:
            shown.append(f"{key}: {', '.join(values)}")
    return "; ".join(shown)


def last_attempt(meta: Mapping[str, Any]) -> str:
    """Return which attempt is the last one, when it started and where, as a phrase."""
    last = meta["attempts"][-1]
    where = f" on {last['host']}" if "host" in last else ""
    return f"attempt {len(meta['attempts']) - 1} of run {meta['run']} (started {last['started']}{where})"


#: What changes weights and not scores.
BATCH_FACTS = ("ranks", "batch_size")


def batch_differences(attempts: Sequence[Mapping[str, Any]], names: Collection[str] = BATCH_FACTS) -> str:
    """The differences of attempts that change weights and not scores, where they are known.

    Example:
        >>> batch_differences([{"config": {}, "batch_size": 8}, {"config": {}, "batch_size": 32}, {"config": {}}])
        'batch_size: 8, 32'
    """
    known = [{"ranks": facts["config"].get("world_size"), **facts} for facts in attempts]
    shown = (
        differences([{name: facts[name]} for facts in known if facts.get(name) is not None])
        for name in BATCH_FACTS
        if name in names
    )
    return "; ".join(filter(None, shown))


def class_names_in(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes that a description has, ``None`` where it has none.

    Raises:
        LedgerError: They are not a list of text.
    """
    names = meta.get("class_names")
    if names is None:
        return None
    if not _texts(names):
        raise LedgerError(f"`class_names` is {names!r}; expected a list of str (UTF-8), in the order of the labels.")
    return tuple(names)


def _checksum(meta: Mapping[str, Any]) -> str:
    canonical = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _text(value: Any) -> bool:
    """Whether it is text that UTF-8 can encode, which file names are not always."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(_text(each) for each in value)


def _count(value: Any, *, least: int = 0, below: int = 2**63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(_count(each) for each in value)


def _files(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) and _text(each.get("sha256")) for each in value)


#: The fields of an attempt: whether each has one, what it must be, and that in words.
_FIELDS: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "attempt": (False, _count, "an int"),
    "token": (False, _text, "text"),
    "started": (True, _text, "text"),
    "host": (False, _text, "text"),
    "start_step": (True, _count, "an int from 0 to 2^63 - 1"),
    "config": (True, lambda value: isinstance(value, dict), "a mapping"),
    "config_hash": (True, _text, "text"),
    "columns": (False, _texts, "a list of text"),
    "ranks": (False, lambda value: _count(value, least=1, below=1 << 20), "an int from 1 to 2^20 - 1"),
    "rows": (False, _counts, "a list of ints from 0"),
    "batch_size": (False, lambda value: _count(value, least=1), "an int from 1"),
    "continues": (False, lambda value: value is None or _count(value), "an earlier attempt's number, or null"),
    "scored": (False, lambda value: _counts(value) and len(value) == 3, "epoch, step and batch, ints from 0"),
    "elsewhere": (False, lambda value: isinstance(value, bool), "true or false"),
    "checkpointed": (False, lambda value: isinstance(value, bool), "true or false"),
    "ids": (False, lambda value: value in ("int", "str"), "'int' or 'str'"),
    "checkpoints": (False, _files, "a list of files with their sha256"),
    "score_kind": (False, _text, "text"),
    "data": (False, lambda value: isinstance(value, dict), "a mapping"),
    "diagnosis": (False, lambda value: isinstance(value, dict), "a mapping"),
}


def _problem(meta: Mapping[str, Any], *, complete: bool) -> str | None:
    """Return what is wrong with the structure of a description.

    Args:
        meta: With a ``schema_version``, and without a checksum.
        complete: It may hold known keys only, as without a checksum one that is unknown may be a damaged name.
    """
    unknown = meta.keys() - {"schema_version", "run", "attempts", "class_names"}
    if complete and unknown:
        return f"{sorted(unknown)[0]!r} is no key of it"
    run, attempts = meta.get("run"), meta.get("attempts")
    if not isinstance(run, str) or not (run.isascii() and run.isalnum()) or not attempts:
        return "it names no run or no attempts"
    if meta.get("class_names") is not None and not _texts(meta["class_names"]):
        return f"`class_names` is {meta['class_names']!r}; expected a list of text"
    if not isinstance(attempts, list) or not all(isinstance(facts, dict) for facts in attempts):
        return "`attempts` is not a list of mappings"
    return next(filter(None, (_attempt_problem(number, facts) for number, facts in enumerate(attempts))), None)


def _attempt_problem(number: int, facts: Mapping[str, Any]) -> str | None:
    """Return what is wrong with one attempt of a description."""
    for name, (needed, is_right, expected) in _FIELDS.items():
        if name in facts and not is_right(facts[name]):
            return f"`{name}` of attempt {number} is {facts[name]!r}; expected {expected}"
        if needed and name not in facts:
            return f"attempt {number} has no `{name}`"
    if facts.get("attempt", number) != number:
        return f"attempt {number} has the number {facts['attempt']}"
    if facts["config_hash"] != config_hash(facts["config"]):
        return f"the settings of attempt {number} do not have the hash {facts['config_hash']!r} that it names"
    if "rows" in facts and len(facts["rows"]) != facts.get("ranks", len(facts["rows"])):
        return f"attempt {number} has rows of {len(facts['rows'])} ranks, and {facts['ranks']} wrote it"
    if facts.get("continues") is not None and facts["continues"] >= number:
        return f"attempt {number} continues attempt {facts['continues']}, which is not before it"
    return None
