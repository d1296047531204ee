"""Rules of the data flow: which samples the outputs of an operation depend on, given its inputs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import isclose, prod
from typing import Any

import torch

from lightning_mimic.gradients.forward_trace import Operation, Ref
from lightning_mimic.gradients.sample_rows import Constant, Mixed, Rows, Total, Value, is_scored, reshaped

#: A rule gets the operation, the values of its inputs by token, and B; one value serves for all outputs.
Rule = Callable[[Operation, Mapping[int, Value], int], Value | list[Value]]


def outputs_of(operation: Operation, values: Mapping[int, Value], samples: int, read: str | None) -> list[Value]:
    """Return the values of an operation's outputs, then those of the tensors that it changes.

    Args:
        operation: The operation.
        values: Of its inputs, by token.
        samples: B.
        read: How a number was read from the batch that may have entered the operation.
    """
    own = [values[ref.token] for ref in operation.inputs]
    found: Value | list[Value]
    makes = _makes_constants(operation, values)
    if read is not None:
        found = Mixed(read, not makes and any(map(is_scored, own)))
    elif makes or all(isinstance(value, Constant) for value in own):
        found = Constant(exchangeable=True) if makes else _constant(operation, own)
    elif any(isinstance(value, Total) for value in own):
        found = _of_total(operation, values, samples)
    elif mixed := [value for value in own if isinstance(value, Mixed)]:
        found = Mixed(max(mixed, key=is_scored).reason, any(map(is_scored, own)))
    else:
        found = _rule(operation)(operation, values, samples)
    main = found[0] if isinstance(found, list) else found
    outputs = found if isinstance(found, list) else [found] * len(operation.outputs)
    for ref in operation.written:
        result = not operation.outputs or ref.shape == operation.outputs[0].shape
        outputs = [*outputs, main if result else Mixed(f"`{operation.name}` changed it in place", is_scored(main))]
    return outputs


def _makes_constants(operation: Operation, values: Mapping[int, Value]) -> bool:
    """Whether the outputs hold nothing of the inputs but their shape."""
    name = operation.name
    if any(ref.chosen for ref in operation.inputs):
        return False  # which tells how many there are
    if not (name in _FILLED or name.removesuffix("_like") in _FILLED or name.removeprefix("new_") in _FILLED):
        return False
    filling = [ref for argument, ref in operation.arguments.items() if isinstance(ref, Ref) and argument != "self"]
    found = [(ref.shape, values[ref.token]) for ref in filling]
    return all(isinstance(value, Constant) and (value.exchangeable or shape == ()) for shape, value in found)


def _constant(operation: Operation, own: Sequence[Value]) -> Value:
    if operation.name == "arange":
        return Constant(counts=operation.arguments.get("start", 0) == 0 and operation.arguments.get("step", 1) == 1)
    if operation.name == "index" and len(operation.arguments["self"].shape) == 1:
        own = own[1:]  # what is looked up in a table at drawn places
    kept = operation.pointwise or operation.name in _VIEWS or operation.name == "index"
    exchangeable = kept and all(isinstance(value, Constant) and value.exchangeable for value in own)
    return Constant(exchangeable, repeated=_repeated(operation, own))


def _repeated(operation: Operation, own: Sequence[Value]) -> frozenset[int]:
    """Return the axes along which all slices of a constant are the same, because it was expanded."""
    if not operation.outputs or not (operation.pointwise or operation.name == "expand"):
        return frozenset()
    shape = operation.outputs[0].shape
    axes = {axis for axis, size in enumerate(shape) if size > 1}
    for ref, value in zip(operation.inputs, own, strict=True):
        shift = len(shape) - len(ref.shape)
        axes = {axis for axis in axes if not _tells_apart(value, ref, axis - shift)}
    return frozenset(axes)


def _tells_apart(value: Value, ref: Ref, axis: int) -> bool:
    """Whether a tensor is a constant with a value of its own at every place along an axis, where it has that axis."""
    if not isinstance(value, Constant) or value.exchangeable or axis < 0:
        return False
    return ref.shape[axis] != 1 and axis not in value.repeated


def _rule(operation: Operation) -> Rule:
    """Return the rule for an operation with rows of samples among its inputs, and no mixture of them."""
    if operation.name in _RULES:
        return _RULES[operation.name]
    if operation.pointwise:
        return _pointwise
    return _sample_first if operation.name.startswith(_SAMPLE_FIRST_KINDS) else _unknown


def _unknown(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    return _mixed(operation, values, f"how the operation `{operation.name}` treats the samples is not known")


def _mixed(operation: Operation, values: Mapping[int, Value], reason: str) -> Mixed:
    return Mixed(reason, any(is_scored(values[ref.token]) for ref in operation.inputs))


# Means and sums over the samples


def _of_total(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """A mean or a sum over the samples stays one under what is linear."""
    name = operation.name
    own = [values[ref.token] for ref in operation.inputs]
    totals = [value for value in own if isinstance(value, Total)]
    if name in ("mul", "div") and len(totals) == 1:
        return _scaled(operation, values, samples)
    if name in ("add", "sub", "rsub", "cat", "stack"):
        if any(isinstance(value, Rows) or (isinstance(value, Mixed) and value.scored) for value in own):
            reason = next((v.reason for v in own if isinstance(v, Mixed) and v.scored), None)
            return Mixed(reason or "a mean or a sum over the batch is combined with the values of samples", scored=True)
        if len({total.mean for total in totals}) > 1:
            return Mixed("a mean over the batch and a sum over it are combined", scored=True)
        return replace(
            totals[0],
            elements=frozenset.intersection(*(total.elements for total in totals)),
            divisors=frozenset.union(*(total.divisors for total in totals)),
            orders=frozenset.union(*(total.orders for total in totals)),
        )
    if name in ("sum", "nansum"):
        ref = operation.arguments["self"]
        summed = _products([ref.shape[axis] for axis in _axes(operation.arguments.get("dim"), len(ref.shape))])
        return replace(totals[0], elements=frozenset(one * two for one in totals[0].elements for two in summed))
    if (name in _LINEAR or name in _VIEWS) and len(own) == 1:
        return totals[0]
    return Mixed(f"a mean or a sum over the batch goes through `{name}`", scored=True)


def _scaled(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """A product of a mean or a sum with a number, or their quotient."""
    arguments = operation.arguments
    mine, other = arguments["self"], arguments["other"]
    divided = operation.name == "div"
    if divided and arguments.get("rounding_mode") is not None:
        return Mixed("a mean or a sum over the batch is rounded", scored=True)
    if not isinstance(mine, Ref) or not isinstance(values[mine.token], Total):
        mine, other = other, mine
        if divided:
            return Mixed("a number is divided by a mean or a sum over the batch", scored=True)
    total = values[mine.token]
    assert isinstance(total, Total)
    if isinstance(other, Ref):
        factor = values[other.token]
        if not isinstance(factor, Constant):
            reason = factor.reason if isinstance(factor, Mixed) else "a factor differs between samples"
            return Mixed(f"its normaliser or factor depends on the batch ({reason})", scored=True)
        return total
    if total.mean or not isinstance(other, int | float):
        return total
    divisor = divisor_over(samples, other, operation.name, total.elements)
    return total if divisor is None else replace(total, mean=True, divisors=total.divisors | {divisor})


def divisor_over(samples: int, number: float, operation: str, expected: Collection[int]) -> int | None:
    """Return which of the expected multiples of B a number divides by; ``None`` if it is none of them.

    Args:
        samples: B.
        number: That is divided by, or multiplied with.
        operation: ``"div"`` or ``"mul"``.
        expected: The multiples, over B.
    """
    count = number if operation == "div" else 1 / number if number else 0.0
    return next((each for each in sorted(expected) if isclose(count, each * samples, rel_tol=1e-9)), None)


def _reduced(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """A reduction over some axes."""
    ref = operation.arguments["self"]
    return _over(operation, ref, values[ref.token], samples, operation.arguments.get("dim"))


def _over(operation: Operation, ref: Ref, rows: Value, samples: int, dims: Any) -> Value:
    assert isinstance(rows, Rows)
    name, shape = operation.name, ref.shape
    axes = _axes(dims, len(shape))
    if rows.axis not in axes:
        kept = bool(operation.arguments.get("keepdim", False))
        return rows if kept else replace(rows, axis=rows.axis - sum(axis < rows.axis for axis in axes))
    if not rows.scored:
        return Mixed(f"`{name}` over the batch")
    if name == "mean":
        return Total(mean=True)
    if name in ("sum", "nansum"):
        merged = shape[rows.axis] // samples
        return Total(mean=False, elements=_products([merged, *(shape[axis] for axis in axes if axis != rows.axis)]))
    return Mixed(f"`{name}` over the batch", scored=True)


def _products(sizes: Sequence[int]) -> frozenset[int]:
    found = {1}
    for size in sizes:
        found |= {size * each for each in found}
    return frozenset(found)


def _axes(dims: Any, ndim: int) -> set[int]:
    if dims is None or (isinstance(dims, list) and not dims):
        return set(range(ndim))
    return {dim % ndim for dim in (dims if isinstance(dims, list) else [dims]) if ndim}


def _loss(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """A loss of torch: of each element, or their mean or sum."""
    inputs = operation.inputs
    shape = max((ref.shape for ref in inputs), key=len)
    rows = _pointwise(replace(operation, outputs=(Ref(-1, tuple(shape), torch.float32),)), values, samples)
    return _reduction(operation, rows, tuple(shape), samples)


def _reduction(operation: Operation, rows: Value, shape: tuple[int, ...], samples: int) -> Value | list[Value]:
    how = operation.arguments.get("reduction")
    if how in (0, "none") or not isinstance(rows, Rows):
        return rows
    if not rows.scored:
        return Mixed(f"`{operation.name}` over the batch")
    if how in (1, "mean"):
        return Total(mean=True)
    elements = _products([shape[rows.axis] // samples, *(n for axis, n in enumerate(shape) if axis != rows.axis)])
    return Total(mean=False, elements=elements)


def _class_loss(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """A loss of scores over classes, axis 1 or the only one, for which a sample has one target or more."""
    scores = operation.arguments.get("input", operation.arguments.get("self"))
    target, weight = operation.arguments["target"], operation.arguments.get("weight")
    rows, aim = values[scores.token], values[target.token]
    classes = 1 if len(scores.shape) > 1 else 0
    if not isinstance(rows, Rows):
        return _mixed(operation, values, f"the targets of `{operation.name}` are the samples' and its scores are not")
    if rows.axis == classes:
        return _mixed(operation, values, f"`{operation.name}` takes the samples for classes")
    per_class = len(target.shape) == len(scores.shape)
    place = rows.axis if per_class else rows.axis - (rows.axis > classes)
    if isinstance(aim, Rows):
        if (aim.axis, aim.inner) != (place, rows.inner):
            return _mixed(operation, values, "scores and targets have the samples on different axes")
    elif not (isinstance(aim, Constant) and (aim.exchangeable or target.shape[place] == 1)):
        return _mixed(operation, values, _FOREIGN)
    scored = rows.scored or is_scored(aim)
    own = Rows(place if operation.name != "multilabel_margin_loss_forward" else 0, rows.inner, scored)
    how = operation.arguments["reduction"]
    if isinstance(weight, Ref) and how in (1, "mean") and not per_class and operation.name in _WEIGHTED_MEANS:
        return Mixed("it divides by the sum of its class weights", scored)
    if weight is not None and not isinstance(values[weight.token], Constant):
        return Mixed("its class weights depend on the batch", scored)
    shape = target.shape if not per_class else (*scores.shape[:1], *scores.shape[2:])
    if per_class and operation.name == "cross_entropy":
        own = replace(own, axis=own.axis - (own.axis > classes))
    total = _reduction(operation, own, shape, samples)
    if not isinstance(total, Total) or not total.mean or per_class or operation.name not in _WEIGHTED_MEANS:
        return total
    return replace(total, orders=frozenset({_order(own, shape, samples)}))


def _order(rows: Rows, shape: tuple[int, ...], samples: int) -> str:
    step = rows.inner * prod(shape[rows.axis + 1 :])  # between a sample and the next, in elements
    return "together" if step * samples == prod(shape) else "apart" if step == 1 else "in between"


def _cross_entropy(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    if operation.arguments["size_average"] is not None or operation.arguments["reduce"] is not None:
        return _mixed(operation, values, "`size_average` and `reduce` are no longer used; give `reduction`")
    return _class_loss(operation, values, samples)


def _kl_div(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    if operation.arguments["size_average"] is not None or operation.arguments["reduce"] is not None:
        return _mixed(operation, values, "`size_average` and `reduce` are no longer used; give `reduction`")
    found = _loss(operation, values, samples)
    if operation.arguments["reduction"] == "batchmean" and isinstance(found, Total):
        ref = operation.arguments["input"]
        rows = values[ref.token]
        by_rows = isinstance(rows, Rows) and rows.axis == 0
        return Total(mean=True) if by_rows else Mixed("`batchmean` divides by another axis's size", scored=True)
    return found


def _ctc(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """Losses of shape (B,) from log-probabilities of shape (T, B, C), then values for the reverse pass."""
    arguments = operation.arguments
    logits = values[arguments["log_probs"].token]
    others = [arguments[name] for name in ("targets", "input_lengths", "target_lengths")]
    refs = [ref for ref in others if isinstance(ref, Ref) and ref.shape[:1] == (samples,)]
    fits = isinstance(logits, Rows) and (logits.axis, logits.inner) == (1, 1) and len(refs) == len(others)
    known = [values[ref.token] for ref in refs]
    if not fits or any(not _first(v) and not (isinstance(v, Constant) and v.exchangeable) for v in known):
        return _mixed(operation, values, "lengths and targets of `ctc_loss` are not rows of the batch")
    return [Rows(0, 1, is_scored(logits)), Mixed("kept for the reverse pass", is_scored(logits))]


# Element by element

_FOREIGN = "a tensor that is not part of the batch has a value for each of its samples"


def _pointwise(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Element by element, with broadcasting."""
    shape = operation.outputs[0].shape if operation.outputs else operation.inputs[0].shape
    places: set[tuple[int, int]] = set()
    for ref in operation.inputs:
        value = values[ref.token]
        if isinstance(value, Rows):
            places.add((value.axis + len(shape) - len(ref.shape), value.inner))
    scored = any(is_scored(values[ref.token]) for ref in operation.inputs)
    if len(places) > 1:
        return Mixed("tensors with the samples on different axes are combined", scored)
    axis, inner = places.pop()
    for ref in operation.inputs:
        if _tells_apart(values[ref.token], ref, axis - len(shape) + len(ref.shape)):
            return Mixed(_FOREIGN, scored)
    return Rows(axis, inner, scored, _moved(operation.inputs, values))


