"""A record of the operations of one forward pass: what was computed from what, without the numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

#: Ways out of torch's sight: what Python makes of the numbers is not recorded.
_READS = {
    Tensor.item: "item()",
    Tensor.tolist: "tolist()",
    Tensor.numpy: "numpy()",
    Tensor.__array__: "numpy()",
    Tensor.__float__: "float()",
    Tensor.__int__: "int()",
    Tensor.__index__: "int()",
    Tensor.__complex__: "complex()",
    Tensor.__dlpack__: "__dlpack__()",
}

#: Ways into torch's sight, for numbers in lists.
_FROM_LISTS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

#: Functions that are one operation here, whatever they consist of.
_WHOLE = {F.cross_entropy: "cross_entropy", F.kl_div: "kl_div", F.one_hot: "one_hot"}

#: Their arguments, in the order in which they may be given, with their defaults.
_WHOLE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "cross_entropy": {
        "input": None,
        "target": None,
        "weight": None,
        "size_average": None,
        "ignore_index": -100,
        "reduce": None,
        "reduction": "mean",
        "label_smoothing": 0.0,
    },
    "kl_div": {
        "input": None,
        "target": None,
        "size_average": None,
        "reduce": None,
        "reduction": "mean",
        "log_target": False,
    },
    "one_hot": {"tensor": None, "num_classes": -1},
}


@dataclass(frozen=True)
class Ref:
    """A tensor in a record.

    Attributes:
        token: The same for one tensor object throughout the forward pass.
        shape: At the time.
        dtype: Of its elements.
    """

    token: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: Without overload and the mark of an in-place operation: ``"add"``; with its namespace where that is not
            torch's own: ``"mine::add"``.
        arguments: By name, defaults included; tensors as :class:`Ref`, in lists, too.
        outputs: What it returned.
        written: Tensors that it changed in place.
        aliases: Other tensors that share memory with one that was changed, and whether they show all of its elements
            in the same places.
        pointwise: It works element by element, with broadcasting.
        numbers: Numbers among the arguments may have been made of others: factors, bounds, places.
    """

    name: str
    arguments: Mapping[str, Any]
    outputs: tuple[Ref, ...]
    written: tuple[Ref, ...] = ()
    aliases: tuple[tuple[int, bool], ...] = ()
    pointwise: bool = False
    numbers: bool = False

    @property
    def inputs(self) -> list[Ref]:
        """The tensors among the arguments."""
        found: list[Ref] = []
        _each(self.arguments.values(), found.append)
        return found


@dataclass
class ForwardTrace:
    """The operations of one forward pass, in their order.

    Attributes:
        samples: B.
        batch: The batch's tensors.
        constants: Parameters and buffers, by token.
        operations: Of the forward pass.
        nodes: Where the gradient of a tensor arrives, to the tensor and the number of operations before it was used
            or returned.
    """

    samples: int
    batch: list[Ref] = field(default_factory=list)
    constants: set[int] = field(default_factory=set)
    operations: list[Operation] = field(default_factory=list)
    nodes: dict[Node, tuple[int, int]] = field(default_factory=dict)
    _tokens: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, repr=False)
    _storages: dict[int, list[tuple[TensorWeakRef, int]]] = field(default_factory=dict, repr=False)
    _count: int = 0

    def expect(self, batch: Iterable[Tensor], constants: Iterable[Tensor]) -> None:
        """Note what the forward pass will be computed from.

        Args:
            batch: Tensors of the batch.
            constants: Parameters and buffers.
        """
        self.constants = {self.ref(tensor).token for tensor in constants}
        self.batch = [self.ref(tensor) for tensor in batch]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is computed within the context."""
        if not _recording:
            _modes.enter_context(_Operations())
            _modes.enter_context(_Calls())
        _recording.append(self)
        try:
            yield
        finally:
            # By identity: two traces may be equal.
            del _recording[next(place for place, trace in enumerate(_recording) if trace is self)]
            if not _recording:
                _modes.close()

    def ref(self, tensor: Tensor) -> Ref:
        """Return how a tensor is known."""
        token = self._tokens.get(tensor)
        if token is None:
            token = self._count
            self._count += 1
            self._tokens[tensor] = token
            self._sharing(tensor).append((TensorWeakRef(tensor), token))
        if tensor.grad_fn is not None:
            self.nodes.setdefault(tensor.grad_fn, (token, len(self.operations)))
        return Ref(token, tuple(tensor.shape), tensor.dtype)

    def refs(self, values: Any) -> Any:
        """Return arguments or outputs with their tensors replaced."""
        if isinstance(values, Tensor):
            return self.ref(values)
        if isinstance(values, list | tuple):
            return [self.refs(value) for value in values]
        return values

    def aliases(self, changed: Iterable[Tensor]) -> tuple[tuple[int, bool], ...]:
        """Return the tensors that share memory with changed ones, and whether all elements are in the same places."""
        found = []
        for tensor in changed:
            for known, token in self._sharing(tensor):
                other = known()
                if other is None or other is tensor or other.untyped_storage()._cdata != _storage(tensor):
                    continue  # freed, and its memory in use again
                same = other.shape == tensor.shape and other.stride() == tensor.stride()
                found.append((token, same and other.storage_offset() == tensor.storage_offset()))
        return tuple(found)

    def _sharing(self, tensor: Tensor) -> list[tuple[TensorWeakRef, int]]:
        return self._storages.setdefault(_storage(tensor), [])


# Steps of several models may overlap in any order, which torch's stack of modes could not follow.
_recording: list[ForwardTrace] = []
_modes = ExitStack()


class _Operations(TorchDispatchMode):
    """Records every operation below autograd; compiled parts run as they are written while it is on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, kwargs = _kind(func), kwargs or {}
        given = kind.defaults | dict(zip(kind.defaults, args, strict=False)) | kwargs
        changed: list[Tensor] = []
        for name in kind.written:
            _tensors(given[name], changed.append)
        arguments = [{name: trace.refs(value) for name, value in given.items()} for trace in _recording]
        outputs = func(*args, **kwargs)
        for trace, named in zip(_recording, arguments, strict=True):
            found: list[Ref] = []
            _each([trace.refs(outputs)], found.append)
            written = tuple(trace.ref(tensor) for tensor in changed)
            aliases = trace.aliases(changed)
            numbers = kind.numbers(given)
            trace.operations.append(
                Operation(kind.name, named, tuple(found), written, aliases, kind.pointwise, numbers)
            )
        return outputs


