"""Rules for matrix products and layers."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from lightning_mimic.gradients.elementwise_rules import pointwise
from lightning_mimic.gradients.forward_trace import Operation, Ref
from lightning_mimic.gradients.sample_rows import Constant, Mixed, Rows, Value, is_scored, rows_of, unknown

FACTORS = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "addmv": ("mat", "vec"),
    "linear": ("input", "weight"),
}


_ATTENTION = "_scaled_dot_product"


SAMPLE_FIRST_KINDS = (
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


def matrix(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """Products of matrices and vectors."""
    one, two = FACTORS[operation.name]
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
        return pointwise(sums, {**values, -2: found}, samples)
    return found


def sample_first(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
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
        return unknown(operation, values, samples)
    rows = replace(first[0], scored=scored) if isinstance(first[0], Rows) else first[0]
    size = moving[0].shape[0]
    return [
        rows if ref.shape[:1] == (size,) else Mixed(f"`{operation.name}` returned it beside its result", scored)
        for ref in operation.outputs
    ]


def normalised(operation: Operation, values: Mapping[int, Value], samples: int) -> Value | list[Value]:
    """Layer normalisation and its kind, over the last axes."""
    ref = operation.arguments["input"]
    rows = rows_of(values, ref)
    if rows.axis >= len(ref.shape) - len(operation.arguments["normalized_shape"]):
        return Mixed(f"`{operation.name}` over the batch", rows.scored)
    return rows
