"""Which sample every row belongs to, in a forward pass that sorts, selects, flips or joins rows of its batch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lightning_mimic.gradients.forward_trace import ForwardTrace, Operation, Ref
from lightning_mimic.gradients.sample_rows import axes_of

#: In the place of a sample, for a row that belongs to none.
_NONE = -1


@dataclass(frozen=True)
class _Order:
    """The samples of the rows along one axis.

    Attributes:
        samples: Of each row the sample's place in the batch.
        axis: Of the tensor; ``None`` where no axis has that length.
    """

    samples: tuple[int, ...]
    axis: int | None = 0

    def taken(self, places: Iterable[int]) -> "_Order":
        """Return the order of those rows."""
        return replace(self, samples=tuple(self.samples[place] for place in places))

    def within(self, shape: Sequence[int]) -> "_Order":
        """Return it for a tensor of another shape: along the same axis, or else the first of that length."""
        count = len(self.samples)
        if self.axis is not None and 0 <= self.axis < len(shape) and shape[self.axis] == count:
            return self
        return replace(self, axis=next((axis for axis, size in enumerate(shape) if size == count), None))


_Orders = frozenset[_Order]
_UNKNOWN: _Orders = frozenset()


class SampleOrder:
    """The order of the samples in every tensor of a forward pass.

    It is followed through all operations, layers and losses included. Where a tensor holds rows in several orders, as a
    mixture of each sample with another (mixup), one of them is the batch's.

    Args:
        trace: Of the forward pass.

    Example:
        >>> import torch
        >>> batch = torch.tensor([[3.0], [1.0], [2.0]])
        >>> trace = ForwardTrace(samples=3)
        >>> trace.expect([batch], [])
        >>> with trace.recording():
        ...     order = batch[:, 0].argsort()
        ...     rows = batch[order].exp()
        ...     back = rows[order.argsort()]
        >>> found = SampleOrder(trace)
        >>> [found.differs(trace.ref(tensor).token) for tensor in (batch, rows, back)]
        [False, True, False]
    """

    def __init__(self, trace: ForwardTrace) -> None:
        self._count = trace.samples
        batch = _Order(tuple(range(trace.samples)))
        self._orders: dict[int, _Orders] = {
            ref.token: frozenset({batch}) for ref in trace.batch if ref.shape[:1] == (trace.samples,)
        }
        self._operations = trace.operations
        for operation in self._operations:
            self._follow(operation)

    def differs(self, token: int, own: slice = slice(None)) -> bool:
        """Return whether row *i* of a tensor is known not to be sample *i*'s, nor a mixture with it.

        Args:
            token: The tensor's in the trace; several rows in succession may belong to each sample.
            own: The rows of this batch, in a tensor that has those of other ranks, too.
        """
        orders = self._orders.get(token, _UNKNOWN)
        return bool(orders) and not any(self._is_of_batch(order.samples[own]) for order in orders)

    def meets_other_order(self, token: int) -> bool:
        """Return whether rows whose order is not known meet labels, or others, whose order is not the batch's.

        Args:
            token: Of the rows in the trace.
        """
        if self._orders.get(token):
            return False
        met = {token}
        for operation in self._operations:
            if not any(ref.token in met for ref in operation.inputs):
                continue
            if not operation.pointwise and operation.name != "cross_entropy":
                continue
            # Rows of other ranks, which belong to no sample here, say nothing.
            known = [order for order in self._own(operation.inputs) if _NONE not in order.samples]
            orders = [order for order in known if len(order.samples) % self._count == 0]
            if orders and not any(self._is_of_batch(order.samples) for order in orders):
                return True
            met.update(ref.token for ref in operation.outputs if ref.shape)
        return False

    def _is_of_batch(self, samples: Sequence[int]) -> bool:
        each, rest = divmod(len(samples), self._count)
        return not rest and all(sample in (_NONE, row // each) for row, sample in enumerate(samples))

    def _follow(self, operation: Operation) -> None:
        if not self._own(operation.inputs):
            for ref in (*operation.outputs, *operation.written):
                self._orders.pop(ref.token, None)
            return
        rule = _RULES.get(operation.name)
        if rule is not None:
            found = rule(self, operation)
        else:
            found = [self._all(operation, ref) for ref in operation.outputs or operation.written[:1]]
        main = found[0] if found else _UNKNOWN
        for ref, orders in zip(operation.outputs, found, strict=False):
            self._orders[ref.token] = orders if ref.shape else _of_number(orders)
        for ref in operation.written:
            self._orders[ref.token] = main
        for alias in operation.aliases:
            if alias.same:
                self._orders[alias.token] = main

    def _own(self, refs: Iterable[Ref]) -> _Orders:
        return frozenset(chain.from_iterable(self._orders.get(ref.token, ()) for ref in refs))

    def _of(self, ref: Ref) -> _Orders:
        return self._orders.get(ref.token, _UNKNOWN)

    def _all(self, operation: Operation, output: Ref) -> _Orders:
        """Return the orders of all inputs, for an operation that moves no rows."""
        found = set()
        for ref in operation.inputs:
            shift = len(output.shape) - len(ref.shape) if operation.pointwise or operation.name == "expand" else 0
            for order in self._of(ref):
                axis = None if order.axis is None else order.axis + shift
                found.add(replace(order, axis=axis).within(output.shape))
        return _located(found)

    # Rules: each returns the orders of the outputs

    def _moved(self, operation: Operation, moves: Callable[[_Order], Sequence[_Order | None]]) -> list[_Orders]:
        """Return the orders of outputs into which the rows of ``self`` were moved; ``None`` for one that is unknown."""
        each = [moves(order) for order in self._of(operation.arguments["self"])]
        return [
            frozenset(order.within(ref.shape) for order in orders if order is not None)
            for ref, orders in zip(operation.outputs, zip(*each, strict=True), strict=False)
        ]

    def _taken(self, operation: Operation) -> list[_Orders]:
        """``index``, ``index_select``, ``gather``, and the values of ``sort`` and ``topk``."""
        if not self._of(operation.arguments["self"]) and operation.name == "index":
            return [self._all(operation, ref) for ref in operation.outputs]  # a table

        def moves(order: _Order) -> list[_Order | None]:
            places = operation.places.get(-1 if order.axis is None else order.axis)
            if places is None:
                return [None if _works_along(operation, order) else order]
            return [order.taken(places)]

        return self._moved(operation, moves)

    def _cut(self, operation: Operation) -> list[_Orders]:
        """``slice``, ``select``, ``unbind`` and ``split``."""
        arguments, ref = operation.arguments, operation.arguments["self"]
        dim, name = arguments.get("dim", 0) % max(len(ref.shape), 1), operation.name
        drops, count = name in ("select", "unbind"), len(operation.outputs)

        def moves(order: _Order) -> list[_Order | None]:
            if order.axis is None:
                return [order] * count
            if order.axis != dim:
                return [replace(order, axis=order.axis - (drops and dim < order.axis))] * count
            rows = range(len(order.samples))
            if name == "slice":
                return [order.taken(rows[arguments["start"] : arguments["end"] : arguments["step"]])]
            if name == "select":
                return [order.taken([rows[arguments["index"]]])]
            sizes = [1] * count if drops else [each.shape[dim] for each in operation.outputs]
            starts = [sum(sizes[:place]) for place in range(count)]
            return [order.taken(rows[at : at + size]) for at, size in zip(starts, sizes, strict=True)]

        return self._moved(operation, moves)

    def _turned(self, operation: Operation) -> list[_Orders]:
        """``flip`` and ``roll``."""
        arguments, ndim = operation.arguments, len(operation.arguments["self"].shape)
        dims = [dim % ndim for dim in arguments["dims"]]

        def moves(order: _Order) -> list[_Order | None]:
            if not dims and operation.name == "roll":
                return [None]
            if order.axis not in dims:
                return [order]
            count = len(order.samples)
            if operation.name == "flip":
                return [order.taken(reversed(range(count)))]
            by = arguments["shifts"][dims.index(order.axis)]
            return [order.taken((row - by) % count for row in range(count))]

        return self._moved(operation, moves)

    def _permuted(self, operation: Operation) -> list[_Orders]:
        """``permute``, ``transpose`` and ``t``."""
        arguments, ndim = operation.arguments, len(operation.arguments["self"].shape)
        axes = list(range(ndim))
        if operation.name == "permute":
            axes = [dim % ndim for dim in arguments["dims"]]
        elif operation.name == "transpose":
            one, two = arguments["dim0"] % ndim, arguments["dim1"] % ndim
            axes[one], axes[two] = two, one
        else:
            axes.reverse()
        return self._moved(
            operation,
            lambda order: [order if order.axis is None else replace(order, axis=axes.index(order.axis))],
        )

    def _unsqueezed(self, operation: Operation) -> list[_Orders]:
        at = operation.arguments["dim"] % len(operation.outputs[0].shape)
        return self._moved(
            operation,
            lambda order: [order if order.axis is None else replace(order, axis=order.axis + (at <= order.axis))],
        )

    def _repeated(self, operation: Operation) -> list[_Orders]:
        repeats, ref = operation.arguments["repeats"], operation.arguments["self"]
        added = len(repeats) - len(ref.shape)

        def moves(order: _Order) -> list[_Order | None]:
            if order.axis is None:
                return [order]
            axis = order.axis + added
            return [_Order(order.samples * repeats[axis], axis)]

        return self._moved(operation, moves)

    def _reduced(self, operation: Operation) -> list[_Orders]:
        """What is computed of all samples has no order."""
        ref = operation.arguments["self"]
        axes = axes_of(operation.arguments.get("dim"), len(ref.shape))
        left = frozenset(order for order in self._of(ref) if order.axis not in axes)
        keeps = operation.arguments.get("keepdim", False)
        return [
            frozenset(
                order
                if order.axis is None
                else replace(order, axis=order.axis - (0 if keeps else sum(axis < order.axis for axis in axes)))
                for order in left
            )
        ] * len(operation.outputs)

    def _joined(self, operation: Operation) -> list[_Orders]:
        """``cat`` and ``stack``."""
        stacks, refs = operation.name == "stack", operation.arguments["tensors"]
        refs = [ref for ref in refs if stacks or ref.shape != (0,)]
        output = operation.outputs[0]
        dim = operation.arguments.get("dim", 0) % len(output.shape)
        parts = [self._along(ref, dim, 1 if stacks else ref.shape[dim], stacks=stacks) for ref in refs]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            return [frozenset({_Order(tuple(chain(*known)), dim)})]
        found = set()
        for order in self._own(refs):
            axis = order.axis if order.axis is None or not stacks else order.axis + (dim <= order.axis)
            if len(order.samples) == self._count:
                found.add(replace(order, axis=axis).within(output.shape))
        return [_located(found)]

    def _along(self, ref: Ref, dim: int, size: int, *, stacks: bool) -> tuple[int, ...] | None:
        """Return the samples of a part that is joined with others; ``None`` if it is not joined along them."""
        orders = self._of(ref)
        if not orders:
            return (_NONE,) * size
        if len(orders) > 1:
            return None
        (order,) = orders
        fits = len(order.samples) == size and (stacks or order.axis == dim)
        return order.samples if fits else None

    def _put(self, operation: Operation) -> list[_Orders]:
        """What writes rows to places: ``index_put``, ``index_copy``, ``index_add``, ``scatter`` and its kinds."""
        arguments = operation.arguments
        ref = arguments["self"]
        source = next((arguments[name] for name in ("values", "source", "src") if name in arguments), None)
        added = self._of(source) if isinstance(source, Ref) else _UNKNOWN
        base = self._of(ref)
        if base and (operation.name in ("index_add", "scatter_add") or arguments.get("accumulate")):
            added = _UNKNOWN  # to each sample's own
        for axis, places in operation.places.items():
            if any(len(order.samples) != len(places) for order in added) or axis >= len(ref.shape):
                continue
            blank = _Order((_NONE,) * ref.shape[axis], axis)
            bases = [order for order in base if order.axis == axis] or ([] if base else [blank])
            written = {_written(old, places, order) for old in bases for order in added}
            if written:
                return [frozenset(written)]
        return [base]

    def _copied(self, operation: Operation) -> list[_Orders]:
        """``copy_``: what it held before does not matter."""
        source = replace(operation, arguments={"src": operation.arguments["src"]})
        refs = (*operation.outputs, *operation.written)
        return [self._all(replace(source, pointwise=True), ref) for ref in refs]


def _of_number(orders: _Orders) -> _Orders:
    """Return the orders of one number, which has one sample's or is made of several."""
    samples = {sample for order in orders for sample in order.samples}
    return frozenset({_Order((samples.pop(),), None)}) if len(samples) == 1 else _UNKNOWN


