"""One fit's scoring: from the forward pass to gated gradients, step by step."""

import contextlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_mimic.callbacks.aim import Aim
from lightning_mimic.callbacks.batch import Ids, blank_nan_samples, sample_count
from lightning_mimic.callbacks.features import target_features
from lightning_mimic.callbacks.gating import Gate, Scope
from lightning_mimic.callbacks.hooks import LossTap, wrap_method
from lightning_mimic.callbacks.judgement import Judgement, judge
from lightning_mimic.callbacks.plan import Plan, Reach
from lightning_mimic.callbacks.products import Found, layer_products
from lightning_mimic.callbacks.refusals import HOOKED, NOT_PLAIN, NOT_THE_MEAN
from lightning_mimic.callbacks.step import Step, Way, taken
from lightning_mimic.callbacks.support import on_all_ranks
from lightning_mimic.gradients import hook_gradient
from lightning_mimic.gradients.graph import targets_left_out
from lightning_mimic.gradients.nodes import made_by
from lightning_mimic.gradients.parameters import few
from lightning_mimic.ledger import Flag
from lightning_mimic.scorers import Products, Scorer, Weighting

Escaping = Literal["refuse", "plain"]
#: What a step's doubt says; 0: nothing.
DOUBTS = {1: NOT_PLAIN.format("it left out targets (ignore_index)"), 2: NOT_THE_MEAN, 3: NOT_THE_MEAN}

OnNonfinite = Literal["mask", "mask_loss", "raise"]


