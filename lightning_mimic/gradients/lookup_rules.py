"""Rules for operations that look elements up, or write them, by index or mask."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from lightning_mimic.gradients.elementwise_rules import pointwise
from lightning_mimic.gradients.forward_trace import Operation, Ref
from lightning_mimic.gradients.sample_rows import FOREIGN, Constant, Mixed, Rows, Value, is_scored, mixed, tells_apart


def gathered(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``gather`` and ``scatter``: one index for each element that is taken or written."""
    arguments = operation.arguments
    refs = [ref for ref in operation.inputs if ref.shape]
    ndim = len(arguments["self"].shape)
    places = {(v.axis, v.inner) for ref in refs if isinstance(v := values[ref.token], Rows)}
    scored = any(is_scored(values[ref.token]) for ref in refs)
    axis, inner = places.pop()
    if places or axis == arguments["dim"] % ndim:
        return Mixed(f"`{operation.name}` along the batch", scored)
    if any(tells_apart(values[ref.token], ref, axis) for ref in refs):
        return Mixed(FOREIGN, scored)
    if any(ref.shape[axis] != arguments["self"].shape[axis] for ref in refs):
        return Mixed("only some of the samples are taken", scored)
    return Rows(axis, inner, scored)


def one_hot(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Return the rows of class indices that were spread over classes."""
    if operation.arguments["num_classes"] == -1:
        return Mixed("`one_hot` without `num_classes` takes the number of classes from the batch")
    return values[operation.arguments["tensor"].token]


def embedded(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Return the rows of indices that were looked up in a table."""
    table, indices = operation.arguments["weight"], operation.arguments["indices"]
    if isinstance(values[table.token], Constant):
        return values[indices.token]
    return mixed(operation, values, "rows of the batch are looked up")


def placed(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``bucketize`` and ``searchsorted``: the place of each element among limits."""
    arguments = operation.arguments
    limits = arguments.get("boundaries", arguments.get("sorted_sequence"))
    refs = [ref for ref in operation.inputs if ref != limits]
    if len(refs) == 1 and isinstance(values[limits.token], Constant) and len(limits.shape) == 1:
        return values[refs[0].token]
    return mixed(operation, values, f"`{operation.name}` takes its limits from the batch, or several")


def selected(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``index_select``, whose index has one axis."""
    arguments = operation.arguments
    ref, index = arguments["self"], arguments["index"]
    rows, chosen = values[ref.token], values[index.token]
    dim = arguments["dim"] % len(ref.shape)
    if isinstance(rows, Constant):
        return replace(chosen, axis=dim) if isinstance(chosen, Rows) else Mixed(FOREIGN)
    if isinstance(rows, Rows) and isinstance(chosen, Constant):
        return _chosen(rows, ref, dim, index, samples)
    return mixed(operation, values, "samples are chosen by values of the batch")


def _chosen(rows: Rows, ref: Ref, dim: int, index: Ref, samples: int) -> Value:
    if dim != rows.axis:
        return rows
    order = index.shape == (samples,) and index.dtype != torch.bool
    if rows.scored or rows.inner != 1 or ref.shape[dim] != samples or not order:
        return Mixed("the samples' rows are put in another order, or only some are taken", rows.scored)
    return rows  # as the targets of mixed samples are


def indexed(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``tensor[indices]``, and what writes there."""
    arguments = operation.arguments
    ref, indices = arguments["self"], arguments["indices"]
    table, given = values[ref.token], [index for index in indices if index is not None]
    found = [values[index.token] for index in given]
    scored = any(is_scored(values[each.token]) for each in operation.inputs)
    masks = any(index.dtype in (torch.bool, torch.uint8) for index in given)
    writes = operation.name in ("index_put", "_index_put_impl")
    if masks and not (len(given) == 1 and isinstance(found[0], Constant) and not writes):
        return _masked_write(operation, values, scored) if writes else Mixed("samples are chosen by a mask", scored)
    if isinstance(table, Constant) and not writes:
        # A table: each index is looked up for itself.
        if all(index is not None for index in indices) or (len(given) == 1 and indices[0] is not None):
            lookup = replace(operation, arguments={"indices": given}, outputs=(_broadcast(given),))
            return pointwise(lookup, values, samples)
        return Mixed("a table is looked up along a later axis", scored)
    rows = table if isinstance(table, Rows) else Rows(0)  # to be filled with the samples' values
    counting = indices[0] is not None and isinstance(found[0], Constant) and found[0].counts
    if rows.axis == 0 and rows.inner == 1 and counting and indices[0].shape == (samples,) == ref.shape[:1]:
        # tensor[arange(B), classes]: in every row an element of its own.
        own = all(first(v) or (isinstance(v, Constant) and v.exchangeable) for v in found[1:])
        together = all(index is not None and index.shape in ((samples,), ()) for index in indices)
        if own and together and not tells_apart(table, ref, 0) and not _written(operation, values):
            return Rows(0, 1, scored)
        return Mixed("samples are chosen by values of the batch", scored)
    if not isinstance(table, Rows) or writes or len(given) != 1 or not isinstance(found[0], Constant):
        return Mixed("samples are chosen by values of the batch", scored)
    dim = next(axis for axis, index in enumerate(indices) if index is not None)
    if len(given[0].shape) != 1:
        return Mixed("samples are chosen by an index with several axes", scored)
    return _chosen(rows, ref, dim, given[0], samples)


def first(value: Value) -> bool:
    """Whether it has a row for each sample on its first axis."""
    return isinstance(value, Rows) and (value.axis, value.inner) == (0, 1)


def _written(operation: Operation, values: Mapping[int, Value]) -> bool:
    """Whether what is written by ``index_put`` is anything but one number or a row for each sample."""
    ref = operation.arguments.get("values")
    if not isinstance(ref, Ref) or (prod(ref.shape) == 1 and isinstance(values[ref.token], Constant)):
        return False
    # One axis of the indices, and those that were not indexed: with fewer axes it would be broadcast along the first.
    ndim = 1 + len(operation.arguments["self"].shape) - len(operation.arguments["indices"])
    return not (first(values[ref.token]) and len(ref.shape) == ndim)


def _masked_write(operation: Operation, values: Mapping[int, Value], scored: bool) -> Value:
    """``tensor[mask] = number``."""
    arguments = operation.arguments
    ref, mask, number = arguments["self"], arguments["indices"], arguments["values"]
    simple = len(mask) == 1 and mask[0] is not None and prod(number.shape) == 1
    if simple and isinstance(values[number.token], Constant) and mask[0].shape == ref.shape[: len(mask[0].shape)]:
        apart = [values[each.token] for each in (ref, mask[0]) if not isinstance(values[each.token], Constant)]
        places = {(v.axis, v.inner) for v in apart if isinstance(v, Rows)}
        constants = [values[each.token] for each in (ref, mask[0])]
        if len(places) == 1 and all(not isinstance(v, Constant) or v.exchangeable for v in constants):
            return Rows(*places.pop(), scored)
    return Mixed("values are written to samples that a mask chooses", scored)


def _broadcast(refs: Sequence[Ref]) -> Ref:
    return Ref(-1, tuple(torch.broadcast_shapes(*(ref.shape for ref in refs))), torch.int64)
