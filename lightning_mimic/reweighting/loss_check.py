"""A loss is scored because it was shown to be a plain mean of its samples' losses, or because the user says so."""

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
    """Shows for a run without ``sample_losses`` that its losses are plain means over the samples.

    The operations of a forward pass are followed in its first step, at the start of every epoch, and whenever a batch
    has another size. In between, the graph of the loss must be the one for which it was shown.

    Args:
        module: The module that is trained.
        asserted: The user asserts it, so that nothing is checked.
        captured: The module has ``sample_losses``.
        ambiguous: Look out for code that looks for NaN, as nobody said what NaN in a batch means.
    """

    def __init__(
        self, module: nn.Module, asserted: AssertedLoss | None, *, captured: bool = False, ambiguous: bool = False
    ) -> None:
        self._module = module
        self._asserted = asserted is not None
        self._captured = captured
        self._ambiguous = ambiguous
        #: The module looks for NaN, so that NaN in a batch may be meant.
        self.looks_for_nan = False
        self._sizes: set[int] = set()
        # The means that were shown, and the fingerprints of their graphs.
        self._shown: list[tuple[Total, list[tuple[str, int | None]]]] = []

    @property
    def basis(self) -> str:
        """Why the loss is taken for a plain mean, for the ledger."""
        if self._captured:
            return "sample_losses"
        return "asserted" if self._asserted else "shown"

    def trace(self, batch: object, samples: int, check: bool) -> ForwardTrace | None:
        """Return an empty record for the forward pass that comes; ``None`` if it need not be followed.

        Args:
            batch: What the loss will be computed from.
            samples: B.
            check: It is the first micro-batch of an epoch, or the module has changed.
        """
        shows = not (self._asserted or self._captured) and samples not in self._sizes
        if samples < 2 or not (check or shows):
            return None
        trace = ForwardTrace(samples)
        trace.expect(held_tensors(batch), [*self._module.parameters(), *self._module.buffers()])
        return trace

    def look(self, trace: ForwardTrace) -> None:
        """Take in what a forward pass that was followed says about NaN."""
        names = {operation.name for operation in trace.operations}
        self.looks_for_nan |= self._ambiguous and bool(names & _LOOK_FOR_NAN)

    def show(self, forward: Forward, edge: GradientEdge) -> None:
        """Show that the loss of a forward pass that was followed is a plain mean.

        Args:
            forward: The micro-batch.
            edge: Where the gradient with one row per sample arrives.

        Raises:
            MimicError: It is not shown.
        """
        if forward.trace is None or not forward.shows:
            return
        flow = forward.flow(edge)
        if flow is None:
            raise MimicError(NOT_PLAIN.format(f"the use of the scored rows ({kind_of(edge.node)}) is not seen"))
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
        """Return a :class:`LossProblem` that only the numbers of this batch show, on the device.

        Args:
            forward: The micro-batch.
            edge: Where the gradient with one row per sample arrives.

        Raises:
            MimicError: The loss is computed otherwise than where it was shown to be a plain mean.
        """
        none = torch.zeros((), dtype=torch.int8, device=forward.loss.device)
        if self._asserted or forward.rows < 2:
            return none
        if forward.rows not in self._sizes:
            self.show(forward, edge)
        nodes = between(grad_fn_of(forward.loss), edge.node)
        if not nodes:
            return none  # no gradient will arrive, which is refused when the backward pass has ended
        known = [mean for mean, shown in self._shown if fingerprint(nodes, forward.rows, mean.divisors) == shown]
        if not known and not any(map(is_compiled, nodes)):
            raise MimicError(OTHERWISE)
        apart = any("apart" in mean.orders for mean in known)
        return none + unequal_targets(nodes, forward.rows, apart=apart) * LossProblem.UNEQUAL_TARGETS
