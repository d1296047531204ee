"""The scored parameters, the direction towards the reference, and the reference's losses."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic.distributed import on_all_ranks
from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import Direction, GradientDirection, select_parameters
from lightning_mimic.reference import (
    Aligned,
    AlignedDirection,
    Diagnosis,
    ReferenceLoadError,
    ReferenceSource,
    aliases_of,
    aligned_direction,
    fingerprint,
    has_towers,
    match_reference,
    read_reference,
    reference_model,
    rest_trains,
    weight_similarity,
)
from lightning_mimic.reference.diagnose import whole_reference
from lightning_mimic.reference.pair_calibration import PairCalibration
from lightning_mimic.reweighting.batch import Ids, describe
from lightning_mimic.reweighting.checks import check_needs
from lightning_mimic.reweighting.reference_batches import ReferenceBatches
from lightning_mimic.reweighting.reference_monitor import ReferenceMonitor, warn_once_for_all_ranks
from lightning_mimic.reweighting.settings import Settings
from lightning_mimic.scorers import WEIGHT_NEEDS, UsesLoader
from lightning_mimic.sharding import sharded_modules


class Target:
    """The scored parameters and the direction towards the reference, of one run.

    Args:
        module: The module that is trained.
        settings: The user's. To align a doubtful reference is prepared; until it is known whether that is needed there
            is no direction.
        prepare: Applied to the batches of a scorer's own loader.

    Raises:
        MimicError: The reference cannot be read or does not fit, or the parameters are not usable.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        prepare: Callable[[Any], Any],
    ) -> None:
        scorer, needs, parameters, reference = (
            settings.make_scores,
            settings.needs,
            settings.parameters,
            settings.reference,
        )
        #: The scored parameters by full name; empty for a scorer that needs no gradient.
        self.parameters = {} if parameters is None else select_parameters(module, parameters)
        #: The posteriors are those of pairs, which the aligned reference of a CLIP gives, and no layer's.
        self.has_pairs = "posteriors" in needs and has_towers(module)
        if self.has_pairs and not isinstance(reference, Aligned):
            raise MimicError(
                "`reference`: the probability that a pair matches comes from the reference's own similarities; give it "
                "as lightning_mimic.Aligned(reference), with `rotate=False` if it started from the model's weights."
            )
        check_needs(scorer, needs - {"posteriors"} if self.has_pairs else needs, module, self.parameters)
        #: Towards the reference, or against the gradient of a reference batch; ``None`` if none is needed.
        self.direction: Direction | GradientDirection | None = None
        #: Of the reference; ``None`` without one.
        self.fingerprint: str | None = None
        #: It is not known yet whether the reference has to be aligned; until then all weights are uniform.
        self.undecided = False
        #: What is known of the reference before the first sample: fields of :class:`Diagnosis`.
        self.facts: dict[str, Any] = {}
        self._aligned: AlignedDirection | None = None
        self._reference: nn.Module | None = None
        # The reference as a model that gives losses, where it is one.
        self._whole: nn.Module | None = None
        self._batches: ReferenceBatches | None = None
        self._align_doubtful = settings.on_doubtful == "align"
        self._from_start = settings.direction == "start"
        self._config: dict[str, Any] = {
            "aligned_every": reference.every if isinstance(reference, Aligned) else None,
            "parameters": list(self.parameters),
        }
        if isinstance(reference, Aligned) and not reference.rotate:
            # Left out by default, so that older ledgers go on.
            self._config["aligned_rotate"] = False
        directed = bool(needs & WEIGHT_NEEDS)
        if isinstance(scorer, UsesLoader) and directed:
            self._follow_batches(scorer.loader, module, type(scorer).__name__, prepare)
        if reference is None:
            return
        if isinstance(reference, Aligned) and not directed:
            raise MimicError(
                f"`reference`: {type(scorer).__name__} takes no direction, so there is nothing to align; give it the "
                "reference itself, without Aligned."
            )
        source = reference.reference if isinstance(reference, Aligned) else reference
        if "reference_losses" in needs:
            self._reference = reference_model(source, module)
            self.fingerprint = fingerprint(self._reference.state_dict())
        if isinstance(reference, Aligned):
            self._align(reference, module)
        elif directed:
            self.facts = self._set_direction(source, module)
        self._whole = whole_reference(source, module) if self._reference is None else self._reference

    @property
    def config(self) -> dict[str, Any]:
        """What decides the meaning of the scores."""
        held = self.direction.start if isinstance(self.direction, Direction) else None
        # Scores towards one reference from two starts are not of one kind.
        start = {} if held is None else {"start": fingerprint(held)}
        return self._config | {"reference": self.fingerprint} | start

    @property
    def aligns(self) -> bool:
        """A direction is fitted while the model trains, so that there is none at first."""
        return self._aligned is not None

    @property
    def reference(self) -> Mapping[str, Tensor] | None:
        """The reference's parameters by name, aligned or not; ``None`` where the direction leads to none."""
        return self.direction.reference if isinstance(self.direction, Direction) else None

    def monitor(self, device: torch.device, samples: int) -> ReferenceMonitor | None:
        """Return a monitor of the reference on so many samples; ``None`` where there is nothing to look at."""
        if self._whole is None and not self.facts:
            return None
        return ReferenceMonitor(self.facts, self._whole, device, samples)

    def start(self) -> None:
        """Hold the weights with which the run begins, if the direction is from there and no state had them."""
        if self._from_start and isinstance(self.direction, Direction) and self.direction.start is None:
            self.direction.set_start()

    def at_reference(self) -> bool:
        """Return whether the model stands at its reference now (a host sync)."""
        direction = None if self.aligns else self.direction
        return isinstance(direction, Direction) and bool(direction.vanishes(direction.norm()))

    def advance(self) -> None:
        """Take the direction of the next reference batch, for a scorer that uses a loader."""
        if self._batches is not None:
            self._batches.advance()

    def reference_losses(self, batch: Any, like: Tensor | None) -> Tensor | None:
        """Return the reference's losses, if they are needed.

        Args:
            batch: What the training step got.
            like: The model's losses of the same samples, if they are known.

        Raises:
            MimicError: They are not as many as the model's.
        """
        if self._reference is None:
            return None
        with torch.no_grad():
            losses: Tensor = self._reference.sample_losses(batch)  # type: ignore[operator]
        if like is not None and losses.shape != like.shape:
            raise MimicError(
                f"the reference's `sample_losses` returned shape {tuple(losses.shape)}, the model's "
                f"{tuple(like.shape)}; both must give one loss for each of the same samples."
            )
        return losses

    def observe(
        self, batch: Any, ids: Ids | None, inputs: Callable[[], Mapping[str, Tensor]], clean: Tensor | None
    ) -> Tensor | None:
        """Take in what the target parameters were multiplied with, of the clean samples, for the alignment.

        Args:
            batch: What the training step got.
            ids: Of its samples.
            inputs: Returns the features by parameter name.
            clean: Samples that hold no NaN; all, if ``None``.

        Returns:
            Of a CLIP, each pair's probability of a match, shape ``(B,)``, if it is needed.
        """
        if self._aligned is None:
            return None

        def known() -> Mapping[str, Tensor]:
            if clean is None:
                return inputs()
            # The features of a blanked sample belong to no sample.
            views = {name: (x, clean.view(-1, *[1] * (x.ndim - 1))) for name, x in inputs().items()}
            return {name: torch.where(valid, x, torch.nan) for name, (x, valid) in views.items()}

        return self._aligned.observe(batch, ids, known)

    @property
    def wrong_share(self) -> Tensor | None:
        """The estimated share of mismatched pairs, a scalar; ``None`` without an aligned CLIP."""
        return None if self._aligned is None else self._aligned.wrong_share

    def calibration(self) -> PairCalibration | None:
        """Return the calibration of an aligned CLIP's similarities (a host sync); ``None`` without one."""
        return None if self._aligned is None else self._aligned.calibration()

    def scores_for_diagnosis(self, scores: Tensor | None) -> Tensor | None:
        """Return the mimic scores where they say something about the reference.

        With an aligned reference they do not: a model that is about to fit the wrong labels has negative scores on
        the whole, however good the reference.
        """
        return scores if self.direction is not self._aligned else None

    def choose_direction(self, diagnosis: Diagnosis) -> None:
        """Choose between the reference as it is and aligned, once it has been diagnosed."""
        if not (self._align_doubtful and self.aligns):
            return
        if self.undecided and diagnosis.verdict == "compatible":
            self._aligned = None
        elif self.undecided:
            self.direction = self._aligned
        # A reference that knows nothing is no better for being aligned.
        self.undecided = not diagnosis.alignable

    def objection(self) -> str | None:
        """Return why the scores say less than the aligned reference does, as a phrase (a host sync)."""
        return None if self._aligned is None else self._aligned.objection()

    def warn_if_unaligned(self) -> None:
        """Warn, at the end of a run, of an alignment that did not work."""
        message = self._aligned.failure_message() if self._aligned is not None and not self.undecided else None
        if message is not None:
            warn_once_for_all_ranks(message)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of alignment and reference batches."""
        state = {
            "undecided": self.undecided,
            "aligned": None if self._aligned is None else self._aligned.state_dict(),
            "batches": None if self._batches is None else self._batches.state_dict(),
        }
        if self._from_start and isinstance(self.direction, Direction):
            state["start"] = self.direction.start
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, diagnosed: bool, compatible: bool) -> bool:
        """Continue from a state; what was decided stays so.

        Args:
            state: From :meth:`state_dict`.
            diagnosed: The reference had been diagnosed.
            compatible: And was found compatible.

        Returns:
            Whether the diagnosis still holds.
        """
        if self._from_start and isinstance(self.direction, Direction):
            if "start" not in state:
                raise MimicError(
                    "`direction` is 'start', but the state of the run does not hold the weights that it started with, "
                    "because it was saved with `direction='current'`. Resume with that, or begin another run."
                )
            if state["start"] is not None:  # of a run that had begun
                self.direction.set_start(state["start"])
        if self._batches is not None and state["batches"]:
            self._batches.load_state_dict(state["batches"])
        if self._aligned is not None and state["aligned"] is not None:
            self._aligned.load_state_dict(state["aligned"])
        if not diagnosed:
            return False
        if self.undecided and not state["undecided"]:
            if state["aligned"] is not None:
                self.direction = self._aligned
            elif compatible:
                self._aligned = None
            else:  # the run continued with a doubtful reference as it was: to be diagnosed once more
                return False
        self.undecided = state["undecided"] and self.undecided
        return True

    def _follow_batches(
        self, loader: Iterable[Any], module: nn.Module, scorer: str, prepare: Callable[[Any], Any]
    ) -> None:
        self._batches = ReferenceBatches(loader, module, self.parameters, scorer, prepare)
        self.direction = self._batches.direction
        self._config["reference_batches"] = describe(loader)

    def _set_direction(self, source: ReferenceSource, module: nn.Module) -> dict[str, Any]:
        """Take the direction to given weights, and return how similar to the model's they are."""

        def matched() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            tensors = read_reference(source)
            return tensors, match_reference(tensors, self.parameters, aliases_of(module))

        try:
            # What comes next gathers a sharded model's weights, on all ranks or on none.
            sharded = bool(sharded_modules(module))
            tensors, held = on_all_ranks(matched, "could not use its reference") if sharded else matched()
        except ReferenceLoadError as error:
            if not isinstance(source, nn.Module):
                raise
            if not self._align_doubtful:
                raise ReferenceLoadError(
                    f"{error} A model of another architecture can be given as lightning_mimic.Aligned(model)."
                ) from error
            self._align(Aligned(source), module)
            return {"mismatch": str(error)}
        self.direction = Direction(held, self.parameters)
        self.fingerprint = fingerprint(held)
        if self._align_doubtful:
            self._aligned = aligned_direction(Aligned(source), module, self.parameters)
            self.undecided = True
        return weight_similarity(module, tensors, self.parameters, held) | {
            "rest_trains": rest_trains(module, self.parameters)
        }

    def _align(self, aligned: Aligned, module: nn.Module) -> None:
        self.direction = self._aligned = aligned_direction(aligned, module, self.parameters, posteriors=self.has_pairs)
        self.fingerprint = self._aligned.fingerprint
