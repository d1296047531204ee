"""Rules for operations that work element by element."""

from collections.abc import Mapping

from lightning_mimic.gradients.forward_trace import Operation
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
    return Rows(axis, inner, scored)
