"""The engine that scores every sample and weights every micro-batch of a training loop."""

import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic import distributed
from lightning_mimic.batches import sample_count, to_device
from lightning_mimic.dataset_ids import check_loader_ids
from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.gradients import ModelHooks, named_parameters
from lightning_mimic.ledger import Flag
from lightning_mimic.reference import Aligned, Diagnosis, ReferenceSource
from lightning_mimic.reference.calibration import Calibration
from lightning_mimic.reference.pair_calibration import PairCalibration
from lightning_mimic.reweighting.batch import (
    Ids,
    batch_size_of,
    check_ids,
    class_columns,
    class_names_of,
    describe,
    kind_of,
    sample_ids,
)
from lightning_mimic.reweighting.checks import check_sharded
from lightning_mimic.reweighting.choice import Choice, choose_method
from lightning_mimic.reweighting.forward import Forward
from lightning_mimic.reweighting.gate import Reweight
from lightning_mimic.reweighting.head import Head
from lightning_mimic.reweighting.hooks import LossCapture
from lightning_mimic.reweighting.loss_check import AssertedLoss, LossCheck
from lightning_mimic.reweighting.messages import HOOKED
from lightning_mimic.reweighting.methods import Reach, ScoringMethod, ScoringTask
from lightning_mimic.reweighting.recorder import Position, ScoreRecorder
from lightning_mimic.reweighting.reference_monitor import OnDoubtful, report_unsure
from lightning_mimic.reweighting.repeated_ids import RepeatedIds
from lightning_mimic.reweighting.run_ledger import RunLedger
from lightning_mimic.reweighting.settings import OnNonfinite, Origin, Settings, Uncovered
from lightning_mimic.reweighting.step import Step, StepContext
from lightning_mimic.reweighting.target import Target
from lightning_mimic.reweighting.weigh import StepResult
from lightning_mimic.scorers import KeepsState, RunWeighting, Scorer, Temperature, Weighting
from lightning_mimic.sharding import whole_parameters
from lightning_mimic.stores import path_of

_log = logging.getLogger("lightning_mimic")
# Micro-batches between two checks for an unsure reference; each check is a host sync.
_LOOK_EVERY = 64


