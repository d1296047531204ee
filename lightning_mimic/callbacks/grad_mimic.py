"""The callback: added to a Trainer, it scores every sample and re-weights every batch."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mimic.callbacks.aim import Aim, OnDoubtful
from lightning_mimic.callbacks.batch import Ids, class_columns, describe, sample_ids
from lightning_mimic.callbacks.gating import Scope
from lightning_mimic.callbacks.recorder import ScoreRecorder, open_on_all_ranks
from lightning_mimic.callbacks.session import DOUBTS, Escaping, OnNonfinite, Session
from lightning_mimic.callbacks.support import amp_scale, check_packages, check_scorer, check_support, on_all_ranks
from lightning_mimic.gradients import nearest_names
from lightning_mimic.ledger import Flag, LedgerWriter, note_run
from lightning_mimic.reference import Aligned, ReferenceSource, refuse_module_on_features
from lightning_mimic.scorers import MimicScore, Scorer, weighting_of


class GradMimic(Callback):
    """Weights every sample by how far a descent step on it moves the model towards a reference.

    Per sample *i* of a micro-batch, over all ranks: ``mᵢ = −⟨∇ℓᵢ, v⟩/‖v‖`` with ``v = θ_ref − θ``, then
    ``wᵢ = softmax(m/τ)ᵢ``, then the step ``θ ← θ − η Σ wᵢ ∇ℓᵢ``. One layer is scored in a hook inside the one
    backward pass, several in a reverse pass of their own before it; the weights enter the backward pass in a hook, so
    that clipping, accumulation, mixed precision and DDP go on as they were. Where the loss itself mixes samples
    (contrastive losses), ``sample_losses`` gives the samples' own gradients. Logs
    ``mimic/score_mean``, ``mimic/ess`` (effective sample size), ``mimic/direction_norm`` and ``mimic/misaligned``
    (share of negative scores).

    Args:
        reference: A checkpoint's path (``.ckpt``, ``.pt``, ``.safetensors``), a module or a state dict whose
            weights mean the same as the model's; :class:`~lightning_mimic.Aligned` around one of another
            initialisation, width or architecture. Samples that trained it get flattering scores: do not score them.
        parameters: Whose direction counts: ``"all"`` trainable ones, a module path (``"head"``), a parameter name
            (``"head.weight"``), a glob, ``"!"`` in front of any of these to leave them out, or a list. The fewer and
            the later, the cheaper: one last layer costs next to nothing, all about two thirds of a step.
        scorer: What makes scores of the gradients, see :mod:`lightning_mimic.scorers`. One that needs no gradient
            takes no ``parameters``, one that needs no reference, or goes by a ``loader`` of its own, no ``reference``.
        temperature: τ of the softmax, in the score's unit, loss per unit of weight distance; 1.0, if left out. Neither
            this nor ``min_ess`` with a scorer that makes weights itself.
        min_ess: Floor on the effective sample size as a fraction of the batch; raises τ for a batch that would
            fall below. 0: none; 0.25, if left out.
        scope: ``"loss"``: weights reach all that a sample's gradient reaches. ``"target"``: the chosen
            parameters only, all else gets the plain mean.
        escaping: Trainable parameters that the loss reaches around the layer: ``"refuse"`` names them in an
            error, ``"plain"`` lets them have the plain mean.
        reweight: ``False``: only score; training stays what it is without the callback, to the bit.
        ledger: Directory for the scores, one row per sample and scoring; needs ids in the batch (``WithIds``,
            a key ``"id"``, or ``id_from``). A training_step that returns a dict with class indices ``label`` and
            ``predicted``, shape ``(B,)``, has them recorded too.
        id_from: From a batch to its ids.
        on_nonfinite: A sample that holds NaN or whose loss is not finite: ``"mask"`` gives it weight 0 and takes it
            out of the batch that training_step sees, ``"mask_loss"`` goes by the loss alone (where NaN in a batch is
            meant), ``"raise"`` stops, at one host sync per step.
        math_attention: Run attention in scored steps by the slower kernel that can be differentiated twice, so that
            parameters below it can be scored from the losses alone.
        on_doubtful: The first 512 samples tell whether the reference is kin to the model, knows the data and leads
            downhill (:class:`~lightning_mimic.Diagnosis`). If not: ``"warn"``, ``"raise"``, or ``"align"`` it, for
            which weights stay uniform until that is known.

    Raises:
        ValueError: An argument, or at the start of ``fit`` the reference, the parameters, the trainer or the
            ledger are not usable; the message says what was given, what was expected and the fix.

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
        temperature: float | None = None,
        min_ess: float | None = None,
        scope: Scope = "loss",
        escaping: Escaping = "refuse",
        reweight: bool = True,
        ledger: str | Path | None = None,
        id_from: Callable[[Any], Ids] | None = None,
        on_nonfinite: OnNonfinite = "mask",
        math_attention: bool = False,
        on_doubtful: OnDoubtful = "warn",
    ) -> None:
        for name, value, kind in (
            ("scope", scope, Scope),
            ("escaping", escaping, Escaping),
            ("on_nonfinite", on_nonfinite, OnNonfinite),
            ("on_doubtful", on_doubtful, OnDoubtful),
        ):
            if value not in get_args(kind):
                raise ValueError(f"`{name}` is {value!r}; {nearest_names(str(value), get_args(kind))}.")
        self.scorer: Scorer = MimicScore() if scorer is None else scorer
        check_scorer(self.scorer, reference=reference is not None, parameters=parameters is not None)
        if scope == "target" and parameters is None:
            raise ValueError("`scope='target'` weights the target parameters, and this scorer has none.")
        self.reference = reference
        self.parameters = parameters
        self.weighting = weighting_of(self.scorer, temperature, min_ess)
        self.scope = scope
        self.escaping = escaping
        self.reweight = reweight
        self.ledger = None if ledger is None else Path(ledger).expanduser()
        self.id_from = id_from
        self.on_nonfinite = on_nonfinite
        self.math_attention = math_attention
        self.on_doubtful = on_doubtful
        #: Look at the reference while the first samples train.
        self.examines = True
        self._run: str | None = None
        self._attempt = 0
        self._aim: Aim | None = None
        self._resumed: dict[str, Any] | None = None
        self._left: dict[str, Any] = {}
        self._session: Session | None = None
        self._recorder: ScoreRecorder | None = None
        self._ids: Ids | None = None
        self._place: tuple[int, int, int] | None = None
        self._config: dict[str, Any] = {}
        self._checked_epoch = -1

    def should_score(self, trainer: pl.Trainer) -> bool:
        """Whether the batch that starts now is scored and re-weighted; override for a schedule.

        Must say the same on every rank. Batches that are not scored train plainly.
        """
        return True

    def note(self, trainer: pl.Trainer, notes: dict[str, Any]) -> None:
        """Adds to what the ledger's ``meta.json`` says of the fit under way."""
        directory = self._directory(trainer)
        if directory is not None and trainer.is_global_zero:
            note_run(directory, self._attempt, notes)

    # Lightning's hooks, in the order in which they come

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_packages(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        on_all_ranks(lambda: self._attach(trainer, pl_module), "could not start")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._session is not None
        # Not before: a resumed fit learns its step after on_fit_start.
        assert self._aim is not None
        expected = {Flag.ZERO_DIRECTION} if self._aim.aligns else ()
        self._recorder = ScoreRecorder(self._open_ledger(trainer), DOUBTS, expected)
        self._checked_epoch, self._place = -1, None
        if self._aim.at_reference():
            self._recorder.warn({Flag.ZERO_DIRECTION: 0})

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._session is not None
        assert self._aim is not None
        if self._place is None and batch_idx > 0 and not hasattr(trainer.train_dataloader, "state_dict"):
            warnings.warn(
                f"resumed after {batch_idx} batches of epoch {trainer.current_epoch}, but the loader starts that "
                "epoch's data again: some of its samples are scored twice and others not at all. A loader with "
                "`state_dict` goes on where it stopped.",
                stacklevel=2,
            )
        self._session.reset()
        self._place = (trainer.current_epoch, trainer.global_step, batch_idx)
        if self.should_score(trainer):
            caches = isinstance(self.reference, Aligned) and self.reference.cache
            self._ids = sample_ids(batch, self.id_from, needed=self.ledger is not None, wanted=caches)
            # Once per epoch, because a schedule may have unfrozen parameters.
            check = self._checked_epoch != trainer.current_epoch or self._session.pending
            scale = amp_scale(trainer, pl_module)
            # As the backward pass will be scaled, so that a pass before it overflows no sooner.
            scale = None if scale is None else scale / trainer.accumulate_grad_batches
            self._aim.advance()
            self._session.arm(batch, self._ids, scale, check=check)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # Inert outside our own training batches (a learning-rate finder runs others).
        if self._session is None or not self._session.active:
            return
        scale = amp_scale(trainer, pl_module)
        one = torch.ones((), device=loss.device) if scale is None else scale
        self._session.before_backward(one / trainer.accumulate_grad_batches)
        kind = self._session.kind
        if kind is not None and self._checked_epoch < 0:
            self.note(trainer, {"score_kind": kind, "data": describe(trainer.train_dataloader)})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._session is not None
        assert self._recorder is not None
        assert self._place is not None
        scored = self._session.finish()
        if scored is None:
            self._session.reset()
            return
        columns, figures = scored
        assert self._aim is not None
        diagnosis = self._aim.examine(batch, self._session.towards, columns) if self.examines else None
        self._checked_epoch = trainer.current_epoch
        columns |= class_columns(outputs, len(columns["flag"]))
        self._recorder.add(*self._place, self._ids, columns, self._session.doubt())
        self._session.reset()
        pl_module.log_dict(figures, prog_bar=True, on_step=True, on_epoch=False, batch_size=len(columns["flag"]))
        if diagnosis is not None:
            self.note(trainer, {"diagnosis": diagnosis.facts()})
            self._aim.tell()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._recorder is not None
        self._recorder.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._recorder is not None
        self._recorder.close()
        assert self._aim is not None
        self._aim.complain()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            if self._recorder is not None:
                self._recorder.close()
        except Exception as error:  # the exception under way is the one to raise
            warnings.warn(f"the last scores could not be recorded: {error}", stacklevel=2)
        finally:
            self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        if self._recorder is not None:
            # What a checkpoint has trained on, the ledger holds.
            self._recorder.flush()
        state = {} if self._run is None else {"run": self._run, "attempt": self._attempt}
        if aim := self._left if self._aim is None else self._aim.state_dict():
            state["aim"] = aim
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run = state_dict.get("run")
        self._resumed = state_dict.get("aim")

    # What they delegate to

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks everything that can be checked before training, and hooks the layer."""
        check_support(trainer, pl_module)
        if getattr(pl_module, "takes_features", False):
            refuse_module_on_features(self.reference)
        aim = self._aim = Aim(pl_module, self.scorer, self.parameters, self.reference, self.on_doubtful)
        frozen = [n for n, p in aim.targets.items() if not p.requires_grad]
        if self.scope == "target" and frozen:
            raise ValueError(f"`scope='target'` weights the gradients of {frozen[0]!r}, but they are frozen.")
        if self._resumed:
            aim.load_state_dict(self._resumed)
            self._resumed = None
        self._config = {
            **aim.config,
            "temperature": self.weighting.temperature,
            "min_ess": self.weighting.min_ess,
            "scope": self.scope,
            "reweight": self.reweight,
            "world_size": trainer.world_size,
        }
        self._session = Session(
            pl_module,
            self.scorer,
            self.weighting,
            aim,
            scope=self.scope,
            escaping=self.escaping,
            reweight=self.reweight,
            on_nonfinite=self.on_nonfinite,
            math_attention=self.math_attention,
        )

    def _detach(self) -> None:
        if self._session is not None:
            self._session.remove()
        # A checkpoint may be saved after the fit.
        self._left = self._left if self._aim is None else self._aim.state_dict()
        self._session = self._recorder = self._ids = self._aim = None

    def _directory(self, trainer: pl.Trainer) -> Path | None:
        # A development run leaves nothing behind that a real run would trip over.
        return None if trainer.fast_dev_run else self.ledger  # type: ignore[attr-defined]

    def _open_ledger(self, trainer: pl.Trainer) -> LedgerWriter | None:
        directory = self._directory(trainer)
        if directory is None:
            return None
        self._run, self._attempt = open_on_all_ranks(trainer, directory, self._config, self._run)
        return LedgerWriter(directory, self._run, self._attempt, trainer.global_rank)
