"""Which samples stay, which go, and why: a Parquet file, and what other tools read of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Subset

from lightning_mimic.curation.database import Database, first_line, quoted
from lightning_mimic.data.kept import kept_of
from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.files import atomic_path, atomic_write

#: Its own name among a Parquet file's key-value metadata.
_KEY = b"lightning_mimic"


class Manifest:
    """Decisions about samples, with their provenance.

    The file has a row per sample (or per listing of a sample, where a pool lists it more than once), the most
    suspicious first. A manifest made of others has ``id``, ``keep`` and ``reason`` only.

    - ``id``; ``keep``; ``reason``: why it goes or has no opinion, null where it is kept on its score;
    - ``score``: mean mimic score, loss per unit of weight distance, unbounded; lower is more suspicious, null: none;
    - ``scorings``: how many scores that is the mean of;
    - ``lift``: mean of weight times batch size, 0 to B; 1 is the weight in a uniform batch;
    - ``votes_keep`` of ``votes``: null unless many voted;
    - ``label`` and ``predicted``: null where not recorded.

    Args:
        path: Of a file with columns ``id`` and ``keep``.

    Raises:
        CurationError: No such file, or something else.

    Example:
        >>> Manifest("nowhere.parquet")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: nowhere.parquet is no manifest: there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise CurationError(f"{self.path} is no manifest: there is no such file.")
        try:
            form = pq.read_schema(self.path)
        except (OSError, pa.ArrowException) as error:
            raise CurationError(f"{self.path} is no manifest: {first_line(error)}") from error
        if not {"id", "keep"} <= set(form.names):
            raise CurationError(f"{self.path} is no manifest: its columns are {', '.join(form.names)}.")
        #: What it was made of and how.
        self.provenance: dict[str, Any] = json.loads((form.metadata or {}).get(_KEY, b"{}"))

    def table(self) -> pa.Table:
        """All of it, in memory."""
        with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            return file.read()

    def subset(self, dataset: Any) -> Subset:
        """What is kept of a data set, in its order.

        Args:
            dataset: A :class:`~lightning_mimic.WithIds`, or one whose row numbers the ids are.

        Raises:
            MimicError: The manifest is of another data set.
        """
        return kept_of(dataset, self.path)

    def to_csv(self, path: str | Path) -> None:
        """Writes the table as CSV."""
        with Database() as database:
            _copy(database, f"SELECT * FROM {self._read(database)}", Path(path))

    def to_datacomp(self, path: str | Path) -> None:
        """Writes the kept ids as DataComp's resharder wants them: ``.npy`` of ``u8,u8``, sorted, repeats kept.

        Raises:
            CurationError: An id is not 32 hexadecimal digits.
        """
        import numpy as np

        with Database() as database:
            kept = f"FROM {self._read(database)} WHERE keep"
            need_uids(database, self._read(database))
            count = database.value(f"SELECT count(*) {kept}")
            form = np.dtype("u8,u8")
            with atomic_write(_with_parents(Path(path))) as file:
                header = {"descr": np.lib.format.dtype_to_descr(form), "fortran_order": False, "shape": (count,)}
                np.lib.format.write_array_header_1_0(file, header)
                with database.reader(f"SELECT lower(id) AS id {kept} ORDER BY lower(id)") as batches:
                    for batch in batches:
                        digits = bytes.fromhex("".join(batch["id"].to_pylist()))
                        file.write(np.frombuffer(digits, ">u8").astype("<u8").tobytes())

    def to_cleanlab(self, path: str | Path) -> None:
        """Writes a table as cleanlab's ``find_label_issues`` gives it, as CSV in the order of ids.

        ``is_label_issue`` (not kept), ``label_quality`` (share of the other scored samples with a lower mean score, 0
        to 1; lower is worse, empty: never scored), ``given_label`` and ``predicted_label``.

        Raises:
            CurationError: No labels were recorded.
        """
        with Database() as database:
            table = self._read(database)
            need_labels(database, table)
            rank = "percent_rank() OVER (PARTITION BY score IS NULL ORDER BY score)"
            _copy(
                database,
                f"SELECT id, NOT keep AS is_label_issue, CASE WHEN score IS NOT NULL THEN {rank} END AS label_quality, "
                f"label AS given_label, predicted AS predicted_label FROM {table} ORDER BY id",
                Path(path),
            )

    def _read(self, database: Database) -> str:
        return database.file(self.path, pq.read_schema(self.path).names)


def need_uids(database: Database, table: str) -> None:
    """Raises :class:`CurationError` unless a table's ids are DataComp's."""
    if database.columns(table)["id"] != "VARCHAR":
        raise CurationError("DataComp's ids are 32 hexadecimal digits, and these are whole numbers.")
    others = database.column(f"SELECT id FROM {table} WHERE NOT regexp_full_match(id, '[0-9a-fA-F]{{32}}') LIMIT 1")
    if others:
        raise CurationError(f"DataComp's ids are 32 hexadecimal digits, and {others[0]!r} is not.")


def need_labels(database: Database, table: str) -> None:
    """Raises :class:`CurationError` unless a table has labels."""
    if "label" not in database.columns(table) or not database.value(f"SELECT count(label) FROM {table}"):
        raise CurationError(
            "cleanlab's table shows labels, and none were recorded. Let training_step return a dict with class indices "
            "'label' and 'predicted' beside 'loss'."
        )


@dataclass(frozen=True)
class Export:
    """What a manifest can be written as.

    Attributes:
        file: Its name.
        write: Writes it.
        check: Raises, before long work, if a table with ``id`` and ``label`` cannot be exported so.
    """

    file: str
    write: Callable[[Manifest, str | Path], None]
    check: Callable[[Database, str], None]


#: By name.
EXPORTS = {
    "csv": Export("manifest.csv", Manifest.to_csv, lambda database, table: None),
    "datacomp": Export("kept.npy", Manifest.to_datacomp, need_uids),
    "cleanlab": Export("label_issues.csv", Manifest.to_cleanlab, need_labels),
}


def checked_exports(names: Sequence[str]) -> Sequence[str]:
    """The names, or a :class:`CurationError` for one that is none of :data:`EXPORTS`."""
    for name in names:
        if name not in EXPORTS:
            raise CurationError(f"`exports`: {name!r}; {nearest_names(name, EXPORTS)}.")
    return names


def write_manifest(path: Path, database: Database, query: str, provenance: Mapping[str, Any]) -> Manifest:
    """Writes a query's rows, in its order, as a manifest; a file that is there is whole.

    Args:
        path: Of the file.
        database: Answers the query.
        query: SQL with at least ``id`` and ``keep``.
        provenance: What it was made of and how.
    """
    with atomic_write(_with_parents(path)) as file, database.reader(query, "writing") as batches:
        form = batches.schema.with_metadata({_KEY: json.dumps(dict(provenance))})
        # Nothing but reasons repeats itself.
        how = {"compression": "zstd", "use_dictionary": ["reason"], "write_statistics": False}
        with pq.ParquetWriter(file, form, write_page_checksum=True, **how) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(form.metadata))
    return Manifest(path)


def _copy(database: Database, query: str, path: Path) -> None:
    # Rows in the query's order.
    database.run("SET preserve_insertion_order = true")
    with atomic_path(_with_parents(path)) as temporary:
        database.run(f"COPY ({query}) TO {quoted(str(temporary))} (FORMAT csv, HEADER)")


def _with_parents(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
