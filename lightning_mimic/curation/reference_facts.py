"""The facts that a ledger's description holds about its reference: the verdict on it, and the share of wrong labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mimic.errors import CurationError, nearest_names

#: The verdicts of a diagnosis, the best first.
VERDICTS = ("compatible", "doubtful", "unsure", "unrelated")
#: Those that alignment answers: the direction leads to the refitted layer, not to the reference's own weights.
_ANSWERED_BY_ALIGNMENT = {"doubtful", "unrelated"}


@dataclass(frozen=True)
class ReferenceVerdict:
    """The verdict on the reference that a ledger's scores were taken with.

    Attributes:
        verdict: The worst one of the attempts whose rows count, one of :data:`VERDICTS`; ``None``: not diagnosed.
        findings: The objections behind it.
        aligned: The reference was aligned because of them.
        attempts: How many attempts have rows that count.
    """

    verdict: str | None
    findings: tuple[str, ...] = ()
    aligned: bool = False
    attempts: int = 1

    @property
    def stands(self) -> str | None:
        """The verdict on what the scores were in fact taken with."""
        return "compatible" if self.aligned else self.verdict

    def __str__(self) -> str:
        if self.verdict is None:
            return "The reference was not diagnosed"
        worst = f" (the worst verdict of {self.attempts} attempts)" if self.attempts > 1 else ""
        reasons = f": {'; '.join(self.findings)}" if self.findings else ""
        aligned = "; it was aligned from then on" if self.aligned else ""
        return f"The reference is {self.verdict}{worst}{reasons}{aligned}"


def reference_verdict(place: str, attempts: Sequence[Mapping[str, Any]]) -> ReferenceVerdict:
    """Return the worst verdict of attempts.

    Args:
        place: The ledger, for messages.
        attempts: The descriptions of those whose rows count.

    Raises:
        CurationError: A verdict that this release does not know.

    Example:
        >>> found = {"diagnosis": {"verdict": "doubtful", "findings": ["its weights have little in common"]}}
        >>> print(reference_verdict("scores", [{"config": {}, **found}]))
        The reference is doubtful: its weights have little in common
    """
    found = [_verdict(place, facts, len(attempts)) for facts in attempts]
    diagnosed = [each for each in found if each.verdict is not None]
    worst = max(diagnosed, key=lambda each: VERDICTS.index(str(each.stands)), default=None)
    return ReferenceVerdict(None, attempts=len(attempts)) if worst is None else worst


def _verdict(place: str, facts: Mapping[str, Any], attempts: int) -> ReferenceVerdict:
    diagnosis = facts.get("diagnosis") or {}
    verdict, findings = diagnosis.get("verdict"), diagnosis.get("findings", [])
    if verdict is None:
        return ReferenceVerdict(None, attempts=attempts)
    if verdict not in VERDICTS:
        raise CurationError(
            f"{place}: the verdict on its reference is {verdict!r}, which this release does not know; "
            f"{nearest_names(str(verdict), VERDICTS)}."
        )
    if not isinstance(findings, list) or not all(isinstance(each, str) for each in findings):
        raise CurationError(f"{place}: the findings about its reference are {findings!r}; expected a list of text.")
    aligned = facts["config"].get("align_doubtful") is True and verdict in _ANSWERED_BY_ALIGNMENT
    return ReferenceVerdict(verdict, tuple(findings), aligned, attempts)


def check_verdict(place: str, verdict: ReferenceVerdict, *, accepted: bool, calibrated: bool = False) -> None:
    """Raise :class:`CurationError` if a verdict does not allow to curate.

    Args:
        place: The ledger, for the message.
        verdict: On its reference.
        accepted: Whether the user accepts one that is ``doubtful`` or ``unsure``.
        calibrated: Whether decisions rest on calibrated posteriors, for which an ``unsure`` one is good enough.
    """
    if verdict.stands == "unrelated":
        raise CurationError(
            f"{place}: {_lower(verdict)}. Its scores may say the opposite of what is true, so that no decision is made "
            "from them. Score the samples with the reference given as lightning_mimic.Aligned(...), or with another "
            "reference."
        )
    if verdict.stands == "unsure" and not accepted and not calibrated:
        raise CurationError(
            f"{place}: {_lower(verdict)}. Decisions from its scores may be wrong. Decide by its calibrated posteriors "
            "(Posterior(), filter=posterior), or score the samples with another reference; `accept_verdict=true` "
            "decides all the same."
        )
    if verdict.stands == "doubtful" and not accepted:
        raise CurationError(
            f"{place}: {_lower(verdict)}. Decisions from its scores may be wrong. Look at some of the lowest and the "
            "highest scores, or score the samples with another reference (or with lightning_mimic.Aligned(...)); "
            "`accept_verdict=true` decides all the same."
        )


def _lower(verdict: ReferenceVerdict) -> str:
    text = str(verdict)
    return text[0].lower() + text[1:]


@dataclass(frozen=True)
class WrongShare:
    """The estimated share of wrong labels, from the calibration of the reference on the given labels.

    Attributes:
        estimate: Share of samples whose label is wrong, 0 to 1.
        low: Lower end of its 95 % interval.
        high: Upper end.
        samples: On which the reference was calibrated.
    """

    estimate: float
    low: float
    high: float
    samples: float

    def __str__(self) -> str:
        return f"{self.estimate:.1%} (95 % interval {self.low:.1%} to {self.high:.1%})"


def last_calibration(attempts: Sequence[Mapping[str, Any]]) -> Any:
    """Return the calibration of the reference that the last attempt noted which has one; empty if none has.

    Args:
        attempts: The descriptions of those whose rows count.

    Example:
        >>> last_calibration([{"calibration": {"wrong_share": 0.3}}, {}])
        {'wrong_share': 0.3}
    """
    return next((facts["calibration"] for facts in reversed(attempts) if facts.get("calibration") is not None), {})


def wrong_share(place: str, attempts: Sequence[Mapping[str, Any]]) -> WrongShare | None:
    """Return the estimate of the last attempt that has one.

    Args:
        place: The ledger, for messages.
        attempts: The descriptions of those whose rows count.

    Returns:
        ``None`` if none has, or if the reference does not explain the labels.

    Raises:
        CurationError: A calibration that holds something else.

    Example:
        >>> facts = {"wrong_share": 0.36, "low": 0.31, "high": 0.4, "samples": 900, "classes": 10}
        >>> print(wrong_share("scores", [{"calibration": facts}]))
        36.0% (95 % interval 31.0% to 40.0%)
    """
    facts = last_calibration(attempts)
    informative = facts.get("informative", True) if isinstance(facts, dict) else True
    if not isinstance(informative, bool):
        raise CurationError(f"{place}: `informative` of the calibration is {informative!r}; expected true or false.")
    if facts == {} or not informative:
        return None
    names = ("wrong_share", "low", "high", "samples")
    values = [facts.get(name) for name in names] if isinstance(facts, dict) else []
    numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) < len(names):
        raise CurationError(f"{place}: the calibration of its reference is {facts!r}; expected {', '.join(names)}.")
    estimate, low, high, samples = numbers
    if not (0 <= low <= high <= 1 and 0 <= estimate <= 1 and 0 < samples < 2**63):
        raise CurationError(
            f"{place}: the calibration of its reference estimates a share of wrong labels of {estimate}, between {low} "
            f"and {high}, from {samples} samples; expected shares from 0 to 1, and samples."
        )
    return WrongShare(float(estimate), float(low), float(high), float(samples))
