"""Plots of scores and of estimated quality."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from lightning_mimic.curation.comparison import Comparison
from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.files import atomic_path
from lightning_mimic.user_files import user_path, writing

if TYPE_CHECKING:
    from torch import Tensor

_RIGHT, _WRONG, _LINE = "#0072b2", "#d55e00", "#444444"  # distinguishable with colour blindness


def plot_scores(
    path: str | Path,
    scores: "Tensor",
    wrong: "Tensor",
    images: "Sequence[Tensor]",
    captions: Sequence[str],
    title: str,
) -> None:
    """Plot histograms of the mean scores of right and wrong labels, above the most suspicious images.

    Args:
        path: Path of the plot; the suffix sets the format, by default PNG.
        scores: Mean score per sample, shape ``(n,)``, in loss per unit of weight distance.
        wrong: Boolean, whether each label is known to be wrong, shape ``(n,)``.
        images: Grey images of shape ``(1, H, W)`` from 0 (white) to 1 (black), the most suspicious first.
        captions: One caption per image.
        title: Title of the plot.

    Raises:
        CurationError: The suffix is not a supported format, or the file cannot be written.
    """
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.5, 1], squeeze=False).flat
    axes = upper.subplots()
    # Zero, the cut of the decision, is the edge of a bin.
    low, high = float(scores.min()), float(scores.max())
    width = max(high - low, 1e-12) / 60
    edges = [width * k for k in range(math.floor(low / width), math.ceil(high / width) + 1)]
    for mask, colour, name in ((~wrong, _RIGHT, "right label"), (wrong, _WRONG, "wrong label")):
        axes.hist(
            scores[mask].tolist(), bins=edges, color=colour, alpha=0.7, label=f"{name} ({int(mask.sum())} images)"
        )
    axes.axvline(0, color=_LINE, linestyle="--", linewidth=1)
    axes.set_xlabel("mean mimic score (negative: a step on the sample moves the model away from the reference)")
    axes.set_ylabel("images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(title)
    for cell, image, caption in zip(lower.subplots(1, len(images)), images, captions, strict=True):
        cell.imshow(image[0].tolist(), cmap="gray_r", vmin=0, vmax=1)
        cell.set_title(caption, fontsize=8)
        cell.set_xticks([])
        cell.set_yticks([])
    lower.suptitle(f"the {len(images)} images with the lowest scores", fontsize=9)
    _save(figure, path)


def plot_quality(path: str | Path, comparison: Comparison) -> None:
    """Plot the estimated share of good samples per data set, with intervals, and the true shares where known.

    Args:
        path: Path of the plot; the suffix sets the format, by default PNG.
        comparison: Data sets to plot, one row each.

    Raises:
        CurationError: The suffix is not a supported format, or the file cannot be written.
    """
    datasets = comparison.datasets[::-1]  # the best at the top
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(datasets)), layout="constrained")
    axes = figure.subplots()
    places = range(len(datasets))
    by_sign = [(100 * each.share_kept, k) for k, each in enumerate(datasets) if each.share_kept is not None]
    x, y = zip(*by_sign, strict=True) if by_sign else ((), ())
    axes.plot(x, y, "|", color=_LINE, markersize=12, label="score of 0 or more")
    for place, each in zip(places, datasets, strict=True):
        if each.quality is not None and each.low is not None and each.high is not None:
            axes.plot([100 * each.low, 100 * each.high], [place, place], color=_RIGHT, linewidth=3, alpha=0.5)
    calibrated = [(100 * each.quality, k) for k, each in enumerate(datasets) if each.quality is not None]
    known = [(100 * each.right, k) for k, each in enumerate(datasets) if each.right is not None]
    for points, mark, colour, name in (
        (calibrated, "o", _RIGHT, "quality, calibrated, with its 95 % interval"),
        (known, "x", _WRONG, "truly good"),
    ):
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, mark, color=colour, label=name)
    axes.set_yticks(list(places), [each.name for each in datasets])
    axes.set_xlim(-2, 102)
    axes.set_ylim(-0.6, len(datasets) - 0.4)
    axes.set_xlabel("% of samples")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    path = user_path(path, "plot")
    form = path.suffix.lower().removeprefix(".") or "png"
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise CurationError(f"`plot` is {path}; .{form} is not a supported format; {nearest_names(form, known)}.")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=120, format=form)
