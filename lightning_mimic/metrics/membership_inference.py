"""Membership inference: the samples on which a reference was trained, guessed from scores."""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

import pyarrow as pa
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_jaccard_index

from lightning_mimic.errors import CurationError
from lightning_mimic.manifest import Manifest
from lightning_mimic.metrics.detection import detection_scores


@dataclass(frozen=True)
class Membership:
    """Metrics of how well scores identify the samples that trained the reference, each between 0 and 1.

    Attributes:
        ranking: Ids of the samples, most likely member first.
        auroc: Probability that a member scores higher than a non-member; 0.5 is chance.
        average_precision: Average precision of the ranking.
        jaccard: Jaccard index (intersection over union) of the members and the equally many samples with the highest
            scores.
        chance: Jaccard index expected of a random ranking.
    """

    ranking: tuple[int | str, ...]
    auroc: float
    average_precision: float
    jaccard: float
    chance: float


def membership(manifest: Manifest, members: Iterable[int | str]) -> Membership:
    """Guess from high scores which samples the reference was trained on, and compare with the truth.

    Samples on which the reference was trained get higher scores, because gradient steps on them lead towards it.

    Args:
        manifest: Manifest with a mean score per sample.
        members: Ids of the samples on which the reference was in fact trained.

    Raises:
        CurationError: Some members have no score, the members are all or none of the samples, or the manifest has no
            scores.

    Source: Huang et al., arXiv 2501.06708.

    Example:
        >>> import tempfile, pyarrow as pa, pyarrow.parquet as pq
        >>> path = tempfile.mkdtemp() + "/manifest.parquet"
        >>> rows = {"id": [1, 2, 3, 4], "keep": [True] * 4, "score": [0.3, 0.1, 0.9, -1.0]}
        >>> pq.write_table(pa.table(rows), path)
        >>> membership(Manifest(path), [1, 2]).jaccard  # 3 and 1 score highest
        0.3333333432674408
    """
    table = manifest.table()
    if "score" not in table.column_names or not pa.types.is_floating(table["score"].type):
        raise CurationError(f"{manifest.path} has no column of scores; use a manifest that was curated from a ledger.")
    table = table.filter(table["score"].is_valid()).sort_by([("score", "descending"), ("id", "ascending")])
    ids, true = table["id"].to_pylist(), _ids(members)
    unknown = true - set(ids)
    if unknown:
        raise CurationError(
            f"{len(unknown)} of the `members` have no score in {manifest.path}, such as {min(unknown, key=str)!r}."
        )
    if not 0 < len(true) < len(ids):
        raise CurationError(
            f"{len(true)} of {len(ids)} samples are members; there must be at least one member and one non-member."
        )
    # Members score high; detection_scores() ranks low scores first.
    scores = detection_scores(-torch.tensor(table["score"].to_pylist(), dtype=torch.float64))
    truth = torch.tensor([int(each in true) for each in ids])
    guessed = (torch.arange(len(ids)) < len(true)).long()
    share = len(true) / len(ids)
    return Membership(
        ranking=tuple(ids),
        auroc=float(binary_auroc(scores, truth)),
        average_precision=float(binary_average_precision(scores, truth)),
        jaccard=float(binary_jaccard_index(guessed, truth)),
        chance=share / (2 - share),
    )


def _ids(members: Iterable[int | str]) -> set[int | str]:
    if isinstance(members, str) or not isinstance(members, Iterable):
        raise CurationError(f"`members` is {members!r}; expected a list of ids.")
    members = list(members)
    other = [each for each in members if isinstance(each, bool) or not isinstance(each, Integral | str)]
    if other:
        raise CurationError(f"`members` holds {other[0]!r}; expected ids, each an int or a str.")
    return set(members)
