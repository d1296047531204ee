"""Gates: apply the sample weights to gradients in the backward pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lightning_mimic import distributed
from lightning_mimic.gradients import gate_rows, hook_gradient
from lightning_mimic.gradients.layer_hooks import LayerCall
from lightning_mimic.reweighting.forward import Forward
from lightning_mimic.reweighting.hooks import GradientHooks
from lightning_mimic.reweighting.weigh import StepResult

#: Parameters whose gradients are weighted: all trainable parameters, the target parameters, or none.
Reweight = Literal["all", "target", "none"]


class Gate(ABC):
    """Scale each sample's row of a gradient in the backward pass of one micro-batch.

    Args:
        hooks: Gradient hooks of the micro-batch.
        clean: Mask of the samples without NaN, shape ``(B,)``; ``None`` where it is not known.
    """

    def __init__(self, hooks: GradientHooks, clean: Tensor | None) -> None:
        self._hooks = hooks
        self._clean = clean

    @abstractmethod
    def in_backward(self, gradients: Tensor, call: LayerCall, result: StepResult) -> Tensor | None:
        """Return the weighted gradient of the target layer's output, or ``None`` to leave it unchanged.

        Args:
            gradients: Incoming gradient, shape ``(B, ...)``.
            call: Call of the target layer.
            result: Weights of the samples.
        """

    @abstractmethod
    def before_backward(self, forward: Forward, edge: GradientEdge, result: StepResult, scale: Tensor) -> None:
        """Prepare the coming backward pass so that it applies the weights.

        Args:
            forward: Micro-batch after its forward pass.
            edge: Graph edge at which the gradient with one row per sample arrives.
            result: Weights of the samples.
            scale: Factor that prevents underflow in half precision; divided out again.
        """

    def _passing(self, result: StepResult) -> Tensor:
        """Return factors of 1, or NaN for samples with NaN if no sample of any rank has a valid score.

        The factors restore the NaN of samples that were set to zero, so that a batch without a valid sample gives NaN.
        """
        passing = torch.ones_like(result.scores)
        if self._clean is None:
            return passing
        return torch.where((result.weights.counted == 0) & ~self._clean, torch.nan, passing)

    def rows(self, forward: Forward, result: StepResult) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights, factors of :meth:`_passing` and mask for the rows of the incoming gradient."""
        rows = result.weights.scale, self._passing(result), result.masked
        if not forward.of_all_ranks:
            return rows
        # The gradient holds the rows of all ranks, which have equally many samples.
        scale, passing, masked = (torch.cat(distributed.gather_equal(each)) for each in rows)
        return scale, passing, masked


class ClosedGate(Gate):
    """Leave all gradients unchanged: the samples are only scored."""

    def in_backward(self, gradients: Tensor, call: LayerCall, result: StepResult) -> Tensor | None:
        """Leave the gradient unchanged."""
        return None

    def before_backward(self, forward: Forward, edge: GradientEdge, result: StepResult, scale: Tensor) -> None:
        """Leave the gradient unchanged."""


class FullGate(Gate):
    """Weight the gradients of all parameters to which a sample's gradient flows."""

    def in_backward(self, gradients: Tensor, call: LayerCall, result: StepResult) -> Tensor | None:
        """Scale the rows."""
        return gate_rows(gradients, result.weights.scale * self._passing(result), result.masked)

    def before_backward(self, forward: Forward, edge: GradientEdge, result: StepResult, scale: Tensor) -> None:
        """Register a hook that scales the rows at the edge."""
        weights, passing, masked = self.rows(forward, result)
        self._hooks.on_edge(edge, lambda gradients: gate_rows(gradients, weights * passing, masked))


class TargetGate(Gate):
    """Weight the gradients of the target parameters only; all other parameters get the plain mean.

    Args:
        hooks: Gradient hooks of the micro-batch.
        clean: Mask of the samples without NaN, shape ``(B,)``; ``None`` where it is not known.
        targets: Target parameters by name.
        factor: Function that returns the gradient with which the backward pass starts at the loss, a scalar.
    """

    def __init__(
        self,
        hooks: GradientHooks,
        clean: Tensor | None,
        targets: Mapping[str, nn.Parameter],
        factor: Callable[[], Tensor],
    ) -> None:
        super().__init__(hooks, clean)
        self._targets = dict(targets)
        self._factor = factor
        # Correction to add to each target's gradient; set when the backward pass reaches the target layer.
        self._corrections: dict[str, Tensor] = {}
        for name, parameter in self._targets.items():
            hooks.on_parameter(parameter, self._corrector(name))

    def in_backward(self, gradients: Tensor, call: LayerCall, result: StepResult) -> Tensor | None:
        """Mask the rows, and prepare the corrections of the target parameters' gradients."""
        kept = gate_rows(gradients, self._passing(result), result.masked)
        change = call.gradients(kept).weighted_sum(result.weights.scale - 1)
        self._corrections = {name: change[part] for part, name in call.parts.items()}
        return kept

    def before_backward(self, forward: Forward, edge: GradientEdge, result: StepResult, scale: Tensor) -> None:
        """Compute the corrections of the targets' gradients in a separate pass; the backward pass is not weighted."""
        weights, passing, masked = self.rows(forward, result)
        handle = hook_gradient(edge, lambda gradients: gate_rows(gradients, weights - 1, masked))
        seed = forward.seed * scale / forward.rows
        parameters = list(self._targets.values())
        changes = torch.autograd.grad(forward.root, parameters, seed, retain_graph=True, allow_unused=True)
        handle.remove()
        pairs = zip(self._targets, changes, strict=True)
        lacking = {name: change / scale for name, change in pairs if change is not None}

        def correct_and_mask(gradients: Tensor) -> Tensor:
            self._corrections = {name: change * self._factor() for name, change in lacking.items()}
            return gate_rows(gradients, passing, masked)

        self._hooks.on_edge(edge, correct_and_mask)

    def _corrector(self, name: str) -> Callable[[Tensor], Tensor | None]:
        def correct(gradient: Tensor) -> Tensor | None:
            # Other parts of the gradient, such as that of a regulariser, stay unchanged.
            correction = self._corrections.pop(name, None)
            return None if correction is None else gradient + correction.to(gradient.dtype)

        return correct
