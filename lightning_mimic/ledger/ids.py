"""Ids of samples as a ledger holds them."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import pyarrow as pa

from lightning_mimic.errors import LedgerError

_LEAST, _SIGNED, _UNSIGNED = -(2**63), 2**63, 2**64


def id_array(values: Any) -> pa.Array:
    """Return ids as an array of ``int64``, ``uint64`` (if one is 2^63 or above) or ``string``.

    Args:
        values: An array of integers, or a list of ints or of non-empty text; numpy's scalars count as what they hold.

    Raises:
        LedgerError: Some value is neither, or is out of range; or they are of both kinds, or both below 0 and above
            2^63 - 1. The message names it.

    Example:
        >>> id_array([1, 2**63]).type, id_array(["a.png"]).type
        (DataType(uint64), DataType(string))
    """
    kind = getattr(getattr(values, "dtype", None), "kind", None)
    if kind in ("i", "u"):
        ids = pa.array(values)
        return ids if pa.types.is_uint64(ids.type) else ids.cast(pa.int64())
    plain = [_plain(value) for value in (values.tolist() if kind else values)]
    texts = [value for value in plain if isinstance(value, str)]
    numbers = [value for value in plain if isinstance(value, int)]
    if texts and numbers:
        raise LedgerError(f"ids must be all int or all str, and there are both: {numbers[0]!r} and {texts[0]!r}.")
    if texts:
        return pa.array(texts, pa.string())
    lowest, highest = min(numbers, default=0), max(numbers, default=0)
    if highest < _SIGNED:
        return pa.array(numbers, pa.int64())
    if lowest < 0:
        raise LedgerError(
            f"the ids {lowest} and {highest} do not go together: ids are signed or unsigned numbers of 64 bits."
        )
    return pa.array(numbers, pa.uint64())


def unified(types: Iterable[pa.DataType]) -> pa.DataType | None:
    """Return the type that holds ids of all these types, ``None`` where none does.

    Whether signed ids are from 0 on, so that unsigned ones go with them, is not known from their type.
    """
    there = set(types)
    if there == {pa.int64(), pa.uint64()}:
        return pa.uint64()
    return there.pop() if len(there) == 1 else None


def _plain(value: Any) -> int | str:
    """Return an id as a plain int or str."""
    if isinstance(value, str):
        if not value:
            raise LedgerError(f"the id {value!r} is empty; every sample needs an id of its own.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise LedgerError(
                f"the id {value!r} is not valid text: it cannot be written as UTF-8. Rename the file that it names, or "
                "give other ids."
            ) from None
        return str(value)
    number = None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
    if number is not None:
        if not _LEAST <= number < _UNSIGNED:
            raise LedgerError(f"the id {value!r} is out of range: int ids are from -2^63 to 2^64 - 1.")
        return number
    if value is None:
        raise LedgerError("an id is missing (None); every sample needs an id of its own.")
    raise LedgerError(f"the id {value!r} is a {type(value).__name__}; ids must be all int or all str.")
