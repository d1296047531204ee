"""Which samples of a data set, or of a stream of samples, a manifest keeps."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_mimic.dataset_ids import SampleIds, reads_ids_from_samples, row_ids, sample_ids
from lightning_mimic.errors import CurationError, MimicError
from lightning_mimic.tables import checked_ids, decisions
from lightning_mimic.user_files import open_parquet, user_path

if TYPE_CHECKING:
    from torch.utils.data import Subset


def kept_subset(dataset: Any, manifest: str | Path) -> "Subset":
    """Return the samples that a manifest keeps, in the data set's order; one that it keeps twice is there twice.

    Labels that a person has corrected are put in place of the data set's.

    Args:
        dataset: Map-style. The ids are those of :func:`~lightning_mimic.dataset_ids.sample_ids` (``WithIds``, in
            subsets and joined data sets, too), or else row numbers; of a ``Subset`` they are those of the whole.
        manifest: Parquet with columns ``id`` and ``keep``, as ``mimic-curate`` writes it.

    Raises:
        MimicError: No manifest; it is of other samples; it keeps none; or the ids cannot be known (a stream, samples
            that carry ids of their own).

    Example:
        >>> import tempfile, pyarrow as pa, pyarrow.parquet as pq
        >>> path = tempfile.mkdtemp() + "/manifest.parquet"
        >>> pq.write_table(pa.table({"id": [0, 1, 2], "keep": [True, False, True]}), path)
        >>> list(kept_subset(["a", "b", "c"], path))
        ['a', 'c']
    """
    from torch.utils.data import Subset  # importing the package must not load torch

    rows = read_decisions(user_path(manifest, "manifest"), ("id", "keep"), optional=("corrected_label",))
    known, keep = rows["id"].to_pylist(), rows["keep"].to_pylist()
    ids = _ids_of(dataset)
    unlike = sorted(set(ids) ^ set(known), key=str)
    if unlike:
        raise MimicError(
            f"{manifest} decides on {len(set(known))} samples and the data set has {len(ids)}; {len(unlike)} ids are "
            f"in one of them alone, such as {unlike[0]!r}. Curate the scores of this data set (with `pool`, if some "
            "were never scored)."
        )
    times = Counter(each for each, stays in zip(known, keep, strict=True) if stays)
    if not times:
        raise MimicError(f"{manifest} keeps none of its {len(known)} samples.")
    labels = _corrected(rows)
    if labels:
        dataset = CorrectedLabels(dataset, {place: labels[each] for place, each in enumerate(ids) if each in labels})
    return Subset(dataset, [place for place, each in enumerate(ids) for _ in range(times[each])])


def _corrected(rows: pa.Table) -> dict[int | str, int]:
    """Return the labels that a person has corrected, by id."""
    if "corrected_label" not in rows.column_names:
        return {}
    rows = rows.filter(pc.is_valid(rows["corrected_label"]))
    return dict(zip(rows["id"].to_pylist(), rows["corrected_label"].to_pylist(), strict=True))


class CorrectedLabels:
    """A data set some of whose labels are replaced.

    A sample is a tuple or list whose second item is the label, or a mapping with a key ``label`` or ``labels``; the
    label is an integer, or an integer tensor or array without axes.

    Args:
        dataset: Map-style.
        labels: Row to its label.

    Raises:
        MimicError: On access, a sample of another kind.

    Example:
        >>> data = CorrectedLabels([("a", 0), ("b", 1)], {1: 7})
        >>> data[0], data[1]
        (('a', 0), ('b', 7))
    """

    def __init__(self, dataset: Any, labels: Mapping[int, int]) -> None:
        self.dataset = dataset
        self.labels = dict(labels)
        if callable(getattr(dataset, "sample_ids", None)):
            self.sample_ids = dataset.sample_ids

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        sample = self.dataset[row]
        label = self.labels.get(row % len(self))
        return sample if label is None else _with_label(sample, label)


def _with_label(sample: Any, label: int) -> Any:
    """Return a copy of a sample with another label."""
    inner = getattr(sample, "sample", None)
    if hasattr(sample, "id") and inner is not None:  # of WithIds
        return type(sample)(_with_label(inner, label), sample.id)
    if isinstance(sample, tuple | list) and len(sample) > 1 and _is_label(sample[1]):
        items = [sample[0], _as_label(label, sample[1]), *sample[2:]]
        return type(sample)(*items) if hasattr(sample, "_fields") else type(sample)(items)
    if isinstance(sample, Mapping):
        name = next((each for each in ("label", "labels") if each in sample and _is_label(sample[each])), None)
        if name is not None:
            copied: Any = copy.copy(sample)
            copied[name] = _as_label(label, sample[name])
            return copied
    raise MimicError(
        f"the manifest has corrected labels, and a sample of the data set is a {type(sample).__name__} whose label is "
        "not known; expected (input, label, ...) or a mapping with 'label', and labels that are integers."
    )


def _is_label(value: Any) -> bool:
    if hasattr(value, "dtype") and hasattr(value, "ndim"):
        return value.ndim == 0 and "int" in str(value.dtype)
    return isinstance(value, Integral) and not isinstance(value, bool)


def _as_label(label: int, like: Any) -> Any:
    """Return a label as the same kind of number as another one."""
    if hasattr(like, "new_tensor"):
        return like.new_tensor(label)
    return like.dtype.type(label) if hasattr(like, "dtype") else label


def _ids_of(dataset: Any) -> SampleIds:
    """Return the ids under which the samples of a map-style data set are scored."""
    from torch.utils.data import IterableDataset

    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise MimicError(
            f"a {type(dataset).__name__} has no rows to choose from; give a map-style data set, such as "
            "WithIds(dataset)."
        )
    ids = sample_ids(dataset)
    if ids is None and reads_ids_from_samples(dataset):
        raise MimicError(
            f"the samples of the {type(dataset).__name__} carry ids of their own, which are not known without reading "
            "all of them. Give it a method `sample_ids()` that returns them in its order, or WithIds(dataset, ids)."
        )
    return row_ids(dataset) if ids is None else ids


class KeptIds:
    """How often a manifest keeps an id, for as many ids as DataComp has.

    Ids of 32 hex digits are two sorted columns of 64 bits (20 bytes an id, shared by forked workers), others a dict.

    Args:
        manifest: Parquet with columns ``id`` (text) and ``keep``.

    Raises:
        MimicError: No manifest, ids that are no text, or it keeps none.

    Example:
        >>> import tempfile, pyarrow.parquet as pq
        >>> path = tempfile.mkdtemp() + "/manifest.parquet"
        >>> pq.write_table(pa.table({"id": ["a", "b", "b"], "keep": [False, True, True]}), path)
        >>> kept = KeptIds(path)
        >>> kept.times("a"), kept.times("b"), kept.times("c")
        (0, 2, None)
    """

    def __init__(self, manifest: str | Path) -> None:
        rows = read_decisions(user_path(manifest, "manifest"))
        ids, keep = rows["id"], rows["keep"]
        if not pa.types.is_string(ids.type):
            raise MimicError(f"{manifest} has ids of type {ids.type}; ids of image-text pairs are text.")
        if keep.null_count:
            raise MimicError(f"{manifest} has {keep.null_count} rows without a decision.")
        if not pc.any(keep).as_py():
            raise MimicError(f"{manifest} keeps none of its {len(ids)} samples.")
        self._times: dict[str, int] = {}
        self._columns: Any = None
        if pc.all(pc.match_substring_regex(ids, "^[0-9a-f]{32}$")).as_py():
            self._columns = _sorted_columns(ids, keep)
        else:
            for each, stays in zip(ids.to_pylist(), keep.to_pylist(), strict=True):
                self._times[each] = self._times.get(each, 0) + bool(stays)

    def times(self, id: str) -> int | None:
        """How often the id is kept: 0 or more, ``None`` if the manifest does not know it."""
        if self._columns is None:
            return self._times.get(id)
        if len(id) != 32 or not set(id) <= _DIGITS:
            return None
        import numpy as np

        high, low, times = self._columns
        first, second = (np.uint64(int(half, 16)) for half in (id[:16], id[16:]))
        begin, end = np.searchsorted(high, first, "left"), np.searchsorted(high, first, "right")
        place = begin + np.searchsorted(low[begin:end], second)
        return int(times[place]) if place < end and low[place] == second else None


_DIGITS = frozenset("0123456789abcdef")


def _sorted_columns(ids: pa.ChunkedArray, keep: pa.ChunkedArray) -> Any:
    """Upper and lower halves of the ids, ascending, each id once, and how often it is kept."""
    import numpy as np

    halves = np.empty((len(ids), 2), dtype=np.uint64)
    start = 0
    for chunk in ids.chunks:  # by the chunk, so that the text is never there twice
        if not len(chunk):
            continue
        _, offsets, text = chunk.buffers()
        first = int(np.frombuffer(offsets, dtype=np.int32)[chunk.offset])
        flat = np.frombuffer(text, dtype=np.uint8)[first : first + 32 * len(chunk)]
        digits = np.where(flat < ord("a"), flat - ord("0"), flat - ord("a") + 10).reshape(len(chunk), 2, 8, 2)
        octets = (digits[..., 0] << 4 | digits[..., 1]).astype(np.uint8)
        halves[start : start + len(chunk)] = octets.copy().view(">u8")[..., 0]
        start += len(chunk)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    high, low = halves[order, 0], halves[order, 1]
    stays = keep.to_numpy().astype(np.uint32)[order]
    new = np.ones(len(high), dtype=bool)
    new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return high[new], low[new], np.add.reduceat(stays, np.flatnonzero(new)).astype(np.uint32)


def read_decisions(
    path: Path, columns: Sequence[str] | None = ("id", "keep"), optional: Sequence[str] = ()
) -> pa.Table:
    """Read columns of a manifest into memory, verifying its checksums, because a flipped bit would be another sample.

    Args:
        path: Path of the file.
        columns: Names of the columns, ``id`` and ``keep`` among them; ``None``: all.
        optional: Names of further ones that are read where they are there.

    Returns:
        The table, whose ids are whole numbers or text and whose decisions are booleans.

    Raises:
        CurationError: No such file, something else, or a damaged one.
    """
    with open_parquet(path, "is no manifest") as file:
        if columns is not None:
            columns = [*columns, *(name for name in optional if name in file.schema_arrow.names)]
        rows = file.read(None if columns is None else list(columns))
        rows.validate(full=True)
        for name, check in (("id", checked_ids), ("keep", decisions)):
            if rows.column_names.count(name) != 1:
                raise CurationError(f"{path} is no manifest: its columns are {', '.join(file.schema_arrow.names)}.")
            rows = rows.set_column(rows.column_names.index(name), name, check(rows[name], path))
    return rows.select(columns or rows.column_names).replace_schema_metadata(None)
