"""The function :func:`select`, which combines manifests and tables of scores: and, or, minus, top and bottom."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lightning_mimic.database import Database, Progress, is_whole
from lightning_mimic.errors import CurationError
from lightning_mimic.manifest import EXPORTS, Manifest, checked_exports, write_manifest
from lightning_mimic.stores import hide_secrets
from lightning_mimic.tables import Table, settle_ids
from lightning_mimic.user_files import open_parquet, user_path, writing
from lightning_mimic.version import __version__

End = Literal["top", "bottom"]
_JOINTS = {"and": "INTERSECT", "or": "UNION", "minus": "EXCEPT"}
_PATH = r"(?P<path>\S+?(?:\.(?:parquet|csv)|/))"
#: Column with labels that a person has corrected.
_CORRECTED = "corrected_label"
#: Columns with labels, and their SQL types, which are copied from the first manifest that has them.
_LABELS = {"label": "BIGINT", "label_name": "VARCHAR", "predicted": "BIGINT", "predicted_name": "VARCHAR"}
_TERM = re.compile(_PATH + r"(?::(?P<column>\S+)\s+(?P<end>top|bottom)\s+(?P<amount>\S+))?")
_AMOUNT = re.compile(r"(?P<percent>\d+(?:\.\d+)?)\s*%|(?P<count>\d+)")
_GRAMMAR = (
    "expected PATH (a manifest: the samples it keeps) or PATH:COLUMN top|bottom AMOUNT (such as 30% or 300), combined "
    "from left to right by and, or, minus; a PATH ends in .parquet, .csv, or, if it is a directory of Parquet files, /"
)


@dataclass(frozen=True)
class Term:
    """Select samples from one table.

    Attributes:
        path: Parquet or CSV file with a column ``id``, and ``column`` or ``keep``.
        column: Column by which the samples are ordered; ``None``: select the samples that a manifest keeps.
        end: Whether the highest (``"top"``) or the lowest (``"bottom"``) values are selected.
        fraction: Share of all rows of the table to select, 0 to 1; either this or ``count`` is given with ``column``.
        count: Number of samples to select.
    """

    path: str
    column: str | None = None
    end: End | None = None
    fraction: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Recipe:
    """Hold the terms of a selection and their operators.

    Attributes:
        terms: Terms from left to right.
        joints: Operator between each term and those before it: ``"and"``, ``"or"`` or ``"minus"``.

    Example:
        >>> Recipe.parse("clip.parquet:clip_score top 30% minus mimic.parquet:score bottom 15%").joints
        ('minus',)
    """

    terms: tuple[Term, ...]
    joints: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """Parse a recipe.

        Args:
            text: Terms combined by ``and``, ``or``, ``minus``, from left to right. ``PATH`` of a manifest selects the
                samples that it keeps. ``PATH:COLUMN top 300`` (or ``bottom``) selects the 300 samples with the highest
                (lowest) values; ties are broken in favour of smaller ids. ``PATH:COLUMN top 30%`` is DataComp's rule:
                with *n* = 30 % of all rows of the table, rounded down, it selects the samples whose value is at least
                the (*n* + 1)-th highest, that is, one more than *n* and all ties with the last. Rows without a value
                count towards *n* and are never selected.

        Raises:
            CurationError: The text does not have this form.
        """
        pieces = re.split(r"\s+(and|or|minus)\s+", text.strip())
        return cls(tuple(_term(piece.strip()) for piece in pieces[::2]), tuple(pieces[1::2]))


def select(
    recipe: str | Recipe,
    out: str | Path,
    *,
    exports: Sequence[str] = (),
    allow_unknown: bool = False,
    memory: str = "2GB",
    progress: Progress | None = None,
) -> Manifest:
    """Combine manifests and tables of scores into a new manifest.

    Args:
        recipe: Selection, see :meth:`Recipe.parse`.
        out: Path of the new manifest, which must not exist.
        exports: Further formats to write beside the manifest, with its name: ``"csv"`` or ``"datacomp"``.
        allow_unknown: Whether tables may list different samples; a sample missing from a table is not selected by its
            term.
        memory: Memory limit of the database, such as ``"2GB"``; larger data spill to disk.
        progress: Callback for progress, called with a description and the completed share.

    Returns:
        A manifest with a decision on every sample in any of the tables, the recorded labels of the first manifest in
        the recipe that has labels, and the corrected labels of all manifests in the recipe. A sample that the first
        table lists several times has as many rows.

    Raises:
        CurationError: The recipe or a table cannot be read, or the tables have ids of different types or different
            samples.

    Example:
        >>> import tempfile, pyarrow as pa, pyarrow.csv
        >>> folder = tempfile.mkdtemp()
        >>> pa.csv.write_csv(pa.table({"id": [1, 2, 3, 4], "clip": [0.9, 0.8, 0.1, 0.3]}), f"{folder}/clip.csv")
        >>> pa.csv.write_csv(pa.table({"id": [1, 2, 3, 4], "score": [-2.0, 1.0, 1.0, 1.0]}), f"{folder}/mimic.csv")
        >>> recipe = f"{folder}/clip.csv:clip top 40% minus {folder}/mimic.csv:score bottom 1"
        >>> select(recipe, f"{folder}/both.parquet").table().to_pylist()[1]
        {'id': 2, 'keep': True, 'reason': None}
    """
    if not isinstance(recipe, str | Recipe):
        raise CurationError(f"`recipe` is {recipe!r}; {_GRAMMAR}.")
    read = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(allow_unknown, bool):
        raise CurationError(f"`allow_unknown` is {allow_unknown!r}; expected true or false.")
    out = user_path(out, "out")
    if out.suffix != ".parquet":
        raise CurationError(f"`out` is {out}; expected a path that ends in .parquet.")
    exports = checked_exports(exports)
    with writing(out):  # an object store may deny access
        taken = out.is_symlink() or out.exists()
    if taken:
        raise CurationError(f"`out`: {out} is there already; name another file, or delete it.")
    with Database(memory, progress) as database:
        labelled = _labelled(read.terms)
        tables = {
            f"term{k}": _load(database, f"term{k}", term, labels=term is labelled) for k, term in enumerate(read.terms)
        }
        settle_ids(database, tables)
        for name, term in zip(tables, read.terms, strict=True):
            _choose(database, name, term)
        if not allow_unknown:
            _same_samples(database, read.terms)
        for name in exports:
            EXPORTS[name].check(database, "term0")
        chosen = "SELECT DISTINCT id FROM term0 WHERE chosen"
        for k, joint in enumerate(read.joints, start=1):
            chosen = f"({chosen}) {_JOINTS[joint]} (SELECT id FROM term{k} WHERE chosen)"
        database.run(f"CREATE TABLE selected AS {chosen}", "selecting")
        # All samples in any table, as often as the first table lists them.
        all_samples = "SELECT id FROM term0"
        others = " UNION ".join(f"SELECT id FROM term{k}" for k in range(1, len(read.terms)))
        if others:
            all_samples += f" UNION ALL (({others}) EXCEPT SELECT id FROM term0)"
        samples, kept = database.row(
            f"SELECT count(*), count(selected.id) FROM ({all_samples}) AS all_samples LEFT JOIN selected USING (id)"
        )
        why = "CASE WHEN selected.id IS NULL THEN 'not in the recipe' END"
        provenance = {
            "package_version": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": recipe if isinstance(recipe, str) else repr(recipe),
            "sizes": [database.value(f"SELECT count_if(chosen) FROM term{k}") for k in range(len(read.terms))],
            "samples": samples,
            "kept": kept,
            **_verdicts(read.terms),
            **_class_names(labelled),
        }
        corrected = _corrected(database, tables)
        labels = [] if labelled is None else _labels(database, f"term{read.terms.index(labelled)}")
        carried = "".join(f", {name}" for name in [*labels, *([_CORRECTED] if corrected else [])])
        query = (
            f"SELECT all_samples.id, selected.id IS NOT NULL AS keep, {why} AS reason{carried} "
            f"FROM ({all_samples}) AS all_samples LEFT JOIN selected ON all_samples.id = selected.id "
            f"{'LEFT JOIN labels ON all_samples.id = labels.id' if labels else ''} "
            f"{'LEFT JOIN corrected ON all_samples.id = corrected.id' if corrected else ''} ORDER BY all_samples.id"
        )
        with database.reader(query, "writing") as rows:
            return write_manifest(out, rows, provenance, exports)


def _labelled(terms: Sequence[Term]) -> Term | None:
    """Return the first term whose table is a manifest with recorded labels."""
    for term in terms:
        with contextlib.suppress(CurationError):  # a table of another kind
            manifest = Manifest(term.path)
            with open_parquet(manifest.path) as file:
                if manifest.provenance and "label" in file.schema_arrow.names:
                    return term
    return None


def _class_names(labelled: Term | None) -> dict[str, Any]:
    """Return the names of the classes, for the provenance."""
    names = None if labelled is None else Manifest(labelled.path).class_names
    return {} if names is None else {"class_names": list(names)}


def _labels(database: Database, name: str) -> list[str]:
    """Create a table with the labels of a term, and return the names of its label columns."""
    found = [column for column in database.columns(name) if column in _LABELS]
    each = ", ".join(f"any_value({column})::{_LABELS[column]} AS {column}" for column in found)
    database.run(f"CREATE TABLE labels AS SELECT id, {each} FROM {name} GROUP BY id")
    return found


def _corrected(database: Database, tables: Mapping[str, Table]) -> bool:
    """Create a table with the corrected labels of all manifests, and return whether a manifest has any."""
    found = [name for name, table in tables.items() if _CORRECTED in table.names]
    if not found:
        return False
    each = " UNION ".join(f"SELECT id, TRY_CAST({_CORRECTED} AS BIGINT) AS {_CORRECTED} FROM {name}" for name in found)
    database.run(f"CREATE TABLE corrected AS SELECT * FROM ({each}) WHERE {_CORRECTED} IS NOT NULL")
    twice = database.column("SELECT id FROM corrected GROUP BY id HAVING count(*) > 1 ORDER BY id LIMIT 1")
    if twice:
        paths = " and ".join(str(tables[name].path) for name in found)
        raise CurationError(f"`recipe`: {paths} have different corrected labels of {twice[0]!r}. Change one of them.")
    return True


def _verdicts(terms: Sequence[Term]) -> dict[str, Any]:
    """Return the verdicts on the references behind the manifests in a recipe, by path, for the provenance."""
    found = {}
    for term in terms:
        with contextlib.suppress(CurationError):  # a table of another kind
            found[term.path] = Manifest(term.path).provenance.get("verdict")
    return {"verdicts": found} if any(found.values()) else {}


def _term(text: str) -> Term:
    match = _TERM.fullmatch(text)
    if match is None:
        raise CurationError(f"`recipe`: {hide_secrets(text)!r} cannot be read; {_GRAMMAR}.")
    if match["column"] is None:
        return Term(match["path"])
    amount = _AMOUNT.fullmatch(match["amount"])
    percent = float(amount["percent"]) if amount and amount["percent"] else None
    if amount is None or (percent is not None and percent > 100):
        raise CurationError(f"`recipe`: {match['amount']!r} is not an amount; expected 0% to 100%, or a count.")
    end: End = "top" if match["end"] == "top" else "bottom"
    fraction = None if percent is None else percent / 100
    # No table has a number of rows with more than 18 digits.
    count = None if percent is not None else int(amount["count"]) if len(amount["count"]) < 19 else 10**18
    return Term(match["path"], match["column"], end, fraction, count)


def _load(database: Database, name: str, term: Term, *, labels: bool) -> Table:
    """Load a table with ``id``, and ``keep`` or ``value``; with ``labels``, also its columns of labels."""
    table = Table(term.path)
    columns = {"id": "id", "keep": "keep"} if term.column is None else {"id": "id", "value": term.column}
    if _CORRECTED in table.names:
        columns[_CORRECTED] = _CORRECTED
    if labels:
        columns |= {column: column for column in _LABELS if column in table.names}
    table.load(database, name, columns, f"reading {table.path.name}")
    return table


def _choose(database: Database, name: str, term: Term) -> None:
    """Replace the column ``keep`` or ``value`` of a term's table by a column ``chosen``."""
    chosen = "coalesce(keep, false)"
    if term.column is not None:
        value, valued = _value(database, name, term)
        order = f"OVER (PARTITION BY {valued} ORDER BY {value} {'DESC' if term.end == 'top' else 'ASC'}"
        if term.fraction is None:
            chosen = f"{valued} AND row_number() {order}, id) <= {term.count}"
        else:
            # Rank n + 1 is that of the threshold value and of all values equal to it.
            rows = database.value(f"SELECT count(*) FROM {name}")
            chosen = f"{valued} AND rank() {order}) <= {int(rows * term.fraction) + 1 if term.fraction else 0}"
    unused = "keep" if term.column is None else "value"
    database.run(f"CREATE OR REPLACE TABLE {name} AS SELECT * EXCLUDE ({unused}), ({chosen}) AS chosen FROM {name}")


