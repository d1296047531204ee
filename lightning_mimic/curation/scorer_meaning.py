"""The meaning of a ledger's scores by their scorer: where 0, their order and their weights say something."""

from collections.abc import Mapping
from typing import Any, Literal

#: What a filter rests on: that 0 divides scores into good and bad, that higher ones are better, that they differ, and
#: that weights differ.
Basis = Literal["zero", "order", "difference", "weights"]

#: By scorer: its scores in words, and what cannot be decided by them. 0 divides the scores of all others.
_WITHOUT: dict[str, tuple[str, frozenset[Basis]]] = {
    "ReferenceLoss": ("minus a loss, never above 0", frozenset({"zero"})),
    "HeadReferenceLoss": ("minus a loss, never above 0", frozenset({"zero"})),
    "GradMatch": ("weights, never below 0", frozenset({"zero"})),
    "GradNorm": ("lengths of gradients, never below 0, high for wrong labels", frozenset({"zero", "order", "weights"})),
    "Uniform": ("0 for every sample", frozenset({"zero", "order", "difference", "weights"})),
}


def missing_basis(config: Mapping[str, Any], basis: Basis) -> str | None:
    """Return why a ledger's scores cannot be decided by, as a phrase; ``None`` if they can.

    Scorers of users' own have all that a filter may rest on, unless they have an attribute ``signed`` that is false,
    which the ledger records with their settings.

    Args:
        config: The settings of the attempt.
        basis: What a decision rests on.

    Example:
        >>> missing_basis({"scorer": "ReferenceLoss"}, "zero")
        'scores of ReferenceLoss (minus a loss, never above 0)'
        >>> missing_basis({"scorer": "MimicScore"}, "zero")
    """
    scorer = str(config.get("scorer"))
    if basis == "weights" and config.get("min_ess") == 1:
        return "weights with `min_ess=1`, which are 1/B for every sample"
    # A weighting of another kind makes weights of something else than the scores.
    if basis == "weights" and config.get("weighting", "SoftmaxWeighting") != "SoftmaxWeighting":
        return None
    words, without = _WITHOUT.get(scorer, ("", frozenset[Basis]()))
    if basis in without:
        return f"{'weights from ' if basis == 'weights' else ''}scores of {scorer} ({words})"
    settings = config.get("scorer_settings")
    if basis == "zero" and isinstance(settings, dict) and settings.get("signed") is False:
        return f"scores of {scorer}, which declares that they have no sign (`signed` is false)"
    return None
