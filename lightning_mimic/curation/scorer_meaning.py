"""Meaning of scores by scorer: whether their sign, order and weights can be used for decisions."""

from collections.abc import Mapping
from typing import Any, Literal

#: Property that a filter needs: 0 separates good from bad scores, higher scores are better, scores differ, or weights
#: depend on scores.
Basis = Literal["zero", "order", "difference", "weights"]

#: By scorer: a description of its scores, and the properties that they lack. Scores of all other scorers lack none.
_WITHOUT: dict[str, tuple[str, frozenset[Basis]]] = {
    "ReferenceLoss": ("minus a loss, never above 0", frozenset({"zero"})),
    "HeadReferenceLoss": ("minus a loss, never above 0", frozenset({"zero"})),
    "GradMatch": ("weights, never below 0", frozenset({"zero"})),
    "GradNorm": ("gradient norms, never below 0, high for wrong labels", frozenset({"zero", "order", "weights"})),
    "Uniform": ("0 for every sample", frozenset({"zero", "order", "difference", "weights"})),
}


def missing_basis(config: Mapping[str, Any], basis: Basis) -> str | None:
    """Return a description of the scores if they lack a property that a decision needs; otherwise ``None``.

    A scorer of your own has all properties, unless its attribute ``signed``, which the ledger records with its
    settings, is false; then 0 does not separate good from bad scores.

    Args:
        config: Settings of the attempt.
        basis: Property that the decision needs.

    Example:
        >>> missing_basis({"scorer": "ReferenceLoss"}, "zero")
        'scores of ReferenceLoss (minus a loss, never above 0)'
        >>> missing_basis({"scorer": "MimicScore"}, "zero")
    """
    scorer = str(config.get("scorer"))
    if basis == "weights" and config.get("min_ess") == 1:
        return "weights with `min_ess=1`, which are 1/B for every sample"
    # Other weightings may compute weights from something other than the scores.
    if basis == "weights" and config.get("weighting", "SoftmaxWeighting") != "SoftmaxWeighting":
        return None
    words, without = _WITHOUT.get(scorer, ("", frozenset[Basis]()))
    if basis in without:
        return f"{'weights from ' if basis == 'weights' else ''}scores of {scorer} ({words})"
    settings = config.get("scorer_settings")
    if basis == "zero" and isinstance(settings, dict) and settings.get("signed") is False:
        return f"scores of {scorer}, whose sign has no meaning (`signed` is false)"
    return None