def _value(database: Database, name: str, term: Term) -> tuple[str, str]:
    """Return SQL for the values that order a table, and for whether a row has one; integers are compared exactly."""
    kind = database.columns(name)["value"]
    if kind == "BOOLEAN":
        return "value::INT", "value IS NOT NULL"
    if kind not in ("VARCHAR", "DOUBLE"):
        return "value", "value IS NOT NULL"
    if kind == "DOUBLE":
        return "value", "value IS NOT NULL AND NOT isnan(value)"
    number, whole = "TRY_CAST(value AS DOUBLE)", f"CASE WHEN {is_whole('value')} THEN TRY_CAST(value AS HUGEINT) END"
    lost, example = database.row(
        f"SELECT count(*), any_value(value) FROM {name} WHERE {number} IS NULL AND value IS NOT NULL"
    )
    if lost:
        raise CurationError(
            f"{term.path}: {lost} values of column {term.column!r} are not numbers, such as {example!r}."
        )
    rounded, others = database.row(
        f"SELECT count_if(abs({whole}) > {2**53}), count_if({whole} IS NULL) FROM {name} WHERE value IS NOT NULL"
    )
    if rounded and others:
        raise CurationError(
            f"{term.path}: column {term.column!r} mixes whole numbers beyond 2^53 with fractions, which cannot be "
            "compared exactly. Give all values as whole numbers, or none beyond 2^53."
        )
    return (whole, "value IS NOT NULL") if rounded else (number, f"{number} IS NOT NULL AND NOT isnan({number})")


def _same_samples(database: Database, terms: tuple[Term, ...]) -> None:
    for k, term in enumerate(terms[1:], start=1):
        for one, other, (first, second) in (
            ("term0", f"term{k}", (terms[0], term)),
            (f"term{k}", "term0", (term, terms[0])),
        ):
            unknown = f"FROM {one} WHERE id NOT IN (SELECT id FROM {other})"
            count = database.value(f"SELECT count(*) {unknown}")
            if count:
                example = database.value(f"SELECT min(id) {unknown}")
                raise CurationError(
                    f"{count} samples of {first.path}, such as {example!r}, are not in {second.path}. With "
                    "`allow_unknown=true`, a sample that is missing from a table is not selected by its term."
                )
