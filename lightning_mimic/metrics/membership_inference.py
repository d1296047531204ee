"""Which samples a reference was trained on."""

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
    """How well scores tell who trained the reference, each between 0 and 1.

    Attributes:
        ranking: Ids, the likeliest member first.
        auroc: Probability that a member scores higher than another sample; 0.5 is chance.
        average_precision: Of the ranking.
        jaccard: Overlap of the members with as many samples of the highest scores: shared over all in either.
        chance: The Jaccard index expected of a random ranking.
    """

    ranking: tuple[int | str, ...]
    auroc: float
    average_precision: float
    jaccard: float
    chance: float


def membership(manifest: Manifest, members: Iterable[int | str]) -> Membership:
    """Guesses from high scores which samples the reference was trained on, and compares with the truth.

    Samples that trained the reference get flattering scores: steps on them lead towards it.

    Args:
        manifest: With a mean score per sample.
        members: Ids that trained the reference, in truth.

    Raises:
        CurationError: Members that are unknown, all or none of the samples, or a manifest without scores.

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
        raise CurationError(f"{manifest.path} has no scores; curate a ledger.")
    table = table.filter(table["score"].is_valid()).sort_by([("score", "descending"), ("id", "ascending")])
    ids, true = table["id"].to_pylist(), _ids(members)
    unknown = true - set(ids)
    if unknown:
        raise CurationError(
            f"{len(unknown)} members have no score in {manifest.path}, such as {min(unknown, key=str)!r}."
        )
    if not 0 < len(true) < len(ids):
        raise CurationError(f"{len(true)} of {len(ids)} samples are members; there must be both.")
    # A member is the less suspicious, the higher its score.
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
        raise CurationError(f"`members` is {members!r}; expected ids.")
    members = list(members)
    other = [each for each in members if isinstance(each, bool) or not isinstance(each, Integral | str)]
    if other:
        raise CurationError(f"`members` holds {other[0]!r}; expected ids.")
    return set(members)
