"""The diagnosis of a reference: its similarity to the model, its fit to the labels, the loss on the path to it."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_mimic.reference.margins import LEAST_RATIO

Verdict = Literal["compatible", "doubtful", "unsure", "unrelated"]

#: Cosine between weight matrices below which two networks are unrelated: trained apart, they lie within 0.05 of 0.
UNRELATED_COSINE = 0.2
#: Below this cosine the networks are related, but most of the direction is due to other differences.
RELATED_COSINE = 0.4
#: Standard errors by which a mean must exceed zero.
MIN_STANDARD_ERRORS = 3.0
#: Standard deviations of a sample by which exchanged labels must raise the reference's loss: chance makes it 0.1 for a
#: head that learnt other labels, and where six labels in ten are wrong a good reference still has 0.3.
MIN_EFFECT_SIZE = 0.2
#: Samples below which a mean is not tested.
MIN_SAMPLES = 100
#: From this cosine on, the layers below the target are regarded as shared with the reference.
SHARED_COSINE = 0.9


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
        """Whether there were enough samples to find it above zero, and it is not."""
        return self.count >= MIN_SAMPLES and self.mean <= MIN_STANDARD_ERRORS * self.error

    @property
    def small(self) -> bool:
        """Whether it is missing, or small relative to the standard deviation of the samples."""
        return self.missing or (
            self.count >= MIN_SAMPLES and self.mean <= MIN_EFFECT_SIZE * self.error * self.count**0.5
        )

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Diagnosis:
    """The figures of a diagnosis; ``None`` or empty where they could not be computed.

    The verdict on it: ``"unrelated"`` if it does not fit the model, shares nothing with it, or knows nothing of the
    data; ``"unsure"`` if it is so much less sure than the model that its scores are upside down, or knows less than the
    model; ``"doubtful"`` if it shares little, if moving towards it does not lower the loss, or if the target is late
    and what lies below it is not the reference's and still trains; otherwise ``"compatible"``. The thresholds were set
    on digits, see docs/evidence/diagnosis.md.

    Attributes:
        samples: How many were looked at.
        mismatch: Why its weights do not fit the model's.
        cosines: Cosine between θ and θ_ref, by target tensor.
        distances: ``‖θ_ref − θ‖ / ‖θ‖``, by target tensor.
        weight_cosine: Cosine over the weight matrices outside the target, or over the target's where there are no
            others: 1 for a shared backbone, near 0 for networks of different initialisation.
        rest_trains: Whether the target is a part of the model, and weights outside it train.
        score: Mean mimic score, loss per unit of weight distance; negative: moving to the reference raises the loss.
        label_gap: How much higher the reference's own loss is when samples are given each other's labels.
        loss: The model's mean loss.
        reference_loss: The reference's.
        path_losses: Mean loss at θ + t (θ_ref − θ), by t.
        margin_ratio: How far the reference's outputs for the class that the model predicts stand out from their mean,
            over how far the model's do, at the last layer.
        agreement: Share of given labels that the calibrated reference predicts.
        model_agreement: Share that the model predicted before it trained on the samples.
        knows_less: The reference predicts so many fewer than the model that it can judge none.
        objection: Why scores towards its alignment are doubtful.
    """

    samples: int = 0
    mismatch: str | None = None
    cosines: dict[str, float] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    weight_cosine: float | None = None
    rest_trains: bool = False
    score: Estimate | None = None
    label_gap: Estimate | None = None
    loss: float | None = None
    reference_loss: float | None = None
    path_losses: dict[float, float] = field(default_factory=dict)
    margin_ratio: float | None = None
    agreement: float | None = None
    model_agreement: float | None = None
    knows_less: bool = False
    objection: str | None = None

    @property
    def findings(self) -> list[tuple[Verdict, str]]:
        """The objections to the reference, the worst first."""
        found: list[tuple[Verdict, str]] = []
        cosine = None if self.weight_cosine is None else f"(cosine {self.weight_cosine:.2f})"
        if self.mismatch is not None:
            found.append(("unrelated", f"its weights do not fit the model's: {self.mismatch.rstrip('.')}"))
        if self.weight_cosine is not None and self.weight_cosine < UNRELATED_COSINE:
            reason = f"its weights have nothing in common with the model's {cosine}, as after another initialisation"
            found.append(("unrelated", reason))
        if self.label_gap is not None and self.label_gap.small:
            rise = f"exchanging them raises its loss by {self.label_gap}"
            found.append(("unrelated", f"it does not know the samples' labels from each other's ({rise})"))
        if self.margin_ratio is not None and self.margin_ratio < LEAST_RATIO:
            reason = (
                f"it is less sure of what the model predicts than the model ({self.margin_ratio:.2f} of its margin)"
            )
            found.append(("unsure", reason))
        if self.knows_less:
            shares = [f"{share:.0%}" for share in (self.agreement, self.model_agreement) if share is not None]
            reason = f"they predict {' and '.join(shares)} of the given labels"
            found.append(("unsure", f"it knows less than the model ({reason})"))
        if self.weight_cosine is not None and UNRELATED_COSINE <= self.weight_cosine < RELATED_COSINE:
            found.append(("doubtful", f"its weights have little in common with the model's {cosine}"))
        if self.score is not None and self.score.missing:
            found.append(("doubtful", f"moving towards it does not lower the loss (mean mimic score {self.score})"))
        if self.rest_trains and self.weight_cosine is not None and RELATED_COSINE <= self.weight_cosine < SHARED_COSINE:
            reason = f"what lies below the target is not the reference's {cosine} and trains; score 'all' parameters"
            found.append(("doubtful", reason))
        if self.objection is not None:
            found.append(("doubtful", self.objection))
        return found

    @property
    def unsure(self) -> bool:
        """Whether that is among the objections, so that weights of uncalibrated scores are uniform."""
        return any(verdict == "unsure" for verdict, _ in self.findings)

    @property
    def alignable(self) -> bool:
        """Whether aligning the reference can help, because it predicts the labels."""
        return self.label_gap is None or not self.label_gap.small

    @property
    def verdict(self) -> Verdict:
        """``"compatible"``, ``"doubtful"``, ``"unsure"`` or ``"unrelated"``."""
        return self.findings[0][0] if self.findings else "compatible"

    def __str__(self) -> str:
        reasons = "; ".join(reason for _, reason in self.findings)
        known = {
            "cosine to the model": None if self.weight_cosine is None else f"{self.weight_cosine:.2f}",
            "mean mimic score": self.score,
            "its loss": None if self.reference_loss is None else f"{self.reference_loss:.3g}",
            "the model's": None if self.loss is None else f"{self.loss:.3g}",
            "margin over the model's": None if self.margin_ratio is None else f"{self.margin_ratio:.2f}",
        }
        facts = [f"{self.samples} samples"] if self.samples else []
        facts += [f"{name} {value}" for name, value in known.items() if value is not None]
        shown = f" ({'; '.join(facts)})" if facts else ""
        return f"the reference is {self.verdict}{': ' * bool(reasons)}{reasons}{shown}"

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain numbers and strings, for a file."""
        losses = {str(t): loss for t, loss in self.path_losses.items()}
        verdict = {"verdict": self.verdict, "findings": [reason for _, reason in self.findings]}
        # A tensor that begins at zero is infinitely far, which no JSON can say.
        distances = {name: d if math.isfinite(d) else None for name, d in self.distances.items()}
        return verdict | asdict(self) | {"path_losses": losses, "distances": distances}
