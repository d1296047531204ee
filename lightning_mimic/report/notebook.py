"""Views for notebooks, as HTML with a plain-text fallback."""

from typing import Any

from lightning_mimic.database import Database
from lightning_mimic.manifest import Manifest
from lightning_mimic.report.facts import ManifestFacts, Shown, class_name
from lightning_mimic.report.held_views import Views, held_views
from lightning_mimic.report.page import figures, rendered
from lightning_mimic.report.samples import Render


class Inline:
    """Display HTML in a notebook, and plain text elsewhere.

    Args:
        html: HTML with all values escaped.
        text: Text that is printed if HTML cannot be displayed.

    Example:
        >>> Inline("<b>12</b>", "12")
        12
    """

    def __init__(self, html: str, text: str) -> None:
        self._html = html
        self._text = text

    def _repr_html_(self) -> str:
        return self._html

    def __repr__(self) -> str:
        return self._text


def manifest_view(manifest: Manifest, dataset: Any = None, most: int = 10, render: Render | None = None) -> Inline:
    """Return a notebook view of a manifest's figures and its most suspicious samples.

    Args:
        manifest: Manifest to show.
        dataset: Data set with the samples, as for :func:`~lightning_mimic.curation.report`; ``None``: show neither
            images nor texts.
        most: Maximum number of samples.
        render: Function from a sample to a PIL image, a text, or a pair of them.

    Raises:
        CurationError: The manifest is damaged.
        MimicError: The data set has none of the samples, or a sample cannot be shown.
    """
    with Database() as database:
        facts = ManifestFacts(manifest, database)
        shown = facts.suspicious(most)
        held = Views() if dataset is None else held_views(dataset, shown, most, float("inf"), render)
        samples = [_sample(facts, shown, held, row) for row in range(len(shown))]
        found = figures(facts)
    text = "\n".join(
        [f"{each['name']}: {each['value']} ({each['note']})" for each in found]
        + [", ".join(f"{name} {value}" for name, value in each["facts"]) for each in samples]
    )
    return Inline(rendered("notebook.html", figures=found, samples=samples), text)


def _sample(facts: ManifestFacts, shown: Shown, held: Views, row: int) -> dict[str, Any]:
    """Return the image, text and facts to show for a sample."""
    names = facts.manifest.class_names
    values = {name: column[row] for name, column in shown.columns.items()}
    found = [("id", str(shown.ids[row]))]
    found += [
        (title, class_name(names, values[name]))
        for name, title in (("label", "given"), ("predicted", "predicted"))
        if values.get(name) is not None
    ]
    found += [
        (title, f"{values[name]:.3g}")
        for name, title in (("posterior", "probability of being right"), ("score", "score"))
        if values.get(name) is not None
    ]
    found.append(("decision", "kept" if shown.keep[row] else "dropped"))
    return {"image": held.images.get(row), "text": held.texts.get(row, ""), "facts": found}
