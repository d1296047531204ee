"""Manual corrections: a person's decisions and labels, which replace those of a filter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mimic.database import Database, is_whole, quoted
from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.tables import Table, settle_ids
from lightning_mimic.user_files import user_path

#: Reason recorded for samples that a person has decided on.
BY_HAND = "by hand"
_COLUMNS = ("keep", "label", "label_name")


def apply_corrections(
    path: str | Path,
    database: Database,
    *,
    id_type: str,
    class_names: Sequence[str] | None,
    has_labels: bool,
) -> dict[str, Any]:
    """Apply corrections to the view ``decided``, and add a column ``corrected_label`` to it.

    Args:
        path: CSV or Parquet with ``id`` and any of ``keep`` (true or false), ``label`` (index of a class) and
            ``label_name``; an empty cell changes nothing. The report page can download such a file.
        database: Database with the view, whose columns include ``id``, ``keep``, ``opinion`` and ``reason``.
        id_type: SQL type of the ids in the view.
        class_names: Names of the classes, or ``None`` if unknown.
        has_labels: Whether the run recorded labels.

    Returns:
        Summary for the provenance: name of the file, and numbers of corrected samples.

    Raises:
        CurationError: The table cannot be read, has samples that are not in the view, has two different corrections of
            one sample, a row without a correction, or a label that is not a class.
    """
    table = Table(user_path(path, "corrections"))
    given = [name for name in _COLUMNS if name in table.names]
    if not given:
        raise CurationError(f"{path} has no corrections; expected at least one of the columns {', '.join(_COLUMNS)}.")
    table.load(database, "given", {"id": "id", **{name: name for name in given}}, "reading corrections")
    settle_ids(database, {"given": table}, id_type)
    labels = _label_sql(database, given, class_names)
    keep = "keep" if "keep" in given else "NULL::BOOLEAN"
    database.run(f"CREATE TABLE corrections AS SELECT DISTINCT id, {keep} AS keep, {labels} AS label FROM given")
    _check_rows(path, database, given, class_names, has_labels)
    database.run("ALTER VIEW decided RENAME TO filtered")
    database.run(
        f"""CREATE VIEW decided AS SELECT filtered.* REPLACE (
                coalesce(corrections.keep, filtered.keep) AS keep,
                coalesce(corrections.keep, opinion) AS opinion,
                CASE WHEN corrections.keep IS NULL THEN reason ELSE {quoted(BY_HAND)} END AS reason
            ), corrections.label AS corrected_label
            FROM filtered LEFT JOIN corrections ON filtered.id = corrections.id"""
    )
    samples, kept, dropped, relabelled = database.row(
        "SELECT count(*), count_if(keep), count_if(NOT keep), count(label) FROM corrections"
    )
    return {"file": table.path.name, "samples": samples, "kept": kept, "dropped": dropped, "relabelled": relabelled}


def _label_sql(database: Database, given: Sequence[str], class_names: Sequence[str] | None) -> str:
    """Return SQL for a class index: -1 if it is not a class, -2 if index and name differ, null if no label is given."""
    index = None
    if "label" in given:
        # pandas stores whole numbers as floats if one of them is missing.
        is_float = database.columns("given")["label"] == "DOUBLE"
        present = "NOT isnan(label)" if is_float else "label IS NOT NULL"
        whole = "label = trunc(label)" if is_float else is_whole("label")
        index = (
            f"CASE WHEN {present} THEN CASE WHEN {whole} THEN coalesce(TRY_CAST(label AS BIGINT), -1) ELSE -1 END END"
        )
    if "label_name" not in given or class_names is None:
        return index or "NULL::BIGINT"
    names = f"[{', '.join(quoted(name) for name in class_names)}]::VARCHAR[]"
    # For an unknown name, list_position is 0 or null.
    position = f"coalesce(list_position({names}, label_name::VARCHAR), 0)::BIGINT - 1"
    named = f"CASE WHEN label_name IS NOT NULL THEN {position} END"
    if index is None:
        return named
    return f"CASE WHEN {index} <> {named} THEN -2 ELSE coalesce({index}, {named}) END"


def _check_rows(
    path: str | Path,
    database: Database,
    given: Sequence[str],
    class_names: Sequence[str] | None,
    has_labels: bool,
) -> None:
    """Raise :class:`CurationError` for corrections that cannot be applied."""
    unknown = database.column("SELECT id FROM corrections WHERE id NOT IN (SELECT id FROM decided) ORDER BY id LIMIT 3")
    if unknown:
        raise CurationError(
            f"{path} corrects samples that are not in this ledger or pool, such as {unknown[0]!r}. Give the "
            "corrections of this data set."
        )
    twice = database.column("SELECT id FROM corrections GROUP BY id HAVING count(*) > 1 ORDER BY id LIMIT 1")
    if twice:
        raise CurationError(f"{path} has two different corrections of sample {twice[0]!r}; remove one of them.")
    nothing = database.column("SELECT id FROM corrections WHERE keep IS NULL AND label IS NULL ORDER BY id LIMIT 1")
    if nothing:
        why = ""
        if "label_name" in given and class_names is None:
            why = " The run recorded no class names; give class indices in a column 'label'."
        raise CurationError(f"{path} has a row without a correction, for sample {nothing[0]!r}.{why}")
    relabelled = database.rows("SELECT id, label FROM corrections WHERE label IS NOT NULL ORDER BY label, id LIMIT 1")
    if relabelled and not has_labels:
        raise CurationError(
            f"{path} corrects the label of sample {relabelled[0][0]!r}, but the run recorded no labels."
        )
    most = None if class_names is None else len(class_names) - 1
    beyond = "" if most is None else f"OR label > {most}"
    bad = database.rows(f"SELECT id, label FROM corrections WHERE label < 0 {beyond} ORDER BY id LIMIT 1")
    if not bad:
        return
    sample, label = bad[0]
    shown = database.rows(f"SELECT {', '.join(given)} FROM given WHERE id = {_literal(sample)} LIMIT 1")[0]
    row = ", ".join(f"{name} {value!r}" for name, value in zip(given, shown, strict=True) if value is not None)
    if label == -2:
        raise CurationError(f"{path}: label and label_name of sample {sample!r} are different classes ({row}).")
    name = dict(zip(given, shown, strict=True)).get("label_name")
    nearest = f"; {nearest_names(str(name), class_names)}" if name is not None and class_names is not None else ""
    classes = "a whole number of 0 or more" if most is None else f"0 to {most}"
    raise CurationError(f"{path}: the label of sample {sample!r} is not a class ({row}); expected {classes}{nearest}.")


def _literal(value: int | str) -> str:
    return quoted(value) if isinstance(value, str) else str(value)