class Reweighter:
    """Score samples by how far a gradient step on them moves a model towards a reference, and weight batches.

    This is the engine for any training loop; in a Lightning ``Trainer`` use the callback
    :class:`~lightning_mimic.GradMimic`. For each sample *i* of a micro-batch, over all ranks: the score is
    ``mᵢ = −⟨∇ℓᵢ, v⟩/‖v‖`` with ``v = θ_ref − θ``, the weights are ``w = softmax(m/τ)``, and the gradient is
    ``Σ wᵢ ∇ℓᵢ`` instead of the plain mean.

    Gradients are in ``.grad`` as after ``backward()``, so clipping, accumulation, schedulers,
    ``DistributedDataParallel`` and gradient scalers work as before. Use the object as a context manager: at the end it
    writes the last scores of all ranks and removes all hooks. Without ``with``, call :meth:`finish` on every rank, then
    :meth:`close`.

    Args:
        model: Module to train; a ``DistributedDataParallel`` or a compiled module is unwrapped. If it has a method
            ``sample_losses(batch)`` that returns one loss per sample, the loss must be the mean of these losses.
        reference: See :class:`~lightning_mimic.GradMimic` for all arguments up to ``keep_output_gradients``.
        parameters: Parameters over which scores are computed.
        scorer: Computes scores from products with the samples' gradients.
        weighting: Computes weights from scores.
        temperature: τ of the softmax, or ``"auto"``.
        min_ess: Floor on the effective sample size, as a fraction of the batch.
        reweight: What the weights apply to.
        uncovered: Treatment of trainable parameters that the weights do not reach.
        ledger: Directory for the scores.
        id_from: Function from a batch to its ids.
        on_nonfinite: Treatment of samples whose loss is not finite. If they are masked, compute the loss from
            ``step.batch``, in which samples with NaN are replaced by zeros.
        math_attention: Whether to run attention in scored steps with the kernel that can be differentiated twice.
        loss: ``"mean"`` asserts that the loss is the plain mean of the samples' own losses.
        on_doubtful: Reaction to a reference that the diagnosis does not find compatible.
        diagnose_reference: Whether to diagnose the reference on the first 512 samples.
        direction: ``"current"``, or ``"start"`` for the direction from the starting weights.
        keep_output_gradients: Whether to compute the weighted gradients from the output gradients of the scoring pass.
        grad_scaler: Gradient scaler of the backward pass, if any.
        prepare: Function that moves a batch of the scorer's own loader to the model's device and precision; by default
            it moves the batch to the device.

    Raises:
        MimicError: An argument, the reference, the parameters or the ledger cannot be used.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = [(torch.randn(4, 2), torch.tensor([0, 1, 1, 0])) for _ in range(3)]
        >>> reference = {"weight": torch.eye(2), "bias": torch.zeros(2)}
        >>> with Reweighter(model, reference, "all", diagnose_reference=False) as reweighter:
        ...     for batch in loader:
        ...         with reweighter.step(batch) as step:
        ...             inputs, labels = step.batch
        ...             result = step.backward(nn.functional.cross_entropy(model(inputs), labels))
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> result.scores.shape
        torch.Size([4])

    Source: Huang et al., *Evaluating Sample Utility for Efficient Data Selection by Mimicking Model Weights*,
    arXiv 2501.06708.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: ReferenceSource | Aligned | None = None,
        parameters: str | Sequence[str] | None = None,
        *,
        scorer: Scorer | None = None,
        weighting: Weighting | None = None,
        temperature: Temperature | None = None,
        min_ess: float | None = None,
        reweight: Reweight = "all",
        uncovered: Uncovered = "error",
        ledger: str | Path | None = None,
        id_from: Callable[[Any], Ids] | None = None,
        on_nonfinite: OnNonfinite | None = None,
        math_attention: bool = False,
        loss: AssertedLoss | None = None,
        on_doubtful: OnDoubtful = "warn",
        diagnose_reference: bool = True,
        direction: Origin = "current",
        keep_output_gradients: bool = False,
        grad_scaler: "torch.amp.GradScaler | None" = None,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        settings = Settings(
            reference=reference,
            parameters=parameters,
            scorer=scorer,
            weighting=weighting,
            temperature=temperature,
            min_ess=min_ess,
            reweight=reweight,
            uncovered=uncovered,
            ledger=ledger,
            id_from=id_from,
            on_nonfinite=on_nonfinite,
            math_attention=math_attention,
            loss=loss,
            on_doubtful=on_doubtful,
            diagnose_reference=diagnose_reference,
            direction=direction,
            keep_output_gradients=keep_output_gradients,
        )
        self._set_up(model, settings, grad_scaler, prepare)

    @classmethod
    def from_settings(
        cls, model: nn.Module, settings: Settings, prepare: Callable[[Any], Any] | None = None
    ) -> "Reweighter":
        """Create an engine from settings that were checked before the model existed."""
        reweighter = cls.__new__(cls)
        reweighter._set_up(model, settings, None, prepare)
        return reweighter

    def _set_up(
        self,
        model: nn.Module,
        settings: Settings,
        grad_scaler: "torch.amp.GradScaler | None",
        prepare: Callable[[Any], Any] | None,
    ) -> None:
        self.settings = settings
        model = getattr(model, "_orig_mod", model)  # of torch.compile(model), which may wrap the DDP
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        device = next(self.model.parameters()).device
        #: Parameters of a sharded model as they appear in the graph.
        self._whole = whole_parameters(self.model)
        if self._whole:
            check_sharded(
                self.model,
                settings.make_scores,
                settings.needs,
                settings.reference,
                settings.reweight,
                settings.on_doubtful,
                settings.keep_output_gradients,
            )
        self._scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._target = Target(
            self.model,
            settings,
            prepare=(lambda batch: to_device(batch, device)) if prepare is None else prepare,
        )
        self._monitor = (
            self._target.monitor(device, settings.diagnosis_samples) if settings.diagnose_reference else None
        )
        self._compatible = False
        # Micro-batches since the diagnosis.
        self._steps = 0
        self._trains = False
        # Made by this process, not by the run that is continued.
        self._diagnosis: Diagnosis | None = None
        self._choice: Choice | None = None
        self._checked_epoch = -1
        self._parameters: list[tuple[int, bool]] = []
        self._closed = False
        self._repeated_ids = RepeatedIds()
        # With several loaders, one may restart within an epoch.
        self._one_loader = False
        # State of the run that is continued, until the ledger is open.
        self._progress: dict[str, Any] = {}
        self._ledger: RunLedger | None = None
        self._batch_size_known = False
        self._recorder: ScoreRecorder | None = None
        # Position of the next micro-batch, if it belongs to the same epoch.
        self._next = Position(0, 0, 0)
        # Set if the weighting keeps state over the batches.
        self._weighting: RunWeighting | None = None
        self._closing = ExitStack()
        self._context = self._attach()

    @property
    def config(self) -> dict[str, Any]:
        """Settings that determine the meaning of scores and weights; attempts of one ledger must agree on them."""
        return {**self._target.config, **self.settings.config}

    @property
    def targets(self) -> dict[str, nn.Parameter]:
        """Scored parameters by name."""
        return self._target.parameters

    # A run

    @property
    def started(self) -> bool:
        """Whether the run has started, with its ledger open if it has one."""
        return self._recorder is not None

    def start(
        self, step: int | None = None, loader: Any = None, data_module: Any = None, *, record: bool = True
    ) -> None:
        """Open the ledger; called by the first :meth:`step`, if not before.

        Args:
            step: Step at which a resumed run continues; recorded rows from there on are superseded. Counted in
                micro-batches in your own loop (default: where the loaded state was saved), in optimizer steps in a
                Trainer.
            loader: Loader of the training batches; its data set and class names are recorded in the ledger.
            data_module: Another source of class names.
            record: Whether to write the ledger.

        Raises:
            LedgerError: The directory holds another run, or cannot be written; raised on all ranks.
            MimicError: An id names two samples of the loader's data set.
            RuntimeError: The run was started before.
        """
        if self.started:
            raise RuntimeError("this run was started before; make another Reweighter for another run.")
        step = self._next.step if step is None else step
        self._target.start()
        directory = self._directory
        if record and directory is not None:
            if self.settings.id_from is None:
                check_loader_ids(loader)
            self._one_loader = hasattr(loader, "dataset")
            notes = _describe_data(loader, data_module)
            self._batch_size_known = "batch_size" in notes
            self._ledger = RunLedger(directory, self.config, step, self._progress, notes)
        writer = None if self._ledger is None else self._ledger.writer
        later = self._target.aligns or "calibrated_outputs" in self.settings.needs
        self._recorder = ScoreRecorder(writer, {Flag.ZERO_DIRECTION} if later else ())
        self._closing.callback(weakref.finalize(self, _warn_of_unwritten, self._recorder, directory).detach)
        self._next = replace(self._next, step=step)
        if self._target.at_reference():
            self._recorder.warn({Flag.ZERO_DIRECTION: 0})

    @contextmanager
    def step(self, batch: Any, ids: Ids | None = None, *, epoch: int | None = None) -> Iterator[Step]:
        """Score and weight one micro-batch; call it on every rank.

        Compute the loss within the block and pass it to :meth:`Step.backward`.

        Args:
            batch: Batch from which the loss is computed: a tensor; tensors in tuples, lists, mappings or dataclasses;
                or joined graphs (``num_graphs``), in which NaN are not replaced.
            ids: Ids of the samples, int or str; by default those in the batch (``WithIds``, a key or attribute
                ``id``, ``id_from``). Needed for a ledger.
            epoch: Number of the pass over the data; by default everything is one pass.

        Raises:
            MimicError: There are no ids for the ledger, or the samples cannot be scored exactly.
        """
        here, epoch, assumed = self._next, epoch or 0, epoch is None
        position = Position(epoch, here.step, here.batch if epoch == here.epoch else 0, assumed)
        with self.begin(batch, ids, position) as step:
            yield step
            if not step.has_loss:
                raise MimicError("the step has no loss: call `step.backward(loss)` within it.")
            result = self.end(step, step.classes)
            if result is not None and result.report and distributed.rank() == 0:
                _log.info(result.report)

    def begin(self, batch: Any, ids: Ids | None, position: Position, scale: Tensor | None = None) -> Step:
        """Create the step of one micro-batch; for adapters.

        Args:
            batch: What the loss will be computed from.
            ids: One per sample; found in the batch if left out.
            position: Of the micro-batch.
            scale: By which loss and gradients will be multiplied against underflow; by default the gradient scaler's.
        """
        if self._closed:
            raise RuntimeError("this Reweighter is closed; make another one for another run.")
        if not self.started:
            self.start(position.step)
        settings = self.settings
        if ids is None:
            needed = settings.ledger is not None
            ids = sample_ids(batch, settings.id_from, needed=needed, wanted=settings.uses_ids)
        else:
            ids = check_ids(ids, sample_count(batch))
        if self._recorder is not None:
            self._recorder.check_ids(ids)
        if ids is not None and self._ledger is not None:
            self._repeated_ids.check(batch, ids)
            if self._one_loader:
                self._repeated_ids.remember(batch, ids, position.epoch)
        # Once per epoch, and whenever parameters were frozen or unfrozen.
        parameters = [(id(p), p.requires_grad) for p in self.model.parameters()]
        check = self._checked_epoch != position.epoch or parameters != self._parameters
        check = check or (self._choice is not None and self._choice.pending)
        if check:
            self._refuse_replaced()
        self._parameters = parameters
        if scale is None and self._scaler is not None:
            scale = self._scaler.scale(torch.ones((), device=self._context.task.device))
        self._target.advance()
        return Step(self._context, batch, ids, position, check=check, scale=scale)

    def end(self, step: Step, outputs: Any = None) -> StepResult | None:
        """Record a micro-batch after its backward pass; for adapters.

        Args:
            step: Step returned by :meth:`begin`.
            outputs: Return value of the training step. If it is a mapping, its class indices ``label`` and
                ``predicted`` are recorded.

        Returns:
            The result, with a report on the reference if there is one; ``None`` without a loss.
        """
        result = step.finish()
        if result is None or self._recorder is None or self._choice is None:
            return None
        here = step.position
        if self._ledger is not None:
            if self._checked_epoch < 0:
                notes: dict[str, Any] = {"score_kind": self._choice.kind, "loss": self._context.loss_check.basis}
                notes["ids"] = kind_of(step.ids)
                self._ledger.note(notes if self._batch_size_known else notes | {"batch_size": len(result)})
            self._ledger.scored(here)
        if here.epoch != self._checked_epoch:
            self._note_calibration()
        self._checked_epoch = here.epoch
        self._next = Position(here.epoch, here.step + 1, here.batch + 1)
        columns = result.columns() | class_columns(outputs, len(result))
        self._recorder.add(step.position, step.ids, columns, step.problem())
        return self._diagnose(step, result)

    def note(self, notes: Mapping[str, Any]) -> None:
        """Add facts about this run to the ledger's description."""
        if self._ledger is not None:
            self._ledger.note(notes)

    def calibration(self) -> Calibration | PairCalibration | None:
        """Return the calibration of the reference on the given labels or pairs, or ``None`` (a host sync).

        ``str(reweighter.calibration())`` is a sentence with the estimated share of wrong labels.
        """
        calibration = self._context.head.calibration()
        return self._target.calibration() if calibration is None else calibration

    def flush(self) -> None:
        """Write all scores so far to the ledger.

        Raises:
            MimicError: A loss was not the mean of the samples' losses, an id named two samples, or the scores cannot be
                written.
        """
        if self._recorder is not None:
            self._recorder.flush()
        self._repeated_ids.compare()

    def finish(self) -> None:
        """Write the last scores of all ranks, and warn if an alignment failed; call it on every rank.

        When it returns, the rows of all ranks are on the disk and their numbers are in the ledger's description.

        Raises:
            MimicError: The last scores of a rank could not be written; raised on all ranks.
        """
        self._look_for_unsure()
        if self._recorder is not None:
            if self._ledger is not None:
                self._ledger.finish(self._recorder)
            else:
                self._recorder.commit()
        self._repeated_ids.compare()
        self._note_calibration()
        if self._target.undecided and self._monitor is not None:
            self._monitor.warn_if_unaligned()
        self._target.warn_if_unaligned()

    def close(self) -> None:
        """Write the last scores of this rank and remove all hooks; may be called repeatedly.

        It does not wait for other ranks, which may be gone after an error.
        """
        try:
            if self._recorder is not None:
                if self._ledger is not None:
                    self._ledger.close(self._recorder)
                else:
                    self._recorder.commit()
        finally:
            self._closed = True
            self._closing.close()

    def __enter__(self) -> "Reweighter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with closing(self):
                self.finish()
                if distributed.rank() == 0 and (calibration := self.calibration()) is not None:
                    _log.info(str(calibration))
            return
        try:
            self.close()
        except Exception as lost:  # the exception in flight is the one to raise
            warnings.warn(f"the last scores could not be recorded: {lost}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs.

        Call it on every rank, even if only one saves the state: it writes all scores of this rank so far, because the
        model has been trained on these samples. It does not wait for other ranks. If the first rank cannot write its
        scores, they are stored in the state, with a warning.

        Raises:
            LedgerError: Another rank cannot write its scores, even at the second attempt. Do not save a state then.
        """
        if self._ledger is not None and self._recorder is not None:
            state = self._ledger.progress(self._recorder)
        else:
            state = dict(self._progress)
            if self._recorder is not None:
                self._recorder.commit()
        if self._weighting is not None and (kept := self._weighting.state_dict()):
            state["weighting"] = kept
        if "run" in state:
            state["position"] = asdict(self._next)
        if self._target.aligns or self._monitor is None or self.settings.direction == "start":
            state["diagnosed"] = self._monitor is None
            state["compatible"] = self._compatible
            state["target"] = self._target.state_dict()
        if head := self._context.head.state_dict():
            state["head"] = head
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run of a saved state; call it before the first step."""
        names = ("run", "attempt", "token", "scored", "unwritten")
        self._progress = {name: state[name] for name in names if state.get(name) is not None}
        if "position" in state:
            try:
                self._next = Position(**state["position"])
            except TypeError as error:
                raise MimicError(
                    f"the state of the run is damaged: its `position` is {state['position']!r}. Take another."
                ) from error
        if self._weighting is not None:
            self._weighting.load_state_dict(state.get("weighting", {}))
        self._context.head.load_state_dict(state.get("head", {}))
        if "target" not in state:
            return
        self._compatible = state["compatible"]
        diagnosed = self._target.load_state_dict(
            state["target"], diagnosed=state["diagnosed"], compatible=self._compatible
        )
        if diagnosed:
            self._monitor = None

    # The rest

    @property
    def _directory(self) -> Path | None:
        return None if self.settings.ledger is None else path_of(self.settings.ledger, "ledger")

    def _attach(self) -> StepContext:
        """Install hooks on the model; :meth:`close` removes them."""
        settings, targets = self.settings, {n: self._whole.get(n, p) for n, p in self.targets.items()}
        # Posteriors of pairs come from the reference's similarities and need no gradients.
        needs = settings.needs - {"posteriors"} if self._target.has_pairs else settings.needs
        frozen = [n for n, p in targets.items() if not p.requires_grad]
        if settings.reweight == "target" and frozen:
            raise MimicError(f"`reweight='target'` weights the gradients of {frozen[0]!r}, but they are frozen.")
        reach: Reach = "targets" if settings.reweight != "all" else "all" if settings.uncovered == "error" else "around"
        named = set() if settings.parameters is None else named_parameters(self.model, settings.parameters)
        optional = frozenset(targets.keys() - named)
        task = ScoringTask(
            self.model,
            ModelHooks(self.model, targets),
            targets,
            self._whole,
            needs,
            reach,
            optional,
            settings.keep_output_gradients,
        )
        self._closing.callback(task.hooks.remove)
        if settings.reweight == "target" and task.hooked:
            raise MimicError(HOOKED.format(join_names(task.hooked)))
        capture = LossCapture(self.model) if callable(getattr(self.model, "sample_losses", None)) else None
        if capture is not None:
            self._closing.callback(capture.remove)
        ambiguous = settings.masks and settings.on_nonfinite is None
        loss_check = LossCheck(self.model, settings.loss, captured=capture is not None, ambiguous=ambiguous)
        weighting = settings.make_weights
        if isinstance(weighting, KeepsState):
            weighting = weighting.for_run()
            self._weighting = weighting
        head = Head(needs, settings.rests_on_margins)
        return StepContext(settings, task, self._target, capture, loss_check, weighting, self._choose, head)

    def _refuse_replaced(self) -> None:
        for name, parameter in self.targets.items():
            if all(self.model.get_parameter(name) is not known for known in (parameter, self._whole.get(name))):
                raise MimicError(
                    f"`parameters`: {name!r} is another tensor than when the run began "
                    "(`load_state_dict(assign=True)`, a new layer); make a new Reweighter for the changed model."
                )

    def _choose(self, forward: Forward, check: bool) -> ScoringMethod:
        """Return the method that scores a micro-batch; an error on one rank is raised on all ranks."""
        choice = self._choice
        if choice is None or check:
            task = self._context.task

            def chosen() -> Choice:
                chosen = choose_method(task, forward, choice)
                edge = chosen.method.gate_edge(forward)
                forward.check_order([edge.node])
                if forward.losses is None:
                    self._context.loss_check.show(forward, edge)
                return chosen

            problem = "could not score its samples"
            # Before the ranks exchange anything else, because they may disagree.
            distributed.on_all_ranks(forward.check_observed, problem)
            choice = self._choice = distributed.on_all_ranks(chosen, problem)
        return choice.method

    def _note_calibration(self) -> None:
        """Record the calibration of the reference in the ledger, if there is one (a host sync)."""
        if self._ledger is None:
            return
        calibration = self.calibration()
        if calibration is not None:
            self.note({"calibration": calibration.facts()})
        objection = self._target.objection()
        if objection is not None and self._diagnosis is not None:
            self.note({"diagnosis": replace(self._diagnosis, objection=objection).facts()})

    def _diagnose(self, step: Step, result: StepResult) -> StepResult:
        """Return the result, with a report on the reference if this step completes its diagnosis."""
        self._trains |= step.backward_follows
        if self._monitor is None or not step.backward_follows:
            self._steps += 1
            if self._steps % _LOOK_EVERY == 0:
                self._look_for_unsure()
            return result
        scores = self._target.scores_for_diagnosis(result.mimic_scores)
        diagnosis = self._monitor.update(step.given_batch, result, scores)
        if diagnosis is None:
            return result
        monitor, self._monitor = self._monitor, None
        self._diagnosis = diagnosis = replace(diagnosis, **self._context.head.facts())
        self._compatible = diagnosis.verdict == "compatible"
        self._target.choose_direction(diagnosis)
        self.note({"diagnosis": diagnosis.facts()})
        report = monitor.report(
            diagnosis,
            self.settings.on_doubtful,
            aligned=self._target.aligns,
            uniform=self._target.undecided,
            rests_on_margins=self.settings.rests_on_margins,
        )
        return result.with_report(report)

    def _look_for_unsure(self) -> None:
        """Record and warn of a reference that has become unsure since its diagnosis; called on every rank."""
        known = Diagnosis() if self._diagnosis is None else self._diagnosis
        # Without training, this is the only check.
        awaited = self._trains and self._monitor is not None
        if not self.settings.diagnose_reference or known.unsure or awaited:
            return
        diagnosis = replace(known, **self._context.head.facts())
        if not diagnosis.unsure:
            return
        self._diagnosis = diagnosis
        self._compatible = False
        self.note({"diagnosis": diagnosis.facts()})
        report_unsure(diagnosis, self.settings.on_doubtful, rests_on_margins=self.settings.rests_on_margins)


def _describe_data(loader: Any, data_module: Any) -> dict[str, Any]:
    """Return data set, class names and batch size for the ledger's description."""
    data: dict[str, Any] = {} if loader is None else {"data": describe(loader)}
    size = batch_size_of(loader)
    return data | {"class_names": class_names_of(data_module, loader)} | ({} if size is None else {"batch_size": size})


def _warn_of_unwritten(recorder: ScoreRecorder, directory: Path | None) -> None:
    """Warn of unwritten rows of a Reweighter that was not closed.

    They are not written here, because this may run at any moment of garbage collection.
    """
    if recorder.unwritten:
        warnings.warn(
            f"a Reweighter was not closed, and {recorder.unwritten} rows were not written to {directory}. "
            "Use it as a context manager (`with Reweighter(...) as reweighter:`), or call `finish()` and `close()`.",
            stacklevel=2,
        )
