"""Scored parameters, direction towards the reference, and losses of the reference."""

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
    """Hold the scored parameters of one run and the direction towards the reference.

    If the settings ask to align a doubtful reference, there is no direction until the diagnosis has shown whether
    alignment is needed.

    Args:
        module: Module that is trained.
        settings: Settings of the run.
        prepare: Function applied to each batch of a scorer's own loader.

    Raises:
        MimicError: The reference cannot be read or does not fit the module, or the parameters cannot be scored.
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
        #: Scored parameters by full name; empty for a scorer that needs no gradient.
        self.parameters = {} if parameters is None else select_parameters(module, parameters)
        #: Whether posteriors are those of image-text pairs, computed by an aligned CLIP reference and not by a layer.
        self.has_pairs = "posteriors" in needs and has_towers(module)
        if self.has_pairs and not isinstance(reference, Aligned):
            raise MimicError(
                "`reference`: the probability that a pair matches is computed from the reference's own similarities; "
                "pass lightning_mimic.Aligned(reference), with `rotate=False` if the reference and the model started "
                "from the same weights."
            )
        check_needs(scorer, needs - {"posteriors"} if self.has_pairs else needs, module, self.parameters)
        #: Direction towards the reference, or against the gradient of a reference batch; ``None`` if none is needed.
        self.direction: Direction | GradientDirection | None = None
        #: Fingerprint of the reference; ``None`` without a reference.
        self.fingerprint: str | None = None
        #: Whether it is still open if the reference has to be aligned; until then all weights are uniform.
        self.undecided = False
        #: Fields of :class:`Diagnosis` that are known before the first sample.
        self.facts: dict[str, Any] = {}
        self._aligned: AlignedDirection | None = None
        self._reference: nn.Module | None = None
        # The reference as a model that computes losses; None if it is not available as one.
        self._whole: nn.Module | None = None
        self._batches: ReferenceBatches | None = None
        self._align_doubtful = settings.on_doubtful == "align"
        self._from_start = settings.direction == "start"
        self._config: dict[str, Any] = {
            "aligned_every": reference.every if isinstance(reference, Aligned) else None,
            "parameters": list(self.parameters),
        }
        if isinstance(reference, Aligned) and not reference.rotate:
            # Omitted for the default, so that runs with older ledgers can be resumed.
            self._config["aligned_rotate"] = False
        directed = bool(needs & WEIGHT_NEEDS)
        if isinstance(scorer, UsesLoader) and directed:
            self._set_batch_direction(scorer.loader, module, type(scorer).__name__, prepare)
        if reference is None:
            return
        if isinstance(reference, Aligned) and not directed:
            raise MimicError(
                f"`reference`: {type(scorer).__name__} takes no direction, so there is nothing to align; pass the "
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
        """Settings that determine the meaning of the scores."""
        held = self.direction.start if isinstance(self.direction, Direction) else None
        # Scores from different starting weights are not comparable, even with the same reference.
        start = {} if held is None else {"start": fingerprint(held)}
        return self._config | {"reference": self.fingerprint} | start

    @property
    def aligns(self) -> bool:
        """Whether the direction is fitted during training, so that there is none at first."""
        return self._aligned is not None

    @property
    def reference(self) -> Mapping[str, Tensor] | None:
        """Parameters of the reference by name, aligned or not; ``None`` if the direction leads to no reference."""
        return self.direction.reference if isinstance(self.direction, Direction) else None

    def monitor(self, device: torch.device, samples: int) -> ReferenceMonitor | None:
        """Return a monitor that diagnoses the reference on ``samples`` samples; ``None`` if it cannot be diagnosed."""
        if self._whole is None and not self.facts:
            return None
        return ReferenceMonitor(self.facts, self._whole, device, samples)

    def start(self) -> None:
        """Store the starting weights if the direction is taken from them and no loaded state contained them."""
        if self._from_start and isinstance(self.direction, Direction) and self.direction.start is None:
            self.direction.set_start()

    def at_reference(self) -> bool:
        """Return whether the model's current weights equal those of its reference (a host sync)."""
        direction = None if self.aligns else self.direction
        return isinstance(direction, Direction) and bool(direction.vanishes(direction.norm()))

    def advance(self) -> None:
        """Update the direction from the next reference batch, for a scorer that uses a loader."""
        if self._batches is not None:
            self._batches.advance()

    def reference_losses(self, batch: Any, like: Tensor | None) -> Tensor | None:
        """Return the reference's losses, or ``None`` if they are not needed.

        Args:
            batch: Batch passed to the training step.
            like: Losses of the model for the same samples; ``None`` if they are not known.

        Raises:
            MimicError: The losses of reference and model differ in shape.
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
        """Update the alignment with the inputs of the target parameters for the clean samples.

        Args:
            batch: Batch passed to the training step.
            ids: Ids of its samples.
            inputs: Function that returns the inputs by parameter name.
            clean: Mask of the samples without NaN, shape ``(B,)``; ``None`` if all are clean.

        Returns:
            For a CLIP model whose posteriors are needed, the probability that each pair matches, shape ``(B,)``;
            otherwise ``None``.
        """
        if self._aligned is None:
            return None

        def clean_inputs() -> Mapping[str, Tensor]:
            if clean is None:
                return inputs()
            # Ignore the features of samples that were set to zero because they held NaN.
            views = {name: (x, clean.view(-1, *[1] * (x.ndim - 1))) for name, x in inputs().items()}
            return {name: torch.where(valid, x, torch.nan) for name, (x, valid) in views.items()}

        return self._aligned.observe(batch, ids, clean_inputs)

    @property
    def wrong_share(self) -> Tensor | None:
        """Estimated share of mismatched pairs, a scalar; ``None`` without an aligned CLIP model."""
        return None if self._aligned is None else self._aligned.wrong_share

    def calibration(self) -> PairCalibration | None:
        """Return the calibration of an aligned CLIP model's similarities (a host sync); ``None`` without one."""
        return None if self._aligned is None else self._aligned.calibration()

    def scores_for_diagnosis(self, scores: Tensor | None) -> Tensor | None:
        """Return the mimic scores if they are evidence about the reference, otherwise ``None``.

        With an aligned reference they are not: when a model starts to fit the wrong labels, scores become negative on
        average, however good the reference is.
        """
        return scores if self.direction is not self._aligned else None

    def choose_direction(self, diagnosis: Diagnosis) -> None:
        """Choose between the original and the aligned reference after the diagnosis."""
        if not (self._align_doubtful and self.aligns):
            return
        if self.undecided and diagnosis.verdict == "compatible":
            self._aligned = None
        elif self.undecided:
            self.direction = self._aligned
        # Alignment does not help a reference that has not learnt the task.
        self.undecided = not diagnosis.alignable

    def objection(self) -> str | None:
        """Return the reason why the scores are less reliable than the aligned reference, as a phrase (a host sync)."""
        return None if self._aligned is None else self._aligned.objection()

    def warn_if_unaligned(self) -> None:
        """Warn at the end of a run if the alignment has failed."""
        message = self._aligned.failure_message() if self._aligned is not None and not self.undecided else None
        if message is not None:
            warn_once_for_all_ranks(message)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: alignment, reference batches and starting weights."""
        state = {
            "undecided": self.undecided,
            "aligned": None if self._aligned is None else self._aligned.state_dict(),
            "batches": None if self._batches is None else self._batches.state_dict(),
        }
        if self._from_start and isinstance(self.direction, Direction):
            state["start"] = self.direction.start
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, diagnosed: bool, compatible: bool) -> bool:
        """Continue from a state, and keep its decision about alignment.

        Args:
            state: State from :meth:`state_dict`.
            diagnosed: Whether the reference had been diagnosed.
            compatible: Whether it was found compatible.

        Returns:
            Whether the diagnosis still holds.

        Raises:
            MimicError: ``direction`` is ``"start"``, and the state does not contain the starting weights.
        """
        if self._from_start and isinstance(self.direction, Direction):
            if "start" not in state:
                raise MimicError(
                    "`direction` is 'start', but the state of the run does not contain its starting weights, because "
                    "it was saved with `direction='current'`. Resume with `direction='current'`, or start a new run."
                )
            if state["start"] is not None:  # None if the run had not started yet
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
            else:  # the run continued with a doubtful reference without alignment: diagnose it again
                return False
        self.undecided = state["undecided"] and self.undecided
        return True

    def _set_batch_direction(
        self, loader: Iterable[Any], module: nn.Module, scorer: str, prepare: Callable[[Any], Any]
    ) -> None:
        self._batches = ReferenceBatches(loader, module, self.parameters, scorer, prepare)
        self.direction = self._batches.direction
        self._config["reference_batches"] = describe(loader)

    def _set_direction(self, source: ReferenceSource, module: nn.Module) -> dict[str, Any]:
        """Set the direction to the reference's weights, and return their similarity to the model's weights."""

        def matched() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            tensors = read_reference(source)
            return tensors, match_reference(tensors, self.parameters, aliases_of(module))

        try:
            # The following steps gather a sharded model's weights, so all ranks must fail together.
            sharded = bool(sharded_modules(module))
            tensors, held = on_all_ranks(matched, "could not use its reference") if sharded else matched()
        except ReferenceLoadError as error:
            if not isinstance(source, nn.Module):
                raise
            if not self._align_doubtful:
                raise ReferenceLoadError(
                    f"{error} Pass a model of another architecture as lightning_mimic.Aligned(model)."
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
