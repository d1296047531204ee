"""Rules for operations that move, cut, join or work along axes."""

from collections.abc import Mapping
from dataclasses import replace

from lightning_mimic.gradients.forward_trace import Operation
from lightning_mimic.gradients.sample_rows import (
    FOREIGN,
    Mixed,
    Rows,
    Value,
    axes_of,
    is_scored,
    reshaped,
    rows_of,
    tells_apart,
)

VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "unsqueeze",
        "squeeze",
        "t",
        "transpose",
        "permute",
        "expand",
        "select",
        "slice",
        "unbind",
        "split",
        "split_with_sizes",
        "unsafe_split",
        "unsafe_split_with_sizes",
        "flatten",
        "unflatten",
    ]
)


def reshape(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Return where the samples lie in another shape with the elements in the same order."""
    ref = operation.arguments["self"]
    rows = rows_of(values, ref)
    found = reshaped(rows, samples, ref.shape, operation.outputs[0].shape)
    return found or Mixed("the samples' axis is split up", rows.scored)


def permuted(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Return where the samples lie after axes were exchanged."""
    arguments, ref = operation.arguments, operation.arguments["self"]
    ndim = len(ref.shape)
    order = list(range(ndim))
    if operation.name == "permute":
        order = [dim % ndim for dim in arguments["dims"]]
    elif operation.name == "transpose":
        one, two = arguments["dim0"] % ndim, arguments["dim1"] % ndim
        order[one], order[two] = order[two], order[one]
    else:
        order.reverse()
    rows = rows_of(values, ref)
    return replace(rows, axis=order.index(rows.axis))


def expanded(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Return where the samples lie after axes were added in front or made longer."""
    ref = operation.arguments["self"]
    rows = rows_of(values, ref)
    return replace(rows, axis=rows.axis + len(operation.outputs[0].shape) - len(ref.shape))


def repeated_rows(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``repeat``, along other axes than the samples'."""
    ref, repeats = operation.arguments["self"], operation.arguments["repeats"]
    rows, added = rows_of(values, ref), len(repeats) - len(ref.shape)
    if repeats[rows.axis + added] != 1:
        return Mixed("the samples are repeated", rows.scored)
    return replace(rows, axis=rows.axis + added)


def along(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """What works along one axis, and keeps it."""
    ref = operation.arguments.get("self", operation.arguments.get("input"))
    rows = rows_of(values, ref)
    if operation.arguments.get("dim", -1) is None or rows.axis in axes_of(
        operation.arguments.get("dim", -1), len(ref.shape)
    ):
        return Mixed(f"`{operation.name}` along the batch", rows.scored)
    return rows


def renormed(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Each slice along one axis is scaled by its own norm."""
    ref = operation.arguments["self"]
    rows = rows_of(values, ref)
    within = rows.axis in axes_of(operation.arguments["dim"], len(ref.shape))
    return rows if within else Mixed("`renorm` over the batch")


def sliced(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Return what is left of the samples in a part of a tensor, or in several."""
    arguments, ref = operation.arguments, operation.arguments["self"]
    rows, dim = rows_of(values, ref), arguments.get("dim", 0) % len(ref.shape)
    if dim != rows.axis:
        return replace(rows, axis=rows.axis - (dim < rows.axis)) if operation.name in ("select", "unbind") else rows
    if operation.name == "slice" and operation.outputs[0].shape == ref.shape:
        return rows
    return Mixed("only some of the samples, or one, are taken", rows.scored)


def reordered(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Flipped or rolled: the targets of mixed-up samples are still as many rows."""
    ref = operation.arguments["self"]
    rows = rows_of(values, ref)
    if rows.axis not in axes_of(operation.arguments["dims"], len(ref.shape)):
        return rows
    if rows.scored or rows.inner != 1 or ref.shape[rows.axis] != samples:
        return Mixed("the samples' rows are put in another order", rows.scored)
    return rows


def joined(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``cat`` and ``stack``."""
    stacks = operation.name == "stack"
    dim, refs = operation.arguments.get("dim", 0), operation.arguments["tensors"]
    refs = [ref for ref in refs if stacks or ref.shape != (0,)]
    dim %= len(operation.outputs[0].shape)
    places = {(v.axis, v.inner) for ref in refs if isinstance(v := values[ref.token], Rows)}
    scored = any(is_scored(values[ref.token]) for ref in refs)
    if len(places) > 1:
        return Mixed("tensors with the samples on different axes are combined", scored)
    axis, inner = places.pop()
    if not stacks and dim == axis and not all(isinstance(values[ref.token], Rows) for ref in refs):
        return Mixed("something is joined to the batch", scored)
    if any(tells_apart(values[ref.token], ref, axis) for ref in refs):
        return Mixed(FOREIGN, scored)
    return Rows(axis + (stacks and dim <= axis), inner, scored)


def padded(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Return the rows of a padded tensor."""
    ref = operation.arguments["self"]
    rows = rows_of(values, ref)
    if rows.axis >= len(ref.shape) - len(operation.arguments["pad"]) // 2:
        return Mixed("the samples' axis is padded", rows.scored)
    return rows
