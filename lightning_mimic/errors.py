"""Errors of the package, and the phrases that their messages are made of."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class MimicError(ValueError):
    """Input that cannot be used; the message names what was given, what was expected and the fix."""


class ReferenceLoadError(MimicError):
    """A checkpoint that cannot be read, or does not fit the model."""


class LedgerError(MimicError):
    """A ledger that cannot be written or read as asked."""


class CurationError(MimicError):
    """Scores, a manifest or a setting from which no decision can be made."""


@contextmanager
def package_of_extra(use: str, extra: str) -> Iterator[None]:
    """Turn a missing optional package into an error that tells how to install it.

    Args:
        use: Purpose of the package, in the singular.
        extra: The extra of this package that brings it.

    Raises:
        MimicError: A module that is imported in the context is not installed.

    Example:
        >>> with package_of_extra("a graph", "graphs"):
        ...     import no_such_package
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: a graph needs the package no_such_package: pip install 'lightning-mimic[...
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        raise MimicError(f"{use} needs the package {name}: pip install 'lightning-mimic[{extra}]'.") from error


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
