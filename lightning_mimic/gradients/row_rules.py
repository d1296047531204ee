"""Rules of the data flow: which samples the outputs of an operation depend on, given its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_mimic.gradients.axis_rules import (
    VIEWS,
    along,
    expanded,
    joined,
    padded,
    permuted,
    renormed,
    reordered,
    repeated_rows,
    reshape,
    sliced,
)
from lightning_mimic.gradients.elementwise_rules import pointwise
from lightning_mimic.gradients.forward_trace import Operation, Ref
from lightning_mimic.gradients.layer_row_rules import FACTORS, SAMPLE_FIRST_KINDS, matrix, normalised, sample_first
from lightning_mimic.gradients.lookup_rules import embedded, gathered, indexed, one_hot, placed, selected
from lightning_mimic.gradients.mean_rules import class_loss, cross_entropy, ctc, kl_div, loss, of_total, reduced
from lightning_mimic.gradients.sample_rows import Constant, Mixed, Rule, Total, Value, is_scored, tells_apart, unknown


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
        found = of_total(operation, values, samples)
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
    kept = operation.pointwise or operation.name in VIEWS or operation.name == "index"
    exchangeable = kept and all(isinstance(value, Constant) and value.exchangeable for value in own)
    return Constant(exchangeable, repeated=_repeated(operation, own))


def _copied(operation: Operation, values: Mapping[int, Value], samples: int) -> Value:
    """``copy_``: what it held before does not matter."""
    source = replace(operation, arguments={"src": operation.arguments["src"]})
    own = [values[ref.token] for ref in source.inputs]
    return _constant(source, own) if isinstance(own[0], Constant) else pointwise(source, values, samples)


def _repeated(operation: Operation, own: Sequence[Value]) -> frozenset[int]:
    """Return the axes along which all slices of a constant are the same, because it was expanded."""
    if not operation.outputs or not (operation.pointwise or operation.name == "expand"):
        return frozenset()
    shape = operation.outputs[0].shape
    axes = {axis for axis, size in enumerate(shape) if size > 1}
    for ref, value in zip(operation.inputs, own, strict=True):
        shift = len(shape) - len(ref.shape)
        axes = {axis for axis in axes if not tells_apart(value, ref, axis - shift)}
    return frozenset(axes)


def _rule(operation: Operation) -> Rule:
    """Return the rule for an operation with rows of samples among its inputs, and no mixture of them."""
    if operation.name in _RULES:
        return _RULES[operation.name]
    if operation.pointwise:
        return pointwise
    return sample_first if operation.name.startswith(SAMPLE_FIRST_KINDS) else unknown


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
        reduced,
    ),
    **dict.fromkeys(
        ["view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten"], reshape
    ),
    **dict.fromkeys(("t", "transpose", "permute"), permuted),
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
        along,
    ),
    **dict.fromkeys(["select", "slice", "unbind"], sliced),
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"], sliced),
    **dict.fromkeys(("flip", "roll"), reordered),
    **dict.fromkeys(("cat", "stack"), joined),
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce"), gathered),
    **dict.fromkeys(("index", "index_put", "_index_put_impl", "_unsafe_index"), indexed),
    **dict.fromkeys(FACTORS, matrix),
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
        loss,
    ),
    **dict.fromkeys(
        ["nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss", "multilabel_margin_loss_forward"], class_loss
    ),
    "cross_entropy": cross_entropy,
    "one_hot": one_hot,
    "kl_div": kl_div,
    "_ctc_loss": ctc,
    "renorm": renormed,
    "copy": _copied,
    "expand": expanded,
    "repeat": repeated_rows,
    "constant_pad_nd": padded,
    "embedding": embedded,
    "bucketize": placed,
    "searchsorted": placed,
    "index_select": selected,
    "native_layer_norm": normalised,
    "_fused_rms_norm": normalised,
}
