"""Write a manifest: rows in a given order, with their provenance, complete or not there."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mimic.files import atomic_path
from lightning_mimic.manifest.exports import EXPORTS
from lightning_mimic.manifest.reader import PROVENANCE, Manifest
from lightning_mimic.stores import as_store_path, path_of
from lightning_mimic.user_files import SEALED, seal_parquet, writing

if os.name == "posix":
    import fcntl


def write_manifest(
    path: str | Path, rows: pa.RecordBatchReader, provenance: Mapping[str, Any], exports: Sequence[str] = ()
) -> Manifest:
    """Write rows as a manifest, in their order, and its exports; none of these files is there before all are complete.

    Args:
        path: Path of the file; its directory is made if it is not there.
        rows: Batches with at least ``id`` and ``keep``.
        provenance: Settings and sources of the decisions, as JSON has them.
        exports: Names of :data:`EXPORTS`, to be written beside the manifest and named after it, in place of what has
            these names already; on a store, where there are no locks, these names must be free.

    Returns:
        The manifest that was written.

    Raises:
        CurationError: There is a file of this name, or it cannot be written.

    Example:
        >>> import tempfile
        >>> table = pa.table({"id": [1, 2], "keep": [True, False], "reason": [None, "a duplicate"]})
        >>> path = tempfile.mkdtemp() + "/manifest.parquet"
        >>> write_manifest(path, table.to_reader(), {"made_by": "hand"}).table()["id"].to_pylist()
        [1, 2]
    """
    path = path_of(path, "path")
    on_store = as_store_path(path) is not None
    with writing(path), contextlib.ExitStack() as finished:
        path.parent.mkdir(parents=True, exist_ok=True)
        alone = finished.enter_context(_lock(path.parent))
        temporary = finished.enter_context(atomic_path(path, exclusive=True))
        write_rows(temporary, rows, provenance)
        for name in exports:
            # What is entered later is placed earlier: the manifest is the last to appear.
            place = path.with_name(f"{path.stem}.{EXPORTS[name].file}")
            # On a store no lock keeps another writer's export from being put beside this manifest.
            beside = finished.enter_context(atomic_path(place, exclusive=on_store))
            EXPORTS[name].write(Manifest(temporary), beside)
        alone()
        if path.exists():
            raise FileExistsError(errno.EEXIST, "", str(path))
    return Manifest(path)


def write_rows(path: Path, rows: pa.RecordBatchReader, provenance: Mapping[str, Any]) -> None:
    """Write the content of a manifest to a file that has not got its final name yet.

    Args:
        path: Path of the file.
        rows: As for :func:`write_manifest`.
        provenance: Likewise.
    """
    form = rows.schema.with_metadata({PROVENANCE: json.dumps(dict(provenance)), SEALED: "sha256"})
    # Only reasons and names repeat.
    repeats = [name for name in form.names if name == "reason" or name.endswith("_name")]
    how = {"compression": "zstd", "use_dictionary": repeats, "write_statistics": False}
    with pq.ParquetWriter(path, form, write_page_checksum=True, **how) as writer:
        for batch in rows:
            writer.write_batch(batch.replace_schema_metadata(form.metadata))
    seal_parquet(path)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that waits until no other writer places files in a folder; then none does until the end."""
    if os.name != "posix" or as_store_path(folder):
        yield lambda: None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:

        def wait() -> None:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)

        yield wait
    finally:
        os.close(descriptor)
