"""Views for notebooks: HTML where it is shown, text elsewhere."""

from typing import Any

from lightning_mimic.database import Database
from lightning_mimic.manifest import Manifest
from lightning_mimic.report.facts import ManifestFacts, Shown, class_name
from lightning_mimic.report.held_views import Views, held_views
from lightning_mimic.report.page import figures, rendered
from lightning_mimic.report.samples import Render


class Inline:
    """A piece of HTML that a notebook shows, with a text for everything else.

    Args:
        html: The HTML, escaped.
        text: What is printed where there is no HTML.

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
    """Return the figures of a manifest and its most suspicious samples.

    Args:
        manifest: The manifest.
        dataset: The samples, as for :func:`~lightning_mimic.curation.report`; ``None``: without images and texts.
        most: Number of samples.
        render: From a sample to a PIL image, a text, or a pair of them.

    Raises:
        CurationError: The manifest is damaged.
        MimicError: The data set has none of the samples, or one that cannot be shown.
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
    """What is shown of a sample."""
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
