"""Checks of settings by the types that what they build declares, before anything is built."""

import collections.abc
import pydoc
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_mimic.errors import MimicError

#: Those of the roots that build nothing.
_PATHS = dict.fromkeys(("resume", "save_to", "save_epochs_to", "features"), str | None)
_OWN = _PATHS | {
    "seed": int,
    "test": bool,
    "suspicious_images": int,
    "optimized_metric": str | None,
    "checkpoints": str | collections.abc.Sequence[str],
}
#: Null, until they are taken from the data.
_FROM_DATA = ("num_classes", "image_shape")
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}
_WORDS |= {collections.abc.Sequence: "a list", tuple: "a list", list: "a list", typing.Literal: "text"}


def check_types(config: DictConfig) -> None:
    """Refuse values of another type than the parameter that they are given for.

    Without it, ``no`` is a text and thus true, and ``abc`` ends in an error of somebody else's in the middle of a run.

    Args:
        config: With nodes that have a ``_target_``.

    Raises:
        MimicError: Such a value, or a seed that cannot be one.

    Example:
        >>> check_types(OmegaConf.create({"net": {"_target_": "torch.nn.Flatten", "start_dim": "abc"}}))
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.MimicError: `net.start_dim` is 'abc'; expected a whole number.
    """
    for place, value, hint in _typed_settings(config):
        if not _fits(value, hint) and not (value is None and place.rpartition(".")[2] in _FROM_DATA):
            kinds = [typing.get_origin(each) or each for each in _members(hint)]
            known = dict.fromkeys(_WORDS.get(each, getattr(each, "__name__", str(each))) for each in kinds)
            raise MimicError(f"`{place}` is {value!r}; expected {' or '.join(known)}.")
    seed = config.get("seed")
    if seed is not None and not 0 <= seed < 2**32:
        raise MimicError(f"`seed` is {seed}; expected a whole number from 0 to {2**32 - 1}.")


def _typed_settings(config: DictConfig) -> Iterator[tuple[str, Any, Any]]:
    """The place, value and declared type of every setting that has one."""
    waiting: list[tuple[str, DictConfig, dict[str, Any]]] = [("", config, _OWN)]
    while waiting:
        prefix, node, hints = waiting.pop()
        for name in map(str, node):
            try:
                if OmegaConf.is_missing(node, name):
                    continue
                value = node[name]
            except OmegaConfBaseException:  # who builds from it reports it
                continue
            if isinstance(value, DictConfig):
                below = _hints(value.get("_target_"))
                waiting.append((f"{prefix}{name}.", value, below))
            elif name in hints:
                yield prefix + name, list(value) if isinstance(value, ListConfig) else value, hints[name]


def _hints(target: Any) -> dict[str, Any]:
    if not isinstance(target, str):
        return {}
    try:
        found: Any = pydoc.locate(target)
        return typing.get_type_hints(getattr(found, "__init__") if isinstance(found, type) else found)  # noqa: B009
    except Exception:  # a name that leads nowhere is reported when it is built; some types are not there at run time
        return {}


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_is(value, each) for each in _members(hint))


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; yes, where that cannot be seen."""
    origin = typing.get_origin(kind)
    if isinstance(value, bool) and kind in (int, float):
        return False
    if kind is float:
        return isinstance(value, int | float)
    if origin is typing.Literal:  # which words there are, who builds from it knows, with the nearest names
        return isinstance(value, str) or value in typing.get_args(kind)
    if origin is collections.abc.Callable:
        return callable(value)
    if isinstance(origin, type):
        if not isinstance(value, list):
            return isinstance(value, origin)
        of = typing.get_args(kind)[:1] if issubclass(origin, list | collections.abc.Sequence) else ()
        return issubclass(origin, collections.abc.Iterable) and all(
            isinstance(each, DictConfig) or _fits(each, of[0]) for each in value if of
        )
    if not isinstance(kind, type):
        return True
    if issubclass(kind, Path):
        return isinstance(value, str)
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol, which has methods of its own
        return not isinstance(value, str | int | float | list | None)
