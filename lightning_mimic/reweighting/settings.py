"""The settings of a run, checked before there is a model."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.reference import Aligned, ReferenceSource
from lightning_mimic.reference.diagnose import SAMPLES
from lightning_mimic.reweighting.batch import Ids
from lightning_mimic.reweighting.checks import check_scorer, check_start_direction
from lightning_mimic.reweighting.gate import Reweight
from lightning_mimic.reweighting.loss_check import AssertedLoss
from lightning_mimic.reweighting.reference_monitor import OnDoubtful
from lightning_mimic.scorers import (
    MimicScore,
    Need,
    Scorer,
    Temperature,
    Weighting,
    choose_weighting,
    validate_needs,
)
from lightning_mimic.stores import path_of

#: What to do about trainable parameters that the weights do not reach.
Uncovered = Literal["error", "mean"]

#: What to do about samples whose loss is not finite.
OnNonfinite = Literal["mask", "mask_loss", "raise"]

#: The weights from which the direction to the reference is taken.
Origin = Literal["current", "start"]

_CHOICES = {"reweight": Reweight, "uncovered": Uncovered, "on_doubtful": OnDoubtful, "direction": Origin}


@dataclass(frozen=True)
class Settings:
    """What :class:`~lightning_mimic.GradMimic` and :class:`~lightning_mimic.Reweighter` are given, see there.

    Attributes:
        diagnosis_samples: Samples of all ranks on which the reference is diagnosed.

    Raises:
        MimicError: A value that cannot be used, or two that contradict each other.
    """

    reference: ReferenceSource | Aligned | None
    parameters: str | Sequence[str] | None
    scorer: Scorer | None
    weighting: Weighting | None
    temperature: Temperature | None
    min_ess: float | None
    reweight: Reweight
    uncovered: Uncovered
    ledger: str | Path | None
    id_from: Callable[[Any], Ids] | None
    on_nonfinite: OnNonfinite | None
    math_attention: bool
    loss: AssertedLoss | None
    on_doubtful: OnDoubtful
    diagnose_reference: bool
    direction: Origin = "current"
    diagnosis_samples: int = SAMPLES

    def __post_init__(self) -> None:
        choices = _CHOICES if self.on_nonfinite is None else _CHOICES | {"on_nonfinite": OnNonfinite}
        for name, kind in choices.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                raise MimicError(f"`{name}` is {value!r}; {nearest_names(str(value), get_args(kind))}.")
        if self.loss not in (None, *get_args(AssertedLoss)):
            raise MimicError(f"`loss` is {self.loss!r}; expected 'mean', or nothing.")
        if self.ledger is not None and (not isinstance(self.ledger, str | os.PathLike) or self.ledger == ""):
            raise MimicError(f"`ledger` is {self.ledger!r}; expected the path of a directory, or None for no ledger.")
        if self.ledger is not None:
            path_of(self.ledger, "ledger")
        names = [self.parameters] if isinstance(self.parameters, str | None) else self.parameters
        if not isinstance(names, Iterable) or not all(isinstance(name, str | None) for name in names):
            raise MimicError(
                f"`parameters` is {self.parameters!r}; expected a module ('head'), a parameter ('head.weight'), 'all', "
                "or a list of these."
            )
        check_scorer(
            self.make_scores,
            self.needs,
            reference=self.reference is not None,
            parameters=self.parameters is not None,
        )
        if self.reweight == "target" and self.parameters is None:
            raise MimicError("`reweight='target'` weights the target parameters, and this scorer has none.")
        if self.direction == "start":
            check_start_direction(self.make_scores, self.needs, self.reference, self.on_doubtful)
        if self.on_doubtful == "align" and not self.diagnose_reference:
            raise MimicError("`on_doubtful='align'` needs the diagnosis that `diagnose_reference=False` leaves out.")

    @property
    def masks(self) -> bool:
        """Samples that hold NaN are taken out of the batch."""
        return self.reweight != "none" and self.on_nonfinite in (None, "mask")

    @cached_property
    def make_scores(self) -> Scorer:
        """The scorer; the mimic score, if none is given."""
        return MimicScore() if self.scorer is None else self.scorer

    @cached_property
    def make_weights(self) -> Weighting:
        """The weighting; if none is given, the scorer's own or a softmax."""
        return choose_weighting(self.make_scores, self.weighting, self.temperature, self.min_ess)

    @cached_property
    def needs(self) -> frozenset[Need]:
        """The products that scorer and weighting need."""
        return validate_needs(self.make_scores) | validate_needs(self.make_weights, "weighting")

    @property
    def rests_on_margins(self) -> bool:
        """The weights rest on a score that holds the model's outputs beside the reference's uncalibrated ones."""
        of_scorer = self.make_scores.needs
        holds_both = "dot" in of_scorer or {"outputs", "reference_outputs"} <= of_scorer
        return holds_both and "posteriors" not in self.make_weights.needs

    @property
    def uses_ids(self) -> bool:
        """Samples are told apart by their ids: in the ledger, or in a cache of the reference's outputs."""
        return self.ledger is not None or (isinstance(self.reference, Aligned) and self.reference.cache)

    @property
    def config(self) -> dict[str, Any]:
        """What decides the meaning of scores and weights, for the ledger."""
        scorer, weighting = self.make_scores, self.make_weights
        settings = plain_settings(weighting)
        # The softmax's own settings keep their place, whatever the weighting.
        softmax = {name: settings.pop(name, None) for name in ("temperature", "min_ess")}
        return {
            "scorer": type(scorer).__name__,
            **_if_any("scorer_settings", scorer_settings(scorer)),
            "weighting": type(weighting).__name__,
            **_if_any("weighting_settings", settings),
            **softmax,
            "reweight": self.reweight,
            "align_doubtful": self.on_doubtful == "align",
            # Left out by default, so that older ledgers go on.
            **({} if self.direction == "current" else {"direction": self.direction}),
        }


def scorer_settings(scorer: object) -> dict[str, Any]:
    """Return the settings of a scorer, of which ``signed`` may stand in its class."""
    settings: dict[str, Any] = plain_settings(scorer)
    # The package's own scorers are known by name; left out of theirs, so that older ledgers go on.
    own = type(scorer).__module__.startswith("lightning_mimic.")
    return settings if own or getattr(scorer, "signed", True) else settings | {"signed": False}


def plain_settings(of: object) -> dict[str, str | int | float]:
    """Return the public attributes of a scorer or weighting that are plain values, as a file can hold them."""
    return {n: v for n, v in vars(of).items() if isinstance(v, str | int | float) and not n.startswith("_")}


def _if_any(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings} if settings else {}
