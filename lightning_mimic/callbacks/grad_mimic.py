"""The callback: added to a Trainer, it scores every sample and re-weights every batch."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from lightning_mimic import distributed
from lightning_mimic.callbacks.trainer_support import (
    backward_scale,
    check_packages,
    check_support,
    keep_ids,
    loss_of,
    with_loss,
)
from lightning_mimic.reference import Aligned, ReferenceSource
from lightning_mimic.reweighting import Reweighter, Step, StepResult
from lightning_mimic.reweighting.batch import Ids
from lightning_mimic.reweighting.gate import Reweight
from lightning_mimic.reweighting.hooks import wrap_method
from lightning_mimic.reweighting.loss_check import AssertedLoss
from lightning_mimic.reweighting.messages import SEVERAL_PASSES
from lightning_mimic.reweighting.recorder import Position
from lightning_mimic.reweighting.reference_monitor import OnDoubtful
from lightning_mimic.reweighting.settings import OnNonfinite, Origin, Settings, Uncovered
from lightning_mimic.scorers import Scorer, Temperature, Weighting
from lightning_mimic.trainer_package import package_of, pl


class GradMimic(pl.Callback):
    """Weight every sample by how far a gradient step on it moves the model towards a reference.

    For each sample *i* of a micro-batch, over all ranks: the score is ``mᵢ = −⟨∇ℓᵢ, v⟩/‖v‖`` with
    ``v = θ_ref − θ``, the weights are ``w = softmax(m/τ)``, and the step is ``θ ← θ − η Σ wᵢ ∇ℓᵢ``.

    One layer is scored in a hook within the backward pass, several layers in an additional reverse pass before it. The
    weights are applied by a hook in the backward pass, so clipping, accumulation, mixed precision and DDP work as
    before. If the loss itself mixes samples (contrastive losses), the module's ``sample_losses`` provides the gradients
    of single samples.

    Logged are ``mimic/score_mean``, ``mimic/ess`` (effective sample size), ``mimic/direction_norm`` and
    ``mimic/negative_share`` (share of negative scores). For other training loops see
    :class:`~lightning_mimic.Reweighter`.

    Row *i* of the batch must be sample *i* during the whole ``training_step``: sort and filter before, in the
    ``collate_fn``. Samples that the first step of an epoch reorders are refused.

    Args:
        reference: Path of a checkpoint (``.ckpt``, ``.pt``, ``.safetensors``), a module or a state dict whose weights
            have the same meaning as the model's; or :class:`~lightning_mimic.Aligned` around a reference of another
            initialisation, width or architecture. Do not score samples that trained it: their scores are too high.
        parameters: Parameters over which scores are computed: ``"all"`` trainable ones, a module path (``"head"``), a
            parameter name (``"head.weight"``), a glob, a list of these; ``"!"`` in front excludes. Few and late
            parameters are cheap: one last layer costs almost nothing, all parameters about two thirds of a step.
        scorer: Computes scores from products with the samples' gradients, see :mod:`lightning_mimic.scorers`; the mimic
            score by default. A scorer without gradients takes no ``parameters``; one that needs no reference, or has
            its own ``loader``, takes no ``reference``.
        weighting: Computes weights from scores, instead of the softmax with ``temperature`` and ``min_ess``.
        temperature: τ of the softmax in the unit of the score, loss per unit of weight distance; 1.0 by default.
            ``"auto"`` chooses τ for each batch so that the effective sample size is the share of positive scores, see
            :class:`~lightning_mimic.scorers.SoftmaxWeighting`. Not with a scorer that computes weights itself.
        min_ess: Floor on the effective sample size as a fraction of the batch; τ is raised for batches that would fall
            below. 0.25 by default; 0 for no floor. Not with a scorer that computes weights itself.
        reweight: What the weights apply to. ``"all"``: all gradients of the samples. ``"target"``: the gradients of the
            scored parameters; all others get the plain mean. ``"none"``: nothing; training is then bit for bit the same
            as without the callback.
        uncovered: Treatment of trainable parameters that the loss reaches on a path around the weighted tensor:
            ``"error"`` names them in an error, ``"mean"`` gives them the plain mean gradient.
        ledger: Directory for the scores, one row per sample and scoring. It needs ids in the batch (``WithIds``, a key
            or attribute ``id``, or ``id_from``). If training_step returns a dict with class indices ``label`` and
            ``predicted``, shape ``(B,)``, these are recorded as well.
        id_from: Function from a batch, as training_step receives it, to its ids.
        on_nonfinite: Treatment of samples that contain NaN or whose loss is not finite. ``"mask"``: weight 0, and
            zeros in place of the sample in the batch that training_step receives. ``"mask_loss"``: weight 0 if the loss
            is not finite; the batch is not changed (for batches with intended NaN). ``"raise"``: an error, at the cost
            of one host sync per step. By default ``"mask"``, unless the module itself checks for NaN, which may then
            be intended: the first such batch is an error.
        math_attention: Whether to run attention in scored steps with the slower kernel that can be differentiated
            twice, so that parameters below it can be scored from ``sample_losses`` alone.
        loss: Without ``sample_losses``, a module is scored only if the operations between the scored rows and the
            loss show that the loss is a plain mean over the samples. ``"mean"`` asserts this instead. The ledger's
            description records which.
        on_doubtful: Reaction to a reference that does not fit. On the first 512 samples it is checked whether the
            reference shares the model's initialisation, predicts the labels, and whether moving towards it lowers the
            loss (:class:`~lightning_mimic.Diagnosis`). ``"warn"``, ``"raise"``, or ``"align"``, with uniform weights
            until the check is complete. At the last layer of a classifier, the outputs of both networks are compared
            during the whole run; weights are uniform while the reference is so unsure that uncalibrated scores are
            upside down, or while it knows less than the model.
        diagnose_reference: Whether to make these checks.
        direction: Weights from which the direction to the reference is taken: ``"current"``, ``v = θ_ref − θ`` at every
            step, or ``"start"``, ``v = θ_ref − θ₀`` with the weights θ₀ at the start of the run, which checkpoints
            store. ``"start"`` is for a reference that began from the same weights, and for finding wrong labels with
            scores over the whole model (``reweight="none"``); as weights it made training worse.
        keep_output_gradients: Whether to keep the gradients of the outputs of several scored layers (``"all"``), and
            compute the weighted gradients from these without a second pass through the network: 4/3 of a plain step's
            arithmetic instead of 5/3, and more memory, about that of the activations. For models without batch
            normalisation in training mode or activation checkpointing, all of whose trainable parameters are scored.

    Raises:
        MimicError: An argument cannot be used; or, at the start of ``fit``, the reference, the parameters, the trainer
            or the ledger. The message says what was given, what was expected, and the fix.

    Example:
        >>> import lightning as L
        >>> callback = GradMimic(reference="clean.ckpt", parameters="head", ledger="scores/")
        >>> trainer = L.Trainer(callbacks=[callback], accelerator="cpu", logger=False)

    Source: Huang et al., *Evaluating Sample Utility for Efficient Data Selection by Mimicking Model Weights*,
    arXiv 2501.06708.
    """

    def __init__(
        self,
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
    ) -> None:
        self.settings = Settings(
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
        self._fit: _Fit | None = None
        # What a checkpoint gave for the next fit, and what the last fit left.
        self._resumed: dict[str, Any] = {}
        self._left: dict[str, Any] = {}
        # Of a fit whose last scores could not be written: they are tried again before a checkpoint is saved.
        self._unwritten: Reweighter | None = None

    @property
    def reweighter(self) -> Reweighter:
        """The engine of the current fit.

        Raises:
            RuntimeError: No fit is running.
        """
        return self._running.reweighter

    @property
    def last_step(self) -> tuple[StepResult, Ids | None] | None:
        """Scores and weights of the micro-batch that ended last, and its ids; ``None`` if it was not scored.

        Raises:
            RuntimeError: No fit is running.
        """
        return self._running.last

    def should_score(self, trainer: pl.Trainer) -> bool:
        """Return whether the batch that starts now is scored and re-weighted; override for a schedule.

        Must be the same on every rank. Batches that are not scored train plainly.
        """
        return True

    # Lightning's hooks, in the order in which they come

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_packages(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit = distributed.on_all_ranks(lambda: self._attach(trainer, pl_module), "could not start")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not before: a resumed fit knows its step only after on_fit_start. A development run leaves nothing behind.
        if self.reweighter.started:
            return  # by AtCheckpoints, if it comes first
        record = not trainer.fast_dev_run  # type: ignore[attr-defined]
        data_module = getattr(trainer, "datamodule", None)
        self.reweighter.start(trainer.global_step, trainer.train_dataloader, data_module, record=record)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        fit = self._running
        fit.warn_of_repeats(trainer, batch_idx)
        fit.close_step()
        if self.should_score(trainer):
            position = Position(trainer.current_epoch, trainer.global_step, batch_idx)
            fit.step = fit.reweighter.begin(batch, None, position, backward_scale(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        result = self._running.end_step(outputs)
        if result is not None:
            pl_module.log_dict(result.figures(), prog_bar=True, on_step=True, on_epoch=False, batch_size=len(result))
            if result.report:
                package_of(trainer).utilities.rank_zero_info(result.report)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reweighter.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reweighter.finish()
        calibration = self.reweighter.calibration()
        if calibration is not None:
            package_of(trainer).utilities.rank_zero_info(str(calibration))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            self._detach()
        except Exception as error:  # the exception in flight is the one to raise
            warnings.warn(f"the last scores could not be recorded: {error}", stacklevel=2)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        if self._fit is not None:
            return self._fit.reweighter.state_dict()
        if self._unwritten is not None:
            self._left, self._unwritten = self._unwritten.state_dict(), None
        return self._left

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fit is not None:  # a ModelParallelStrategy restores after on_fit_start
            self._fit.reweighter.load_state_dict(state_dict)
            return
        self._resumed = dict(state_dict)

    # What they delegate to

    @property
    def _running(self) -> "_Fit":
        if self._fit is None:
            raise RuntimeError("no fit is running, so there is no engine.")
        return self._fit

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> "_Fit":
        """Check everything that can be checked before training, and put the engine's hooks on the module."""
        check_support(trainer, pl_module, self.settings.reference)

        def prepare(batch: Any) -> Any:
            return trainer.precision_plugin.convert_input(pl.utilities.move_data_to_device(batch, pl_module.device))

        with ExitStack() as failed:
            reweighter = Reweighter.from_settings(pl_module, self.settings, prepare)
            failed.callback(reweighter.close)
            # A fit of the same object after another one continues its ledger, and nothing else.
            left = self.state_dict()
            reweighter.load_state_dict(self._resumed or {n: left[n] for n in ("run", "attempt") if n in left})
            failed.pop_all()
        self._resumed = {}
        return _Fit(reweighter, trainer, pl_module)

    def _detach(self) -> None:
        fit, self._fit = self._fit, None
        if fit is None:
            return
        self._unwritten = fit.reweighter
        fit.close()
        self.state_dict()  # a checkpoint may be saved after the fit


