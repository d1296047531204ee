"""Test cases: all pairs of values instead of all combinations, and loops that name the case that failed."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(**values: Iterable[Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return arguments of `pytest.mark.parametrize` in which each pair of values of two parameters occurs.

    Greedy and deterministic: the combination with the most pairs that are still missing is taken next.
    """
    names, listed = list(values), [list(v) for v in values.values()]

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(case), 2))

    every = list(product(*(range(len(v)) for v in listed)))
    missing, cases = set().union(*map(pairs, every)), []
    while missing:
        best = max(every, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(best)
    return names, [tuple(v[k] for v, k in zip(listed, case, strict=True)) for case in sorted(cases)]


@contextlib.contextmanager
def case(*names: Any) -> Iterator[None]:
    """Add the name of a case in a loop to the report of an error."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {', '.join(map(str, names))}")
        raise


def for_each(names: str | Iterable[str], values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for all of many cheap values, where `pytest.mark.parametrize` would make a test of each.

    All values are tried, and all that fail are reported. They share the test's fixtures, but not ``tmp_path``.
    """
    given = [names] if isinstance(names, str) else list(names)
    rows = [(value,) if isinstance(names, str) else tuple(value) for value in values]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def loop(**fixtures: Any) -> None:
            failed: list[BaseException] = []
            folder = fixtures.get("tmp_path")
            for k, row in enumerate(rows):
                if folder is not None:
                    fixtures["tmp_path"] = folder / str(k)
                    fixtures["tmp_path"].mkdir()
                try:
                    with case(*row):
                        test(**fixtures, **dict(zip(given, row, strict=True)))
                except (Exception, pytest.fail.Exception) as error:
                    failed.append(error)
            if len(failed) == 1:
                raise failed[0]
            if failed:
                raise BaseExceptionGroup(f"{len(failed)} of {len(rows)} cases failed", failed)

        signature = inspect.signature(test)
        fixtures = [p for name, p in signature.parameters.items() if name not in given]
        loop.__signature__ = signature.replace(parameters=fixtures)  # type: ignore[attr-defined]
        return loop

    return decorate
