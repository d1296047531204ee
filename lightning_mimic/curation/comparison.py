"""Several data sets side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_mimic.curation.reference_facts import VERDICTS
from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.manifest import Manifest


@dataclass(frozen=True)
class DataSet:
    """What is known of one data set; shares from 0 to 1.

    Attributes:
        name: Its own.
        samples: In it.
        kept: Share that its filter keeps.
        share_kept: Share of the scored samples with a mean score of 0 or more; ``None`` where 0 does not divide scores.
        mean_score_kept: Mean score of what is kept, loss per unit of weight distance; comparable between pools that
            one model scored in one run.
        quality: Estimated share of good samples; ``None`` without trusted samples.
        low: Lower end of its 95 % interval.
        high: Upper end.
        right: True share of good samples, where it is known.
        verdict: On its reference; ``None`` where it was not diagnosed.
        wrong_share: Estimated share of wrong labels, from the calibration of its reference; ``None`` where it has none.
    """

    name: str
    samples: int
    kept: float
    share_kept: float | None
    mean_score_kept: float | None = None
    quality: float | None = None
    low: float | None = None
    high: float | None = None
    right: float | None = None
    verdict: str | None = None
    wrong_share: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Data sets, the best first, and how what is estimated goes with the truth.

    Attributes:
        datasets: By quality; where not all have one, by the share with a mean score of 0 or more; where not all have
            that, by the share that their filters keep.
        pearson: Correlation of that figure with the true share of good samples, -1 to 1; ``None`` where fewer than
            three are known.
        spearman: Of their ranks.
    """

    datasets: tuple[DataSet, ...]
    pearson: float | None
    spearman: float | None


def compare(manifests: Mapping[str, Manifest], noise: Mapping[str, float] | None = None) -> Comparison:
    """Put data sets beside each other.

    Args:
        manifests: Name to what :func:`~lightning_mimic.curation.curate` wrote.
        noise: Name to the true share of bad samples, where it is known.

    Raises:
        CurationError: No manifests, one that was not made from a ledger, an unknown name, a share outside 0 to 1.

    Example:
        >>> compare({})
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: there are no manifests to compare.
    """
    if not manifests:
        raise CurationError("there are no manifests to compare.")
    if noise is not None and not isinstance(noise, Mapping):
        raise CurationError(f"`noise` is {noise!r}; expected shares by name, as in {{new: 0.2}}.")
    known = dict(noise or {})
    for name, share in known.items():
        if name not in manifests:
            raise CurationError(f"`noise`: no manifest is called {name!r}; {nearest_names(name, manifests)}.")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise CurationError(f"`noise` of {name!r} is {share!r}; it is a share, 0 to 1.")
    found = [_data_set(name, manifest, known.get(name)) for name, manifest in manifests.items()]
    figures = ("quality", "share_kept", "kept")
    ordering = next(name for name in figures if all(getattr(each, name) is not None for each in found))

    def figure(each: DataSet) -> float:
        return float(getattr(each, ordering))

    pairs = [(figure(each), each.right) for each in found if each.right is not None]
    pearson = spearman = None
    if len(pairs) >= 3 and all(len(set(values)) > 1 for values in zip(*pairs, strict=True)):
        # Not at the top: importing the package must not load them.
        import torch
        from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

        estimated, right = torch.tensor(pairs, dtype=torch.float64).T
        pearson, spearman = float(pearson_corrcoef(estimated, right)), float(spearman_corrcoef(estimated, right))
    return Comparison(tuple(sorted(found, key=figure, reverse=True)), pearson, spearman)


def _data_set(name: str, manifest: Manifest, noise: float | None) -> DataSet:
    found = manifest.provenance
    if "share_kept" not in found:
        raise CurationError(f"{manifest.path} was not made from a ledger; curate one.")
    quality, means, wrong = (found.get(name) or {} for name in ("quality", "mean_score", "wrong_share"))
    if not isinstance(quality, dict) or not isinstance(means, dict):
        raise CurationError(f"{manifest.path}: its provenance is damaged: {quality!r}, {means!r}.")
    if not isinstance(wrong, dict):
        raise CurationError(f"{manifest.path}: its provenance is damaged: {wrong!r}.")
    verdict = found.get("verdict")
    if verdict is not None and verdict not in VERDICTS:
        raise CurationError(
            f"{manifest.path}: 'verdict' in its provenance is {verdict!r}; {nearest_names(str(verdict), VERDICTS)}."
        )
    samples, kept = (_figure(manifest, found, each) or 0 for each in ("samples", "kept"))
    share_kept = _figure(manifest, found, "share_kept")
    if not 0 <= kept <= samples or not samples:
        raise CurationError(f"{manifest.path}: its provenance has {kept} kept of {samples} samples.")
    return DataSet(
        name=name,
        samples=int(samples),
        kept=kept / samples,
        share_kept=share_kept,
        mean_score_kept=_figure(manifest, means, "kept"),
        quality=_figure(manifest, quality, "estimate"),
        low=_figure(manifest, quality, "low"),
        high=_figure(manifest, quality, "high"),
        right=None if noise is None else 1 - noise,
        verdict=verdict,
        wrong_share=_figure(manifest, wrong, "estimate"),
    )


def _figure(manifest: Manifest, found: Mapping[str, Any], name: str) -> float | None:
    """A number of a provenance, ``None`` where there is none."""
    value = found.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise CurationError(f"{manifest.path}: {name!r} in its provenance is {value!r}; expected a number.")
    return value
