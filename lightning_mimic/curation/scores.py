"""A ledger's scores as tables: a row per scoring, and a row per sample."""

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

#: Samples on which clusters, mixtures and the label model are fitted.
SAMPLE_SIZE = 20_000


@dataclass(frozen=True)
class ScoreTable:
    """A table of scores, a row per sample and epoch, or per sample.

    Its columns are ``id``, ``epoch``, ``score``, ``relative_weight``, ``label``, and those that the ledger's table sums
    up and the ledger has recorded. ``score`` is never null, in loss per unit of weight distance; ``relative_weight`` is
    the weight over that of a uniform batch, ``w · B``. A table with a row per sample holds its means, under epoch 0.

    Attributes:
        database: Where they are.
        name: Of the table or view.
        epochs: Those that there are, in order.
        samples: How many different ones.
        sample_size: About so many are sampled.
    """

    database: Database
    name: str
    epochs: tuple[int, ...]
    samples: int
    sample_size: int = SAMPLE_SIZE

    @property
    def sampled(self) -> str:
        """An SQL condition that holds for about ``sample_size`` samples, or for all if there are fewer.

        By their ids and not by chance, so that they are the same in every epoch, and a decision can be repeated.
        """
        return f"hash(id) % {max(-(-self.samples // self.sample_size), 1)} = 0"

    @cached_property
    def sample(self) -> str:
        """Name of a table with the rows of the sampled samples."""
        name = f"{self.name}_sample"
        self.database.run(f"CREATE OR REPLACE TABLE {name} AS FROM {self.name} WHERE {self.sampled}", "sampling")
        return name

    @cached_property
    def sampled_scores(self) -> dict[int, Any]:
        """Scores of the sampled samples in ascending order, by epoch."""
        import numpy as np

        found = self.database.arrays(f"SELECT epoch, score FROM {self.sample}")
        return {e: np.sort(found["score"][found["epoch"] == e]) for e in self.epochs if (found["epoch"] == e).any()}


class Scores:
    """A ledger, in a database.

    Of a sample that an epoch repeats, the first row counts, as in :meth:`lightning_mimic.Ledger.table`. What does not
    fit into the database's memory is split into partitions by a hash of the ids, which are summed up one at a time.

    Args:
        ledger: Its directory.
        database: Where its tables are made.
        name: In front of the tables' names.
        allow_partial: Read what there is, instead of refusing where parts are damaged or rows missing.
        sample_size: Of the tables.
        shared: The ledger's partitions, if they are there already.

    Raises:
        CurationError: ``shared`` is of another ledger, or not complete.
        LedgerError: As for :meth:`lightning_mimic.Ledger.parts`.

    Attributes:
        parts: The ledger's files.
        samples: Name of the view with a row per sample that was ever in a batch: ``id``, ``score`` (mean over its
            scorings, null where none has a score), ``scorings`` (those with a score), ``relative_weight`` (mean of
            ``w · B``), ``label`` and ``predicted`` (of its last epoch, null where not recorded), ``flag`` (why there
            is no score, or null), and the other recorded columns that the ledger's table sums up.
        columns: Names of the columns in these tables that the ledger's table sums up, ``label`` and ``predicted``
            first.
        attempts: The descriptions of the attempts whose rows count.
        class_names: Names of the classes, ``None`` where not recorded.
        id_type: ``BIGINT``, ``UBIGINT`` or ``VARCHAR``.
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
        """Settings of the attempts whose rows count; they do not differ in what the scores mean."""
        config: dict[str, Any] = self.attempts[-1]["config"]
        return config

    def means(self) -> ScoreTable:
        """A row per sample: its means."""
        name = f"{self._name}_means"
        self.database.run(
            f"CREATE OR REPLACE VIEW {name} AS SELECT id, 0 AS epoch, score, relative_weight, "
            f"{', '.join(self.columns)} FROM {self.samples} WHERE score IS NOT NULL"
        )
        return ScoreTable(self.database, name, (0,), self._count, self._sample_size)

    def scorings(self) -> ScoreTable:
        """A row per sample and epoch."""
        name = f"{self._name}_rows"
        epochs = self.database.column(f"SELECT DISTINCT epoch FROM {name} ORDER BY epoch")
        return ScoreTable(self.database, name, tuple(epochs), self._count, self._sample_size)

    @property
    def partitions(self) -> int:
        """The number of partitions of the samples, by ``hash(id)`` modulo this number."""
        return len(self._partitions)

    def one_at_a_time(self, *, last: bool = False) -> Iterator[int]:
        """Restrict all tables to each partition in turn.

        Args:
            last: The tables are not needed any more afterwards; the rows of each partition are removed when it has been
                seen, to make room.

        Yields:
            The number of the partition.
        """
        for number, partition in enumerate(self._partitions):
            self._show([partition])
            yield number
            for path in partition.rows if last and self._shared is None else ():
                path.unlink()
        if not last:
            self._show(self._partitions)

    def _make(self) -> list[Partition]:
        """Sum up the samples, one partition at a time."""
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
            database.report_progress(f"summing up {name}", number / count)
            samples, repeats = (folder / f"{kind}-{number}.parquet" for kind in ("samples", "repeats"))
            has_repeats = summarise(database, self._scored(files), self._columns, samples, repeats)
            made.append(Partition(files, samples, repeats if has_repeats else None))
        database.report_progress(f"summing up {name}", 1.0)
        return made

    def _show(self, partitions: Sequence[Partition]) -> None:
        """Make the views of the rows and samples of partitions."""
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
        """Query for the rows in files of partitions, or in the ledger's if it is not split."""
        if self._split:
            same = self._shared is None or self._shared.same_ids
            source = rows_in(files, self._columns, self.parts.id_type, same_ids=same)
        else:
            source = f"({rows_of(self.parts, self._columns)})"
        return scored_rows(source, self._columns, self.parts.id_type)