def _moved(refs: Sequence[Ref], values: Mapping[int, Value]) -> bool:
    """Whether all rows come in another order; what is mixed with others' rows, as in mixup, belongs to its own."""
    rows = [value for ref in refs if isinstance(value := values[ref.token], Rows)]
    return all(value.moved for value in rows)


def _copied(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``copy_``: what it held before does not matter."""
    source = replace(operation, arguments={"src": operation.arguments["src"]})
    own = [values[ref.token] for ref in source.inputs]
    return _constant(source, own) if isinstance(own[0], Constant) else _pointwise(source, values, samples)


# Views


def _reshape(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    ref = operation.arguments["self"]
    rows = _rows(values, ref)
    found = reshaped(rows, samples, ref.shape, operation.outputs[0].shape)
    return found or Mixed("the samples' axis is split up", rows.scored)


def _permuted(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
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
    rows = _rows(values, ref)
    return replace(rows, axis=order.index(rows.axis))


def _expanded(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    ref = operation.arguments["self"]
    rows = _rows(values, ref)
    return replace(rows, axis=rows.axis + len(operation.outputs[0].shape) - len(ref.shape))


def _repeated_rows(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``repeat``, along other axes than the samples'."""
    ref, repeats = operation.arguments["self"], operation.arguments["repeats"]
    rows, added = _rows(values, ref), len(repeats) - len(ref.shape)
    if repeats[rows.axis + added] != 1:
        return Mixed("the samples are repeated", rows.scored)
    return replace(rows, axis=rows.axis + added)


def _along(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """What works along one axis, and keeps it."""
    ref = operation.arguments.get("self", operation.arguments.get("input"))
    rows = _rows(values, ref)
    if operation.arguments.get("dim", -1) is None or rows.axis in _axes(
        operation.arguments.get("dim", -1), len(ref.shape)
    ):
        return Mixed(f"`{operation.name}` along the batch", rows.scored)
    return rows


def _renormed(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Each slice along one axis is scaled by its own norm."""
    ref = operation.arguments["self"]
    rows = _rows(values, ref)
    return rows if rows.axis in _axes(operation.arguments["dim"], len(ref.shape)) else Mixed("`renorm` over the batch")


def _sliced(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    arguments, ref = operation.arguments, operation.arguments["self"]
    rows, dim = _rows(values, ref), arguments.get("dim", 0) % len(ref.shape)
    if dim != rows.axis:
        return replace(rows, axis=rows.axis - (dim < rows.axis)) if operation.name in ("select", "unbind") else rows
    if operation.name == "slice" and operation.outputs[0].shape == ref.shape:
        return rows
    return Mixed("only some of the samples, or one, are taken", rows.scored)


def _reordered(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Flipped or rolled: the targets of mixed-up samples are still as many rows."""
    ref = operation.arguments["self"]
    rows = _rows(values, ref)
    if rows.axis not in _axes(operation.arguments["dims"], len(ref.shape)):
        return rows
    if rows.scored or rows.inner != 1 or ref.shape[rows.axis] != samples:
        return Mixed("the samples' rows are put in another order", rows.scored)
    return replace(rows, moved=True)


def _joined(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
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
    if any(_tells_apart(values[ref.token], ref, axis) for ref in refs):
        return Mixed(_FOREIGN, scored)
    return Rows(axis + (stacks and dim <= axis), inner, scored, _moved(refs, values))


def _padded(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    ref = operation.arguments["self"]
    rows = _rows(values, ref)
    if rows.axis >= len(ref.shape) - len(operation.arguments["pad"]) // 2:
        return Mixed("the samples' axis is padded", rows.scored)
    return rows


# Looking up


def _gathered(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``gather`` and ``scatter``: one index for each element that is taken or written."""
    arguments = operation.arguments
    refs = [ref for ref in operation.inputs if ref.shape]
    ndim = len(arguments["self"].shape)
    places = {(v.axis, v.inner) for ref in refs if isinstance(v := values[ref.token], Rows)}
    scored = any(is_scored(values[ref.token]) for ref in refs)
    axis, inner = places.pop()
    if places or axis == arguments["dim"] % ndim:
        return Mixed(f"`{operation.name}` along the batch", scored)
    if any(_tells_apart(values[ref.token], ref, axis) for ref in refs):
        return Mixed(_FOREIGN, scored)
    if any(ref.shape[axis] != arguments["self"].shape[axis] for ref in refs):
        return Mixed("only some of the samples are taken", scored)
    return Rows(axis, inner, scored, _moved(refs, values))


def _one_hot(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    if operation.arguments["num_classes"] == -1:
        return Mixed("`one_hot` without `num_classes` takes the number of classes from the batch")
    return values[operation.arguments["tensor"].token]


def _embedded(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    table, indices = operation.arguments["weight"], operation.arguments["indices"]
    if isinstance(values[table.token], Constant):
        return values[indices.token]
    return _mixed(operation, values, "rows of the batch are looked up")


def _placed(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``bucketize`` and ``searchsorted``: the place of each element among limits."""
    arguments = operation.arguments
    limits = arguments.get("boundaries", arguments.get("sorted_sequence"))
    refs = [ref for ref in operation.inputs if ref != limits]
    if len(refs) == 1 and isinstance(values[limits.token], Constant) and len(limits.shape) == 1:
        return values[refs[0].token]
    return _mixed(operation, values, f"`{operation.name}` takes its limits from the batch, or several")


def _selected(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``index_select``, whose index has one axis."""
    arguments = operation.arguments
    ref, index = arguments["self"], arguments["index"]
    rows, chosen = values[ref.token], values[index.token]
    dim = arguments["dim"] % len(ref.shape)
    if isinstance(rows, Constant):
        return replace(chosen, axis=dim) if isinstance(chosen, Rows) else Mixed(_FOREIGN)
    if isinstance(rows, Rows) and isinstance(chosen, Constant):
        return _chosen(rows, ref, dim, index, samples)
    return _mixed(operation, values, "samples are chosen by values of the batch")


def _chosen(rows: Rows, ref: Ref, dim: int, index: Ref, samples: int) -> Value:
    if dim != rows.axis:
        return rows
    order = index.shape == (samples,) and index.dtype != torch.bool
    if rows.scored or rows.inner != 1 or ref.shape[dim] != samples or not order:
        return Mixed("the samples' rows are put in another order, or only some are taken", rows.scored)
    return replace(rows, moved=True)  # as the targets of mixed samples are


def _indexed(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
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
            return _pointwise(lookup, values, samples)
        return Mixed("a table is looked up along a later axis", scored)
    rows = table if isinstance(table, Rows) else Rows(0)  # to be filled with the samples' values
    counting = indices[0] is not None and isinstance(found[0], Constant) and found[0].counts
    if rows.axis == 0 and rows.inner == 1 and counting and indices[0].shape == (samples,) == ref.shape[:1]:
        # tensor[arange(B), classes]: in every row an element of its own.
        own = all(_first(v) or (isinstance(v, Constant) and v.exchangeable) for v in found[1:])
        together = all(index is not None and index.shape in ((samples,), ()) for index in indices)
        if own and together and not _tells_apart(table, ref, 0) and not _written(operation, values):
            return Rows(0, 1, scored)
        return Mixed("samples are chosen by values of the batch", scored)
    if not isinstance(table, Rows) or writes or len(given) != 1 or not isinstance(found[0], Constant):
        return Mixed("samples are chosen by values of the batch", scored)
    dim = next(axis for axis, index in enumerate(indices) if index is not None)
    if len(given[0].shape) != 1:
        return Mixed("samples are chosen by an index with several axes", scored)
    return _chosen(rows, ref, dim, given[0], samples)


def _first(value: Value) -> bool:
    """Whether it has a row for each sample on its first axis."""
    return isinstance(value, Rows) and (value.axis, value.inner) == (0, 1)


def _written(operation: Operation, values: Mapping[int, Value]) -> bool:
    """Whether what is written by ``index_put`` is anything but one number or a row for each sample."""
    ref = operation.arguments.get("values")
    if not isinstance(ref, Ref) or (prod(ref.shape) == 1 and isinstance(values[ref.token], Constant)):
        return False
    # One axis of the indices, and those that were not indexed: with fewer axes it would be broadcast along the first.
    ndim = 1 + len(operation.arguments["self"].shape) - len(operation.arguments["indices"])
    return not (_first(values[ref.token]) and len(ref.shape) == ndim)


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


# Layers


def _matrix(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Products of matrices and vectors."""
    one, two = _FACTORS[operation.name]
    left, right = operation.arguments[one], operation.arguments[two]
    a, b = values[left.token], values[right.token]
    scored = any(is_scored(values[ref.token]) for ref in operation.inputs)
    found: Rows | None = None
    last = len(left.shape) - 1
    if isinstance(a, Rows) and a.axis != last and (isinstance(b, Constant) and len(right.shape) <= 2):
        found = a
    elif isinstance(b, Rows) and b.axis == len(right.shape) - 1 == 1 and isinstance(a, Constant) and last == 1:
        found = b
    elif len(left.shape) == len(right.shape) == 3 and a.__class__ is b.__class__ is Rows:
        batched = isinstance(a, Rows) and isinstance(b, Rows) and a.axis == b.axis == 0 and a.inner == b.inner
        found = a if batched and isinstance(a, Rows) else None
    elif len(left.shape) == 3 and isinstance(a, Rows) and a.axis == 1 and isinstance(b, Constant):
        found = a
    if found is None:
        if {a.__class__, b.__class__} == {Rows, Constant}:
            return Mixed(f"`{operation.name}` sums over the batch, or takes a constant for each sample", scored)
        return Mixed(f"`{operation.name}` combines samples with others", scored)
    found = replace(found, scored=scored)
    added = operation.arguments.get("self") if operation.name.startswith("add") else None
    added = operation.arguments.get("self") if operation.name == "baddbmm" else added
    if isinstance(added, Ref):
        product = Ref(-2, operation.outputs[0].shape, torch.float32)
        sums = replace(operation, arguments={"self": added, "product": product})
        return _pointwise(sums, {**values, -2: found}, samples)
    return found


_FACTORS = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "addmv": ("mat", "vec"),
    "linear": ("input", "weight"),
}


def _sample_first(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """Layers that treat the rows of axis 0 alike and apart, by parameters."""
    refs = operation.inputs
    moving = [ref for ref in refs if not isinstance(values[ref.token], Constant)]
    scored = any(is_scored(values[ref.token]) for ref in moving)
    first = [values[ref.token] for ref in moving]
    if (
        any(not isinstance(v, Rows) or v.axis != 0 for v in first)
        or len({v.inner for v in first if isinstance(v, Rows)}) != 1
    ):
        return Mixed(f"the samples do not lie on the first axis of `{operation.name}`", scored)
    if len(moving) > 1 and not operation.name.startswith(_ATTENTION):
        return _unknown(operation, values, samples)
    rows = replace(first[0], scored=scored) if isinstance(first[0], Rows) else first[0]
    size = moving[0].shape[0]
    return [
        rows if ref.shape[:1] == (size,) else Mixed(f"`{operation.name}` returned it beside its result", scored)
        for ref in operation.outputs
    ]


def _normalised(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """Layer normalisation and its kind, over the last axes."""
    ref = operation.arguments["input"]
    rows = _rows(values, ref)
    if rows.axis >= len(ref.shape) - len(operation.arguments["normalized_shape"]):
        return Mixed(f"`{operation.name}` over the batch", rows.scored)
    return rows


def _rows(values: Mapping[int, Value], ref: Ref) -> Rows:
    rows = values[ref.token]
    assert isinstance(rows, Rows)
    return rows


_FILLED = frozenset(
    [
        "bernoulli_",
        "cauchy",
        "empty",
        "empty_strided",
        "exponential",
        "fill",
        "full",
        "geometric",
        "log_normal",
        "normal",
        "ones",
        "rand",
        "randint",
        "randn",
        "random",
        "scalar_tensor",
        "uniform",
        "zero",
        "zeros",
        "normal_functional",
    ]
)

_LINEAR = frozenset(["neg", "clone", "detach", "alias", "_to_copy", "lift_fresh", "sum", "mean"])

_VIEWS = frozenset(
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

#: Losses whose mean divides by the sum of their classes' weights.
_WEIGHTED_MEANS = frozenset({"cross_entropy", "nll_loss_forward", "nll_loss2d_forward"})

_ATTENTION = "_scaled_dot_product"

_SAMPLE_FIRST_KINDS = (
    _ATTENTION,
    "convolution",
    "_convolution",
    "mkldnn_convolution",
    "cudnn_convolution",
    "native_group_norm",
    "native_batch_norm",
    "_native_batch_norm",
    "_batch_norm",
    "cudnn_batch_norm",
    "max_pool",
    "avg_pool",
    "adaptive_",
    "_adaptive_avg_pool",
    "upsample_",
    "reflection_pad",
    "replication_pad",
)

_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        [
            "sum",
            "nansum",
            "mean",
            "amax",
            "amin",
            "aminmax",
            "max",
            "min",
            "argmax",
            "argmin",
            "prod",
            "logsumexp",
            "norm",
            "linalg_vector_norm",
            "var",
            "std",
            "var_mean",
            "std_mean",
            "any",
            "all",
            "count_nonzero",
            "median",
            "nanmedian",
            "mode",
        ],
        _reduced,
    ),
    **dict.fromkeys(
        ["view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten"], _reshape
    ),
    **dict.fromkeys(("t", "transpose", "permute"), _permuted),
    **dict.fromkeys(
        [
            "_softmax",
            "_log_softmax",
            "cumsum",
            "cumprod",
            "logcumsumexp",
            "cummax",
            "cummin",
            "sort",
            "topk",
            "argsort",
            "kthvalue",
            "glu",
        ],
        _along,
    ),
    **dict.fromkeys(["select", "slice", "unbind"], _sliced),
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"], _sliced),
    **dict.fromkeys(("flip", "roll"), _reordered),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce"), _gathered),
    **dict.fromkeys(("index", "index_put", "_index_put_impl", "_unsafe_index"), _indexed),
    **dict.fromkeys(_FACTORS, _matrix),
    **dict.fromkeys(
        [
            "mse_loss",
            "smooth_l1_loss",
            "huber_loss",
            "l1_loss",
            "soft_margin_loss",
            "binary_cross_entropy",
            "binary_cross_entropy_with_logits",
        ],
        _loss,
    ),
    **dict.fromkeys(
        ["nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss", "multilabel_margin_loss_forward"], _class_loss
    ),
    "cross_entropy": _cross_entropy,
    "one_hot": _one_hot,
    "kl_div": _kl_div,
    "_ctc_loss": _ctc,
    "renorm": _renormed,
    "copy": _copied,
    "expand": _expanded,
    "repeat": _repeated_rows,
    "constant_pad_nd": _padded,
    "embedding": _embedded,
    "bucketize": _placed,
    "searchsorted": _placed,
    "index_select": _selected,
    "native_layer_norm": _normalised,
    "_fused_rms_norm": _normalised,
}
