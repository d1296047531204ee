"""A ledger's rows in partitions by a hash of their ids, and the samples of each partition, one partition at a time."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lightning_mimic.database import Database, parquet, sql_type
from lightning_mimic.ledger import Column, Parts, summarised_columns
from lightning_mimic.ledger.columns import schema
from lightning_mimic.ledger.writer import PART_NAME

#: The columns of a ledger that curation reads, beside those that it sums up.
READ_COLUMNS = (
    *("id", "epoch", "step", "batch", "rank", "position", "attempt", "score", "weight", "batch_size", "flag"),
)
#: Memory that a row takes, at most, while its partition is summed up: each has sums of its own until those of a sample
#: meet.
_BYTES_PER_ROW = 120
#: More would be written in pieces too small to be read fast; partitions too large for the memory spill to disk.
_MOST_PARTITIONS = 256


@dataclass(frozen=True)
class SampleColumns:
    """The columns that curation sums up by sample.

    Attributes:
        last: Those of which the value of a sample's last epoch counts.
        mean: Those of which the mean counts.
    """

    last: tuple[Column, ...]
    mean: tuple[Column, ...]

    @classmethod
    def among(cls, recorded: Collection[str]) -> "SampleColumns":
        """Return those with these names; labels and predictions are always among them."""
        found = [each for each in summarised_columns() if each.name in {"label", "predicted", *recorded}]
        last, mean = ([each for each in found if each.summary == kind] for kind in ("last", "mean"))
        return cls(tuple(last), tuple(mean))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all, ``label`` and ``predicted`` first."""
        return tuple(each.name for each in (*self.last, *self.mean))


@dataclass(frozen=True)
class Partition:
    """The samples whose ids have one hash, modulo the number of partitions.

    Attributes:
        rows: Files with their rows; there may be none.
        samples: Parquet file with a row per sample.
        repeats: Parquet file with the rows that count of the samples some of whose rows do not count, or have no score;
            ``None`` if there are no such samples.
    """

    rows: tuple[Path, ...]
    samples: Path
    repeats: Path | None


