"""Partitions of a ledger's rows by a hash of their ids, summarised by sample one partition at a time."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lightning_mimic.database import Database, parquet, sql_type
from lightning_mimic.ledger import Column, Parts, summarised_columns
from lightning_mimic.ledger.columns import schema
from lightning_mimic.ledger.writer import PART_NAME

#: Columns of a ledger that curation reads, besides those that it summarises by sample.
READ_COLUMNS = (
    *("id", "epoch", "step", "batch", "rank", "position", "attempt", "score", "weight", "batch_size", "flag"),
)
#: Upper bound on the memory per row while a partition is summarised, bytes. The database holds sums for each row until
#: it merges those of a sample.
_BYTES_PER_ROW = 120
#: Maximum number of partitions. More would have files too small to be read fast; partitions that do not fit into memory
#: spill to disk.
_MOST_PARTITIONS = 256


@dataclass(frozen=True)
class SampleColumns:
    """Hold the columns that curation summarises by sample.

    Attributes:
        last: Columns summarised by the value in the sample's last epoch.
        mean: Columns summarised by their mean.
    """

    last: tuple[Column, ...]
    mean: tuple[Column, ...]

    @classmethod
    def among(cls, recorded: Collection[str]) -> "SampleColumns":
        """Return the columns with these names; labels and predictions are always included."""
        found = [each for each in summarised_columns() if each.name in {"label", "predicted", *recorded}]
        last, mean = ([each for each in found if each.summary == kind] for kind in ("last", "mean"))
        return cls(tuple(last), tuple(mean))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns, ``label`` and ``predicted`` first."""
        return tuple(each.name for each in (*self.last, *self.mean))


@dataclass(frozen=True)
class Partition:
    """Hold the files of one partition: the samples whose id hashes are equal modulo the number of partitions.

    Attributes:
        rows: Files with the rows of the samples; may be empty.
        samples: Parquet file with a row per sample.
        repeats: Parquet file for the samples that have repeated rows or rows without a score, with the rows that are
            used; ``None`` if there are no such samples.
    """

    rows: tuple[Path, ...]
    samples: Path
    repeats: Path | None


