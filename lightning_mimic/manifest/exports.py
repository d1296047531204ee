"""Manifests in the formats of other tools: CSV, DataComp's ids, cleanlab's table of label issues."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from lightning_mimic.database import Database, quoted
from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.files import atomic_path, atomic_write

if TYPE_CHECKING:
    from lightning_mimic.manifest.reader import Manifest


def write_csv(manifest: "Manifest", path: str | Path) -> None:
    """Write the table as CSV.

    Args:
        manifest: The decisions.
        path: Path of the file.
    """
    with Database() as database:
        _copy(database, f"SELECT * FROM {_rows(manifest, database)}", Path(path))


def write_datacomp(manifest: "Manifest", path: str | Path) -> None:
    """Write the kept ids as DataComp's resharder reads them: ``.npy`` of ``u8,u8``, sorted, with repeats.

    Args:
        manifest: The decisions.
        path: Path of the file.

    Raises:
        CurationError: An id is not 32 hexadecimal digits.
    """
    import numpy as np

    with Database() as database:
        rows = _rows(manifest, database)
        need_uids(database, rows)
        count = database.value(f"SELECT count(*) FROM {rows} WHERE keep")
        form = np.dtype("u8,u8")
        with atomic_write(_with_parents(Path(path))) as file:
            header = {"descr": np.lib.format.dtype_to_descr(form), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            query = f"SELECT lower(id) AS id FROM {rows} WHERE keep ORDER BY lower(id)"
            with database.reader(query) as batches:
                for batch in batches:
                    digits = bytes.fromhex("".join(batch["id"].to_pylist()))
                    file.write(np.frombuffer(digits, ">u8").astype("<u8").tobytes())


def write_cleanlab(manifest: "Manifest", path: str | Path) -> None:
    """Write a table as cleanlab's ``find_label_issues`` returns it, as CSV in the order of ids.

    Its columns are ``is_label_issue`` (not kept), ``label_quality`` (share of the other scored samples with a lower
    mean score, 0 to 1; lower is worse, empty: never scored), ``given_label`` and ``predicted_label`` (names of classes
    where they are known).

    Args:
        manifest: The decisions.
        path: Path of the file.

    Raises:
        CurationError: No labels were recorded.
    """
    with Database() as database:
        rows = _rows(manifest, database)
        need_labels(database, rows)
        there = database.columns(rows)
        label, predicted = (
            f"coalesce({name}_name, {name}::VARCHAR)" if f"{name}_name" in there else name
            for name in ("label", "predicted")
        )
        rank = "percent_rank() OVER (PARTITION BY score IS NULL ORDER BY score)"
        _copy(
            database,
            f"SELECT id, NOT keep AS is_label_issue, CASE WHEN score IS NOT NULL THEN {rank} END AS label_quality, "
            f"{label} AS given_label, {predicted} AS predicted_label FROM {rows} ORDER BY id",
            Path(path),
        )


def need_uids(database: Database, table: str) -> None:
    """Raise :class:`CurationError` unless a table's ids are DataComp's."""
    if database.columns(table)["id"] != "VARCHAR":
        raise CurationError("DataComp's ids are 32 hexadecimal digits, and these are whole numbers.")
    others = database.column(f"SELECT id FROM {table} WHERE NOT regexp_full_match(id, '[0-9a-fA-F]{{32}}') LIMIT 1")
    if others:
        raise CurationError(f"DataComp's ids are 32 hexadecimal digits, and {others[0]!r} is not.")


def need_labels(database: Database, table: str) -> None:
    """Raise :class:`CurationError` unless a table has labels."""
    if "label" not in database.columns(table) or not database.value(f"SELECT count(label) FROM {table}"):
        raise CurationError(
            "cleanlab's table shows labels, and none were recorded. Let training_step return a dict with class indices "
            "'label' and 'predicted' beside 'loss'."
        )


@dataclass(frozen=True)
class Export:
    """A format that a manifest can be written in.

    Attributes:
        file: Name of the file.
        write: Writes it.
        check: Raises, before long work, if a table with ``id`` and ``label`` cannot be exported in this format.
    """

    file: str
    write: "Callable[[Manifest, str | Path], None]"
    check: Callable[[Database, str], None]


#: By name.
EXPORTS = {
    "csv": Export("manifest.csv", write_csv, lambda database, table: None),
    "datacomp": Export("kept.npy", write_datacomp, need_uids),
    "cleanlab": Export("label_issues.csv", write_cleanlab, need_labels),
}


def checked_exports(names: Sequence[str]) -> Sequence[str]:
    """Return the names, or raise :class:`CurationError` for one that is not in :data:`EXPORTS`."""
    for name in names:
        if name not in EXPORTS:
            raise CurationError(f"`exports`: {name!r}; {nearest_names(name, EXPORTS)}.")
    return names


def _rows(manifest: "Manifest", database: Database) -> str:
    """The manifest as something to select from, every page verified."""
    return database.file(manifest.path, pq.read_schema(manifest.path).names)


def _copy(database: Database, query: str, path: Path) -> None:
    # Rows in the query's order.
    database.run("SET preserve_insertion_order = true")
    with atomic_path(_with_parents(path)) as temporary:
        database.run(f"COPY ({query}) TO {quoted(str(temporary))} (FORMAT csv, HEADER)")


def _with_parents(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
