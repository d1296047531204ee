"""Facts about the reference in a ledger's description: the verdict on it, and the share of wrong labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mimic.errors import CurationError, nearest_names

#: Verdicts of a diagnosis, the best first.
VERDICTS = ("compatible", "doubtful", "unsure", "unrelated")
#: Verdicts that alignment resolves: the direction then points to the refitted layer, not the reference's own weights.
_ANSWERED_BY_ALIGNMENT = {"doubtful", "unrelated"}


@dataclass(frozen=True)
class ReferenceVerdict:
    """Hold the verdict on the reference with which a ledger's samples were scored.

    Attributes:
        verdict: Worst verdict of the attempts whose rows are used, one of :data:`VERDICTS`; ``None`` if the reference
            was not diagnosed.
        findings: Reasons for the verdict.
        aligned: Whether the reference was aligned because of the verdict.
        attempts: Number of attempts whose rows are used.
    """

    verdict: str | None
    findings: tuple[str, ...] = ()
    aligned: bool = False
    attempts: int = 1

    @property
    def stands(self) -> str | None:
        """The verdict that applies to the scores: ``"compatible"`` if the reference was aligned."""
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
        place: Path of the ledger, for messages.
        attempts: Descriptions of the attempts whose rows are used.

    Raises:
        CurationError: A verdict is unknown to this release, or the findings are not a list of text.

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
            f"{place}: the verdict on its reference is {verdict!r}, which is unknown to this release; "
            f"{nearest_names(str(verdict), VERDICTS)}."
        )
    if not isinstance(findings, list) or not all(isinstance(each, str) for each in findings):
        raise CurationError(f"{place}: the findings about its reference are {findings!r}; expected a list of text.")
    aligned = facts["config"].get("align_doubtful") is True and verdict in _ANSWERED_BY_ALIGNMENT
    return ReferenceVerdict(verdict, tuple(findings), aligned, attempts)


def check_verdict(place: str, verdict: ReferenceVerdict, *, accepted: bool, calibrated: bool = False) -> None:
    """Raise :class:`CurationError` if the verdict on the reference rules out decisions from the scores.

    Args:
        place: Path of the ledger, for the message.
        verdict: Verdict on the reference of the ledger.
        accepted: Whether the user accepts a ``doubtful`` or ``unsure`` reference.
        calibrated: Whether the decisions depend on calibrated posteriors only. The calibration itself shows whether the
            reference explains the labels, so that a ``doubtful`` or ``unsure`` one needs no acceptance.
    """
    if verdict.stands == "unrelated":
        raise CurationError(
            f"{place}: {_lower(verdict)}. Its scores may rank wrong samples above right ones, so that no decision is "
            "made from them. Score the samples with the reference given as lightning_mimic.Aligned(...), or with "
            "another reference."
        )
    if verdict.stands in ("doubtful", "unsure") and not accepted and not calibrated:
        raise CurationError(
            f"{place}: {_lower(verdict)}. Decisions from its scores may be wrong. Decide by its calibrated posteriors "
            "(Posterior(), filter=posterior), or score the samples with another reference (or with "
            "lightning_mimic.Aligned(...)). `accept_verdict=true` decides anyway."
        )


def _lower(verdict: ReferenceVerdict) -> str:
    text = str(verdict)
    return text[0].lower() + text[1:]


@dataclass(frozen=True)
class WrongShare:
    """Hold the estimated share of wrong labels, from the calibration of the reference on the given labels.

    Attributes:
        estimate: Share of samples whose label is wrong, 0 to 1.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        samples: Number of samples on which the reference was calibrated.
    """

    estimate: float
    low: float
    high: float
    samples: float

    def __str__(self) -> str:
        return f"{self.estimate:.1%} (95 % interval {self.low:.1%} to {self.high:.1%})"


def last_calibration(attempts: Sequence[Mapping[str, Any]]) -> Any:
    """Return the reference's calibration from the last attempt that recorded one; an empty dict if none did.

    Args:
        attempts: Descriptions of the attempts whose rows are used.

    Example:
        >>> last_calibration([{"calibration": {"wrong_share": 0.3}}, {}])
        {'wrong_share': 0.3}
    """
    return next((facts["calibration"] for facts in reversed(attempts) if facts.get("calibration") is not None), {})


def wrong_share(place: str, attempts: Sequence[Mapping[str, Any]]) -> WrongShare | None:
    """Return the share of wrong labels, estimated by the last calibration of the reference.

    Args:
        place: Path of the ledger, for messages.
        attempts: Descriptions of the attempts whose rows are used.

    Returns:
        The estimate; ``None`` without a calibration, or if the reference does not explain the labels.

    Raises:
        CurationError: The calibration lacks a figure, or has one that is invalid.

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
            f"{place}: the calibration of its reference has a share of wrong labels of {estimate}, an interval from "
            f"{low} to {high} and {samples} samples; expected shares from 0 to 1, in order, and a positive number of "
            "samples."
        )
    return WrongShare(float(estimate), float(low), float(high), float(samples))
