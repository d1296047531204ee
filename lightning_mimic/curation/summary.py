"""One row per sample from many scorings."""

import pyarrow as pa


def summarise(rows: pa.Table) -> pa.Table:
    """Each sample's mean score, and what was last said of it.

    Args:
        rows: As :meth:`lightning_mimic.Ledger.table` returns them, in order of time.

    Returns:
        Sorted by ``score``, the most suspicious first; columns ``id``, ``score`` (mean over its scorings, null
        where none has a score), ``scorings`` (those with a score), ``label`` and ``predicted`` (last, null where
        not recorded).

    Example:
        >>> rows = pa.table({"id": [7, 8, 7], "score": [1.0, -1.0, 2.0], "label": [0, 1, 0], "predicted": [3, 1, 0]})
        >>> summarise(rows).to_pylist()[1]
        {'id': 7, 'score': 1.5, 'scorings': 2, 'label': 0, 'predicted': 0}
    """
    # "last" depends on the order, which threads would not keep.
    grouped = rows.group_by("id", use_threads=False).aggregate(
        [("score", "mean"), ("score", "count"), ("label", "last"), ("predicted", "last")]
    )
    summary = grouped.select(["id", "score_mean", "score_count", "label_last", "predicted_last"])
    return summary.rename_columns(["id", "score", "scorings", "label", "predicted"]).sort_by("score")