def _located(orders: Iterable[_Order]) -> _Orders:
    """Return the orders along an axis, or all if there are none: some rows of a packed sequence are added to others."""
    orders = frozenset(orders)
    return frozenset(order for order in orders if order.axis is not None) or orders


def _written(old: _Order, places: Sequence[int], rows: _Order) -> _Order:
    samples = list(old.samples)
    for place, sample in zip(places, rows.samples, strict=True):
        samples[place] = sample
    return replace(old, samples=tuple(samples))


def _works_along(operation: Operation, order: _Order) -> bool:
    """Whether an operation takes elements along the samples' axis at places that are not known."""
    arguments, ref = operation.arguments, operation.arguments["self"]
    if operation.name == "index":
        at = [axis for axis, index in enumerate(arguments["indices"]) if index is not None]
        return order.axis is None or order.axis in at
    return order.axis is None or order.axis == arguments.get("dim", -1) % max(len(ref.shape), 1)


_RULES: dict[str, Callable[[SampleOrder, Operation], Sequence[_Orders]]] = {
    **dict.fromkeys(("index", "_unsafe_index", "index_select", "gather", "sort", "topk"), SampleOrder._taken),
    **dict.fromkeys(
        (
            "slice",
            "select",
            "unbind",
            "split",
            "split_with_sizes",
            "unsafe_split",
            "unsafe_split_with_sizes",
        ),
        SampleOrder._cut,
    ),
    **dict.fromkeys(("flip", "roll"), SampleOrder._turned),
    **dict.fromkeys(("permute", "transpose", "t"), SampleOrder._permuted),
    "unsqueeze": SampleOrder._unsqueezed,
    "repeat": SampleOrder._repeated,
    **dict.fromkeys(
        ("sum", "nansum", "mean", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "prod", "logsumexp"),
        SampleOrder._reduced,
    ),
    **dict.fromkeys(("cat", "stack"), SampleOrder._joined),
    **dict.fromkeys(
        ("index_put", "_index_put_impl", "index_copy", "index_add", "scatter", "scatter_add"), SampleOrder._put
    ),
    "copy": SampleOrder._copied,
}