def partition_count(parts: Parts, memory: int) -> int:
    """Return how many partitions there must be, so that one of them can be summed up in memory.

    Args:
        parts: The ledger's files.
        memory: Of the database, bytes.
    """
    rows = sum(int(match[5]) for match in (PART_NAME.fullmatch(path.name) for path in parts.paths) if match)
    return min(max(-(-rows * _BYTES_PER_ROW // memory), 1), _MOST_PARTITIONS)


def rows_of(parts: Parts, columns: SampleColumns) -> str:
    """Return a query for the rows of a ledger's files that no later attempt went over again.

    NaN is treated as missing; so is the weight of a sample alone in its batch.
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
    """Write the rows of a query to files by the hash of their ids, and return the files of each partition.

    Args:
        database: Runs the query.
        rows: A query with a column ``id``.
        folder: Made for the files.
        count: Number of partitions.
        what: What this is, for the progress.
    """
    database.copy_by(f"SELECT *, hash(id) % {count} AS partition FROM ({rows})", "partition", count, folder, what)
    return [partition_files(folder, number) for number in range(count)]


def partition_files(folder: Path, number: int) -> tuple[Path, ...]:
    """Return the files of one partition that :func:`write_partitions` has written; none where it has no rows."""
    return tuple(sorted((folder / f"partition={number}").glob("*.parquet")))


def rows_in(files: Sequence[Path], columns: SampleColumns, id_type: pa.DataType, *, same_ids: bool = True) -> str:
    """Return files of partitions as something to select from.

    Args:
        files: Paths of the files; there may be none.
        columns: Those that are wanted.
        id_type: Type of the ids, whatever it is in single files.
        same_ids: It is the same in all files.
    """
    if files:
        return parquet(*files, by_name=not same_ids)
    names = ["epoch", "step", "batch", "rank", "position", "flag", "score", "weight", "batch_size", *columns.names]
    types = {field.name: sql_type(field.type) for field in schema(id_type)}
    return f"(SELECT {', '.join(f'NULL::{types[name]} AS {name}' for name in ('id', *names))} WHERE false)"


def scored_rows(rows: str, columns: SampleColumns, id_type: pa.DataType) -> str:
    """Return a query for rows as filters see them, from rows as they are in the files, with what orders them."""
    means = [f"{each.name}::DOUBLE AS {each.name}" for each in columns.mean]
    return f"""SELECT id::{sql_type(id_type)} AS id, epoch, step, batch, rank, position, flag, score::DOUBLE AS score,
        weight::DOUBLE * batch_size AS relative_weight, {", ".join([*(each.name for each in columns.last), *means])}
        FROM {rows}"""


def summarise(database: Database, rows: str, columns: SampleColumns, samples: Path, repeats: Path) -> bool:
    """Write a row per sample of a partition.

    Of a sample that an epoch repeats, the first row counts. The means do not depend on the order of the rows.

    Args:
        database: Runs the queries; its memory should hold the partition.
        rows: Query from :func:`scored_rows`, all rows of the samples.
        columns: Those that are summed up.
        samples: Parquet file to write.
        repeats: Parquet file to write for the samples some of whose rows do not count, or have no score: the rows that
            count.

    Returns:
        Whether there are such samples; without them, there is no such file.
    """
    run = database.run
    run(f"CREATE OR REPLACE VIEW partition_rows AS {rows}")
    summed = ["score", "relative_weight", *(each.name for each in columns.mean)]
    largest = ", ".join(f"max(abs({name}))" for name in summed)
    first, last, count, *sizes = database.row(f"SELECT min(epoch), max(epoch), count(*), {largest} FROM partition_rows")
    means = {name: _exact_mean(name, size, count) for name, size in zip(summed, sizes, strict=True)}
    first, last = (0, 0) if first is None else (first, last)
    run(f"CREATE OR REPLACE TABLE partition_samples AS {_samples('partition_rows', first, last, means, scored=True)}")
    # Not as simple as a mean of all rows: samples with a row without a score, and those that an epoch repeats (a
    # distributed sampler repeats some; a run resumed within an epoch starts that epoch's data again).
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
    """Return a query for the means of samples, with all rows scored or some."""
    # Every state counts: each row has its own until rows of a sample meet.
    bits = f"bit_or(1::BIGINT << (epoch - {first}))" if last - first < 63 else f"bitstring_agg(epoch, {first}, {last})"
    scorings = "count(*)" if scored else "count(score)"
    flag = "NULL::VARCHAR" if scored else "CASE WHEN count(score) = 0 THEN max(flag) END"
    return f"""SELECT id, {", ".join(f"{mean} AS {name}" for name, mean in means.items())}, {scorings} AS scorings,
        {flag} AS flag, count(*) AS seen, bit_count({bits}) AS epochs
        FROM {rows} {"WHERE score IS NOT NULL" if scored else ""} GROUP BY id"""


def _exact_mean(column: str, largest: float | None, rows: int) -> str:
    """Return SQL for a mean that is the same in whatever order and in how many parts its rows are added up.

    Each value is split into a multiple of a power of two and a rest. The power is so large that sums of its multiples
    are exact, and so small that so are sums of the rests, unless they are 2^80 times smaller than the largest value.

    Args:
        column: Name of the column.
        largest: Its largest absolute value; ``None`` if all are null.
        rows: At least as many as a sample can have.
    """
    if not largest:
        return f"avg({column})"
    # Adding and subtracting 1.5 · 2^52 steps rounds to steps.
    shift = f"'{1.5 * 2.0 ** (math.frexp(largest)[1] + rows.bit_length())!r}'::DOUBLE"
    coarse = f"(({column} + {shift}) - {shift})"
    return f"(sum({coarse}) + sum({column} - {coarse})) / count({column})"


def _add_last(database: Database, columns: Iterable[Column], latest: int) -> None:
    """Make a table of what holds as of each sample's last epoch; for most that is the partition's last."""
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
