"""Where the weights enter the backward pass, and how far they reach."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lightning_mimic.callbacks.judgement import Judgement
from lightning_mimic.callbacks.step import Step
from lightning_mimic.callbacks.support import gather_rows
from lightning_mimic.gradients import gate_rows, hook_gradient
from lightning_mimic.gradients.tap import LayerCall

Scope = Literal["loss", "target"]


class Gate:
    """Scales every sample's row of a gradient, everywhere below it or for the target parameters alone.

    Args:
        targets: The target parameters by name.
        scope: ``"loss"``: the weights reach all that a sample's gradient reaches; ``"target"``: the target
            parameters only, all else gets the plain mean.
    """

    def __init__(self, targets: Mapping[str, nn.Parameter], scope: Scope) -> None:
        self._targets = {name: p for name, p in targets.items() if p.requires_grad}
        self._scope = scope
        self._hooks = [p.register_hook(self._corrector(n)) for n, p in self._targets.items() if scope == "target"]
        self.reset()

    def reset(self) -> None:
        """Forgets the last step."""
        # What a target's gradient lacks, of the loss that training_step returned, or of the one differentiated.
        self._to_scale: dict[str, Tensor] = {}
        self._corrections: dict[str, Tensor] = {}

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        self.reset()
        for hook in self._hooks:
            hook.remove()

    def before_backward(self, factor: Tensor) -> None:
        """Takes the factor between the loss that training_step returned and the one that is differentiated."""
        self._corrections = {name: change * factor for name, change in self._to_scale.items()}

    def in_pass(self, gradients: Tensor, call: LayerCall, judged: Judgement, clean: Tensor | None) -> Tensor:
        """The gradient of a layer's output with the weights in it.

        Args:
            gradients: As it arrives, shape ``(B, ...)``.
            call: The layer's.
            judged: The weights.
            clean: Samples that hold no NaN.
        """
        passing = _passing(judged, clean)
        if self._scope == "loss":
            return gate_rows(gradients, judged.weights.scale * passing, judged.masked)
        kept = gate_rows(gradients, passing, judged.masked)
        change = call.gradients(kept).weighted_sum(judged.weights.scale - 1)
        self._corrections = {name: change[part] for part, name in call.parts.items()}
        return kept

    def ahead(
        self, step: Step, edge: GradientEdge, judged: Judgement, clean: Tensor | None, amplification: Tensor
    ) -> None:
        """Lets the weights enter the backward pass that comes.

        Args:
            step: After its forward pass.
            edge: Where the gradient with one row per sample arrives.
            judged: The weights.
            clean: Samples that hold no NaN.
            amplification: Against underflow in half precision; divided out.
        """
        scale, passing, masked = judged.weights.scale, _passing(judged, clean), judged.masked
        if step.of_all_ranks:  # the gradient holds the rows of all of them
            scale, passing, masked = (gather_rows(rows) for rows in (scale, passing, masked))
        if self._scope == "loss":
            hook_gradient(edge, lambda gradients: gate_rows(gradients, scale * passing, masked))
            return
        # The targets' share of the change by a pass of its own; the backward pass stays as it is.
        handle = hook_gradient(edge, lambda gradients: gate_rows(gradients, scale - 1, masked))
        seed = step.seed * amplification / step.rows
        parameters = list(self._targets.values())
        changes = torch.autograd.grad(step.root, parameters, seed, retain_graph=True, allow_unused=True)
        handle.remove()
        pairs = zip(self._targets, changes, strict=True)
        self._to_scale = {name: change / amplification for name, change in pairs if change is not None}
        hook_gradient(edge, lambda gradients: gate_rows(gradients, passing, masked))

    def _corrector(self, name: str) -> Callable[[Tensor], Tensor | None]:
        def correct(gradient: Tensor) -> Tensor | None:
            # What else the gradient holds (a regulariser, another term) stays as it is.
            correction = self._corrections.pop(name, None)
            return None if correction is None else gradient + correction.to(gradient.dtype)

        return correct


def _passing(judged: Judgement, clean: Tensor | None) -> Tensor:
    """Factors under which, when no sample of any rank counts, what was blanked goes through as the NaN it was."""
    passing = torch.ones_like(judged.scores)
    return passing if clean is None else torch.where((judged.weights.counted == 0) & ~clean, torch.nan, passing)
