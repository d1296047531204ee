"""A record of the operations of one forward pass: what was computed from what, without the numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

#: Methods that hand numbers to Python; what is computed from them there is not recorded.
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
    Tensor.__format__: "format()",
    Tensor.__repr__: "repr()",
}

#: What tells how many elements were chosen by their values.
_SIZES = {
    Tensor.shape.__get__: "shape",  # type: ignore[attr-defined]
    Tensor.size: "size()",
    Tensor.numel: "numel()",
    Tensor.nelement: "nelement()",
    Tensor.__len__: "len()",
}

#: Functions that make a tensor of numbers in a list, which may be those of other tensors.
_FROM_LISTS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

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
        chosen: Its size depends on values, as that of a selection.
    """

    token: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    chosen: bool = False


@dataclass(frozen=True)
class Alias:
    """A tensor that shares memory with one that was changed.

    Attributes:
        token: Of it.
        same: It shows all elements of the changed tensor in the same places.
        covered: Axes of it along which the changed tensor reaches everything.
    """

    token: int
    same: bool
    covered: frozenset[int]


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: Without overload and the mark of an in-place operation: ``"add"``; with its namespace where that is not
            torch's own: ``"mine::add"``.
        arguments: By name, defaults included; tensors as :class:`Ref`, in lists, too.
        outputs: What it returned.
        written: Tensors that it changed in place.
        aliases: Other tensors that share memory with one that was changed.
        pointwise: It works element by element, with broadcasting.
        numbers: Those among the arguments that may have been made of others: factors, bounds, places.
        places: Of an operation that takes or writes whole slices of a tensor by an index: by axis their places.
    """

    name: str
    arguments: Mapping[str, Any]
    outputs: tuple[Ref, ...]
    written: tuple[Ref, ...] = ()
    aliases: tuple["Alias", ...] = ()
    pointwise: bool = False
    numbers: frozenset[float] = frozenset()
    places: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

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
    _chosen: set[int] = field(default_factory=set, repr=False)
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

    def ref(self, tensor: Tensor, made: bool = True) -> Ref:
        """Return how a tensor is known.

        Args:
            tensor: Any.
            made: It is an input or a recorded operation has made it. Another one may be a known one in disguise, such
                as ``nn.Parameter(tensor)``.
        """
        token = self._tokens.get(tensor)
        if token is None:
            token = self._count
            self._count += 1
            self._tokens[tensor] = token
            others = [] if made else self.aliases([tensor])
            self._sharing(tensor).append((TensorWeakRef(tensor), token))
            if others:
                other = next((alias for alias in others if alias.same), others[0])
                known, name = Ref(other.token, tuple(tensor.shape), tensor.dtype), "alias" if other.same else "of_part"
                self.operations.append(Operation(name, {"self": known}, (self.ref(tensor),), pointwise=other.same))
        if tensor.grad_fn is not None:
            self.nodes.setdefault(tensor.grad_fn, (token, len(self.operations)))
        return Ref(token, tuple(tensor.shape), tensor.dtype, token in self._chosen)

    def refs(self, values: Any, made: bool = False) -> Any:
        """Return arguments or outputs with their tensors replaced; outputs are ``made``."""
        if isinstance(values, Tensor):
            return self.ref(values, made)
        if isinstance(values, list | tuple):
            return [self.refs(value, made) for value in values]
        return values

    def choose(self, outputs: Any) -> None:
        """Note that the sizes of tensors depend on values."""
        _tensors(outputs, lambda tensor: self._chosen.add(self.ref(tensor).token) if tensor.ndim else None)

    def is_chosen(self, tensor: Tensor) -> bool:
        """Return whether the size of a tensor depends on values."""
        return self._tokens.get(tensor) in self._chosen

    def aliases(self, changed: Iterable[Tensor]) -> tuple[Alias, ...]:
        """Return the tensors that share memory with changed ones."""
        found = []
        for tensor in changed:
            for known, token in self._sharing(tensor):
                other = known()
                if other is None or other is tensor or other.untyped_storage()._cdata != _storage(tensor):
                    continue  # freed, and its memory in use again
                found.append(Alias(token, _in_same_places(other, tensor), _covered(other, tensor)))
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
        places = _places(kind.name, given, outputs)
        for trace, named in zip(_recording, arguments, strict=True):
            found: list[Ref] = []
            if kind.chooses(given) or any(ref.chosen for ref in Operation(kind.name, named, ()).inputs):
                trace.choose(outputs)
            _each([trace.refs(outputs, made=True)], found.append)
            written = tuple(trace.ref(tensor) for tensor in changed)
            aliases = trace.aliases(changed)
            numbers = kind.numbers(given)
            trace.operations.append(
                Operation(kind.name, named, tuple(found), written, aliases, kind.pointwise, numbers, places)
            )
        return outputs


class _Calls(TorchFunctionMode):
    """Records what only the calls from Python show: reads of numbers, their end, and functions as a whole."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note_reads(func, args)
        name = _WHOLE.get(func)
        wrapped: list[Tensor] = []  # within torch.func.vmap and the like, of whose tensors only the parts are known
        if name is not None:
            _tensors([*args, *kwargs.values()], wrapped.append)
        if name is None or any(map(torch._C._functorch.is_functorch_wrapped_tensor, wrapped)):
            before = [len(trace.operations) for trace in _recording]
            outputs = func(*args, **kwargs)
            for trace, length in zip(_recording, before, strict=True):
                if func is Tensor.__deepcopy__:  # by its bytes
                    copied, made = trace.ref(args[0], made=False), (trace.ref(outputs),)
                    trace.operations[length:] = [Operation("clone", {"self": copied}, made, pointwise=True)]
                elif func == _SET_DATA:
                    held, source = (trace.ref(tensor, made=False) for tensor in args)
                    named = {"self": held, "src": source}
                    trace.operations.append(Operation("copy", named, (), written=(held,), pointwise=True))
                trace.operations.append(Operation("returned", {}, ()))
            return outputs
        given = _WHOLE_ARGUMENTS[name] | dict(zip(_WHOLE_ARGUMENTS[name], args, strict=False)) | kwargs
        before = [len(trace.operations) for trace in _recording]
        arguments = [{name: trace.refs(value) for name, value in given.items()} for trace in _recording]
        output = func(*args, **kwargs)
        for trace, length, named in zip(_recording, before, arguments, strict=True):
            trace.nodes = {node: at for node, at in trace.nodes.items() if at[1] <= length}
            smoothing = frozenset({given.get("label_smoothing", 0)}) - {0}
            trace.operations[length:] = [Operation(name, named, (trace.ref(output),), numbers=smoothing)]
        return output

    @staticmethod
    def _note_reads(func: Callable[..., Any], args: Any) -> None:
        read: list[Tensor] = []
        if func in _READS or func in _SIZES:
            _tensors(args[:1], read.append)
        elif func in _FROM_LISTS:
            _tensors([each for each in args if isinstance(each, list | tuple)], read.append)
        elif func is Tensor.register_hook and not _is_of_torch(args[1:]):
            for trace in _recording:
                trace.operations.append(Operation("register_hook", {"self": trace.ref(args[0], made=False)}, ()))
        by = _READS.get(func) or _SIZES.get(func, "torch.tensor([...])")
        for trace in _recording:
            for tensor in read:
                whole = func in _SIZES or not tensor.is_floating_point() or _is_whole(tensor)
                if func not in _SIZES or trace.is_chosen(tensor):
                    known = trace.ref(tensor, made=False)
                    named = {"self": known, "by": by, "size": func in _SIZES, "whole": whole}
                    trace.operations.append(Operation("read", named, ()))


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
        counts: The size of what it returns depends on values.
    """

    name: str
    defaults: dict[str, Any]
    written: tuple[str, ...]
    pointwise: bool
    counts: bool

    def numbers(self, given: Mapping[str, Any]) -> frozenset[float]:
        """Return the numbers among these arguments, other than the defaults, that may mean something."""
        names = self.defaults.keys() if self.pointwise or self.name in _FILLING else _MEANINGFUL & self.defaults.keys()
        found: set[float] = set()
        for name in names - _SETTINGS:
            values = given[name] if isinstance(given[name], list | tuple) else [given[name]]
            numbers = {v for v in values if isinstance(v, int | float) and not isinstance(v, bool)}
            found |= numbers if given[name] != self.defaults[name] else set()
        return frozenset(found - _TRIVIAL)

    def chooses(self, given: Mapping[str, Any]) -> bool:
        """Whether values among these arguments decide how many elements are returned."""
        if self.name != "index":
            return self.counts
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in given["indices"])


# Arguments that are numbers; those of the first kind may be factors and places, those of the second never are.
_MEANINGFUL = frozenset({"value", "alpha", "beta", "delta", "margin", "index", "start", "end", "k", "pad"})
_SETTINGS = frozenset({"dim", "dtype", "layout", "memory_format", "size"})
_FILLING = frozenset({"full", "full_like", "new_full", "fill", "scalar_tensor", "arange"})
_TRIVIAL = frozenset({0, 2**63 - 1})


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
        counts=torch.Tag.dynamic_output_shape in func.tags,
    )


def _places(name: str, given: Mapping[str, Any], outputs: Any) -> dict[int, tuple[int, ...]]:
    """Return by axis which slices an operation takes or writes (a wait for the device)."""
    table = given.get("self")
    if not isinstance(table, Tensor) or not table.ndim:
        return {}
    indices: dict[int, Tensor] = {}
    if name in _BY_INDICES:
        indices = {axis: index for axis, index in enumerate(given["indices"]) if index is not None}
        if len({index.shape for index in indices.values()}) > 1 or any(index.ndim != 1 for index in indices.values()):
            return {}
    elif name in _BY_INDEX:
        axis, index = given["dim"] % table.ndim, given["index"]
        if index.ndim > 1:  # the same for all elements of a slice
            rows = index.movedim(axis, 0).flatten(1)
            index = rows[:, 0] if bool((rows == rows[:, :1]).all()) else None
        indices = {} if index is None else {axis: index.flatten()}
    elif name in ("sort", "topk") and table.ndim == 1:
        indices = {0: outputs[1]}
    found = {}
    for axis, index in indices.items():
        if index.dtype in (torch.bool, torch.uint8):
            index = index.nonzero().flatten()
        found[axis] = tuple(place % table.shape[axis] for place in index.tolist())
    return found


_BY_INDICES = frozenset({"index", "_unsafe_index", "index_put", "_index_put_impl"})
_BY_INDEX = frozenset({"index_select", "index_copy", "index_add", "gather", "scatter", "scatter_add"})


def _is_of_torch(hooks: Sequence[Any]) -> bool:
    """Whether a hook is one of torch's own (FSDP's, those that count operations), which changes no gradient."""
    return any(str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse, or within a transformation like torch.func.vmap
        return id(tensor)


def _is_whole(tensor: Tensor) -> bool:
    """Whether a number is an integer, before it is read anyway."""
    return tensor.numel() == 1 and float(tensor.item()).is_integer()


def _in_same_places(one: Tensor, other: Tensor) -> bool:
    places = [(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype) for tensor in (one, other)]
    return places[0] == places[1]


def _covered(tensor: Tensor, part: Tensor) -> frozenset[int]:
    """Return the axes of a tensor along which a part of its memory reaches everything."""
    start = part.storage_offset() - tensor.storage_offset()
    if start < 0 or part.dtype != tensor.dtype or not tensor.is_contiguous():
        return frozenset()
    spans = set(zip(part.shape, part.stride(), strict=True))
    axes = enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    return frozenset(axis for axis, (size, step) in axes if (size, step) in spans and start // step % size == 0)


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
