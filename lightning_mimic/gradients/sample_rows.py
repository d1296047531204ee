"""Which samples a tensor depends on: the values of the data flow that :mod:`~.plain_mean` follows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from lightning_mimic.gradients.forward_trace import Operation, Ref


@dataclass(frozen=True)
class Constant:
    """Does not depend on the batch.

    Attributes:
        exchangeable: Equal or randomly drawn elements, which may lie along the batch as well as across it.
        counts: Elements 0, 1, 2, ... in this order.
        repeated: Axes along which it was expanded, so that all of its slices are the same.
    """

    exchangeable: bool = False
    counts: bool = False
    repeated: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Rows:
    """Holds a row for each sample, which depends on no other sample.

    In which order they lie is found by :mod:`~.sample_order`.

    Attributes:
        axis: The samples' axis. Its size is a multiple of B where other axes were merged with it.
        inner: Steps along this axis from a sample to the next.
        scored: Depends on the scored rows.
    """

    axis: int
    inner: int = 1
    scored: bool = False


@dataclass(frozen=True)
class Total:
    """Is the mean or the sum of the samples' own values, which depend on the scored rows.

    Attributes:
        mean: It is the mean.
        elements: Of a sum: how many elements of one sample it may be said to consist of.
        divisors: Of a mean: by which numbers sums were divided to become it, over B.
        orders: Of a mean over targets, some of which may not count: all targets of a sample lie together
            (``"together"``), or the first of all samples, then the second (``"apart"``).
    """

    mean: bool
    elements: frozenset[int] = frozenset({1})
    divisors: frozenset[int] = frozenset()
    orders: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Mixed:
    """Depends on several samples in another way.

    Attributes:
        reason: Why, as a phrase.
        scored: Depends on the scored rows.
    """

    reason: str
    scored: bool = False


Value = Constant | Rows | Total | Mixed


#: A rule gets the operation, the values of its inputs by token, and B; one value serves for all outputs.
Rule = Callable[[Operation, Mapping[int, Value], int], Value | list[Value]]

FOREIGN = "a tensor that is not part of the batch has a value for each of its samples"


def is_scored(value: Value) -> bool:
    """Whether a value depends on the scored rows."""
    return isinstance(value, Total) or (not isinstance(value, Constant) and value.scored)


def reshaped(rows: Rows, samples: int, old: tuple[int, ...], new: tuple[int, ...]) -> Rows | None:
    """Return where the samples lie after elements kept their order and got another shape; ``None`` if split up.

    Example:
        >>> flat = reshaped(Rows(0), 4, (4, 3, 5), (12, 5))
        >>> flat
        Rows(axis=0, inner=3, scored=False)
        >>> reshaped(flat, 4, (12, 5), (2, 2, 3, 5))
    """
    if prod(old) != prod(new):
        return None
    step = rows.inner * prod(old[rows.axis + 1 :])  # between a sample and the next, in elements
    for axis, size in enumerate(new):
        within = prod(new[axis + 1 :])
        if within <= step and step * samples <= within * size:
            whole = step % within == 0 and (within * size) % (step * samples) == 0
            return replace(rows, axis=axis, inner=step // within) if whole else None
    return None


def mixed(operation: Operation, values: Mapping[int, Value], reason: str) -> Mixed:
    """Return a mixture of an operation's inputs."""
    return Mixed(reason, any(is_scored(values[ref.token]) for ref in operation.inputs))


def unknown(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Return a mixture, for an operation that has no rule."""
    return mixed(operation, values, f"how the operation `{operation.name}` treats the samples is not known")


def rows_of(values: Mapping[int, Value], ref: Ref) -> Rows:
    """Return the value of a tensor that is known to hold rows of samples."""
    rows = values[ref.token]
    assert isinstance(rows, Rows)
    return rows


def tells_apart(value: Value, ref: Ref, axis: int) -> bool:
    """Whether a tensor is a constant with a value of its own at every place along an axis, where it has that axis."""
    if not isinstance(value, Constant) or value.exchangeable or axis < 0:
        return False
    return ref.shape[axis] != 1 and axis not in value.repeated


def axes_of(dims: Any, ndim: int) -> set[int]:
    """Return the axes that an argument ``dim`` names: all, if there is none."""
    if dims is None or (isinstance(dims, list) and not dims):
        return set(range(ndim))
    return {dim % ndim for dim in (dims if isinstance(dims, list) else [dims]) if ndim}
