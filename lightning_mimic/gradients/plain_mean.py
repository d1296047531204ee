"""Proof that a loss is the plain mean of its samples' losses, from the data flow between scored rows and loss."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_mimic.gradients.forward_trace import ForwardTrace, Operation, Ref
from lightning_mimic.gradients.graph import walk
from lightning_mimic.gradients.mean_rules import divisor_over
from lightning_mimic.gradients.nodes import grad_fn_of, kind_of, shape_of
from lightning_mimic.gradients.row_rules import outputs_of
from lightning_mimic.gradients.sample_rows import Constant, Mixed, Rows, Total, Value, is_scored

_MEAN = 1  # torch's code for a loss's reduction

#: Numbers that people write, and that no real number that was read is by chance.
_WRITTEN = frozenset({-1, 1, 2})


class DataFlow:
    """Which samples every tensor of a forward pass depends on, given that some tensor has a row for each.

    Args:
        trace: Of the forward pass.
        rows: Where the gradient of the scored rows arrives: of a tensor whose first axis is the samples', or theirs
            and more. It must be one that the trace knows.

    Example:
        >>> import torch
        >>> weight, batch = torch.ones(2, requires_grad=True), torch.ones(3, 2)
        >>> trace = ForwardTrace(samples=3)
        >>> trace.expect([batch], [])
        >>> with trace.recording():
        ...     rows = batch * weight
        ...     mean, root = rows.square().mean(), rows.square().mean().sqrt()
        >>> flow = DataFlow(trace, rows.grad_fn)
        >>> flow.objection(mean) is None
        True
        >>> flow.objection(root)
        'a mean or a sum over the batch goes through `sqrt`'
    """

    def __init__(self, trace: ForwardTrace, rows: Node) -> None:
        self._trace = trace
        self._rows = rows
        #: How the batch's own tensors show that the scored rows are not the samples', as a phrase.
        self.misplaced: str | None = None
        self._hooked: set[int] = set()
        self._values: dict[int, Value] = {ref.token: _of_batch(ref, trace.samples) for ref in trace.batch}
        self._values |= dict.fromkeys(trace.constants, Constant())
        self._follow_all()

    def objection(self, loss: Tensor) -> str | None:
        """Return why a loss is not shown to be a plain mean over the samples, as a phrase; ``None`` if it is.

        It is shown where every operation on the way from the scored rows to the loss treats each sample apart, until a
        mean over all of them, or a sum that is divided by their number, and where no factor or normaliser on the way
        was made of several samples, whatever its value in this batch.

        Args:
            loss: Of the traced forward pass.
        """
        if self.misplaced is not None:
            return self.misplaced
        found = self._values.get(self._trace.ref(loss).token)
        if isinstance(found, Total) and found.mean:
            if len(found.orders) > 1 or "in between" in found.orders:
                return "the targets of several losses lie in different orders, or neither together nor apart"
            if any(is_scored(self._values[token]) for token in self._hooked):
                return "a hook on a tensor (`register_hook`) may change the gradient"
            custom = [kind_of(node) for node in between(grad_fn_of(loss), self._rows) if _is_custom(node)]
            return f"the gradients of `{custom[0]}` are made by code of its own" if custom else None
        if isinstance(found, Total):
            return "it is a sum over the batch that is not divided by the number of samples"
        if isinstance(found, Mixed) and found.scored:
            return found.reason
        return "it is not made of the scored rows by operations that can be followed"

    def mean(self, loss: Tensor) -> Total:
        """Return what is known of a loss that is a plain mean."""
        found = self._values[self._trace.ref(loss).token]
        assert isinstance(found, Total)
        return found

    def has_rows(self, node: Node) -> bool:
        """Return whether the tensor that a node made has a row for each sample on its first axis."""
        token, _ = self._trace.nodes.get(node, (-1, 0))
        value = self._values.get(token)
        return isinstance(value, Rows) and value.scored and (value.axis, value.inner) == (0, 1)

    def lies_elsewhere(self, node: Node) -> bool:
        """Return whether the batch's tensors show that the samples lie on another axis than the first of a tensor."""
        token, _ = self._trace.nodes.get(node, (-1, 0))
        value = self._values.get(token)
        if not isinstance(value, Rows):
            return False
        return value.axis != 0 or value.inner * self._trace.samples != shape_of(node)[0]

    def _follow_all(self) -> None:
        token, since = self._trace.nodes[self._rows]
        read: str | None = None  # by Python, which may use the number anywhere later
        whole = False  # one of the numbers that were read is an integer
        within: str | None = None  # by torch, for an argument of the call from Python that goes on
        for place, operation in enumerate(self._trace.operations):
            for ref in operation.inputs:
                # From outside: a constant, unless it may have been made of a number that was read from the batch.
                self._values.setdefault(ref.token, Constant() if read is None else Mixed(read))
                if place == since and ref.token == token:
                    self._begin(ref)
            match operation.name:
                case "read":
                    found = self._reads(operation, f"by `{operation.arguments['by']}`")
                    read = found or read
                    whole |= found is not None and operation.arguments["whole"]
                case "register_hook":
                    self._hooked.add(operation.inputs[0].token)
                case "_local_scalar_dense":
                    within = self._reads(operation, "in place of a number") or within
                case "returned":
                    within = None
                case _:
                    entered = operation.numbers if whole else operation.numbers - _WRITTEN
                    self._follow(operation, within or (read if entered else None))

    def _reads(self, operation: Operation, how: str) -> str | None:
        """Return that an operation reads a number from the batch, as a phrase; truth values are not numbers."""
        source = operation.arguments["self"]
        value = self._values[source.token]
        if operation.arguments.get("size", False):
            unread = isinstance(value, Constant | Rows)  # chosen by constants
        else:
            unread = isinstance(value, Constant) or source.dtype == torch.bool
        if unread:
            return None
        return f"a number was read from the batch {how} and may have entered it"

    def _begin(self, ref: Ref) -> None:
        """Take a tensor for the scored rows."""
        rows, known = Rows(0, inner=max(ref.shape[0] // self._trace.samples, 1), scored=True), self._values[ref.token]
        if isinstance(known, Rows) and (known.axis, known.inner) != (rows.axis, rows.inner):
            self.misplaced = "the samples do not lie on the first axis of the scored rows"
        self._values[ref.token] = rows

    def _follow(self, operation: Operation, read: str | None) -> None:
        """Set the values of what an operation returns and of what it changes."""
        values = self._values
        before = [values.get(ref.token) for ref in operation.written]
        outputs = outputs_of(operation, values, self._trace.samples, read)
        for ref, value in zip((*operation.outputs, *operation.written), outputs, strict=True):
            values[ref.token] = value
        after = [values[ref.token] for ref in operation.written]
        if not after or (before == after and isinstance(after[0], Rows)):
            return
        for alias in operation.aliases:
            known = values.get(alias.token, Constant())
            values[alias.token] = after[0] if alias.same else _changed(known, after[0], alias.covered, operation.name)


def _of_batch(ref: Ref, samples: int) -> Value:
    if ref.shape[:1] == (samples,):
        return Rows(0)
    return Mixed(f"the batch holds a tensor of shape {ref.shape}, not a row for each of {samples} samples")


def _changed(known: Value, part: Value, covered: frozenset[int], name: str) -> Value:
    """Return the value of a tensor of which a part was changed in place, and what that part is now.

    Args:
        known: Its value before.
        part: The value of what was changed.
        covered: Its axes along which the part reaches everything.
        name: Of the operation.
    """
    if isinstance(known, Rows) and part == known:
        return known  # cut and mixed with others' rows
    if isinstance(known, Rows) and isinstance(part, Constant) and part.exchangeable and known.axis in covered:
        return known
    if isinstance(known, Constant) and isinstance(part, Constant):
        kept = covered if known.exchangeable else covered & known.repeated
        return Constant(repeated=kept if part.exchangeable else frozenset())
    return Mixed(f"`{name}` changed a part of it in place", is_scored(known) or is_scored(part))


def between(root: Node, rows: Node) -> list[Node]:
    """Return the nodes on the ways from a loss to the scored rows, both included, in a fixed order."""
    order = list(walk(root, stop=rows))
    leading = {rows}
    stack = [(root, iter(root.next_functions))]
    opened = {root}
    while stack:
        node, children = stack[-1]
        for child, _ in children:
            if child is not None and child not in opened and child is not rows and node is not rows:
                opened.add(child)
                stack.append((child, iter(child.next_functions)))
                break
        else:
            stack.pop()
            if node is not rows and any(child in leading for child, _ in node.next_functions):
                leading.add(node)
    return [node for node in order if node in leading]


def _is_custom(node: Any) -> bool:
    """Whether a user's ``torch.autograd.Function`` made the node."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and not function.__module__.startswith("torch.")


def unequal_targets(nodes: Sequence[Node], samples: int, *, apart: bool = False) -> Tensor:
    """Return whether some averaging cross-entropy did not count as many targets of each sample, a scalar.

    It stays on the device, so that it can be asked at every step and looked at later.

    Args:
        nodes: On the ways from the loss to the scored rows.
        samples: B.
        apart: The targets of a sample do not lie together, but B places apart.
    """
    unequal = torch.zeros((), dtype=torch.bool)
    for node in nodes:
        if not kind_of(node).startswith("NllLoss") or node._saved_reduction != _MEAN:  # type: ignore[attr-defined]
            continue
        ignored = node._saved_ignore_index  # type: ignore[attr-defined]
        ignored -= 2**64 * (ignored >= 2**63)  # autograd keeps it without a sign
        # Counted, because the saved sum of weights is rounded in half precision.
        kept = node._saved_target != ignored  # type: ignore[attr-defined]
        if kept.numel() % samples:
            return torch.ones_like(unequal)
        counts = kept.reshape(-1, samples).sum(0) if apart else kept.reshape(samples, -1).sum(1)
        unequal = unequal | (counts != counts[0]).any()
    return unequal


def fingerprint(nodes: Sequence[Node], samples: int, divisors: Collection[int]) -> list[tuple[str, int | None]]:
    """Return the kinds of nodes, and the numbers by which a sum was divided to become a mean, over B.

    Equal ones belong to losses that are computed in the same way.

    Args:
        nodes: On the ways from the loss to the scored rows.
        samples: B.
        divisors: Over B, from :meth:`DataFlow.mean`.
    """
    return [(kind_of(node), _divisor(node, samples, divisors)) for node in nodes]


def _divisor(node: Any, samples: int, divisors: Collection[int]) -> int | None:
    kind = kind_of(node)
    other = (
        getattr(node, "_saved_other", None) if kind in ("Div", "Mul") and divisors and shape_of(node) == () else None
    )
    if isinstance(other, Tensor):
        other = other.item() if other.device.type == "cpu" and other.ndim == 0 and not other.requires_grad else None
    return divisor_over(samples, other, kind.lower(), divisors) if isinstance(other, int | float) else None
