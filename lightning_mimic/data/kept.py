"""What a manifest keeps of a data set."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from torch.utils.data import Subset

from lightning_mimic.data.ids import WithIds


def kept_of(dataset: Any, manifest: str | Path) -> Subset:
    """The samples that a manifest keeps, in the data set's order; one that it keeps twice is there twice.

    Args:
        dataset: A :class:`WithIds`, or one whose row numbers the ids are.
        manifest: Parquet with columns ``id`` and ``keep``, as ``mimic-curate`` writes it.

    Raises:
        ValueError: No manifest; it is of other samples; or it keeps none.

    Example:
        >>> import tempfile, pyarrow as pa
        >>> path = tempfile.mkdtemp() + "/manifest.parquet"
        >>> pq.write_table(pa.table({"id": [0, 1, 2], "keep": [True, False, True]}), path)
        >>> list(kept_of(["a", "b", "c"], path))
        ['a', 'c']
    """
    try:
        # Checksums, because a flipped bit would be another sample.
        with pq.ParquetFile(manifest, page_checksum_verification=True) as file:
            rows = file.read(["id", "keep"])
        known, keep = rows["id"].to_pylist(), rows["keep"].to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{manifest} is no manifest: {str(error).splitlines()[0]}") from error
    ids = dataset.ids if isinstance(dataset, WithIds) and dataset.ids is not None else list(range(len(dataset)))
    unlike = sorted(set(ids) ^ set(known), key=str)
    if unlike:
        raise ValueError(
            f"{manifest} decides on {len(set(known))} samples and the data set has {len(ids)}; {len(unlike)} ids are "
            f"in one of them alone, such as {unlike[0]!r}. Curate the scores of this data set (with `pool`, if some "
            "were never scored)."
        )
    times = Counter(each for each, stays in zip(known, keep, strict=True) if stays)
    if not times:
        raise ValueError(f"{manifest} keeps none of its {len(known)} samples.")
    return Subset(dataset, [place for place, each in enumerate(ids) for _ in range(times[each])])
