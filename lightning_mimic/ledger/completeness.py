"""Rows that were recorded and are not there, and attempts of which that cannot be known."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: What a description holds of an attempt: its number of ``ranks`` from the start, and how many ``rows`` each rank has
#: written once all of them are on the disk. Older ledgers have neither.
Attempt = Mapping[str, Any]


def missing_rows(
    attempts: Sequence[Attempt],
    parts: Iterable[tuple[int, int, int, int]],
    ends: Mapping[tuple[int, int], float],
    continued: Mapping[int, int],
) -> list[str]:
    """Describe rows that are missing for certain.

    An attempt that has ended knows the number of each rank's rows. In any other one the ranks number their parts
    without gaps; all of them have rows if one has; and what a later attempt continues was written by all, up to the
    last step that was scored before the checkpoint.

    Args:
        attempts: As described.
        parts: Of each part its attempt, rank, number and rows, by its name.
        ends: By attempt and rank, the last step whose rows were read and hold.
        continued: By attempt, the last of its steps that a later one relies on.

    Example:
        >>> missing_rows([{"ranks": 2, "rows": [5, 4]}], [(0, 0, 0, 5)], {}, {})
        ['attempt 0, rank 1, 4 of 4 rows (missing)']
    """
    rows: Counter[tuple[int, int]] = Counter()
    numbers = defaultdict[tuple[int, int], set[int]](set)
    for attempt, rank, number, count in parts:
        rows[attempt, rank] += count
        numbers[attempt, rank].add(number)
    missing = []
    for attempt, facts in enumerate(attempts):
        for rank, expected in enumerate(facts.get("rows", ())):
            lacking = expected - rows[attempt, rank]
            if lacking > 0:
                missing.append(f"attempt {attempt}, rank {rank}, {lacking} of {expected} rows (missing)")
        for rank, step in _ranks_behind(attempt, facts, ends, continued.get(attempt, -1)).items():
            if step < 0:
                missing.append(f"attempt {attempt}, rank {rank}, all rows (missing)")
            elif attempt < len(attempts) - 1:
                missing.append(f"attempt {attempt}, rank {rank}, rows after step {step:.0f} (missing)")
    for (attempt, rank), seen in numbers.items():
        if "rows" not in attempts[attempt]:
            gaps = sorted(set(range(max(seen))) - seen)
            missing += [f"attempt {attempt}, rank {rank}, part {gap} (missing)" for gap in gaps]
    return missing


def rows_in_doubt(attempts: Sequence[Attempt], ends: Mapping[tuple[int, int], float]) -> list[str]:
    """Describe rows that may be missing: before the first attempt, or after the last one if it has not ended.

    Args:
        attempts: As described.
        ends: By attempt and rank, the last step whose rows were read and hold.

    Example:
        >>> rows_in_doubt([{"ranks": 1}], {(0, 0): 99})[0][:39]
        'attempt 0 has not ended: it still runs,'
    """
    last, facts = len(attempts) - 1, attempts[-1]
    start = attempts[0].get("start_step", 0)
    doubts = [f"the rows before step {start} are in another directory"] if attempts[0].get("elsewhere") else []
    if not _is_open(facts):
        return doubts
    behind = [f"rank {rank} stops at step {step:.0f}" for rank, step in _ranks_behind(last, facts, ends).items()]
    known = f" ({listed(behind)}, before others)" if behind else ""
    return [
        *doubts,
        f"attempt {last} has not ended: it still runs, or was stopped or killed, so that its last rows may be "
        f"missing{known}",
    ]


def listed(descriptions: Sequence[str], most: int = 8) -> str:
    """Return the first descriptions, and how many more there are, for a message.

    Example:
        >>> listed(["part 1", "part 2", "part 3"], most=2)
        'part 1; part 2; and 1 more'
    """
    more = len(descriptions) - most
    return "; ".join([*descriptions[:most], *([f"and {more} more"] if more > 0 else [])])


def _is_open(facts: Attempt) -> bool:
    """Whether the attempt knows its ranks, and not yet their rows."""
    return "ranks" in facts and "rows" not in facts


def _ranks_behind(
    attempt: int, facts: Attempt, ends: Mapping[tuple[int, int], float], needed: int = -1
) -> dict[int, float]:
    """Of an attempt that has not ended, the ranks that stop before another one, and their last steps; -1: no rows.

    Args:
        attempt: Its number.
        facts: Its description.
        ends: By attempt and rank, the last step of which rows hold.
        needed: A step that all ranks reached.
    """
    if not _is_open(facts):
        return {}
    steps = {rank: ends.get((attempt, rank), -1) for rank in range(facts["ranks"])}
    return {rank: step for rank, step in steps.items() if step < max(needed, *steps.values())}
