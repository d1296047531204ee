"""What the scores of a fit are taken against: the target parameters, and the way to the reference."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_mimic.callbacks.batch import Ids, describe
from lightning_mimic.callbacks.checkup import Checkup
from lightning_mimic.callbacks.hooks import LossTap
from lightning_mimic.callbacks.second_batch import SecondBatches
from lightning_mimic.callbacks.step import same_samples
from lightning_mimic.callbacks.support import check_needs
from lightning_mimic.gradients import Descent, Direction, select_parameters
from lightning_mimic.ledger import Flag
from lightning_mimic.reference import (
    Aligned,
    AlignedDirection,
    Diagnosis,
    ReferenceLoadError,
    ReferenceSource,
    aliases_of,
    aligned_direction,
    below_moves,
    fingerprint,
    match_reference,
    read_reference,
    reference_model,
    resemblance,
)
from lightning_mimic.reference.diagnose import SAMPLES, whole_reference
from lightning_mimic.scorers import Compares, Scorer

OnDoubtful = Literal["warn", "raise", "align"]


class Aim:
    """What one fit's scores are taken against, and what is known of the reference.

    Args:
        module: The module that is trained.
        scorer: Says what is needed.
        parameters: As :func:`~lightning_mimic.gradients.select_parameters` takes them.
        reference: As the callback takes it.
        on_doubtful: As the callback takes it. To ``"align"``, everything is made ready, and until it is known
            whether that is needed there is no direction.

    Raises:
        ValueError: The reference cannot be read or does not fit, or the parameters are not usable.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        scorer: Scorer,
        parameters: str | Sequence[str] | None,
        reference: ReferenceSource | Aligned | None,
        on_doubtful: OnDoubtful,
    ) -> None:
        #: The target parameters by full name; empty for a scorer that needs no gradient.
        self.targets = {} if parameters is None else select_parameters(module, parameters)
        check_needs(scorer, module, self.targets)
        #: From the trained weights to the reference, or where a step on a second batch leads; ``None`` if not needed.
        self.direction: Direction | Descent | None = None
        #: Of the reference; ``None`` without one.
        self.fingerprint: str | None = None
        #: It is not known yet where to; no sample is scored.
        self.undecided = False
        self._model: nn.Module | None = None
        self._on_doubtful = on_doubtful
        self._aligned: AlignedDirection | None = None
        self._checkup: Checkup | None = None
        self._diagnosis: Diagnosis | None = None
        self._compatible = False
        self._seconds = 0.0
        self._second: SecondBatches | None = None
        plain = {n: v for n, v in vars(scorer).items() if isinstance(v, str | int | float) and not n.startswith("_")}
        self._config: dict[str, Any] = {
            "scorer": type(scorer).__name__,
            **({"scorer_settings": plain} if plain else {}),
            "aligned_every": reference.every if isinstance(reference, Aligned) else None,
            "align_doubtful": on_doubtful == "align",
            "parameters": list(self.targets),
        }
        if isinstance(scorer, Compares) and "dot" in scorer.needs:
            self._second = SecondBatches(scorer.loader, module, self.targets, type(scorer).__name__)
            self.direction = self._second.direction
            self._config["second_batches"] = describe(scorer.loader)
        if reference is None:
            return
        if isinstance(reference, Aligned) and "dot" not in scorer.needs:
            raise ValueError(
                f"`reference`: {type(scorer).__name__} takes no direction, so there is nothing to align; give it the "
                "reference itself, without Aligned."
            )
        source = reference.reference if isinstance(reference, Aligned) else reference
        if "reference_losses" in scorer.needs:
            self._model = reference_model(source, module)
            self.fingerprint = fingerprint(self._model.state_dict())
        facts: dict[str, Any] = {}
        if isinstance(reference, Aligned):
            self._align(reference, module)
        elif "dot" in scorer.needs:
            facts = self._point(source, module)
        whole = whole_reference(source, module) if self._model is None else self._model
        if whole is not None or facts:
            self._checkup = Checkup(facts, whole, module.device)

    @property
    def config(self) -> dict[str, Any]:
        """What decides the meaning of the scores."""
        return self._config | {"reference": self.fingerprint}

    @property
    def aligns(self) -> bool:
        """A direction is fitted while the model trains, so that there is none at first."""
        return self._aligned is not None

    def at_reference(self) -> bool:
        """Whether the model stands at its reference now (a host sync)."""
        direction = None if self.aligns else self.direction
        return isinstance(direction, Direction) and bool(direction.vanishes(direction.norm()))

    def advance(self) -> None:
        """Takes the direction of the next second batch, where the scorer goes by such."""
        if self._second is not None:
            self._second.advance()

    def reference_losses(self, batch: Any, losses: LossTap | None) -> Tensor | None:
        """The reference's losses, if the scorer asks for them; ``ValueError`` unless as many as the model's."""
        if self._model is None:
            return None
        with torch.no_grad():
            return same_samples(self._model.sample_losses(batch), losses)  # type: ignore[operator]

    def observe(
        self, batch: Any, ids: Ids | None, inputs: Callable[[], Mapping[str, Tensor]], clean: Tensor | None
    ) -> None:
        """Takes in what the target parameters were multiplied with, of the clean samples, for the alignment."""
        assert self._aligned is not None

        def known() -> Mapping[str, Tensor]:
            if clean is None:
                return inputs()
            # The features of a blanked sample belong to no sample.
            views = {name: (x, clean.view(-1, *[1] * (x.ndim - 1))) for name, x in inputs().items()}
            return {name: torch.where(counts, x, torch.nan) for name, (x, counts) in views.items()}

        self._aligned.observe(batch, ids, known)

    def examine(self, batch: Any, towards: Tensor | None, columns: Mapping[str, Tensor]) -> Diagnosis | None:
        """Looks at the reference in the first scored steps; with the last of them, says what it is worth.

        Args:
            batch: What training_step got.
            towards: Mimic scores of this rank's samples, shape ``(B,)``, NaN where there is none.
            columns: The ledger's of these samples.
        """
        if self._checkup is None:
            return None
        # A model on its way below the wrong labels' loss has negative scores on the whole, however good the reference.
        fresh = towards if self.direction is not self._aligned else None
        losses = columns.get("loss")
        if losses is not None:
            losses = torch.where(columns["flag"] == Flag.NONFINITE_LOSS, torch.nan, losses)
        diagnosis = self._checkup.add(batch, fresh, losses, len(columns["flag"]))
        if diagnosis is None:
            return None
        self._seconds = self._checkup.seconds
        self._checkup, self._diagnosis = None, diagnosis
        if not (self._on_doubtful == "align" and self.aligns):
            return diagnosis
        if self.undecided and diagnosis.verdict == "compatible":
            self._aligned = None
        elif self.undecided:
            self.direction = self._aligned
        # A reference that knows nothing is no better for being aligned.
        self.undecided = not diagnosis.mendable
        return diagnosis

    def tell(self) -> None:
        """Says once what the reference is worth; raises ``ValueError`` if it is worth little and that is wished."""
        assert self._diagnosis is not None
        message = f"{self._diagnosis}. Looking at it took {self._seconds:.1f} s."
        if self._diagnosis.verdict == "compatible":
            rank_zero_info(message)
        elif self._on_doubtful == "align" and self.aligns and not self.undecided:
            rank_zero_info(f"{message} It is aligned from here on.")
        else:
            mend = " Give it as lightning_mimic.Aligned(...), or compare losses with the scorer RhoLoss."
            message += mend if self._diagnosis.mendable and not self.aligns else " Use another reference."
            message += " Weights stay uniform." * self.undecided
            if self._on_doubtful == "raise":
                raise ValueError(message)
            rank_zero_warn(message, stacklevel=2)

    def complain(self) -> None:
        """Warns, at the end of the fit, of an alignment that did not work."""
        complaint = self._aligned.complaint() if self._aligned is not None and not self.undecided else None
        if self.undecided and self._checkup is not None and self._checkup.seen:
            complaint = (
                f"the fit ended after {self._checkup.seen} of the {SAMPLES} samples that it takes to judge the "
                "reference, so all weights were uniform. Train longer, or give it as lightning_mimic.Aligned(...)."
            )
        if complaint is not None:
            rank_zero_warn(complaint, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to go on; empty if that is nothing."""
        if self._aligned is None and self._checkup is not None:
            return {}
        return {
            "undecided": self.undecided,
            "examined": self._checkup is None,
            "compatible": self._compatible if self._diagnosis is None else self._diagnosis.verdict == "compatible",
            "aligned": None if self._aligned is None else self._aligned.state_dict(),
            "second": None if self._second is None else self._second.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; what was decided stays so."""
        if self._second is not None and state.get("second"):
            self._second.load_state_dict(state["second"])
        if self._aligned is not None and state["aligned"] is not None:
            self._aligned.load_state_dict(state["aligned"])
        self._compatible = state["compatible"]
        if not state["examined"]:
            return
        if self.undecided and not state["undecided"]:
            if state["aligned"] is not None:
                self.direction = self._aligned
            elif state["compatible"]:
                self._aligned = None
            else:  # it went on with a doubtful reference as it was: to be looked at once more
                return
        self._checkup, self.undecided = None, state["undecided"] and self.undecided

    def _point(self, source: ReferenceSource, module: pl.LightningModule) -> dict[str, Any]:
        """Takes the direction to given weights, and returns how like the model's they are."""
        tensors = read_reference(source)
        try:
            held = match_reference(tensors, self.targets, aliases_of(module))
        except ReferenceLoadError as error:
            if not isinstance(source, nn.Module):
                raise
            if self._on_doubtful != "align":
                raise ReferenceLoadError(
                    f"{error} A model of another architecture can be given as lightning_mimic.Aligned(model)."
                ) from error
            self._align(Aligned(source), module)
            return {"misfit": str(error)}
        self.direction = Direction(held, self.targets)
        self.fingerprint = fingerprint(held)
        if self._on_doubtful == "align":
            self._aligned = aligned_direction(Aligned(source), module, self.targets)
            self.undecided = True
        return resemblance(module, tensors, self.targets, held) | {"below_moves": below_moves(module, self.targets)}

    def _align(self, aligned: Aligned, module: pl.LightningModule) -> None:
        self.direction = self._aligned = aligned_direction(aligned, module, self.targets)
        self.fingerprint = self._aligned.fingerprint