class _Fit:
    """One fit: the engine, and the micro-batch under way.

    Args:
        reweighter: The engine.
        trainer: The trainer.
        module: The module that is trained.
    """

    def __init__(self, reweighter: Reweighter, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.reweighter = reweighter
        #: ``None`` between micro-batches, and for those that are not scored.
        self.step: Step | None = None
        #: Of the micro-batch that ended last.
        self.last: tuple[StepResult, Ids | None] | None = None
        self._started = False
        self._undo = ExitStack()
        self._undo.callback(wrap_method(module, "training_step", self._around_training_step))
        self._undo.callback(keep_ids(trainer))

    def warn_of_repeats(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Warn, before the first micro-batch, if it comes from within an epoch that the loader begins again."""
        if not self._started and batch_idx > 0 and not hasattr(trainer.train_dataloader, "state_dict"):
            warnings.warn(
                f"resumed after {batch_idx} batches of epoch {trainer.current_epoch}, but the loader starts that "
                "epoch's data again: some of its samples are scored twice and others not at all. A loader with "
                "`state_dict` goes on where it stopped.",
                stacklevel=2,
            )
        self._started = True

    def end_step(self, outputs: Any) -> StepResult | None:
        """Record the micro-batch; return its result, if it was scored."""
        step, self.step, self.last = self.step, None, None
        if step is None:
            return None
        with closing(step):
            result = self.reweighter.end(step, outputs)
            self.last = None if result is None else (result, step.ids)
            return result

    def close(self) -> None:
        """Write the last scores, and take everything off the module."""
        self._undo.close()
        self.close_step()
        self.reweighter.close()

    def close_step(self) -> None:
        """Drop a micro-batch that was begun and not trained on, if there is one."""
        if self.step is not None:
            self.step.close()
        self.step = None

    def _around_training_step(self, call: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.step
        if step is None:  # not one of our own training batches (a learning-rate finder runs others)
            return call(batch, *args, **kwargs)
        if step.has_loss:
            raise RuntimeError(SEVERAL_PASSES)
        step.start(batch)
        outputs = call(step.batch, *args, **kwargs)
        loss = loss_of(outputs)
        if loss is not None:
            return with_loss(outputs, step.after_forward(loss))
        return outputs
