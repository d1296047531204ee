"""Check that the loss is a plain mean of the samples' losses, unless the user asserts it."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lightning_mimic.batches import held_tensors
from lightning_mimic.errors import MimicError
from lightning_mimic.gradients.forward_trace import ForwardTrace
from lightning_mimic.gradients.graph import is_compiled
from lightning_mimic.gradients.nodes import grad_fn_of, kind_of
from lightning_mimic.gradients.plain_mean import between, fingerprint, unequal_targets
from lightning_mimic.gradients.sample_rows import Total
from lightning_mimic.reweighting.forward import Forward
from lightning_mimic.reweighting.loss_problem import LossProblem
from lightning_mimic.reweighting.messages import ELSEWHERE, NOT_PLAIN, OTHERWISE

#: ``"mean"``: the user asserts that the loss is the plain mean of the samples' own losses.
AssertedLoss = Literal["mean"]

_LOOK_FOR_NAN = frozenset({"isnan", "isfinite", "nan_to_num", "nansum", "nanmean", "nanmedian", "nanquantile"})


class LossCheck:
    """Show that the losses of a run without ``sample_losses`` are plain means over the samples.

    The operations of the forward pass are recorded in the first step, at the start of every epoch, and for every new
    batch size. In all other steps, the graph of the loss must match one for which the property was shown.

    Args:
        module: Module that is trained.
        asserted: ``"mean"`` if the user asserts the property, so that nothing is checked; otherwise ``None``.
        captured: Whether the module has ``sample_losses``.
        ambiguous: Whether to detect code that handles NaN, because the user did not configure what NaN in a batch
            means.
    """

    def __init__(
        self, module: nn.Module, asserted: AssertedLoss | None, *, captured: bool = False, ambiguous: bool = False
    ) -> None:
        self._module = module
        self._asserted = asserted is not None
        self._captured = captured
        self._ambiguous = ambiguous
        #: Whether the module's code tests for NaN, so that NaN in a batch may be intended.
        self.looks_for_nan = False
        self._sizes: set[int] = set()
        # Means found so far, and the fingerprints of their graphs.
        self._shown: list[tuple[Total, list[tuple[str, int | None]]]] = []

    @property
    def basis(self) -> str:
        """Reason why the loss is taken to be a plain mean, for the ledger."""
        if self._captured:
            return "sample_losses"
        return "asserted" if self._asserted else "shown"

    def trace(self, batch: object, samples: int, check: bool) -> ForwardTrace | None:
        """Return an empty trace for the coming forward pass, or ``None`` if the pass need not be recorded.

        Args:
            batch: Batch from which the loss will be computed.
            samples: Number of samples B.
            check: Whether this is the first micro-batch of an epoch, or the module has changed.
        """
        shows = not (self._asserted or self._captured) and samples not in self._sizes
        if samples < 2 or not (check or shows):
            return None
        trace = ForwardTrace(samples)
        trace.expect(held_tensors(batch), [*self._module.parameters(), *self._module.buffers()])
        return trace

    def look(self, trace: ForwardTrace) -> None:
        """Update :attr:`looks_for_nan` from a recorded forward pass."""
        names = {operation.name for operation in trace.operations}
        self.looks_for_nan |= self._ambiguous and bool(names & _LOOK_FOR_NAN)

    def show(self, forward: Forward, edge: GradientEdge) -> None:
        """Show that the loss of a recorded forward pass is a plain mean.

        Args:
            forward: Micro-batch after its forward pass.
            edge: Graph edge at which the gradient with one row per sample arrives.

        Raises:
            MimicError: It cannot be shown.
        """
        if forward.trace is None or not forward.shows:
            return
        flow = forward.flow(edge)
        if flow is None:
            raise MimicError(NOT_PLAIN.format(f"the use of the scored rows ({kind_of(edge.node)}) was not recorded"))
        reason = flow.objection(forward.loss)
        if reason is not None:
            raise MimicError(NOT_PLAIN.format(reason))
        for call in forward.calls.calls:
            if call.shape[0] == forward.rows and flow.lies_elsewhere(call.node):
                raise MimicError(ELSEWHERE.format(call.name, call.shape, forward.rows))
        nodes, mean = between(grad_fn_of(forward.loss), edge.node), flow.mean(forward.loss)
        if bool(unequal_targets(nodes, forward.rows, apart="apart" in mean.orders)):
            raise MimicError(LossProblem.UNEQUAL_TARGETS.message)
        self._sizes.add(forward.rows)
        shown = mean, fingerprint(nodes, forward.rows, mean.divisors)
        if shown not in self._shown:
            self._shown.append(shown)

    def problem(self, forward: Forward, edge: GradientEdge) -> Tensor:
        """Return the :class:`LossProblem` that the values of this batch reveal, a scalar on the device.

        Args:
            forward: Micro-batch after its forward pass.
            edge: Graph edge at which the gradient with one row per sample arrives.

        Raises:
            MimicError: The loss is computed by other operations than those for which it was shown to be a plain mean.
        """
        none = torch.zeros((), dtype=torch.int8, device=forward.loss.device)
        if self._asserted or forward.rows < 2:
            return none
        if forward.rows not in self._sizes:
            self.show(forward, edge)
        nodes = between(grad_fn_of(forward.loss), edge.node)
        if not nodes:
            return none  # no gradient will arrive, which raises an error after the backward pass
        known = [mean for mean, shown in self._shown if fingerprint(nodes, forward.rows, mean.divisors) == shown]
        if not known and not any(map(is_compiled, nodes)):
            raise MimicError(OTHERWISE)
        apart = any("apart" in mean.orders for mean in known)
        return none + unequal_targets(nodes, forward.rows, apart=apart) * LossProblem.UNEQUAL_TARGETS