def partition_count(parts: Parts, memory: int) -> int:
    """Return the number of partitions for which each can be summarised in memory.

    Args:
        parts: Files of the ledger.
        memory: Memory of the database, bytes.
    """
    rows = sum(int(match[5]) for match in (PART_NAME.fullmatch(path.name) for path in parts.paths) if match)
    return min(max(-(-rows * _BYTES_PER_ROW // memory), 1), _MOST_PARTITIONS)


def rows_of(parts: Parts, columns: SampleColumns) -> str:
    """Return a query for the rows of a ledger's files that were not superseded by a later attempt.

    NaN is treated as missing, and so is the weight of a sample that is alone in its batch.
    """
    lacking = [field for field in schema(parts.id_type) if field.name not in parts.columns]
    files = parquet(*parts.paths, by_name=not parts.uniform)
    if lacking:
        nulls = ", ".join(f"NULL::{sql_type(field.type)} AS {field.name}" for field in lacking)
        files = f"(SELECT *, {nulls} FROM {files})"
    over = " OR ".join(f"(attempt = {number} AND step >= {step})" for number, step in parts.until.items())
    finite = [f"CASE WHEN isfinite({each.name}) THEN {each.name} END AS {each.name}" for each in columns.mean]
    return f"""SELECT id::{sql_type(parts.id_type)} AS id, epoch, step, batch, rank, position,
        CASE WHEN NOT isfinite(score) OR score IS NULL THEN flag END AS flag,
        CASE WHEN isfinite(score) THEN score END AS score,
        CASE WHEN isfinite(score) AND flag <> 'alone' THEN weight END AS weight, batch_size,
        {", ".join([*(each.name for each in columns.last), *finite])}
    FROM {files} {f"WHERE NOT ({over})" if over else ""}"""


def write_partitions(database: Database, rows: str, folder: Path, count: int, what: str) -> list[tuple[Path, ...]]:
    """Write the rows of a query to partitions by the hash of their ids, and return the files of each partition.

    Args:
        database: Database that runs the query.
        rows: Query with a column ``id``.
        folder: Folder to create for the files.
        count: Number of partitions.
        what: Description of the work, for progress reports.
    """
    database.copy_by(f"SELECT *, hash(id) % {count} AS partition FROM ({rows})", "partition", count, folder, what)
    return [partition_files(folder, number) for number in range(count)]


def partition_files(folder: Path, number: int) -> tuple[Path, ...]:
    """Return the files of one partition written by :func:`write_partitions`; empty if the partition has no rows."""
    return tuple(sorted((folder / f"partition={number}").glob("*.parquet")))


def rows_in(files: Sequence[Path], columns: SampleColumns, id_type: pa.DataType, *, same_ids: bool = True) -> str:
    """Return SQL for a ``FROM`` clause that reads the rows in files of partitions.

    Args:
        files: Paths of the files; may be empty.
        columns: Columns to read.
        id_type: Common type of the ids; single files may have another.
        same_ids: Whether the ids have the same type in all files.
    """
    if files:
        return parquet(*files, by_name=not same_ids)
    names = ["epoch", "step", "batch", "rank", "position", "flag", "score", "weight", "batch_size", *columns.names]
    types = {field.name: sql_type(field.type) for field in schema(id_type)}
    return f"(SELECT {', '.join(f'NULL::{types[name]} AS {name}' for name in ('id', *names))} WHERE false)"


def scored_rows(rows: str, columns: SampleColumns, id_type: pa.DataType) -> str:
    """Return a query that turns rows of the files into rows with the columns for filters, and those that order rows."""
    means = [f"{each.name}::DOUBLE AS {each.name}" for each in columns.mean]
    return f"""SELECT id::{sql_type(id_type)} AS id, epoch, step, batch, rank, position, flag, score::DOUBLE AS score,
        weight::DOUBLE * batch_size AS relative_weight, {", ".join([*(each.name for each in columns.last), *means])}
        FROM {rows}"""


def summarise(database: Database, rows: str, columns: SampleColumns, samples: Path, repeats: Path) -> bool:
    """Summarise a partition into a row per sample.

    If an epoch repeats a sample, only its first row in that epoch is used. The means do not depend on the order of the
    rows.

    Args:
        database: Database that runs the queries; its memory should hold the partition.
        rows: Query from :func:`scored_rows` for all rows of the samples.
        columns: Columns to summarise.
        samples: Parquet file to write, with a row per sample.
        repeats: Parquet file to write for the samples that have repeated rows or rows without a score, with the rows
            that are used.

    Returns:
        Whether there are such samples; otherwise ``repeats`` is not written.
    """
    run = database.run
    run(f"CREATE OR REPLACE VIEW partition_rows AS {rows}")
    summed = ["score", "relative_weight", *(each.name for each in columns.mean)]
    largest = ", ".join(f"max(abs({name}))" for name in summed)
    first, last, count, *sizes = database.row(f"SELECT min(epoch), max(epoch), count(*), {largest} FROM partition_rows")
    means = {name: _exact_mean(name, size, count) for name, size in zip(summed, sizes, strict=True)}
    first, last = (0, 0) if first is None else (first, last)
    run(f"CREATE OR REPLACE TABLE partition_samples AS {_samples('partition_rows', first, last, means, scored=True)}")
    # A mean over all rows is wrong for samples that have a row without a score, or that an epoch repeats (a distributed
    # sampler repeats some; a run resumed within an epoch restarts the data of that epoch).
    run(
        """CREATE OR REPLACE TABLE partition_odd AS SELECT id FROM partition_samples WHERE seen > epochs
        UNION SELECT id FROM partition_rows WHERE score IS NULL"""
    )
    any_odd = bool(database.value("SELECT count(*) FROM partition_odd"))
    if any_odd:
        run(
            """CREATE OR REPLACE TABLE partition_repeats AS
            SELECT * FROM partition_rows SEMI JOIN partition_odd USING (id)
            QUALIFY row_number() OVER (PARTITION BY id, epoch ORDER BY step, batch, rank, position) = 1"""
        )
        run("DELETE FROM partition_samples WHERE id IN (FROM partition_odd)")
        run(f"INSERT INTO partition_samples {_samples('partition_repeats', first, last, means, scored=False)}")
        database.copy("FROM partition_repeats", repeats)
    _add_last(database, columns.last, last)
    kept = [*summed, "scorings", "flag", "seen", *(each.name for each in columns.last)]
    database.copy(f"SELECT id, {', '.join(kept)} FROM partition_samples LEFT JOIN partition_last USING (id)", samples)
    for table in ("samples", "odd", "repeats", "last"):
        run(f"DROP TABLE IF EXISTS partition_{table}")
    return any_odd


def _samples(rows: str, first: int, last: int, means: dict[str, str], *, scored: bool) -> str:
    """Return a query for the means of samples; ``scored``: use the rows with a score only."""
    # Few, small aggregates save memory: the database holds their states for each row until it merges a sample's rows.
    bits = f"bit_or(1::BIGINT << (epoch - {first}))" if last - first < 63 else f"bitstring_agg(epoch, {first}, {last})"
    scorings = "count(*)" if scored else "count(score)"
    flag = "NULL::VARCHAR" if scored else "CASE WHEN count(score) = 0 THEN max(flag) END"
    return f"""SELECT id, {", ".join(f"{mean} AS {name}" for name, mean in means.items())}, {scorings} AS scorings,
        {flag} AS flag, count(*) AS seen, bit_count({bits}) AS epochs
        FROM {rows} {"WHERE score IS NOT NULL" if scored else ""} GROUP BY id"""


def _exact_mean(column: str, largest: float | None, rows: int) -> str:
    """Return SQL for a mean that does not depend on the order in which rows are added, nor on partial sums.

    Each value is split into a multiple of a power of two and a remainder. The power is large enough for sums of its
    multiples to be exact, and small enough for sums of the remainders to be exact, except for remainders that are 2^80
    times smaller than the largest value.

    Args:
        column: Name of the column.
        largest: Largest absolute value of the column; ``None`` if all values are null.
        rows: Upper bound on the number of rows of a sample.
    """
    if not largest:
        return f"avg({column})"
    # Adding and subtracting 1.5 · 2^52 steps rounds to steps.
    shift = f"'{1.5 * 2.0 ** (math.frexp(largest)[1] + rows.bit_length())!r}'::DOUBLE"
    coarse = f"(({column} + {shift}) - {shift})"
    return f"(sum({coarse}) + sum({column} - {coarse})) / count({column})"


def _add_last(database: Database, columns: Iterable[Column], latest: int) -> None:
    """Create the table ``partition_last`` with values from each sample's last epoch, usually that of the partition."""
    values = f"SELECT id, {', '.join(f'arg_max({each.name}, step) AS {each.name}' for each in columns)}"
    database.run(
        f"CREATE OR REPLACE TABLE partition_last AS {values} FROM partition_rows WHERE epoch = {latest} GROUP BY id"
    )
    others = "SELECT id FROM partition_samples ANTI JOIN partition_last USING (id)"
    if database.value(f"SELECT count(*) FROM ({others})"):
        own = f"SELECT id, max(epoch) AS epoch FROM partition_rows SEMI JOIN ({others}) USING (id) GROUP BY id"
        database.run(
            f"INSERT INTO partition_last {values} FROM partition_rows SEMI JOIN ({own}) USING (id, epoch) GROUP BY id"
        )
