"""A ledger's scores as tables: a row per scoring, and a row per sample."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_mimic.database import Database, parquet, sql_type
from lightning_mimic.ledger import Ledger, summarised_columns
from lightning_mimic.ledger.columns import schema

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
    def sampled_scores(self) -> dict[int, Any]:
        """Scores of the sampled samples in ascending order, by epoch."""
        import numpy as np

        found = self.database.arrays(f"SELECT epoch, score FROM {self.name} WHERE {self.sampled}")
        return {e: np.sort(found["score"][found["epoch"] == e]) for e in self.epochs if (found["epoch"] == e).any()}


class Scores:
    """A ledger, in a database.

    Of a sample that an epoch repeats, the first row counts, as in :meth:`lightning_mimic.Ledger.table`.

    Args:
        ledger: Its directory.
        database: Where its tables are made.
        name: In front of the tables' names.
        allow_partial: Read what there is, instead of refusing where parts are damaged or rows missing.
        sample_size: Of the tables.

    Raises:
        LedgerError: As for :meth:`lightning_mimic.Ledger.parts`.

    Attributes:
        parts: The ledger's files.
        samples: Name of the table with a row per sample that was ever in a batch: ``id``, ``score`` (mean over its
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
    ) -> None:
        self.ledger = Ledger(ledger)
        self.database = database
        self.parts = self.ledger.parts(
            _COLUMNS,
            allow_partial=allow_partial,
            advance=lambda done, of: database.report_progress(f"checking {name}", done / of),
        )
        self.samples = f"{name}_samples"
        self.id_type = sql_type(self.parts.id_type)
        self.attempts: list[dict[str, Any]] = [self.ledger.meta["attempts"][n] for n in self.parts.attempts]
        self.class_names = self.ledger.class_names
        # Labels are in every table, whether there are any or not.
        found = [
            column for column in summarised_columns() if column.name in {"label", "predicted"} | self.parts.recorded
        ]
        self._last = [column for column in found if column.summary == "last"]
        self._mean = [column for column in found if column.summary == "mean"]
        self.columns = tuple(column.name for column in (*self._last, *self._mean))
        self._name = name
        self._sample_size = sample_size
        self._make()

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

    def _make(self) -> None:
        run, name = self.database.run, self._name
        over = " OR ".join(f"(attempt = {number} AND step >= {step})" for number, step in self.parts.until.items())
        # NaN is treated as missing; so is the relative weight of a sample alone in its batch.
        finite = (f"CASE WHEN isfinite({each.name}) THEN {each.name}::DOUBLE END AS {each.name}" for each in self._mean)
        run(
            f"""CREATE VIEW {name}_everything AS
            SELECT id, epoch, step, batch, rank, position, flag,
                {", ".join([*(each.name for each in self._last), *finite])},
                CASE WHEN isfinite(score) THEN score::DOUBLE END AS score,
                CASE WHEN isfinite(score) AND flag <> 'alone' THEN weight::DOUBLE * batch_size END AS relative_weight
            FROM {self._files()} {f"WHERE NOT ({over})" if over else ""}"""
        )
        scored = "FROM {} WHERE score IS NOT NULL"
        means = self._means_of(f"{name}_everything", only_scored=True)
        run(f"CREATE TABLE {name}_summary AS {means}", f"reading {name}")
        # Not as simple as a mean of all rows: samples with a row without a score, and those that an epoch repeats (a
        # distributed sampler repeats some; a run resumed within an epoch starts that epoch's data again).
        run(
            f"""CREATE TABLE {name}_odd AS SELECT id FROM {name}_summary WHERE seen > epochs
            UNION SELECT id FROM {name}_everything WHERE score IS NULL"""
        )
        shown = f"SELECT id, epoch, score, relative_weight, {', '.join(self.columns)}"
        rows = f"{shown} {scored.format(f'{name}_everything')}"
        if self.database.value(f"SELECT count(*) FROM {name}_odd"):
            run(
                f"""CREATE TABLE {name}_once AS SELECT * FROM {name}_everything WHERE id IN (FROM {name}_odd)
                QUALIFY row_number() OVER (PARTITION BY id, epoch ORDER BY step, batch, rank, position) = 1""",
                f"repeats of {name}",
            )
            run(f"DELETE FROM {name}_summary WHERE id IN (FROM {name}_odd)")
            run(f"INSERT INTO {name}_summary {self._means_of(f'{name}_once', only_scored=False)}")
            rows += f""" AND id NOT IN (FROM {name}_odd)
            UNION ALL {shown} {scored.format(f"{name}_once")}"""
        run(f"CREATE VIEW {name}_rows AS {rows}")
        self._add_last()
        self._count = int(self.database.value(f"SELECT count(*) FROM {self.samples}"))

    def _means_of(self, table: str, *, only_scored: bool) -> str:
        first, last = self.database.row(f"SELECT min(epoch), max(epoch) FROM {self._name}_everything")
        # Every state counts: each row has its own until rows of a sample meet.
        bits = (
            f"bit_or(1::BIGINT << (epoch - {first}))" if last - first < 63 else f"bitstring_agg(epoch, {first}, {last})"
        )
        scorings, flag = "count(*)", "NULL::VARCHAR"
        if not only_scored:
            scorings, flag = "count(score)", "CASE WHEN count(score) = 0 THEN max(flag) END"
        means = "".join(f", avg({column.name}) AS {column.name}" for column in self._mean)
        return f"""SELECT id, avg(score) AS score, {scorings} AS scorings,
            avg(relative_weight) AS relative_weight, {flag} AS flag, count(*) AS seen,
            bit_count({bits}) AS epochs{means}
            FROM {table} {"WHERE score IS NOT NULL" if only_scored else ""} GROUP BY id"""

    def _files(self) -> str:
        """The parts as something to select from, with every known column."""
        lacking = [field for field in schema(self.parts.id_type) if field.name not in self.parts.columns]
        files = parquet(*self.parts.paths, by_name=not self.parts.uniform)
        if not lacking:
            return files
        nulls = ", ".join(f"NULL::{sql_type(field.type)} AS {field.name}" for field in lacking)
        return f"(SELECT *, {nulls} FROM {files})"

    def _add_last(self) -> None:
        """Labels and predictions as of each sample's last epoch; for most that is the ledger's last."""
        run, name = self.database.run, self._name
        kept = ", ".join(["id, score, scorings, relative_weight, flag, seen", *(column.name for column in self._mean)])
        last = [column.name for column in self._last]
        if self.parts.recorded.isdisjoint(last):
            nothing = ", ".join(f"NULL::{sql_type(column.type)} AS {column.name}" for column in self._last)
            run(f"CREATE VIEW {self.samples} AS SELECT {kept}, {nothing} FROM {name}_summary")
            return
        latest = self.database.value(f"SELECT max(epoch) FROM {name}_everything")
        values = f"SELECT id, {', '.join(f'arg_max({each}, step) AS {each}' for each in last)}"
        run(
            f"CREATE TABLE {name}_last AS {values} FROM {name}_everything WHERE epoch = {latest} GROUP BY id",
            f"labels of {name}",
        )
        others = f"FROM {name}_summary WHERE id NOT IN (SELECT id FROM {name}_last)"
        if self.database.value(f"SELECT count(*) {others}"):
            run(
                f"INSERT INTO {name}_last {values} FROM {name}_everything WHERE id IN (SELECT id {others}) GROUP BY id",
                f"labels of {name}",
            )
        run(
            f"CREATE VIEW {self.samples} AS SELECT {kept}, {', '.join(last)} FROM {name}_summary "
            f"LEFT JOIN {name}_last USING (id)"
        )


_COLUMNS = ("id", "epoch", "step", "batch", "rank", "position", "attempt", "score", "weight", "batch_size", "flag")
