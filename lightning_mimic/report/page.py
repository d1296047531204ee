"""HTML page of the report, which opens from disk without a network."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from lightning_mimic.errors import CurationError, join_names
from lightning_mimic.report.facts import Agreement, ManifestFacts, Shown, class_name
from lightning_mimic.report.held_views import Views

#: Epoch and score of each scoring of a sample, by row.
Courses = Mapping[int, Sequence[tuple[int, float]]]

#: Default names of a manifest and of the one that it is compared with.
NAMES = ("this", "the other")
#: Maximum number of classes in the matrix, to keep its cells legible; the classes with the most differing predictions.
MOST_CLASSES = 25
#: Maximum number of rows in the table of classes.
_MOST_LISTED = 200


def render_page(
    facts: ManifestFacts, shown: Shown, held: Views, courses: Courses, title: str, names: tuple[str, str] = NAMES
) -> str:
    """Return the page as self-contained HTML.

    Args:
        facts: Aggregates of the manifest.
        shown: Rows listed on the page.
        held: Images and texts of some of these rows.
        courses: Epoch and score of each scoring, by row.
        title: Headline of the page.
        names: Names of the manifest and of the one that it is compared with.

    Raises:
        CurationError: jinja2, altair or vl-convert are not installed.
    """
    context = _context(facts, title, names)
    context["samples_note"] = f"{_samples_note(facts, shown)} {held.note}".strip()
    data = _data(facts, shown, courses)
    data["compared"] = list(names) if facts.other is not None else None
    data |= {"images": held.images, "texts": held.texts, "has_images": bool(held.images)}
    style, script = (_Trusted(_own_file(name)) for name in ("page.css", "page.js"))
    return rendered("page.html", data=_Trusted(_json(data)), style=style, script=script, **context)


def rendered(name: str, **context: Any) -> str:
    """Render a template of this package, escaping all values.

    Args:
        name: File name of the template.
        context: Values for the template, by name.

    Raises:
        CurationError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise CurationError("the report needs jinja2: pip install 'lightning-mimic[report]'.") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_own_file(name)).render(context)


def _own_file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


class _Trusted:
    """HTML made by this package, which is not escaped."""

    def __init__(self, html: str) -> None:
        self._html = html

    def __html__(self) -> str:
        return self._html


def _json(data: Any) -> str:
    """Return JSON that cannot close the HTML element around it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode()


def _data(facts: ManifestFacts, shown: Shown, courses: Courses) -> dict[str, Any]:
    """Return the data for the script of the page."""
    manifest = facts.manifest
    names = manifest.class_names
    key = hashlib.sha256(json.dumps([manifest.provenance, facts.samples, facts.kept]).encode()).hexdigest()[:16]
    return {
        "key": key,
        # As text, because numbers in JavaScript cannot hold 64-bit integers.
        "ids": [str(each) for each in shown.ids],
        "keep": shown.keep,
        "columns": {name: [_plain(each) for each in column] for name, column in shown.columns.items()},
        "borderline": shown.borderline,
        "class_names": None if names is None else list(names),
        "courses": {row: [[epoch, _plain(score)] for epoch, score in course] for row, course in courses.items()},
    }


def _plain(value: Any) -> Any:
    """Return a value for JSON: floats with six digits, and ``None`` for NaN and infinity."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None


#: Explanation of each verdict on the reference for readers outside the field.
_VERDICTS = {
    "compatible": "The reference model fits the trained model and knows the data, so that scores can be trusted",
    "doubtful": "The reference model may not fit the trained model, so that decisions may be wrong",
    "unsure": "The reference model is less confident than the trained model, so that scores may have the wrong sign",
    "unrelated": "The reference model does not fit the trained model, so that scores are meaningless",
    None: "It is not known whether the reference model fits the trained model",
}