class Session:
    """Scores and gates the micro-batches of one fit.

    The order within a step: :meth:`arm`, the module's training_step (after which :class:`Plan` says how the
    samples are scored, and most are), :meth:`before_backward`, the backward pass (in which the weights enter, and a
    single layer is scored), :meth:`finish`.

    Args:
        module: The module that is trained.
        scorer: Makes scores of products.
        weighting: Makes weights of scores.
        aim: What the scores are taken against.
        scope: ``"loss"``: the weights reach all that a sample's gradient reaches; ``"target"``: the target
            parameters only.
        escaping: What to do about trainable parameters that the gate does not reach.
        reweight: Apply the weights, or only score.
        on_nonfinite: What to do about samples whose loss is not finite.
        math_attention: Run attention in scored steps by the kernel that can be differentiated twice.
    """

    def __init__(
        self,
        module: nn.Module,
        scorer: Scorer,
        weighting: Weighting,
        aim: Aim,
        *,
        scope: Scope,
        escaping: Escaping,
        reweight: bool,
        on_nonfinite: OnNonfinite,
        math_attention: bool,
    ) -> None:
        self._scorer = scorer
        self._weighting = weighting
        self._aim = aim
        self._on_nonfinite = on_nonfinite
        reach: Reach = "targets" if not reweight or scope == "target" else "all" if escaping == "refuse" else "around"
        self._plan = Plan(module, aim.targets, scorer.needs, reach=reach)
        if reweight and scope == "target" and self._plan.hooked:
            raise ValueError(HOOKED.format(few(self._plan.hooked)))
        has_losses = callable(getattr(module, "sample_losses", None))
        self._loss_tap = LossTap(module) if has_losses else None
        self._math_attention = math_attention
        self._attention = contextlib.ExitStack()
        self._undo = wrap_method(module, "training_step", self._around_training_step)
        self._gate = Gate(aim.targets, scope) if reweight else None
        self.reset()

    def reset(self) -> None:
        """Forgets the last step, and lets go of its tensors."""
        self._attention.close()
        self._plan.tap.reset()
        if self._gate is not None:
            self._gate.reset()
        if self._loss_tap is not None:
            self._loss_tap.reset()
        #: The step under way is scored.
        self.active = False
        #: Whose gradient was scored, where this step looked.
        self.kind: str | None = None
        self._check = False
        self._backwards = 0
        self._rows: int | None = None
        self._ids: Ids | None = None
        self._step: Step | None = None
        self._left_out: Tensor | None = None
        self._unlike: Tensor | None = None
        self._clean: Tensor | None = None
        self._scale: Tensor | None = None
        self._factor: Tensor | None = None
        self._reference_losses: Tensor | None = None
        self._judgement: Judgement | None = None
        self._norm: Tensor | None = None
        #: The mimic score of each sample, whatever the scorer; NaN without a direction.
        self.towards: Tensor | None = None

    def remove(self) -> None:
        """Takes every hook and wrapper off the module."""
        self.reset()
        self._plan.tap.remove()
        if self._gate is not None:
            self._gate.remove()
        if self._loss_tap is not None:
            self._loss_tap.remove()
        self._undo()

    def _compared(self, unlike: Tensor) -> None:
        self._unlike = unlike
        if self._check and bool(unlike):
            raise ValueError(NOT_THE_MEAN)

    def _decide(self, step: Step) -> None:
        """Has the plan look at the step; what one rank refuses stops all of them."""
        self.kind = on_all_ranks(lambda: self._plan.decide(step), "could not score its samples")

    @property
    def pending(self) -> bool:
        """The last look at a step did not show everything; the next step is to be looked at, too."""
        return self._plan.pending

    def arm(self, batch: Any, ids: Ids | None, scale: Tensor | None, *, check: bool) -> None:
        """Gets ready for the training_step of one micro-batch.

        Args:
            batch: What training_step will get.
            ids: Of its samples, where they are known.
            scale: Of the gradient scaler over the accumulated micro-batches, a scalar; ``None`` without one.
            check: Look at the graph. For the first step and whenever it may have changed.
        """
        self.reset()
        self.active = True
        if self._math_attention:  # until the step is over, because checkpointed blocks run again in reverse passes
            self._attention.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._check = check
        self._scale = scale
        self._ids = ids
        self._rows = sample_count(batch) if ids is None else len(ids)
        self._plan.tap.armed = True
        if self._loss_tap is not None:
            self._loss_tap.armed = True

    def before_backward(self, factor: Tensor) -> None:
        """Takes leave of the forward pass.

        Args:
            factor: The loss that is about to be differentiated over the one that training_step returned
                (accumulation, AMP scale); a scalar.
        """
        self._backwards += 1
        if self._backwards > 1:
            raise RuntimeError(
                "the optimizer runs its closure more than once per batch (LBFGS, SAM); the weights of a batch hold for "
                "one pass. Use an optimizer with one pass."
            )
        self._factor = factor
        if self._gate is not None:
            self._gate.before_backward(factor)

    def doubt(self) -> Tensor:
        """Whether this step's loss was the plain mean of its samples: a code of :data:`DOUBTS`, on the device."""
        assert self._step is not None
        code = torch.zeros((), dtype=torch.int8, device=self._step.loss.device)
        if self._left_out is not None:
            code = code + (self._left_out > 0)
        return code if self._unlike is None else code + 2 * self._unlike

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The step's ledger columns of shape ``(B,)`` and its figures, scalars; ``None`` if none was scored."""
        judgement = self._judgement
        if self._backwards and judgement is None:
            raise RuntimeError("no gradient reached the output of the scored layer, so this batch has no scores.")
        if judgement is None or self._step is None:
            return None
        columns, figures = judgement.columns(), judgement.figures()
        losses = self._own_losses()
        if losses is not None:
            columns["loss"] = losses.float()
        if self._norm is not None:
            figures["mimic/direction_norm"] = self._norm
        return columns, figures

    def _around_training_step(self, call: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return call(batch, *args, **kwargs)
        if self._gate is not None and self._on_nonfinite == "mask" and self._rows:
            batch, self._clean = blank_nan_samples(batch, self._rows)
        outputs = call(batch, *args, **kwargs)
        # A recomputation (activation checkpointing) calls layers again; that is not another use of them.
        self._plan.tap.armed = False
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            step = self._step = taken(loss, self._loss_tap, self._rows)
            self._reference_losses = self._aim.reference_losses(batch, self._loss_tap)
            if self._aim.aligns:
                self._aim.observe(
                    batch, self._ids, lambda: target_features(self._plan, self._aim.targets, step), self._clean
                )
            # Here, within DDP's forward, and not later: beyond it lies a node that must be passed once.
            with torch.autocast(loss.device.type, enabled=False):
                self._after_forward(step)
        return outputs

    def _after_forward(self, step: Step) -> None:
        if self._check:
            self._decide(step)
        if self._loss_tap is not None:  # before the gate, which changes what is compared
            rows = step.rows
            self._loss_tap.compare(lambda: None if self._factor is None else self._factor / rows, self._compared)
        gate = self._plan.gate(step)
        if step.losses is None:
            self._left_out = targets_left_out(made_by(step.loss), gate.node)
        if self._plan.way is Way.IN_PASS:
            hook_gradient(gate, self._on_gradient)
            return
        found: Found = {}
        scale = torch.ones((), device=step.loss.device) if self._scale is None else self._scale
        if self._plan.way is not Way.NONE:
            found = self._plan.products(step, gate, self._direction, scale, self._known_clean())
        judged = self._judge(found)
        if self._gate is not None:
            self._gate.ahead(step, gate, judged, self._clean, scale)
        # The backward pass frees activations as it goes; nothing here may hold them.
        self._plan.tap.reset()

    def _on_gradient(self, gradients: Tensor) -> Tensor | None:
        """Scores, weighs and gates within the backward pass, at the output of the one target layer."""
        assert self._factor is not None
        call, arrived = self._plan.call, gradients.shape
        gradients = gradients.reshape(call.shape)  # flattened where torch makes the output as a view of a matrix
        rows = len(gradients)
        assert self._step is not None
        if rows != self._step.rows:
            raise ValueError(
                f"`parameters`: the output of {call.name!r} has {rows} rows for {self._step.rows} samples in this "
                "batch; it must have one row per sample in every batch."
            )
        # From the mean loss's gradient, scaled and divided, back to that of each unreduced loss.
        unreduced = gradients.to(torch.promote_types(gradients.dtype, torch.float32)) * (rows / self._factor)
        own, clean = call.gradients(unreduced), self._known_clean()
        judged = self._judge(layer_products(call, own, self._scorer.needs, self._direction, clean))
        return None if self._gate is None else self._gate.in_pass(gradients, call, judged, self._clean).reshape(arrived)

    @property
    def _direction(self) -> Mapping[str, Tensor]:
        """Where to, by parameter name; empty if that is not asked for."""
        return {} if self._aim.direction is None else self._aim.direction

    def _judge(self, found: Found) -> Judgement:
        assert self._step is not None
        step, device = self._step, self._step.loss.device
        vanishes = torch.zeros((), dtype=torch.bool, device=device)
        direction_norm = None
        if self._aim.direction is not None:
            norm = self._norm = self._aim.direction.norm()
            vanishes = self._aim.direction.vanishes(norm)
            direction_norm = torch.where(vanishes, torch.ones_like(norm), norm)
            if (dot := found.get("dot")) is not None:
                clean = self._known_clean()
                known = ~vanishes if clean is None else clean & ~vanishes
                self.towards = torch.where(known, -dot / direction_norm, torch.nan)
            vanishes = vanishes | self._aim.undecided
        scores = self._scorer(
            Products(
                samples=torch.zeros(step.rows, device=device),
                direction_norm=direction_norm,
                losses=self._own_losses(),
                reference_losses=self._own(self._reference_losses),
                **found,
            )
        )
        judged = judge(scores, self._known_clean(), vanishes, self._weighting, scaled=self._scale is not None)
        self._judgement = judged
        # By the flag, not by the mask: when no sample is finite nothing is masked, and it must stop all the same.
        if self._on_nonfinite == "raise" and (
            bad := (judged.flags == Flag.NONFINITE_LOSS).nonzero().flatten().tolist()
        ):
            raise FloatingPointError(f"samples at positions {bad} of the batch have a loss that is not finite.")
        return judged

    def _own_losses(self) -> Tensor | None:
        return self._own(self._loss_tap.values) if self._loss_tap is not None else None

    def _own(self, losses: Tensor | None) -> Tensor | None:
        """This rank's part, in float32 or higher."""
        if losses is None or self._step is None:
            return None
        return losses[self._step.own].to(torch.promote_types(losses.dtype, torch.float32))

    def _known_clean(self) -> Tensor | None:
        losses = self._own_losses()
        if losses is None:
            return self._clean
        finite = torch.isfinite(losses)
        return finite if self._clean is None else finite & self._clean
