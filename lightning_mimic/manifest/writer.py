"""Write a manifest: rows in a given order, with their provenance, complete or not there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mimic.files import atomic_write
from lightning_mimic.manifest.reader import PROVENANCE, Manifest


def write_manifest(path: str | Path, rows: pa.RecordBatchReader, provenance: Mapping[str, Any]) -> Manifest:
    """Write rows as a manifest, in their order; a file under its final name is complete.

    Args:
        path: Path of the file; its directory is made if it is not there.
        rows: Batches with at least ``id`` and ``keep``.
        provenance: Settings and sources of the decisions, as JSON has them.

    Returns:
        The manifest that was written.

    Example:
        >>> import tempfile
        >>> table = pa.table({"id": [1, 2], "keep": [True, False], "reason": [None, "a duplicate"]})
        >>> path = tempfile.mkdtemp() + "/manifest.parquet"
        >>> write_manifest(path, table.to_reader(), {"made_by": "hand"}).table()["id"].to_pylist()
        [1, 2]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        form = rows.schema.with_metadata({PROVENANCE: json.dumps(dict(provenance))})
        # Only reasons and names repeat.
        repeats = [name for name in ("reason", "label_name", "predicted_name") if name in form.names]
        how = {"compression": "zstd", "use_dictionary": repeats, "write_statistics": False}
        with pq.ParquetWriter(file, form, write_page_checksum=True, **how) as writer:
            for batch in rows:
                writer.write_batch(batch.replace_schema_metadata(form.metadata))
    return Manifest(path)
