"""The score file format: flags, and the description beside the parts."""

import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mimic.errors import LedgerError

#: Raised by one whenever a reader of the older format would misread the newer.
SCHEMA_VERSION = 1

META_FILE = "meta.json"


class Flag(enum.IntEnum):
    """What happened to a row; the name in lower case is what the ledger stores."""

    OK = 0
    #: The sample's loss (or, without a loss vector, its gradient) was not finite: weight 0, no score.
    NONFINITE_LOSS = 1
    #: Its gradient left float16's range under a gradient scaler: passed on as it was, no score.
    OVERFLOW = 2
    #: There was no direction, so no score and uniform weights: the model stood at its reference, or the reference was
    #: not aligned yet.
    ZERO_DIRECTION = 3
    #: The only sample of its micro-batch: weight 1, whatever its score.
    ALONE = 4


def class_names_in(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes that a description has, ``None`` where it has none.

    Raises:
        LedgerError: They are not a list of text.
    """
    names = meta.get("class_names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LedgerError(f"`class_names` is {names!r}; expected a list of str, in the order of the labels.")
    return tuple(names)


def read_meta(directory: Path) -> dict[str, Any] | None:
    """The ledger's ``meta.json``, or ``None`` where there is none.

    Raises:
        LedgerError: It cannot be read, or a newer version wrote it.
    """
    path = directory / META_FILE
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise LedgerError(f"{path} is not a ledger's description: {error}.") from error
    if not isinstance(meta, dict) or "schema_version" not in meta:
        raise LedgerError(f"{path} is not a ledger's description: it has no schema_version.")
    if meta["schema_version"] != SCHEMA_VERSION:
        raise LedgerError(
            f"{path} has schema version {meta['schema_version']}; this release reads version {SCHEMA_VERSION}."
        )
    if not isinstance(meta.get("run"), str) or not meta.get("attempts"):
        raise LedgerError(f"{path} is not a ledger's description: it names no run or no attempts.")
    return meta
