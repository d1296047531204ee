"""The score file format: columns, flags and what the file beside them says."""

import enum
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

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


def schema(id_type: pa.DataType) -> pa.Schema:
    """The columns of a part.

    Args:
        id_type: ``int64`` or ``string``.
    """
    return pa.schema(
        [
            ("id", id_type),
            ("epoch", pa.int32()),
            ("step", pa.int64()),  # optimizer steps done before the one this row took part in
            ("batch", pa.int64()),  # index of the micro-batch within the epoch
            ("rank", pa.int32()),
            ("position", pa.int32()),  # row within this rank's micro-batch
            ("attempt", pa.int32()),  # 0, and one more for each resumed or repeated fit
            ("score", pa.float32()),  # loss per unit of weight distance; positive: towards the reference
            ("weight", pa.float32()),  # sums to 1 over a micro-batch of all ranks
            ("loss", pa.float32()),
            ("batch_size", pa.int32()),  # of all ranks
            ("flag", pa.string()),
            ("label", pa.int64()),
            ("predicted", pa.int64()),
        ]
    )


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
