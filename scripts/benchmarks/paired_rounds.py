"""Paired measurements: several ways to do a job take turns, and each is compared with the first in the same round."""

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Name = TypeVar("Name")
Result = TypeVar("Result")


def interleave(
    title: str, ways: Mapping[Name, Callable[[], Result]], rounds: int, warm_up: int = 0
) -> dict[Name, list[Result]]:
    """Call every way once per round, so that whatever else the machine does hits all alike.

    Returns:
        The results by name, one per round after those of the warm-up.
    """
    results: dict[Name, list[Result]] = {name: [] for name in ways}
    for number in track(range(warm_up + rounds), title, console=Console(stderr=True), transient=True):
        for name, way in ways.items():
            result = way()
            if number >= warm_up:
                results[name].append(result)
    return results


def alone(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function in a process of its own, which has inherited nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def own_memory(field: str) -> int:
    """Return this process's resident memory in bytes, now (``VmRSS``) or at its peak (``VmHWM``).

    Not by getrusage, whose maximum a new process inherits from its parent.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return quartiles of the ratios within rounds."""
    found = [value / other for value, other in zip(values, others, strict=True)]
    return statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3


def spread(values: Sequence[float], others: Sequence[float], digits: int = 3) -> str:
    """Write the median of the ratios within rounds with its quartiles."""
    low, middle, high = (f"{value:.{digits}f}" for value in ratios(values, others))
    return f"{middle} ({low}–{high})"