def _context(facts: ManifestFacts, title: str, of: tuple[str, str]) -> dict[str, Any]:
    """Return the values for the template."""
    from lightning_mimic.report.charts import histogram

    provenance, names = facts.manifest.provenance, facts.manifest.class_names
    charts = []
    for measure in ("posterior", "score"):
        if measure == "posterior" and facts.measure != "posterior":
            continue
        bins = facts.histogram(measure) if facts.measure is not None else []
        if bins:
            cut = facts.cut if measure == facts.measure else None
            charts.append(
                {
                    "linear": _Trusted(histogram(bins, measure, cut, log=False)),
                    "log": _Trusted(histogram(bins, measure, cut, log=True)),
                }
            )
    classes = facts.classes()
    listed = [
        {
            "label": each.label,
            "name": class_name(names, each.label),
            "samples": f"{each.samples:,}",
            "dropped": f"{each.dropped:,} ({each.dropped / each.samples:.1%})",
            "share": f"{each.dropped / each.samples:.3f}",
            "mean": "none" if each.mean is None else f"{each.mean:.3g}",
            "other": "" if each.other is None else f"{class_name(names, each.other)} ({each.others:,})",
        }
        for each in classes[:_MOST_LISTED]
    ]
    left = len(classes) - len(listed)
    return {
        "title": title,
        "lead": _lead(facts),
        "figures": figures(facts, of),
        "compared": of if facts.other is not None else None,
        "warnings": _warnings(facts),
        "charts": charts,
        "distribution": _distribution(facts),
        "classes": listed,
        "classes_left": f"{left:,} more labels with smaller shares of dropped samples are not listed." if left else "",
        "mean_head": "mean probability of being right" if facts.measure == "posterior" else "mean score",
        "matrix": _matrix(facts, names),
        "settings": _settings(provenance),
    }


def _lead(facts: ManifestFacts) -> str:
    dropped = facts.samples - facts.kept
    share = dropped / facts.samples if facts.samples else 0.0
    return f"Of {facts.samples:,} samples, {facts.kept:,} are kept and {dropped:,} ({share:.1%}) are dropped."


def _agreement(counts: Agreement, names: tuple[str, str]) -> list[tuple[str, str, str]]:
    """Return name, value and note of the figures that compare the decisions of two manifests."""
    one, other = names
    found = [
        ("Kept by both", f"{counts.both:,}", f"{counts.neither:,} are dropped by both"),
        (f"Kept only by {one}", f"{counts.here:,}", f"dropped by {other}"),
        (f"Kept only by {other}", f"{counts.there:,}", f"dropped by {one}"),
    ]
    if counts.unknown or counts.missing:
        note = f"{counts.unknown:,} only in {one}, {counts.missing:,} only in {other}"
        found.append(("Samples in one manifest only", f"{counts.unknown + counts.missing:,}", note))
    return found


def figures(facts: ManifestFacts, names: tuple[str, str] = NAMES) -> list[dict[str, str]]:
    """Return the figures at the top of the page, in plain words with the technical term in brackets."""
    provenance, whole = facts.manifest.provenance, max(facts.samples, 1)
    found: list[tuple[str, str, str]] = [
        ("Kept", f"{facts.kept:,}", f"{facts.kept / whole:.1%} of {facts.samples:,}"),
        ("Dropped", f"{facts.samples - facts.kept:,}", f"{1 - facts.kept / whole:.1%} of {facts.samples:,}"),
    ]
    if (wrong := provenance.get("wrong_share")) is not None:
        note = f"{_interval(wrong)}, estimated by the calibrated reference (share of wrong labels)"
        found.append(("Labels that are probably wrong", f"{wrong['estimate']:.1%}", note))
    if (quality := provenance.get("quality")) is not None:
        note = f"{_interval(quality)}, by {quality['trusted']:,} trusted samples (quality)"
        found.append(("Good samples", f"{quality['estimate']:.1%}", note))
    if facts.unscored is not None:
        without = f"{facts.unscored:,} have none" if facts.unscored else "all of them"
        share = f"{1 - facts.unscored / whole:.1%}"
        found.append(("Samples with a score", share, f"{without} (coverage)"))
    if facts.other is not None:
        found += _agreement(facts.agreement(), names)
    if "verdict" in provenance:
        verdict = provenance["verdict"]
        note = f"{_VERDICTS.get(verdict, _VERDICTS[None])} (verdict)"
        found.append(("Reference", verdict or "not diagnosed", note))
    return [{"name": name, "value": value, "note": note} for name, value, note in found]


