"""Charts of the report, as inline SVG."""

import math
from collections.abc import Sequence
from typing import Any

from lightning_mimic.report.facts import Bin, Measure

_TITLES: dict[Measure, str] = {
    "score": "mean mimic score (below 0: away from the reference)",
    "posterior": "probability that the label is right",
}
#: Colours that are distinguishable with colour blindness; the style sheet of the page replaces them in dark mode.
KEPT, DROPPED = "#0072b2", "#d55e00"


def histogram(bins: Sequence[Bin], measure: Measure, cut: float | None, *, log: bool) -> str:
    """Draw a histogram of samples by decision.

    Args:
        bins: Bins from :meth:`~lightning_mimic.report.facts.ManifestFacts.histogram`; at least one.
        measure: Quantity on the horizontal axis.
        cut: Position of a vertical line, in units of the measure; ``None``: no line.
        log: Whether the axis for the numbers of samples is logarithmic.

    Returns:
        An ``<svg>`` element whose text and lines inherit the colour of the surrounding text.
    """
    import altair as alt
    import vl_convert

    rows = []
    for each in bins:
        for decision, count, start in (("dropped", each.dropped, 0), ("kept", each.kept, each.dropped)):
            if count:
                # Stacked bars are misleading on a logarithmic axis, so there the bars overlap.
                low, high = (0.5, count) if log else (start, start + count)
                rows.append({"low": each.low, "high": each.high, "from": low, "to": high, "decision": decision})
    data = alt.Data(values=rows)
    axis = alt.Axis(format=",d", tickCount=4, title="samples", grid=True)
    scale = alt.Scale(type="log", domainMin=0.5) if log else alt.Scale(type="linear")
    bars = (
        alt.Chart(data)
        .mark_rect(opacity=0.6 if log else 1)
        .encode(
            x=alt.X("low:Q", title=_TITLES[measure], axis=alt.Axis(grid=False), scale=alt.Scale(nice=False)),
            x2="high:Q",
            y=alt.Y("from:Q", axis=axis, scale=scale),
            y2="to:Q",
            color=alt.Color(
                "decision:N",
                scale=alt.Scale(domain=["kept", "dropped"], range=[KEPT, DROPPED]),
                legend=alt.Legend(title=None, orient="top"),
            ),
        )
    )
    layers: list[Any] = [bars]
    if cut is not None and math.isfinite(cut):
        at = alt.Data(values=[{"cut": cut, "label": f"cut at {cut:.3g}"}])
        layers.append(alt.Chart(at).mark_rule(strokeDash=[5, 4], color="currentColor").encode(x="cut:Q"))
        layers.append(
            alt.Chart(at)
            .mark_text(baseline="bottom", color="currentColor", fontSize=12)
            .encode(x="cut:Q", y=alt.value(-3), text="label:N")
        )
    text = {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12, "titleFontSize": 13}
    lines = {"domainColor": "currentColor", "tickColor": "currentColor", "gridColor": "currentColor"}
    chart = (
        alt.layer(*layers)
        .properties(width=620, height=220)
        .configure(background="transparent", font="system-ui, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(**text, **lines, gridOpacity=0.15, titleFontWeight="normal")
        .configure_legend(**text)
    )
    return str(vl_convert.vegalite_to_svg(chart.to_dict()))
