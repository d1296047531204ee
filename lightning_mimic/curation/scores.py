"""Scores of a ledger as database tables: a row per scoring, and a row per sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_mimic.curation.partitions import (
    READ_COLUMNS,
    Partition,
    SampleColumns,
    partition_count,
    rows_in,
    rows_of,
    scored_rows,
    summarise,
    write_partitions,
)
from lightning_mimic.curation.shares import SharedPartitions
from lightning_mimic.database import Database, parquet, require_space, sql_type
from lightning_mimic.ledger import Ledger

#: Approximate number of samples on which clusters, mixtures and the label model are fitted.
SAMPLE_SIZE = 20_000


@dataclass(frozen=True)
class ScoreTable:
    """Describe a table of scores with a row per sample and epoch, or a row per sample.

    Its columns are ``id``, ``epoch``, ``score``, ``relative_weight``, ``label``, and the other recorded columns that a
    ledger's table summarises. ``score`` is never null, in loss per unit of weight distance; ``relative_weight`` is the
    weight divided by that of a uniform batch, ``w · B``. A table with a row per sample holds means, and its epoch is 0.

    Attributes:
        database: Database with the table.
        name: Name of the table or view.
        epochs: Epochs in the table, in ascending order.
        samples: Number of different samples.
        sample_size: Approximate number of samples in ``sample``.
    """

    database: Database
    name: str
    epochs: tuple[int, ...]
    samples: int
    sample_size: int = SAMPLE_SIZE

    @property
    def sampled(self) -> str:
        """SQL condition that selects about ``sample_size`` samples, or all if there are fewer.

        The selection depends on the ids and not on chance, so that it is the same in every epoch and reproducible.
        """
        return f"hash(id) % {max(-(-self.samples // self.sample_size), 1)} = 0"

    @cached_property
    def sample(self) -> str:
        """Name of a table with the rows of the selected samples."""
        name = f"{self.name}_sample"
        self.database.run(f"CREATE OR REPLACE TABLE {name} AS FROM {self.name} WHERE {self.sampled}", "sampling")
        return name

    @cached_property
    def sampled_scores(self) -> dict[int, Any]:
        """Scores of the selected samples in ascending order, by epoch."""
        import numpy as np

        found = self.database.arrays(f"SELECT epoch, score FROM {self.sample}")
        return {e: np.sort(found["score"][found["epoch"] == e]) for e in self.epochs if (found["epoch"] == e).any()}


class Scores:
    """Load the scores of a ledger into tables of a database.

    If an epoch repeats a sample, its first row in that epoch is used, as in :meth:`lightning_mimic.Ledger.table`. A
    ledger that does not fit into the database's memory is split into partitions by a hash of the ids, which are
    summarised one at a time.

    Args:
        ledger: Directory of the ledger.
        database: Database in which the tables are created.
        name: Prefix of the tables' names.
        allow_partial: Whether to read the rest of the ledger if parts are damaged or rows are missing, instead of
            raising an error.
        sample_size: Approximate number of samples for fits, see :class:`ScoreTable`.
        shared: Partitions of the ledger that were made by several processes; ``None``: make them here.

    Raises:
        CurationError: ``shared`` belongs to another ledger or is incomplete.
        LedgerError: As for :meth:`lightning_mimic.Ledger.parts`.

    Attributes:
        parts: Files of the ledger.
        samples: Name of the view with a row per sample that was ever in a batch: ``id``, ``score`` (mean over its
            scorings, or null), ``scorings`` (number of scorings with a score), ``relative_weight`` (mean of
            ``w · B``), ``label`` and ``predicted`` (from its last epoch, null if not recorded), ``flag`` (reason for a
            missing score, or null), and the other recorded columns that a ledger's table summarises.
        columns: Names of the summarised columns in these tables, ``label`` and ``predicted`` first.
        attempts: Descriptions of the attempts whose rows are used.
        class_names: Names of the classes, or ``None`` if not recorded.
        id_type: SQL type of the ids: ``BIGINT``, ``UBIGINT`` or ``VARCHAR``.
    """

    def __init__(
        self,
        ledger: str | Path,
        database: Database,
        name: str = "data",
        *,
        allow_partial: bool = False,
        sample_size: int = SAMPLE_SIZE,
        shared: SharedPartitions | None = None,
    ) -> None:
        self.ledger = Ledger(ledger)
        self.database = database
        if shared is None:
            self.parts = self.ledger.parts(
                READ_COLUMNS,
                allow_partial=allow_partial,
                advance=lambda done, of: database.report_progress(f"checking {name}", done / of),
            )
        else:
            self.parts = shared.parts(self.ledger, allow_partial=allow_partial)
        self.samples = f"{name}_samples"
        self.id_type = sql_type(self.parts.id_type)
        self.attempts: list[dict[str, Any]] = [self.ledger.meta["attempts"][n] for n in self.parts.attempts]
        self.class_names = self.ledger.class_names
        self._columns = SampleColumns.among(self.parts.recorded)
        self.columns = self._columns.names
        self._name = name
        self._sample_size = sample_size
        self._shared, self._split = shared, shared is not None
        self._partitions = self._make() if shared is None else shared.partitions()
        self._show(self._partitions)
        self._count = int(self.database.value(f"SELECT count(*) FROM {self.samples}"))

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the last attempt; the meaning of the scores is the same in all attempts whose rows are used."""
        config: dict[str, Any] = self.attempts[-1]["config"]
        return config

    def means(self) -> ScoreTable:
        """Return a table with the means of each sample that has a score."""
        name = f"{self._name}_means"
        self.database.run(
            f"CREATE OR REPLACE VIEW {name} AS SELECT id, 0 AS epoch, score, relative_weight, "
            f"{', '.join(self.columns)} FROM {self.samples} WHERE score IS NOT NULL"
        )
        return ScoreTable(self.database, name, (0,), self._count, self._sample_size)

    def scorings(self) -> ScoreTable:
        """Return a table with a row per sample and epoch."""
        name = f"{self._name}_rows"
        epochs = self.database.column(f"SELECT DISTINCT epoch FROM {name} ORDER BY epoch")
        return ScoreTable(self.database, name, tuple(epochs), self._count, self._sample_size)

    @property
    def partitions(self) -> int:
        """Number of partitions of the samples; a sample's partition is ``hash(id)`` modulo this number."""
        return len(self._partitions)

    def one_at_a_time(self, *, last: bool = False) -> Iterator[int]:
        """Restrict all tables to each partition in turn.

        Args:
            last: Whether the tables are no longer needed afterwards; the rows of each partition are then deleted after
                use, to free disk space.

        Yields:
            The index of the partition.
        """
        for number, partition in enumerate(self._partitions):
            self._show([partition])
            yield number
            for path in partition.rows if last and self._shared is None else ():
                path.unlink()
        if not last:
            self._show(self._partitions)

    def _make(self) -> list[Partition]:
        """Summarise the samples, one partition at a time."""
        database, name = self.database, self._name
        folder = database.folder / name
        folder.mkdir()
        count = partition_count(self.parts, database.memory_bytes())
        found: list[tuple[Path, ...]] = [()]  # the ledger's own files
        self._split = count > 1
        if self._split:
            require_space(folder, sum(path.stat().st_size for path in self.parts.paths), f"curating {name}")
            found = write_partitions(
                database, rows_of(self.parts, self._columns), folder / "rows", count, f"reading {name}"
            )
        made = []
        for number, files in enumerate(found):
            database.report_progress(f"summarising {name}", number / count)
            samples, repeats = (folder / f"{kind}-{number}.parquet" for kind in ("samples", "repeats"))
            has_repeats = summarise(database, self._scored(files), self._columns, samples, repeats)
            made.append(Partition(files, samples, repeats if has_repeats else None))
        database.report_progress(f"summarising {name}", 1.0)
        return made

    def _show(self, partitions: Sequence[Partition]) -> None:
        """Create the views of the rows and samples of these partitions."""
        run, name = self.database.run, self._name
        run(f"CREATE OR REPLACE VIEW {self.samples} AS FROM {parquet(*(each.samples for each in partitions))}")
        files = [path for each in partitions for path in each.rows]
        shown = f"SELECT id, epoch, score, relative_weight, {', '.join(self.columns)}"
        rows = f"{shown} FROM ({self._scored(files)})"
        repeats = [each.repeats for each in partitions if each.repeats is not None]
        if repeats:
            once = parquet(*repeats)
            rows += f""" ANTI JOIN (SELECT DISTINCT id FROM {once}) USING (id) WHERE score IS NOT NULL
            UNION ALL {shown} FROM {once}"""
        run(f"CREATE OR REPLACE VIEW {name}_rows AS {rows} WHERE score IS NOT NULL")

    def _scored(self, files: Sequence[Path]) -> str:
        """Return a query for the rows in files of partitions, or of the whole ledger if it is not split."""
        if self._split:
            same = self._shared is None or self._shared.same_ids
            source = rows_in(files, self._columns, self.parts.id_type, same_ids=same)
        else:
            source = f"({rows_of(self.parts, self._columns)})"
        return scored_rows(source, self._columns, self.parts.id_type)
