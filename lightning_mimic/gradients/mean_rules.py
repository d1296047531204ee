"""Rules for means and sums over the samples, other reductions, and losses."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import isclose, prod
from typing import Any

import torch

from lightning_mimic.gradients.axis_rules import VIEWS
from lightning_mimic.gradients.elementwise_rules import pointwise
from lightning_mimic.gradients.forward_trace import Operation, Ref
from lightning_mimic.gradients.lookup_rules import first
from lightning_mimic.gradients.sample_rows import (
    FOREIGN,
    Constant,
    Mixed,
    Rows,
    Total,
    Value,
    axes_of,
    is_scored,
    mixed,
)

_LINEAR = frozenset(["neg", "clone", "detach", "alias", "_to_copy", "lift_fresh", "sum", "mean"])


def of_total(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
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
        summed = _products([ref.shape[axis] for axis in axes_of(operation.arguments.get("dim"), len(ref.shape))])
        return replace(totals[0], elements=frozenset(one * two for one in totals[0].elements for two in summed))
    if (name in _LINEAR or name in VIEWS) and len(own) == 1:
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


def reduced(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """A reduction over some axes."""
    ref = operation.arguments["self"]
    return _over(operation, ref, values[ref.token], samples, operation.arguments.get("dim"))


def _over(operation: Operation, ref: Ref, rows: Value, samples: int, dims: Any) -> Value:
    assert isinstance(rows, Rows)
    name, shape = operation.name, ref.shape
    axes = axes_of(dims, len(shape))
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


#: Losses whose mean divides by the sum of their classes' weights.
_WEIGHTED_MEANS = frozenset({"cross_entropy", "nll_loss_forward", "nll_loss2d_forward"})


def loss(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """A loss of torch: of each element, or their mean or sum."""
    inputs = operation.inputs
    shape = max((ref.shape for ref in inputs), key=len)
    rows = pointwise(replace(operation, outputs=(Ref(-1, tuple(shape), torch.float32),)), values, samples)
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


def class_loss(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """A loss of scores over classes, axis 1 or the only one, for which a sample has one target or more."""
    scores = operation.arguments.get("input", operation.arguments.get("self"))
    target, weight = operation.arguments["target"], operation.arguments.get("weight")
    rows, aim = values[scores.token], values[target.token]
    classes = 1 if len(scores.shape) > 1 else 0
    if not isinstance(rows, Rows):
        return mixed(operation, values, f"the targets of `{operation.name}` are the samples' and its scores are not")
    if rows.axis == classes:
        return mixed(operation, values, f"`{operation.name}` takes the samples for classes")
    per_class = len(target.shape) == len(scores.shape)
    place = rows.axis if per_class else rows.axis - (rows.axis > classes)
    if isinstance(aim, Rows):
        if (aim.axis, aim.inner) != (place, rows.inner):
            return mixed(operation, values, "scores and targets have the samples on different axes")
    elif not (isinstance(aim, Constant) and (aim.exchangeable or target.shape[place] == 1)):
        return mixed(operation, values, FOREIGN)
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


def cross_entropy(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """Return the value of ``F.cross_entropy``."""
    if operation.arguments["size_average"] is not None or operation.arguments["reduce"] is not None:
        return mixed(operation, values, "`size_average` and `reduce` are no longer used; give `reduction`")
    return class_loss(operation, values, samples)


def kl_div(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """Return the value of ``F.kl_div``."""
    if operation.arguments["size_average"] is not None or operation.arguments["reduce"] is not None:
        return mixed(operation, values, "`size_average` and `reduce` are no longer used; give `reduction`")
    found = loss(operation, values, samples)
    if operation.arguments["reduction"] == "batchmean" and isinstance(found, Total):
        ref = operation.arguments["input"]
        rows = values[ref.token]
        by_rows = isinstance(rows, Rows) and rows.axis == 0
        return Total(mean=True) if by_rows else Mixed("`batchmean` divides by another axis's size", scored=True)
    return found


def ctc(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """Losses of shape (B,) from log-probabilities of shape (T, B, C), then values for the reverse pass."""
    arguments = operation.arguments
    logits = values[arguments["log_probs"].token]
    others = [arguments[name] for name in ("targets", "input_lengths", "target_lengths")]
    refs = [ref for ref in others if isinstance(ref, Ref) and ref.shape[:1] == (samples,)]
    fits = isinstance(logits, Rows) and (logits.axis, logits.inner) == (1, 1) and len(refs) == len(others)
    known = [values[ref.token] for ref in refs]
    if not fits or any(not first(v) and not (isinstance(v, Constant) and v.exchangeable) for v in known):
        return mixed(operation, values, "lengths and targets of `ctc_loss` are not rows of the batch")
    return [Rows(0, 1, is_scored(logits)), Mixed("kept for the reverse pass", is_scored(logits))]
