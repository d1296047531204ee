"""The parts of a batch: read without copying it, and replaced in a copy of its own type."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

from torch import Tensor


def parts_of(batch: Any) -> Iterable[tuple[Any, Any]]:
    """Return keys, positions or field names, and what is there; nothing of what is not a collection.

    Args:
        batch: A mapping, a tuple, a list, a dataclass, or anything else.

    Example:
        >>> list(parts_of({"x": 1, "y": 2})), list(parts_of("text"))
        ([('x', 1), ('y', 2)], [])
    """
    if isinstance(batch, Mapping):
        return batch.items()
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return enumerate(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [(field.name, getattr(batch, field.name, None)) for field in dataclasses.fields(batch)]
    return ()


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, at any depth."""
    if isinstance(batch, Tensor):
        yield batch
        return
    for _, part in parts_of(batch):
        yield from tensors_of(part)


def held_tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch and of all that it holds, in attributes of classes of any kind, too.

    Some cannot be counted or replaced, such as those of joined graphs, but the model may read them.

    Args:
        batch: Anything.

    Example:
        >>> import torch, types
        >>> [len(tensor) for tensor in held_tensors(types.SimpleNamespace(x=torch.zeros(3), more=[torch.zeros(2)]))]
        [3, 2]
    """
    waiting, seen = [batch], {}
    while waiting:
        part = waiting.pop(0)
        if id(part) in seen or isinstance(part, type | ModuleType | str | bytes | int | float):
            continue
        seen[id(part)] = part  # kept, so that no other object gets its id
        if isinstance(part, Tensor):
            yield part
            continue
        slots = [name for kind in type(part).__mro__ for name in _names(getattr(kind, "__slots__", ()))]
        waiting += [held for _, held in parts_of(part)]
        waiting += [*getattr(part, "__dict__", {}).values(), *(getattr(part, name, None) for name in slots)]


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def with_parts(batch: Any, changed: Mapping[Any, Any]) -> Any:
    """Return a shallow copy of a batch with some of its parts replaced.

    The constructor is called only of a class of mappings or sequences that is neither derived from ``dict`` or ``list``
    nor knows how to copy itself; it must take the items, as it must for Lightning's transfer.

    Args:
        batch: A mapping, a tuple, a list or a dataclass; not changed.
        changed: New parts by key, position or field name.

    Returns:
        Of the batch's type, and with its other attributes.

    Example:
        >>> with_parts((1, 2), {1: 3})
        (1, 3)
    """
    kind: Any = type(batch)
    made: Any
    if isinstance(batch, tuple):  # a named one, too
        made = tuple.__new__(kind, [changed.get(*each) for each in enumerate(batch)])
        getattr(made, "__dict__", {}).update(getattr(batch, "__dict__", {}))
    elif isinstance(batch, dict | list) or hasattr(batch, "__copy__") or not isinstance(batch, Mapping | Sequence):
        made = copy.copy(batch)
        for key, part in changed.items():
            if isinstance(batch, Mapping | Sequence):
                made[key] = part
            else:
                object.__setattr__(made, key, part)  # it may be frozen
    elif isinstance(batch, Mapping):  # a copy would share the attribute that holds the items
        made = kind({**batch, **changed})
    else:
        made = kind([changed.get(*each) for each in enumerate(batch)])
    for name, value in [item for each in kind.__mro__ for item in vars(each).items()]:
        if isinstance(value, cached_property):  # it was computed from what is replaced
            getattr(made, "__dict__", {}).pop(name, None)
    return made


def replace_parts(batch: Any, chosen: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    """Return a copy of a batch in which the parts that are chosen, at any depth, are changed.

    Args:
        batch: Tensors in tuples, lists, mappings or dataclasses; not changed.
        chosen: Whether a part is to be changed as a whole.
        change: From a part to its replacement; it may return the part itself.

    Returns:
        Of the batch's type. Collections in which nothing is replaced are not copied.

    Example:
        >>> replace_parts({"x": [1, 2], "name": "a"}, lambda part: isinstance(part, int), lambda part: part + 1)
        {'x': [2, 3], 'name': 'a'}
    """
    if chosen(batch):
        return change(batch)
    changed = {}
    for key, part in parts_of(batch):
        new = replace_parts(part, chosen, change)
        if new is not part:
            changed[key] = new
    return with_parts(batch, changed) if changed else batch


def to_device(batch: Any, device: Any) -> Any:
    """Return a batch with its tensors, and whatever else has a method ``to``, on a device."""

    def moved(part: Any) -> Any:
        there = part.to(device)
        return part if there is None else there  # a `to` that works in place and returns nothing

    return replace_parts(batch, lambda part: callable(getattr(part, "to", None)), moved)


def sample_count(batch: Any) -> int | None:
    """Return the number of samples: the leading size that all of a batch's tensors share.

    Of graphs that are joined into one (``num_graphs``, as PyTorch Geometric has it) it is their number.

    Returns:
        ``None`` if there are no tensors or they do not share one size.

    Example:
        >>> import torch
        >>> sample_count((torch.zeros(3, 2), torch.zeros(3))), sample_count((torch.zeros(3, 2), torch.zeros(4)))
        (3, None)
    """
    sizes = set(_leading_sizes(batch))
    return sizes.pop() if len(sizes) == 1 else None


def _leading_sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch.shape[0]
        return
    graphs = getattr(batch, "num_graphs", None)
    if isinstance(graphs, int):
        yield graphs
        return
    for _, part in parts_of(batch):
        yield from _leading_sizes(part)
