"""Can this reference be trusted: is it kin to the model, does it know the data, does the way to it lead downhill?"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["compatible", "doubtful", "unrelated"]

#: Cosine between weight matrices below which two networks have nothing in common; apart, they lie within 0.05 of 0.
STRANGERS = 0.2
#: Below this they have something in common, and a good part of the direction is something else.
KIN = 0.4
#: Standard errors by which a mean must lie above zero.
SURE = 3.0
#: Standard deviations of a sample by which exchanged labels must raise the reference's loss: chance makes it 0.1 for a
#: head that learnt other labels, and where six labels in ten are wrong a good reference still has 0.3.
KNOWS = 0.2
#: Samples below which a mean says nothing.
FEW = 100
#: From this cosine on, the layers below a late target count as the reference's own.
SAME = 0.9


@dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Attributes:
        mean: In the samples' unit.
        error: Its standard error.
        count: Samples.
    """

    mean: float
    error: float
    count: int

    @property
    def missing(self) -> bool:
        """There were enough samples to see it above zero, and it is not."""
        return self.count >= FEW and self.mean <= SURE * self.error

    @property
    def small(self) -> bool:
        """It is missing, or little beside how samples differ."""
        return self.missing or (self.count >= FEW and self.mean <= KNOWS * self.error * self.count**0.5)

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a reference; ``None`` or empty for what could not be looked at.

    The verdict on it: ``"unrelated"`` if it does not fit the model, shares nothing with it, or knows nothing of the
    data; ``"doubtful"`` if it shares little, if moving towards it does not lower the loss, or if the target is late and
    what lies below it is not the reference's and still trains; otherwise ``"compatible"``. The thresholds were set on
    digits, see docs/results.md.

    Attributes:
        samples: How many were looked at.
        misfit: Why its weights do not fit the model's.
        cosines: Cosine between θ and θ_ref, by target tensor.
        distances: ``‖θ_ref − θ‖ / ‖θ‖``, by target tensor.
        kinship: Cosine over the weight matrices outside the target, or over the target's where there are no others:
            1 for a shared backbone, near 0 for networks of different initialisation.
        below_moves: The target is a part of the model, and weights outside it train.
        score: Mean mimic score, loss per unit of weight distance; negative: moving to the reference raises the loss.
        knowledge: How much higher the reference's own loss is when samples are given each other's labels.
        loss: The model's mean loss.
        reference_loss: The reference's.
        line: Mean loss at θ + t (θ_ref − θ), by t.
    """

    samples: int = 0
    misfit: str | None = None
    cosines: dict[str, float] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    kinship: float | None = None
    below_moves: bool = False
    score: Estimate | None = None
    knowledge: Estimate | None = None
    loss: float | None = None
    reference_loss: float | None = None
    line: dict[float, float] = field(default_factory=dict)

    @property
    def findings(self) -> list[tuple[Verdict, str]]:
        """What speaks against the reference, the worst first."""
        found: list[tuple[Verdict, str]] = []
        kin = None if self.kinship is None else f"(cosine {self.kinship:.2f})"
        if self.misfit is not None:
            found.append(("unrelated", f"its weights do not fit the model's: {self.misfit.rstrip('.')}"))
        if self.kinship is not None and self.kinship < STRANGERS:
            reason = f"its weights have nothing in common with the model's {kin}, as after another initialisation"
            found.append(("unrelated", reason))
        if self.knowledge is not None and self.knowledge.small:
            rise = f"exchanging them raises its loss by {self.knowledge}"
            found.append(("unrelated", f"it does not know the samples' labels from each other's ({rise})"))
        if self.kinship is not None and STRANGERS <= self.kinship < KIN:
            found.append(("doubtful", f"its weights have little in common with the model's {kin}"))
        if self.score is not None and self.score.missing:
            found.append(("doubtful", f"moving towards it does not lower the loss (mean mimic score {self.score})"))
        if self.below_moves and self.kinship is not None and KIN <= self.kinship < SAME:
            reason = f"what lies below the target is not the reference's {kin} and trains; score 'all' parameters"
            found.append(("doubtful", reason))
        return found

    @property
    def mendable(self) -> bool:
        """The reference knows the data, so that aligning it can help."""
        return self.knowledge is None or not self.knowledge.small

    @property
    def verdict(self) -> Verdict:
        """``"compatible"``, ``"doubtful"`` or ``"unrelated"``."""
        return self.findings[0][0] if self.findings else "compatible"

    def __str__(self) -> str:
        reasons = "; ".join(reason for _, reason in self.findings)
        known = {
            "cosine to the model": None if self.kinship is None else f"{self.kinship:.2f}",
            "mean mimic score": self.score,
            "its loss": None if self.reference_loss is None else f"{self.reference_loss:.3g}",
            "the model's": None if self.loss is None else f"{self.loss:.3g}",
        }
        facts = "".join(f"; {name} {value}" for name, value in known.items() if value is not None)
        return f"the reference is {self.verdict}{': ' * bool(reasons)}{reasons} ({self.samples} samples{facts})"

    def facts(self) -> dict[str, Any]:
        """All of it as plain numbers and strings, for a file."""
        line = {str(t): loss for t, loss in self.line.items()}
        verdict = {"verdict": self.verdict, "findings": [reason for _, reason in self.findings]}
        # A tensor that begins at zero is infinitely far, which no JSON can say.
        distances = {name: d if math.isfinite(d) else None for name, d in self.distances.items()}
        return verdict | asdict(self) | {"line": line, "distances": distances}
