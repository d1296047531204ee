"""Manifests in the formats of other tools: CSV, DataComp's ids, cleanlab's table of label issues."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mimic.database import Database, named, quoted
from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.files import atomic_path
from lightning_mimic.tables import Table, cell_text, without_formula
from lightning_mimic.user_files import user_path, writing

if TYPE_CHECKING:
    from lightning_mimic.manifest.reader import Manifest


def export(manifest: "Manifest", name: str, path: str | Path) -> None:
    """Write a manifest in the format of another tool; a file under its final name is complete.

    Args:
        manifest: The decisions.
        name: Key of :data:`EXPORTS`.
        path: Path of the file; its directory is made if it is not there.

    Raises:
        CurationError: The manifest cannot be exported in this format, or the file cannot be written.
    """
    path = user_path(path, "path")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            EXPORTS[name].write(manifest, temporary)


def write_csv(manifest: "Manifest", path: Path) -> None:
    """Write the table as CSV; text that a spreadsheet would run as a formula has an apostrophe in front of it.

    Args:
        manifest: The decisions.
        path: Path of the file.
    """
    with Database() as database:
        _load(manifest, database)
        kinds = database.columns("manifest")
        text = {name: without_formula(named(name)) for name, kind in kinds.items() if kind == "VARCHAR"}
        _copy(database, {cell_text(name): text.get(name, named(name)) for name in kinds}, "", path)


def write_datacomp(manifest: "Manifest", path: Path) -> None:
    """Write the kept ids as DataComp's resharder reads them: ``.npy`` of ``u8,u8``, sorted, with repeats.

    Args:
        manifest: The decisions.
        path: Path of the file.

    Raises:
        CurationError: An id is not 32 hexadecimal digits.
    """
    import numpy as np

    with Database() as database:
        _load(manifest, database, "id", "keep")
        need_uids(database, "manifest")
        count = database.value("SELECT count(*) FROM manifest WHERE keep")
        form = np.dtype("u8,u8")
        with path.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(form), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            query = "SELECT lower(id) AS id FROM manifest WHERE keep ORDER BY lower(id)"
            with database.reader(query) as batches:
                for batch in batches:
                    digits = bytes.fromhex("".join(batch["id"].to_pylist()))
                    file.write(np.frombuffer(digits, ">u8").astype("<u8").tobytes())


def write_cleanlab(manifest: "Manifest", path: Path) -> None:
    """Write a table as cleanlab's ``find_label_issues`` returns it, as CSV in the order of ids.

    Its columns are ``is_label_issue`` (not kept), ``label_quality`` (share of the other scored samples with a lower
    mean score, 0 to 1; lower is worse, empty: never scored), ``given_label`` and ``predicted_label`` (names of classes
    where they are known), and ``reference_label``, which the reference suggests, where it is recorded.

    Args:
        manifest: The decisions.
        path: Path of the file.

    Raises:
        CurationError: No labels were recorded.
    """
    with Database() as database:
        _load(manifest, database)
        need_labels(database, "manifest")
        there = database.columns("manifest")
        for name in ("score", "predicted"):
            if name not in there:
                raise CurationError(f"{manifest.path} has no column {name!r}; {nearest_names(name, there)}.")
        cells = {
            "id": without_formula("id") if there["id"] == "VARCHAR" else "id",
            "is_label_issue": "NOT keep",
            "label_quality": "CASE WHEN score IS NOT NULL THEN "
            "percent_rank() OVER (PARTITION BY score IS NULL ORDER BY score) END",
        }
        heads = {"given_label": "label", "predicted_label": "predicted", "reference_label": "reference_predicted"}
        for head, name in heads.items():
            if name == "reference_predicted" and name not in there:
                continue
            names = f"{name}_name"
            cells[head] = f"coalesce({without_formula(names)}, {name}::VARCHAR)" if names in there else name
        _copy(database, cells, "ORDER BY manifest.id", path)


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
        write: Writes it to a file that has not got its final name yet.
        check: Raises, before long work, if a table with ``id`` and ``label`` cannot be exported in this format.
    """

    file: str
    write: "Callable[[Manifest, Path], None]"
    check: Callable[[Database, str], None]


#: By name.
EXPORTS = {
    "csv": Export("manifest.csv", write_csv, lambda database, table: None),
    "datacomp": Export("kept.npy", write_datacomp, need_uids),
    "cleanlab": Export("label_issues.csv", write_cleanlab, need_labels),
}


def checked_exports(names: Sequence[str]) -> Sequence[str]:
    """Return the names, or raise :class:`CurationError` for one that is not in :data:`EXPORTS`."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise CurationError(f"`exports` is {names!r}; expected a list of {', '.join(EXPORTS)}.")
    for name in names:
        if name not in list(EXPORTS):
            raise CurationError(f"`exports`: {name!r}; {nearest_names(str(name), EXPORTS)}.")
    return tuple(dict.fromkeys(names))


def _load(manifest: "Manifest", database: Database, *columns: str) -> None:
    """Make the table ``manifest`` of some columns, or of all, in the file's order."""
    database.run("SET preserve_insertion_order = true")
    Table(manifest.path, "parquet").load(database, "manifest", {name: name for name in columns} or None)


def _copy(database: Database, cells: Mapping[str, str], order: str, path: Path) -> None:
    """Write SQL for the cells of each column of the table ``manifest``."""
    columns = ", ".join(f"{cell} AS {named(head)}" for head, cell in cells.items())
    query = f"SELECT {columns} FROM manifest {order}"
    # The file is there already, under a name that is locked.
    database.run(f"COPY ({query}) TO {quoted(str(path))} (FORMAT csv, HEADER, USE_TMP_FILE false)")
