"""A ledger's scores as tables: a row per scoring, and a row per sample."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_mimic.curation.database import Database, quoted
from lightning_mimic.ledger import Ledger

#: Samples drawn to fit clusters, mixtures and the label model.
DRAWN = 100_000


@dataclass(frozen=True)
class Rows:
    """Scored rows, each of a sample in an epoch, with columns ``id``, ``epoch``, ``score``, ``lift`` and ``label``.

    ``score`` is never null, in loss per unit of weight distance; ``lift`` is the weight over that of a uniform batch,
    ``w · B``. One row per sample and epoch, or one per sample in an epoch 0, which holds its means.

    Attributes:
        database: Where they are.
        name: Of the table or view.
        epochs: Those that there are, in order.
    """

    database: Database
    name: str
    epochs: tuple[int, ...]

    def drawn(self, columns: str, most: int = DRAWN) -> dict[str, Any]:
        """Arrays of about ``most`` samples' rows, or of all if there are fewer, in order of id and epoch.

        The same samples in every epoch, drawn by their ids and not by chance, so that a decision can be repeated.

        Args:
            columns: SQL expressions over the columns.
            most: How many samples.
        """
        count = self.database.value(f"SELECT max(n) FROM (SELECT count(*) AS n FROM {self.name} GROUP BY epoch)")
        share = -(-count // most)
        return self.database.arrays(
            f"SELECT {columns} FROM {self.name} WHERE hash(id) % {share} = 0 ORDER BY id, epoch"
        )


class Scores:
    """A ledger, in a database.

    Args:
        ledger: Its directory.
        database: Where its tables are made.
        name: In front of the tables' names.
        allow_partial: Leave out damaged parts instead of refusing.

    Raises:
        LedgerError: As for :meth:`lightning_mimic.Ledger.parts`.

    Attributes:
        parts: The ledger's files.
        samples: Name of the table with a row per sample that was ever in a batch: ``id``, ``score`` (mean over its
            scorings, null where none has a score), ``scorings`` (those with a score), ``lift`` (mean of ``w · B``),
            ``label`` (of several the largest) and ``predicted`` (last), null where not recorded, ``flag`` (why there is
            no score, or null).
        id_type: ``BIGINT`` or ``VARCHAR``.
    """

    def __init__(
        self, ledger: str | Path, database: Database, name: str = "data", *, allow_partial: bool = False
    ) -> None:
        self.ledger = Ledger(ledger)
        self.database = database
        self.parts = self.ledger.parts(
            _COLUMNS,
            allow_partial=allow_partial,
            advance=lambda done, of: database.tell(f"checking {name}", done / of),
        )
        self.samples = f"{name}_samples"
        self.id_type = "VARCHAR" if pa.types.is_string(self.parts.id_type) else "BIGINT"
        self._name = name
        self._make()

    def means(self) -> Rows:
        """A row per sample: its means."""
        name = f"{self._name}_means"
        self.database.run(
            f"CREATE OR REPLACE VIEW {name} AS SELECT id, 0 AS epoch, score, lift, label FROM {self.samples} "
            "WHERE score IS NOT NULL"
        )
        return Rows(self.database, name, (0,))

    def scorings(self) -> Rows:
        """A row per sample and epoch."""
        name = f"{self._name}_rows"
        epochs = self.database.column(f"SELECT DISTINCT epoch FROM {name} ORDER BY epoch")
        return Rows(self.database, name, tuple(epochs))

    def _make(self) -> None:
        run, name = self.database.run, self._name
        files = ", ".join(quoted(str(path)) for path in self.parts.paths)
        over = " OR ".join(f"(attempt = {number} AND step >= {step})" for number, step in self.parts.until.items())
        # NaN is no score, whoever wrote it; a sample alone in its batch has no weight to speak of.
        run(
            f"""CREATE VIEW {name}_everything AS
            SELECT id, epoch, step, batch, rank, position, label, predicted, flag,
                CASE WHEN isfinite(score) THEN score::DOUBLE END AS score,
                CASE WHEN isfinite(score) AND flag <> 'alone' THEN weight::DOUBLE * batch_size END AS lift
            FROM read_parquet([{files}]) {f"WHERE NOT ({over})" if over else ""}"""
        )
        means = self._means_of(f"{name}_everything")
        run(f"CREATE TABLE {self.samples} AS {means}", f"reading {name}")
        run(f"CREATE TABLE {name}_repeated AS SELECT id FROM {self.samples} WHERE seen > epochs")
        scored = "SELECT id, epoch, score, lift, label FROM {} WHERE score IS NOT NULL"
        rows = scored.format(f"{name}_everything")
        # A distributed sampler repeats some samples; a run resumed within an epoch starts that epoch's data again.
        if self.database.value(f"SELECT count(*) FROM {name}_repeated"):
            run(
                f"""CREATE TABLE {name}_once AS SELECT * FROM {name}_everything WHERE id IN (FROM {name}_repeated)
                QUALIFY row_number() OVER (PARTITION BY id, epoch ORDER BY step, batch, rank, position) = 1""",
                f"repeats of {name}",
            )
            run(f"DELETE FROM {self.samples} WHERE id IN (FROM {name}_repeated)")
            run(f"INSERT INTO {self.samples} {self._means_of(f'{name}_once')}")
            rows += f" AND id NOT IN (FROM {name}_repeated) UNION ALL {scored.format(f'{name}_once')}"
        run(f"CREATE VIEW {name}_rows AS {rows}")

    def _means_of(self, rows: str) -> str:
        first, last = self.database.arrays(f"SELECT min(epoch) AS a, max(epoch) AS b FROM {rows}").values()
        classes = "NULL::BIGINT AS label, NULL::BIGINT AS predicted"
        if self.parts.has_labels:
            # Epoch and class in one number: the last of each sample for a fifth of the time.
            classes = "max(label) AS label, max((epoch::BIGINT << 32) | predicted) & 4294967295 AS predicted"
        return f"""SELECT id, avg(score) AS score, count(score) AS scorings, avg(lift) AS lift, {classes},
            any_value(flag) FILTER (score IS NULL) AS flag,
            count(*) AS seen, bit_count(bitstring_agg(epoch, {first[0]}, {last[0]})) AS epochs
            FROM {rows} GROUP BY id"""


_COLUMNS = ("id", "epoch", "step", "batch", "rank", "position", "attempt", "score", "weight", "batch_size", "flag")
