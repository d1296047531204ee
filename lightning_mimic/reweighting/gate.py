"""The gate: lets the weights enter the backward pass."""

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

#: What the weights reach: all trainable parameters, the target parameters, or nothing.
Reweight = Literal["all", "target", "none"]


class Gate(ABC):
    """Scales every sample's row of a gradient in the backward pass of one micro-batch.

    Args:
        hooks: Of the micro-batch.
        clean: Samples that hold no NaN; ``None`` where that is not known.
    """

    def __init__(self, hooks: GradientHooks, clean: Tensor | None) -> None:
        self._hooks = hooks
        self._clean = clean

    @abstractmethod
    def in_backward(self, gradients: Tensor, call: LayerCall, result: StepResult) -> Tensor | None:
        """Return the gradient of the target layer's output with the weights in it.

        Args:
            gradients: As it arrives, shape ``(B, ...)``.
            call: The layer's.
            result: The weights.
        """

    @abstractmethod
    def before_backward(self, forward: Forward, edge: GradientEdge, result: StepResult, scale: Tensor) -> None:
        """Let the weights enter the backward pass that comes.

        Args:
            forward: The micro-batch.
            edge: Where the gradient with one row per sample arrives.
            result: The weights.
            scale: Against underflow in half precision; divided out.
        """

    def _passing(self, result: StepResult) -> Tensor:
        """Return factors under which, if no sample of any rank counts, a blanked sample is the NaN that it was."""
        passing = torch.ones_like(result.scores)
        if self._clean is None:
            return passing
        return torch.where((result.weights.counted == 0) & ~self._clean, torch.nan, passing)

    def rows(self, forward: Forward, result: StepResult) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights, passing factors and mask for the rows that arrive."""
        rows = result.weights.scale, self._passing(result), result.masked
        if not forward.of_all_ranks:
            return rows
        # The gradient holds the rows of all ranks, which have as many each.
        scale, passing, masked = (torch.cat(distributed.gather_equal(each)) for each in rows)
        return scale, passing, masked


class ClosedGate(Gate):
    """Leaves all gradients as they are: the samples are only scored."""

    def in_backward(self, gradients: Tensor, call: LayerCall, result: StepResult) -> Tensor | None:
        """Leave the gradient."""
        return None

    def before_backward(self, forward: Forward, edge: GradientEdge, result: StepResult, scale: Tensor) -> None:
        """Leave the gradient."""


class FullGate(Gate):
    """Weights reach all that a sample's gradient reaches."""

    def in_backward(self, gradients: Tensor, call: LayerCall, result: StepResult) -> Tensor | None:
        """Scale the rows."""
        return gate_rows(gradients, result.weights.scale * self._passing(result), result.masked)

    def before_backward(self, forward: Forward, edge: GradientEdge, result: StepResult, scale: Tensor) -> None:
        """Scale the rows where they will arrive."""
        weights, passing, masked = self.rows(forward, result)
        self._hooks.on_edge(edge, lambda gradients: gate_rows(gradients, weights * passing, masked))


class TargetGate(Gate):
    """Weights reach the target parameters only; all else gets the plain mean.

    Args:
        hooks: Of the micro-batch.
        clean: Samples that hold no NaN; ``None`` where that is not known.
        targets: The target parameters by name.
        factor: Returns the gradient that the backward pass begins with at the loss, a scalar.
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
        # What each target's gradient still lacks, known once the backward pass has come to the target layer.
        self._corrections: dict[str, Tensor] = {}
        for name, parameter in self._targets.items():
            hooks.on_parameter(parameter, self._corrector(name))

    def in_backward(self, gradients: Tensor, call: LayerCall, result: StepResult) -> Tensor | None:
        """Mask the rows, and correct the target parameters' own gradients."""
        kept = gate_rows(gradients, self._passing(result), result.masked)
        change = call.gradients(kept).weighted_sum(result.weights.scale - 1)
        self._corrections = {name: change[part] for part, name in call.parts.items()}
        return kept

    def before_backward(self, forward: Forward, edge: GradientEdge, result: StepResult, scale: Tensor) -> None:
        """Compute the targets' share of the change in a pass of its own; the backward pass stays as it is."""
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
            # What else the gradient holds (a regulariser, another term) stays as it is.
            correction = self._corrections.pop(name, None)
            return None if correction is None else gradient + correction.to(gradient.dtype)

        return correct
