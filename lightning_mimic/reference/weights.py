"""Choose the weights among what a checkpoint holds."""

import re
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.errors import ReferenceLoadError, join_names

# Where training code puts a model's weights within a checkpoint, Lightning's own key first.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
# Below `callbacks`, what is no average of the weights is a callback's own affair.
_AVERAGE = re.compile("ema|averag|avg|swa|shadow", re.IGNORECASE)
# Averages lie deeper than that in no framework's files.
_DEEPEST = 5

Keys = tuple[str, ...]


def choose_weights(content: Any, origin: str, argument: str, load: str | None, prepare: str = "") -> dict[str, Tensor]:
    """Return the one set of named tensors that is a model's weights.

    Args:
        content: What a file held, or a mapping that was given.
        origin: Where it is from, for messages.
        argument: Name of the caller's argument that holds it, for messages.
        load: A Python expression that reads the content from its file, for messages; ``None`` if there is no file.
        prepare: A sentence about what must be done before ``load`` works.

    Raises:
        ReferenceLoadError: No named tensors, or several sets of them between which nothing decides, such as the
            trained weights and their moving average; sets that are equal are one.

    Example:
        >>> file = {"epoch": 3, "net": {"w": torch.ones(1)}}
        >>> choose_weights(file, "a file", "reference", None)
        {'w': tensor([1.])}
    """
    if not isinstance(content, Mapping):
        raise ReferenceLoadError(f"`{argument}`: {origin} holds a {type(content).__name__}; expected a state dict.")
    sets = _sets(content)
    candidates = _candidates(sets)
    if not candidates:
        keys = join_names([str(key) for key in content]) or "none"
        raise ReferenceLoadError(
            f"`{argument}`: {origin} holds no named tensors; its keys: {keys}. Expected a state dict, itself or below "
            f"one of: {', '.join(_CONTAINERS)}."
        )
    first = candidates[0]
    chosen = _by_end(_floating(sets[first]))
    others = [keys for keys in candidates[1:] if not _same_weights(chosen, _floating(sets[keys]))]
    if not others:
        rest = (keys for keys in sets if keys not in candidates and _may_be_weights(keys))
        others = [keys for keys in rest if _same_weights(chosen, _floating(sets[keys])) is False]
    if others:
        names = " and ".join(_at(keys) or "those at the top" for keys in (first, *others)[:6])
        fix = f"Give the one that is meant, as {_at(others[0])} of what was given"
        if load is not None:
            meant = load + _at(others[0])
            save = f"import torch; torch.save({meant}, 'weights.pt')"
            fix = f"{prepare}Give the one that is meant, for instance `{meant}`, or the file that this makes: `{save}`"
        raise ReferenceLoadError(
            f"`{argument}`: {origin} holds {1 + len(others)} sets of weights, which differ: {names}. {fix}."
        )
    return sets[first]


def equal_tensors(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers; those that cannot be compared, such as sparse ones, do not.

    Example:
        >>> equal_tensors(torch.ones(2), torch.ones(2, device="meta"))
        False
    """
    if first is second:
        return True
    alike = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
    return alike and first.layout == second.layout == torch.strided and not first.is_meta and torch.equal(first, second)


def _sets(content: Mapping[Any, Any]) -> dict[Keys, dict[str, Tensor]]:
    """Every mapping in it that holds named tensors, by the keys that lead there."""
    found: dict[Keys, dict[str, Tensor]] = {}
    waiting: deque[tuple[Keys, Mapping[Any, Any]]] = deque([((), content)])
    while waiting:
        keys, mapping = waiting.popleft()
        tensors = {
            name: value for name, value in mapping.items() if isinstance(name, str) and isinstance(value, Tensor)
        }
        if tensors:
            found[keys] = tensors
        below = [(key, value) for key, value in mapping.items() if isinstance(key, str) and isinstance(value, Mapping)]
        if len(keys) < _DEEPEST:
            waiting.extend(((*keys, key), value) for key, value in below)
    return found


def _candidates(sets: Mapping[Keys, Mapping[str, Tensor]]) -> list[Keys]:
    """Those that may be the weights: in the usual places, or at the top, or where there are more than at the top."""
    usual: list[Keys] = [(key,) for key in _CONTAINERS if (key,) in sets]
    if usual:
        return usual
    at_top = len(_floating(sets.get((), {})))
    below = [keys for keys in sets if 0 < len(keys) <= 2 and len(_floating(sets[keys])) > at_top]
    if below:
        return [keys for keys in below if len(keys) == len(below[0])]
    return [()] if () in sets else []


def _may_be_weights(keys: Keys) -> bool:
    return "callbacks" not in keys or any(map(_AVERAGE.search, keys))


def _floating(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t.is_floating_point() and t.ndim}


def _same_weights(chosen: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool | None:
    """Whether two sets for one model are equal; ``None`` if they are not for one model, by names and shapes.

    Names agree if they are equal, or differ by a prefix only and agree in two parts at least.

    Args:
        chosen: One set, as :func:`_by_end` returns it.
        tensors: The other.
    """
    pairs = []
    for name, tensor in tensors.items():
        other = next((chosen[end] for end in _ends(name) if end in chosen), None)
        if other is not None and other.shape == tensor.shape:
            pairs.append((other, tensor))
    if not pairs or 2 * len(pairs) < min(len({id(each) for each in chosen.values()}), len(tensors)):
        return None
    return all(equal_tensors(*pair) for pair in pairs)


def _by_end(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names, and by the ends of these that are nobody's name."""
    return {end: tensor for name, tensor in tensors.items() for end in _ends(name)} | dict(tensors)


def _ends(name: str) -> list[str]:
    """A name and what is left of it without its first parts, of two parts at least, the longest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(max(1, len(parts) - 1))]


def _at(keys: Keys) -> str:
    return "".join(f"[{key!r}]" for key in keys)