def _interval(estimate: Mapping[str, float]) -> str:
    return f"between {estimate['low']:.1%} and {estimate['high']:.1%} (95 % interval)"


def _warnings(facts: ManifestFacts) -> list[str]:
    provenance = facts.manifest.provenance
    found = []
    if provenance.get("verdict") not in (None, "compatible"):
        found.append(f"{provenance.get('diagnosis', '')}.")
    lost = provenance.get("lost") or []
    if lost:
        found.append(f"Scores are missing: {'; '.join(map(str, lost[:3]))}{' and more' if len(lost) > 3 else ''}.")
    without = provenance.get("unscored") or {}
    if without.get("samples"):
        done = {"keep": "kept", "drop": "dropped"}.get(str(without.get("are")), "left")
        found.append(f"{without['samples']:,} samples have no score and are {done} without a decision by the filter.")
    return found


def _distribution(facts: ManifestFacts) -> str:
    if facts.measure == "posterior":
        how = "Probability that each label is right, according to the calibrated reference (posterior)."
    else:
        how = "How far a training step on a sample moves the model towards the reference (mean mimic score)."
    if facts.cut is None:
        return f"{how} No single cut separates kept from dropped samples."
    return f"{how} The cut separates kept from dropped samples."


def _matrix(facts: ManifestFacts, names: Sequence[str] | None) -> dict[str, Any] | None:
    counts = facts.matrix()
    labels = sorted({label for pair in counts for label in pair})
    if len(labels) < 2:
        return None
    differing = dict.fromkeys(labels, 0)
    for (given, predicted), count in counts.items():
        if given != predicted:
            differing[given] += count
            differing[predicted] += count
    chosen = labels
    if len(labels) > MOST_CLASSES:
        chosen = sorted(sorted(labels, key=lambda each: -differing[each])[:MOST_CLASSES])
    most = max((counts.get((g, p), 0) for g in chosen for p in chosen if g != p), default=0)
    rows = [
        {
            "label": given,
            "name": class_name(names, given),
            "cells": [
                {
                    "label": predicted,
                    "name": class_name(names, predicted),
                    "count": counts.get((given, predicted), 0),
                    "same": given == predicted,
                    "share": f"{counts.get((given, predicted), 0) / most if most else 0:.3f}",
                }
                for predicted in chosen
            ],
        }
        for given in chosen
    ]
    by = "the reference" if facts.predicted == "reference_predicted" else "the trained model"
    explanation = f"Numbers of samples by given label (rows) and label predicted by {by} (columns)."
    if len(chosen) < len(labels):
        explanation += f" The {len(chosen)} of {len(labels)} labels with the most differing predictions are shown."
    return {"columns": [class_name(names, each) for each in chosen], "rows": rows, "explanation": explanation}


def _settings(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings of the run and of the decision, without file paths."""
    ledger = provenance.get("ledger") or {}
    config = (ledger.get("config") or {}) if isinstance(ledger, dict) else {}
    rows: Iterable[tuple[str, Any]] = (
        ("filter", provenance.get("filter")),
        ("samples without a score", (provenance.get("unscored") or {}).get("are")),
        ("scorer", config.get("scorer")),
        ("weighting", config.get("weighting")),
        ("parameters", _joined(config.get("parameters"))),
        ("temperature", config.get("temperature")),
        ("reference", config.get("reference")),
        ("score kind", ledger.get("score_kind") if isinstance(ledger, dict) else None),
        ("run", ledger.get("run") if isinstance(ledger, dict) else None),
        ("created", provenance.get("created")),
        ("package", provenance.get("package_version")),
    )
    return [(name, str(value)) for name, value in rows if value is not None]


def _joined(names: Any) -> str | None:
    return join_names(names, most=4) if isinstance(names, list) else names


def _samples_note(facts: ManifestFacts, shown: Shown) -> str:
    if len(shown) == facts.samples:
        return f"All {facts.samples:,} samples, the most suspicious first."
    return (
        f"{len(shown):,} of {facts.samples:,} samples: the most suspicious, those nearest to the cut, and the best. "
        "Counts in tables and charts cover all samples."
    )
