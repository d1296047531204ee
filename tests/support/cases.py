"""Fewer cases that test as much: all pairs of values instead of all combinations, and loops that name what failed."""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any


def pairwise(**values: Iterable[Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Arguments of `pytest.mark.parametrize`: every pair of values of two arguments occurs in at least one case.

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
    """Names the case of a loop in the report of whatever fails in it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {', '.join(map(str, names))}")
        raise
