"""Aggregates of a manifest for its report, computed exactly by a database that can spill to disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lightning_mimic.database import Database, parquet
from lightning_mimic.errors import CurationError
from lightning_mimic.manifest import Manifest

#: Quantity that orders samples from the most suspicious to the best.
Measure = Literal["posterior", "score"]
#: Columns that are shown for each sample if the manifest has them.
_SHOWN = ("score", "posterior", "label", "corrected_label", "reason", "other_keep")
#: Number of bins of a histogram.
BINS = 60


@dataclass(frozen=True)
class Bin:
    """Hold one bin of a histogram.

    Attributes:
        low: Lower edge of the bin.
        high: Upper edge of the bin.
        kept: Number of kept samples in the bin.
        dropped: Number of dropped samples in the bin.
    """

    low: float
    high: float
    kept: int
    dropped: int


@dataclass(frozen=True)
class ClassFacts:
    """Hold the figures of the samples with one given label.

    Attributes:
        label: Index of the class.
        samples: Number of samples with this label.
        dropped: Number of dropped samples among them.
        mean: Mean of the measure; ``None`` if no sample has a value.
        other: Most frequent predicted label other than ``label``; ``None`` if there is none.
        others: Number of samples with that predicted label.
    """

    label: int
    samples: int
    dropped: int
    mean: float | None
    other: int | None
    others: int


@dataclass(frozen=True)
class Agreement:
    """Hold the numbers of samples by the decisions of two manifests.

    Attributes:
        both: Samples kept by both manifests.
        here: Samples kept by the first manifest only.
        there: Samples kept by the other manifest only.
        neither: Samples dropped by both manifests.
        unknown: Samples that are only in the first manifest.
        missing: Samples that are only in the other manifest.
    """

    both: int
    here: int
    there: int
    neither: int
    unknown: int
    missing: int


@dataclass(frozen=True)
class Shown:
    """Hold the rows of a manifest that are shown, as columns of equal length, the most suspicious sample first.

    Attributes:
        ids: Sample ids.
        keep: Decisions; ``None`` for samples without a decision.
        columns: Values or ``None``, by column: those of ``score``, ``posterior``, ``label``, ``corrected_label``,
            ``predicted``, ``reason`` and ``other_keep`` (decision of the manifest to compare with) that exist.
        borderline: Positions of the rows whose distance to the decision boundary is known, the nearest first.
    """

    ids: list[int | str]
    keep: list[bool | None]
    columns: dict[str, list[Any]]
    borderline: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


class ManifestFacts:
    """Compute counts, histograms, class figures and rows of a manifest.

    Args:
        manifest: Manifest to summarise.
        database: Database that reads the manifest.
        other: Another manifest whose decisions are compared; ``None``: no comparison.

    Attributes:
        samples: Number of rows.
        kept: Number of rows that are kept.
        unscored: Number of rows without a score; ``None`` if the manifest has no scores.
        measure: Quantity that orders the samples; ``None`` if the manifest has neither posteriors nor scores.
        predicted: Column with the predicted label: that of the reference if recorded, otherwise that of the model;
            ``None`` if neither is recorded.

    Raises:
        CurationError: A manifest is damaged, or the two have ids of different types.
    """

    def __init__(self, manifest: Manifest, database: Database, other: Manifest | None = None) -> None:
        self.manifest = manifest
        self.other = other
        self._database = database
        self._rows = parquet(manifest.path)
        if other is not None:
            # A sample that is listed several times counts as kept if any of its rows is.
            decided = (
                f"(SELECT id, bool_or(coalesce(keep, false)) AS other_keep FROM {parquet(other.path)} GROUP BY id)"
            )
            ids = [database.columns(rows)["id"] for rows in (self._rows, parquet(other.path))]
            if (ids[0] == "VARCHAR") != (ids[1] == "VARCHAR"):
                raise CurationError(f"{manifest.path} has ids of type {ids[0]}, but {other.path} of type {ids[1]}.")
            database.run(f"CREATE VIEW compared AS SELECT * FROM {self._rows} LEFT JOIN {decided} USING (id)")
            self._rows = "compared"
        self._names = set(database.columns(self._rows))
        decides = "posterior" in self._names and str(manifest.provenance.get("filter", "")).startswith("Posterior(")
        by_posterior = decides or ("posterior" in self._names and not self._any("score"))
        self.measure: Measure | None = "posterior" if by_posterior else "score" if self._any("score") else None
        by_reference = self._any("reference_predicted")
        self.predicted = "reference_predicted" if by_reference else "predicted" if self._any("predicted") else None
        self.has_labels = self._any("label")
        scored = "count(score)" if "score" in self._names else "NULL"
        self.samples, self.kept, scores = database.row(
            f"SELECT count(*), count(*) FILTER (keep), {scored} FROM {self._rows}"
        )
        self.unscored = None if scores is None else self.samples - scores

    def agreement(self) -> Agreement:
        """Count the samples by the decisions of both manifests."""
        assert self.other is not None
        both, here, there, neither, alone = self._database.row(
            f"""SELECT count(*) FILTER (keep AND other_keep), count(*) FILTER (keep AND NOT other_keep),
            count(*) FILTER (other_keep AND NOT coalesce(keep, false)),
            count(*) FILTER (NOT other_keep AND NOT coalesce(keep, false)),
            count(*) FILTER (other_keep IS NULL) FROM {self._rows}"""
        )
        known, others = (parquet(each.path) for each in (self.manifest, self.other))
        missing = self._database.value(
            f"SELECT count(DISTINCT id) FROM {others} WHERE id NOT IN (SELECT id FROM {known})"
        )
        return Agreement(both, here, there, neither, alone, missing)

    @cached_property
    def cut(self) -> float | None:
        """Value of the measure that separates the kept from the dropped samples; ``None`` if no value does."""
        if self.measure is None:
            return None
        chosen = str(self.manifest.provenance.get("filter", ""))
        known = {"Sign(": 0.0, "Posterior(": 0.5}
        fixed = next((cut for name, cut in known.items() if chosen.startswith(name)), None)
        if fixed is not None:
            return fixed
        highest, lowest = self._database.row(
            f"SELECT max({self.measure}) FILTER (NOT keep), min({self.measure}) FILTER (keep) FROM {self._rows}"
        )
        divides = highest is not None and lowest is not None and highest < lowest
        return lowest if divides else None

    def histogram(self, measure: Measure) -> list[Bin]:
        """Count the kept and dropped samples by score or posterior.

        Args:
            measure: ``"posterior"`` or ``"score"``.

        Returns:
            Bins of equal width; if the cut lies within their range, it is the edge of a bin. Empty if no sample has a
            value.
        """
        low, high = self._database.row(
            f"SELECT min({measure}), max({measure}) FROM {self._rows} WHERE isfinite({measure})"
        )
        if low is None:
            return []
        low, high = (0.0, 1.0) if measure == "posterior" else (float(low), float(high))
        width = max(high - low, 1e-9 * max(abs(low), abs(high), 1.0)) / BINS
        anchor = self.cut if measure == self.measure and self.cut is not None else low
        counted = self._database.rows(
            f"SELECT floor(({measure} - {anchor!r}) / {width!r})::BIGINT AS place, count_if(keep), count(*) "
            f"FROM {self._rows} WHERE isfinite({measure}) GROUP BY place"
        )
        found = {place: (kept, count - kept) for place, kept, count in counted}
        if (
            measure == "posterior" and (end := round((1 - anchor) / width)) in found
        ):  # count a posterior of 1 in the last bin
            last = found.get(end - 1, (0, 0))
            found[end - 1] = last[0] + found[end][0], last[1] + found[end][1]
            del found[end]
        return [
            Bin(anchor + place * width, anchor + (place + 1) * width, *found.get(place, (0, 0)))
            for place in range(min(found), max(found) + 1)
        ]

    def classes(self) -> list[ClassFacts]:
        """Return the figures of each given label, the label with the largest share of dropped samples first."""
        if not self.has_labels:
            return []
        mean = "NULL" if self.measure is None else f"avg({self.measure}) FILTER (isfinite({self.measure}))"
        counted = self._database.rows(
            f"SELECT label, count(*), count(*) - count_if(keep), {mean} FROM {self._rows} WHERE label IS NOT NULL "
            "GROUP BY label"
        )
        others: dict[int, tuple[int, int]] = {}
        for (label, predicted), count in self.matrix().items():
            if label != predicted and count > others.get(label, (0, 0))[1]:
                others[label] = predicted, count
        found = [
            ClassFacts(label, count, dropped, mean, *others.get(label, (None, 0)))
            for label, count, dropped, mean in counted
        ]
        return sorted(found, key=lambda each: (-each.dropped / each.samples, each.label))

    def matrix(self) -> Mapping[tuple[int, int], int]:
        """Count the samples by given and predicted label, in the order of the labels; empty if either is unrecorded."""
        if not self.has_labels or self.predicted is None:
            return {}
        return self._matrix

    @cached_property
    def _matrix(self) -> dict[tuple[int, int], int]:
        rows = self._database.rows(
            f"SELECT label, {self.predicted}, count(*) FROM {self._rows} "
            f"WHERE label IS NOT NULL AND {self.predicted} IS NOT NULL GROUP BY ALL ORDER BY ALL"
        )
        return {(label, predicted): count for label, predicted, count in rows}

    def shown(self, most: int) -> Shown:
        """Return the rows for a page.

        Args:
            most: Maximum number of rows. If the manifest has more, half of these rows are the most suspicious samples,
                a quarter those nearest to the cut, and a quarter the best.
        """
        if self.samples <= most:
            return self._chosen({self._ascending: most})
        nearest, best = f"{self._distance} NULLS LAST, id", f"{self._value} DESC NULLS LAST, id"
        return self._chosen({self._ascending: most // 2, nearest: most // 4, best: most // 4})

    def suspicious(self, most: int) -> Shown:
        """Return the rows of the most suspicious samples.

        Args:
            most: Maximum number of rows.
        """
        return self._chosen({self._ascending: most})

    @property
    def _value(self) -> str:
        # Without a measure, the dropped samples count as the most suspicious.
        return self.measure or "keep::INT"

    @property
    def _ascending(self) -> str:
        return f"{self._value} NULLS LAST, id"

    def _chosen(self, orders: Mapping[str, int]) -> Shown:
        """Return the first rows in each of several orders."""
        wanted: dict[str, str] = {name: name for name in _SHOWN if name in self._names}
        if self.predicted is not None:
            wanted["predicted"] = self.predicted
        columns = ["id", "keep", f"{self._distance} AS distance", f"{self._value} AS value"]
        columns += [f"{column} AS {name}" for name, column in wanted.items()]
        # A sample that the pool lists several times has several equal rows.
        chosen = " UNION ".join(
            f"(SELECT DISTINCT {', '.join(columns)} FROM {self._rows} ORDER BY {order} LIMIT {count})"
            for order, count in orders.items()
        )
        with self._database.reader(f"SELECT * FROM ({chosen}) ORDER BY value NULLS LAST, id") as reader:
            table = reader.read_all().to_pydict()
        distances = table["distance"]
        known = [row for row, distance in enumerate(distances) if distance is not None]
        return Shown(
            ids=table["id"],
            keep=table["keep"],
            columns={name: table[name] for name in wanted},
            borderline=sorted(known, key=distances.__getitem__),
        )

    @property
    def _distance(self) -> str:
        """SQL for the distance of a row to the decision boundary."""
        if self.cut is not None:
            return f"abs({self.measure} - {self.cut!r})"
        if self._any("votes"):
            return "abs(votes_keep / votes - 0.5)"
        return "NULL::DOUBLE"

    def _any(self, column: str) -> bool:
        """Return whether a column exists and has a value in at least one row."""
        if column not in self._names:
            return False
        return bool(self._database.value(f"SELECT bool_or({column} IS NOT NULL) FROM {self._rows}"))


def class_name(names: Sequence[str] | None, label: int | None) -> str:
    """Return the name of a class, or its index if it has no name.

    Example:
        >>> class_name(["cat", "dog"], 1), class_name(None, 3), class_name(["cat"], 7)
        ('dog', '3', '7')
    """
    if label is None:
        return ""
    return names[label] if names is not None and 0 <= label < len(names) else str(label)
