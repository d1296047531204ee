"""Errors of the package, and the phrases that their messages are made of."""

import difflib
from collections.abc import Iterable, Sequence


class MimicError(ValueError):
    """Input that cannot be used; the message names what was given, what was expected and the fix."""


class ReferenceLoadError(MimicError):
    """A checkpoint that cannot be read, or does not fit the model."""


class LedgerError(MimicError):
    """A ledger that cannot be written or read as asked."""


class CurationError(MimicError):
    """Scores, a manifest or a setting from which no decision can be made."""


def nearest_names(name: str, candidates: Iterable[str], count: int = 4) -> str:
    """Return the candidates most like ``name``, as a phrase for an error message.

    Example:
        >>> nearest_names("haed", ["head", "body"])
        "nearest: 'head'"
    """
    names = sorted(set(candidates))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    if close:
        return "nearest: " + ", ".join(repr(c) for c in close)
    shown = ", ".join(repr(c) for c in names[:count])
    return f"there are: {shown}" + (f" and {len(names) - count} more" if len(names) > count else "")


def join_names(names: Sequence[str], most: int = 6) -> str:
    """Return the first of the names, quoted, and how many more there are, for an error message.

    Example:
        >>> join_names(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