class _Calls(TorchFunctionMode):
    """Records what only the calls from Python show: reads of numbers, their end, and functions as a whole."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read: list[Tensor] = []
        if func in _READS:
            _tensors(args[:1], read.append)
        elif func in _FROM_LISTS:
            _tensors([each for each in args if isinstance(each, list | tuple)], read.append)
        for trace in _recording:
            by = _READS.get(func, "torch.tensor([...])")
            trace.operations += [Operation("read", {"self": trace.ref(tensor), "by": by}, ()) for tensor in read]
        name = _WHOLE.get(func)
        if name is None:
            outputs = func(*args, **kwargs)
            for trace in _recording:
                trace.operations.append(Operation("returned", {}, ()))
            return outputs
        given = _WHOLE_ARGUMENTS[name] | dict(zip(_WHOLE_ARGUMENTS[name], args, strict=False)) | kwargs
        before = [len(trace.operations) for trace in _recording]
        arguments = [{name: trace.refs(value) for name, value in given.items()} for trace in _recording]
        output = func(*args, **kwargs)
        for trace, length, named in zip(_recording, before, arguments, strict=True):
            trace.nodes = {node: at for node, at in trace.nodes.items() if at[1] <= length}
            trace.operations[length:] = [Operation(name, named, (trace.ref(output),))]
        return output


#: Operations that work element by element and that not all versions of torch declare to do so.
_POINTWISE = frozenset(
    [
        "_to_copy",
        "alias",
        "bernoulli",
        "binary_cross_entropy_with_logits",
        "complex",
        "copy",
        "detach",
        "dropout",
        "elu",
        "gelu",
        "glu_jvp",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "lift_fresh",
        "log_sigmoid_forward",
        "masked_fill",
        "mish",
        "native_dropout",
        "polar",
        "rrelu_with_noise",
        "silu",
        "softplus",
        "softshrink",
        "threshold",
        "_prelu_kernel",
        "where",
    ]
)


@dataclass(frozen=True)
class _Kind:
    """What is the same in every call of one of torch's operations.

    Attributes:
        name: See :class:`Operation`.
        defaults: Of all arguments, in their order; ``None`` where there is none.
        written: Names of the arguments that it changes.
        pointwise: See :class:`Operation`.
    """

    name: str
    defaults: dict[str, Any]
    written: tuple[str, ...]
    pointwise: bool

    def numbers(self, given: Mapping[str, Any]) -> bool:
        """Whether numbers among these arguments, other than the defaults, may mean something."""
        names = self.defaults if self.pointwise or self.name in _FILLING else _MEANINGFUL & self.defaults.keys()
        for name in names:
            value = given[name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and name not in _SETTINGS and value != self.defaults[name] and value not in _TRIVIAL:
                return True
        return False


# Arguments that are numbers; those of the first kind may be factors and places, those of the second never are.
_MEANINGFUL = frozenset({"value", "alpha", "beta", "delta", "margin", "index", "start", "end"})
_SETTINGS = frozenset({"dim", "dtype", "exponent", "layout", "memory_format", "size"})
_FILLING = frozenset({"full", "full_like", "new_full", "fill", "scalar_tensor", "arange"})
_TRIVIAL = (0, 1, -1, 2, 2**63 - 1)


@cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    # Another library's operation may have the name of one of torch's, and mean something else.
    name = schema.name.removeprefix("aten::")
    name = name if name.endswith("__") else name.removesuffix("_")
    # In place it may not be declared, and for the same overload out of place be.
    overload = getattr(getattr(torch.ops.aten, name, None), func._overloadname, func)
    declared = torch.Tag.pointwise in func.tags or torch.Tag.pointwise in overload.tags
    return _Kind(
        name=name,
        defaults={a.name: a.default_value if a.has_default_value() else None for a in schema.arguments},
        written=tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write),
        pointwise=name in _POINTWISE or declared,
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _each(values: Iterable[Any], take: Callable[[Ref], None]) -> None:
    for value in values:
        if isinstance(value, Ref):
            take(value)
        elif isinstance(value, list | tuple):
            _each(value, take)


def _tensors(values: Any, take: Callable[[Tensor], None]) -> None:
    if isinstance(values, Tensor):
        take(values)
    elif isinstance(values, list | tuple):
        for value in values:
            _tensors(value, take)
