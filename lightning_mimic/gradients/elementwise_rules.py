"""Rules for operations that work element by element."""

from collections.abc import Mapping, Sequence

from lightning_mimic.gradients.forward_trace import Operation, Ref
from lightning_mimic.gradients.sample_rows import FOREIGN, Mixed, Rows, Value, is_scored, tells_apart


def pointwise(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
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
        if tells_apart(values[ref.token], ref, axis - len(shape) + len(ref.shape)):
            return Mixed(FOREIGN, scored)
    return Rows(axis, inner, scored, any_moved(operation.inputs, values))


def any_moved(refs: Sequence[Ref], values: Mapping[int, Value]) -> bool:
    """Whether all rows come in another order; what is mixed with others' rows, as in mixup, belongs to its own."""
    rows = [value for ref in refs if isinstance(value := values[ref.token], Rows)]
    return all(value.moved for value in rows)
