"""The views of samples that a page holds, as many as fit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_mimic.report.facts import Shown
from lightning_mimic.report.samples import Render, views


@dataclass(frozen=True)
class Views:
    """The views that a page holds, by row.

    Attributes:
        images: ``data:`` addresses of thumbnails.
        texts: Captions, texts or numbers.
        note: A sentence about those that it lacks, or empty.
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
    """Read the samples that a person looks at first, each once.

    Args:
        dataset: A map-style data set, or a data module, which is set up.
        shown: The rows of the page.
        most: Number of samples.
        budget: Bytes that all of them may take; what does not fit is left out.
        render: See :func:`~lightning_mimic.report.samples.views`.
        progress: Told which share is read.

    Raises:
        MimicError: See there.
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
        notes.append(f"The first {len(rows):,} of all tabs have a picture or text.")
    if missing := len(rows) - found:
        notes.append(f"{missing:,} of them are not in the data set that was given.")
    if left_out:
        notes.append(f"{left_out:,} are left out, so that the page does not become too big.")
    return Views(images, texts, " ".join(notes))


def first_rows(shown: Shown, most: int) -> list[int]:
    """Return the rows whose pictures are wanted most: by turns two suspicious ones, a borderline one, one of the best.

    Args:
        shown: The rows of the page.
        most: Number of rows.

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
