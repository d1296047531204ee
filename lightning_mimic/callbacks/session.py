"""One fit's scoring: from the hooked layer to gated gradients, step by step."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mimic.callbacks.batch import blank_nan_samples, sample_count
from lightning_mimic.callbacks.hooks import LayerTap, LossTap, wrap_method
from lightning_mimic.callbacks.judgement import Judgement, judge
from lightning_mimic.gradients import Direction, LayerGradients, gate_rows
from lightning_mimic.gradients.graph import (
    escaping_parameters,
    mixes_samples,
    not_a_plain_mean,
    reaches,
    targets_left_out,
    used_beyond,
    uses,
)
from lightning_mimic.ledger import Flag
from lightning_mimic.scorers import SoftmaxWeighting, mimic_score

Scope = Literal["loss", "target"]
Escaping = Literal["refuse", "plain"]
OnNonfinite = Literal["mask", "mask_loss", "raise"]


_NOT_PLAIN = (
    "the loss cannot be taken for a plain mean over samples: {}. Give the module a method `sample_losses(batch)` that "
    "returns one loss per sample, and average it in training_step."
)


class Session:
    """Scores and gates the micro-batches of one fit.

    The order within a step: :meth:`arm`, the module's training_step, :meth:`before_backward`, the backward
    pass (in which the layer's hook scores, weighs and gates), :meth:`finish`.

    Args:
        module: The module that is trained.
        name: The target layer's path.
        targets: The target parameters, by their full names.
        direction: From the trained weights to the reference, by the same names.
        weighting: Makes weights of scores.
        scope: ``"loss"``: the weights reach all that a sample's gradient reaches; ``"target"``: the target
            parameters only.
        escaping: What to do about trainable parameters that the gate does not reach.
        reweight: Apply the weights, or only score.
        on_nonfinite: What to do about samples whose loss is not finite.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        targets: Mapping[str, nn.Parameter],
        direction: Direction,
        weighting: SoftmaxWeighting,
        *,
        scope: Scope,
        escaping: Escaping,
        reweight: bool,
        on_nonfinite: OnNonfinite,
    ) -> None:
        self._module = module
        self._layer = module.get_submodule(name)
        self._targets = dict(targets)
        self._direction = direction
        self._weighting = weighting
        self._scope = scope
        self._escaping = escaping
        self._reweight = reweight
        self._on_nonfinite = on_nonfinite
        self._tap = LayerTap(name, self._layer, self._on_gradient)
        self._loss_tap = LossTap(module) if callable(getattr(module, "sample_losses", None)) else None
        self._left_out: Tensor | None = None
        self._undo = []
        if reweight:
            self._undo.append(wrap_method(module, "training_step", self._around_training_step))
            if scope == "target":
                self._undo += [p.register_hook(self._corrector(n)).remove for n, p in self._targets.items()]
        self.reset()

    def reset(self) -> None:
        """Forgets the last step, and lets go of its tensors."""
        self._tap.reset()
        if self._loss_tap is not None:
            self._loss_tap.reset()
        #: The step under way is scored.
        self.active = False
        self._backwards = 0
        self._rows: int | None = None
        self._clean: Tensor | None = None
        self._factor: Tensor | None = None
        self._scaled = False
        self._corrections: dict[str, Tensor] = {}
        self._judgement: Judgement | None = None
        self._norm: Tensor | None = None

    def remove(self) -> None:
        """Takes every hook and wrapper off the module."""
        self.reset()
        self._tap.remove()
        if self._loss_tap is not None:
            self._loss_tap.remove()
        while self._undo:
            self._undo.pop()()

    def check_targets(self) -> None:
        """Raises ``ValueError`` if a loss has left out targets since the last look (a host sync)."""
        left_out, self._left_out = self._left_out, None
        if left_out is not None and bool(left_out > 0):
            raise ValueError(_NOT_PLAIN.format(f"it left out {int(left_out)} targets (ignore_index)"))

    def at_reference(self) -> bool:
        """Whether the model stands at its reference now (a host sync)."""
        return bool(self._direction.vanishes(self._direction()[1]))

    def arm(self, batch: Any, ids: Any) -> None:
        """Gets ready for the training_step of one micro-batch."""
        self.reset()
        self.active = True
        self._rows = sample_count(batch) if ids is None else len(ids)
        self._tap.armed = True
        if self._loss_tap is not None:
            self._loss_tap.armed = True

    def before_backward(self, loss: Tensor, factor: Tensor, *, scaled: bool, check: bool) -> str | None:
        """Takes leave of the forward pass, and asks the graph whether the scores will be what they are called.

        Args:
            loss: The scalar that is about to be differentiated.
            factor: That loss over the one that training_step returned (accumulation, AMP scale); a scalar.
            scaled: A gradient scaler made part of the factor.
            check: Look at the graph. For the first step and whenever it may have changed.

        Returns:
            With ``check``, whose gradient it is: ``"own_loss"`` or, under batch normalisation after the
            layer, the sample's ``"contribution"`` to the total.

        Raises:
            ValueError: The scores would not be those of the samples, or the weights would not reach all
                parameters; says which and what to do.
        """
        self._backwards += 1
        if self._backwards > 1:
            raise RuntimeError(
                "the optimizer runs its closure more than once per batch (LBFGS, SAM); the weights of a batch hold for "
                "one pass. Use an optimizer with one pass."
            )
        # A recomputation (activation checkpointing) calls the layer again; that is not another use of it.
        self._tap.armed = False
        self._tap.check_used()
        self._check_rows()
        self._factor, self._scaled = factor, scaled
        if self._loss_tap is None and self._tap.node is not None and loss.grad_fn is not None:
            left_out = targets_left_out(loss.grad_fn, self._tap.node)
            self._left_out = left_out if self._left_out is None else self._left_out + left_out
        if not check:
            return None
        if self._loss_tap is not None and self._rows is not None:
            self._loss_tap.expect_plain_mean(factor / self._rows)
        return self._check_graph(loss)

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The step's ledger columns of shape ``(B,)`` and its figures, scalars; ``None`` if none was scored."""
        judgement, norm = self._judgement, self._norm
        if self._backwards and judgement is None:
            raise RuntimeError(
                f"no gradient reached {self._tap.name!r} in this batch, so it was neither scored nor weighted."
            )
        if judgement is None or norm is None:
            return None
        weights = judgement.weights
        columns = {
            "score": judgement.scores.float(),
            # A row that was left to the scaler has no weight of its own.
            "weight": weights.weights.float(),
            "flag": judgement.flags,
            "batch_size": weights.batch_size.expand_as(judgement.flags),
        }
        if self._loss_tap is not None and self._loss_tap.losses is not None:
            columns["loss"] = self._loss_tap.losses.float()
        figures = {
            "mimic/score_mean": weights.score_mean,
            "mimic/ess": weights.ess,
            "mimic/direction_norm": norm,
            "mimic/misaligned": weights.misaligned,
        }
        return columns, figures

    def _around_training_step(self, call: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.active and self._on_nonfinite == "mask" and self._rows:
            batch, self._clean = blank_nan_samples(batch, self._rows)
        return call(batch, *args, **kwargs)

    def _on_gradient(self, gradients: Tensor) -> Tensor | None:
        if self._factor is None:
            raise RuntimeError(
                f"training_step differentiates through {self._tap.name!r} itself (autograd.grad, a gradient penalty); "
                "GradMimic scores the one backward pass that Lightning runs. Name a layer outside of that."
            )
        vectors, norm = self._direction()
        vanishes = self._direction.vanishes(norm)
        rows = len(gradients)
        # From the mean loss's gradient, scaled and divided, back to that of each unreduced loss.
        unreduced = gradients.to(torch.promote_types(gradients.dtype, norm.dtype)) * (rows / self._factor)
        own = LayerGradients(self._layer, self._tap.inputs, unreduced)
        local = {name.rpartition(".")[2]: vector for name, vector in vectors.items()}
        scores = mimic_score(own, local, torch.where(vanishes, torch.ones_like(norm), norm))
        judged = judge(scores, self._known_clean(), vanishes, self._weighting, scaled=self._scaled)
        self._judgement, self._norm = judged, norm
        # By the flag, not by the mask: when no sample is finite nothing is masked, and it must stop all the same.
        if self._on_nonfinite == "raise" and (
            bad := (judged.flags == Flag.NONFINITE_LOSS).nonzero().flatten().tolist()
        ):
            raise FloatingPointError(f"samples at positions {bad} of the batch have a loss that is not finite.")
        if not self._reweight:
            return None
        passing = torch.ones_like(scores)
        if self._clean is not None:
            # When no sample of any rank counts, what was blanked goes through as the NaN that it was.
            passing = torch.where((judged.weights.counted == 0) & ~self._clean, torch.nan, passing)
        if self._scope == "loss":
            return gate_rows(gradients, judged.weights.scale * passing, judged.masked)
        kept = gate_rows(gradients, passing, judged.masked)
        correction = LayerGradients(self._layer, self._tap.inputs, kept).weighted_sum(judged.weights.scale - 1)
        self._corrections = {name: correction[name.rpartition(".")[2]] for name in self._targets}
        return kept

    def _known_clean(self) -> Tensor | None:
        losses = self._loss_tap.losses if self._loss_tap is not None else None
        if losses is None:
            return self._clean
        finite = torch.isfinite(losses)
        return finite if self._clean is None else finite & self._clean

    def _corrector(self, name: str) -> Any:
        def correct(gradient: Tensor) -> Tensor | None:
            # What else the gradient holds (a regulariser, another term) stays as it is.
            correction = self._corrections.pop(name, None)
            return None if correction is None else gradient + correction.to(gradient.dtype)

        return correct

    def _check_rows(self) -> None:
        shape, expected = self._tap.output_shape, self._rows
        if expected is None:
            raise ValueError(
                "the batch's tensors do not share one leading size, so the number of samples is unknown; give ids with "
                "WithIds, a key 'id', or `id_from=`."
            )
        batch_first = LayerGradients.batch_first(self._layer, torch.empty(shape, device="meta"))
        if not batch_first or shape[0] != expected:
            raise ValueError(
                f"the output of {self._tap.name!r} has shape {shape}, but the batch has {expected} samples; the batch "
                "axis must come first and hold one row per sample. Name another layer."
            )
        losses = self._loss_tap.losses if self._loss_tap is not None else None
        if losses is not None and len(losses) != expected:
            raise ValueError(f"`sample_losses` returned {len(losses)} losses for {expected} samples.")

    def _check_graph(self, loss: Tensor) -> str:
        name, gate, root = self._tap.name, self._tap.node, loss.grad_fn
        assert gate is not None
        if root is None or not reaches(root, gate):
            raise ValueError(f"`parameters`: no path leads from the loss to the output of {name!r}.")
        for target, parameter in self._targets.items():
            if uses(gate, parameter) > 1 or used_beyond(root, gate, parameter):
                raise ValueError(
                    f"`parameters`: {target!r} is used more than once in the forward pass (tied); one layer's input "
                    "and output gradient do not hold its whole gradient. Name a parameter that is used once."
                )
        if self._loss_tap is None:
            reason = not_a_plain_mean(root, gate)
            if reason:
                raise ValueError(_NOT_PLAIN.format(reason))
        if self._reweight and self._scope == "loss" and self._escaping == "refuse":
            self._refuse_escaping(escaping_parameters(root, gate, dict(self._module.named_parameters())))
        return "contribution" if mixes_samples(root, gate) else "own_loss"

    def _refuse_escaping(self, names: list[str]) -> None:
        if names:
            shown = ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(
                f"the loss reaches {len(names)} trainable parameters without passing {self._tap.name!r}, so the "
                f"weights would not reach them: {shown}. Name a later layer, weight the target alone with "
                "`scope='target'`, or let these have the plain mean with `escaping='plain'`."
            )
