"""Images and texts of samples that are included in a page, as many as fit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_mimic.report.facts import Shown
from lightning_mimic.report.samples import Render, views


@dataclass(frozen=True)
class Views:
    """Hold the images and texts of a page, by row.

    Attributes:
        images: Thumbnails as ``data:`` URLs.
        texts: Captions, texts or numbers.
        note: Note about samples without image and text; empty if there are none.
    """

    images: dict[int, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    note: str = ""


def held_views(
    dataset: Any,
    shown: Shown,
    most: int,
    budget: float,
    render: Render | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Views:
    """Read and render the samples that a user is most likely to look at, each once.

    Args:
        dataset: Map-style data set, or a data module, which is set up here.
        shown: Rows of the page.
        most: Maximum number of samples.
        budget: Maximum total size in bytes; samples that do not fit are left out.
        render: See :func:`~lightning_mimic.report.samples.views`.
        progress: Callback for progress, called with a description and the completed share.

    Raises:
        MimicError: See :func:`~lightning_mimic.report.samples.drawn`.
    """
    if hasattr(dataset, "prepare_data") and hasattr(dataset, "setup"):
        dataset.prepare_data()
        dataset.setup("fit")
    rows = {shown.ids[row]: row for row in first_rows(shown, most)}
    images, texts, found, left_out = dict[int, str](), dict[int, str](), 0, 0
    for key, view in views(dataset, list(rows), render):
        found += 1
        progress("reading samples", found / len(rows))
        size = len(view.image or "") + len(view.text.encode()) + 16
        if size > budget:
            left_out += 1
            continue
        budget -= size
        if view.image is not None:
            images[rows[key]] = view.image
        if view.text:
            texts[rows[key]] = view.text
    notes = []
    if len(rows) < len(shown):
        notes.append(f"Images or texts are included for the first {len(rows):,} samples across all tabs.")
    if missing := len(rows) - found:
        notes.append(f"{missing:,} of these samples are not in the given data set.")
    if left_out:
        notes.append(f"{left_out:,} images or texts are left out to limit the size of the page.")
    return Views(images, texts, " ".join(notes))


def first_rows(shown: Shown, most: int) -> list[int]:
    """Return the rows to show images of first: repeatedly two suspicious samples, one borderline, one of the best.

    Args:
        shown: Rows of the page.
        most: Maximum number of rows.

    Example:
        >>> first_rows(Shown([1, 2, 3, 4, 5, 6], [True] * 6, {}, borderline=[3, 2]), 5)
        [0, 1, 3, 5, 2]
    """
    suspicious, borderline = iter(range(len(shown))), iter(shown.borderline)
    best = iter(range(len(shown) - 1, -1, -1))
    chosen: dict[int, None] = {}
    while len(chosen) < min(most, len(shown)):
        for source in (suspicious, suspicious, borderline, best):
            row = next(source, None)
            if row is not None:
                chosen.setdefault(row)
    return list(chosen)[:most]
