"""Comparison of several curated data sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_mimic.curation.reference_facts import VERDICTS
from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.manifest import Manifest


@dataclass(frozen=True)
class DataSet:
    """Hold the figures of one data set; all shares are between 0 and 1.

    Attributes:
        name: Name of the data set.
        samples: Number of samples.
        kept: Share of the samples that the filter keeps.
        share_kept: Share of the scored samples with a mean score of 0 or more; ``None`` if 0 does not separate good
            from bad scores of this scorer.
        mean_score_kept: Mean score of the kept samples, in loss per unit of weight distance; comparable between pools
            that one model scored in one run.
        quality: Estimated share of good samples; ``None`` without trusted samples.
        low: Lower end of the 95 % interval of ``quality``.
        high: Upper end of the 95 % interval of ``quality``.
        right: True share of good samples; ``None`` if unknown.
        verdict: Verdict on the reference; ``None`` if it was not diagnosed.
        wrong_share: Estimated share of wrong labels, from the calibration of the reference; ``None`` without a
            calibration.
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
    """Hold ranked data sets, and the correlation of the ranking figure with the true quality.

    Attributes:
        datasets: Data sets, the best first. The ranking figure is ``quality`` if all data sets have it, otherwise
            ``share_kept`` if all have that, otherwise ``kept``.
        pearson: Correlation of the ranking figure with the true share of good samples, -1 to 1; ``None`` if that share
            is known for fewer than three data sets, or if either is constant.
        spearman: Rank correlation of the same two figures, -1 to 1, or ``None``.
    """

    datasets: tuple[DataSet, ...]
    pearson: float | None
    spearman: float | None


def compare(manifests: Mapping[str, Manifest], noise: Mapping[str, float] | None = None) -> Comparison:
    """Compare the quality of several data sets.

    Args:
        manifests: Manifests written by :func:`~lightning_mimic.curation.curate`, by name of the data set.
        noise: True shares of bad samples, 0 to 1, by name of the data set, where known.

    Raises:
        CurationError: There are no manifests, one was not made from a ledger, ``noise`` has an unknown name, or a share
            is outside 0 to 1.

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
            raise CurationError(f"`noise` of {name!r} is {share!r}; expected a share, 0 to 1.")
    found = [_data_set(name, manifest, known.get(name)) for name, manifest in manifests.items()]
    figures = ("quality", "share_kept", "kept")
    ordering = next(name for name in figures if all(getattr(each, name) is not None for each in found))

    def figure(each: DataSet) -> float:
        return float(getattr(each, ordering))

    pairs = [(figure(each), each.right) for each in found if each.right is not None]
    pearson = spearman = None
    if len(pairs) >= 3 and all(len(set(values)) > 1 for values in zip(*pairs, strict=True)):
        # Imported here, because importing the package must not load torch.
        import torch
        from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

        estimated, right = torch.tensor(pairs, dtype=torch.float64).T
        pearson, spearman = float(pearson_corrcoef(estimated, right)), float(spearman_corrcoef(estimated, right))
    return Comparison(tuple(sorted(found, key=figure, reverse=True)), pearson, spearman)


def _data_set(name: str, manifest: Manifest, noise: float | None) -> DataSet:
    found = manifest.provenance
    if "share_kept" not in found:
        raise CurationError(f"{manifest.path} was not made from a ledger; expected a manifest written by mimic-curate.")
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
    """Return a number of a manifest's provenance, or ``None`` if it is missing."""
    value = found.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise CurationError(f"{manifest.path}: {name!r} in its provenance is {value!r}; expected a number.")
    return value
