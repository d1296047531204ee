"""The ids of a data set's samples, looked up through subsets and joined data sets."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightning_mimic.errors import MimicError

#: By sample, in a data set's order.
SampleIds = Sequence[int | str]


def sample_ids(dataset: Any) -> SampleIds | None:
    """Return the ids that a data set's samples carry, in its order.

    They come from the method ``sample_ids()`` of a data set (``WithIds`` has it), through ``Subset``, ``random_split``,
    ``ConcatDataset`` and ``ChainDataset``, nested in any way.

    Args:
        dataset: Map-style or iterable-style.

    Returns:
        ``None``, if no data set within has the method. One id may come several times only where one sample does.
        Where data sets are joined this takes time and, for the moment, memory of about 100 bytes a sample.

    Raises:
        MimicError: An id names two samples, only some of the joined data sets have ids, or a subset names rows that
            are not there.

    Example:
        >>> from torch.utils.data import ConcatDataset, Subset
        >>> from lightning_mimic import WithIds
        >>> sample_ids(Subset(WithIds("abcd", [7, 8, 9, 10]), [3, 0]))
        [10, 7]
        >>> sample_ids(ConcatDataset([WithIds("ab"), WithIds("cd")]))
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: the samples 0 and 2 of the ConcatDataset have the same id, 0...
    """
    ids = _carried_ids(dataset)
    # `WithIds` alone has looked itself.
    if ids is not None and not _checks_itself(dataset) and len(set(ids)) != len(ids):
        _check_repeats(dataset, ids)
    return ids


def row_ids(dataset: Any) -> Sequence[int]:
    """Return the row numbers that name the samples of a data set without ids, in its order.

    They are those of the data set itself, whatever subsets are taken of it, so that a sample keeps its name.

    Args:
        dataset: Map-style, with a length.

    Raises:
        MimicError: Subsets of several data sets are joined, or a subset names rows that are not there.

    Example:
        >>> from torch.utils.data import Subset
        >>> row_ids("abc"), row_ids(Subset("abcdef", [4, 2]))
        (range(0, 3), [4, 2])
    """
    return _rows(dataset)[1]


def check_loader_ids(loader: Any) -> None:
    """Raise ``MimicError`` if an id names two samples of a loader's data set, as far as that has ids of its own.

    Args:
        loader: A ``DataLoader``, several in a ``CombinedLoader`` (each has ids of its own), or anything else.
    """
    for each in getattr(loader, "flattened", [loader]):
        sample_ids(getattr(each, "dataset", None))


def reads_ids_from_samples(dataset: Any) -> bool:
    """Return whether the first sample has an id of its own (``sample["id"]``, ``sample.id``)."""
    sample: Any = None
    with suppress(Exception):  # one that cannot be read shows nothing
        sample = dataset[0]
    if isinstance(sample, Mapping):
        return "id" in sample
    return hasattr(sample, "id")


def _carried_ids(dataset: Any) -> SampleIds | None:
    if callable(getattr(dataset, "sample_ids", None)):
        return dataset.sample_ids()  # type: ignore[no-any-return]
    if (indices := _indices(dataset)) is not None:
        ids = _carried_ids(dataset.dataset)
        return None if ids is None else [ids[index] for index in indices]
    if (members := _members(dataset)) is None:
        return None
    given = [_carried_ids(member) for member in members]
    if all(ids is None for ids in given):
        return None
    if None in given:
        named, bare = (next(m for m, ids in zip(members, given, strict=True) if (ids is None) == no) for no in (0, 1))
        raise MimicError(
            f"the {type(dataset).__name__} joins {_kind(named)}, whose samples have ids, and {_kind(bare)}, whose "
            f"samples have none. Wrap the whole: WithIds({type(dataset).__name__}([...]))."
        )
    return [each for ids in given for each in ids or ()]


def _rows(dataset: Any) -> tuple[Any, Sequence[int]]:
    """Return the data set at the bottom and the rows of it; a ``range``, if they are all of them in their order."""
    if (indices := _indices(dataset)) is not None:
        base, rows = _rows(dataset.dataset)
        return base, [rows[index] for index in indices]
    if (members := _members(dataset)) is None:
        return dataset, range(len(dataset))
    found = [_rows(member) for member in members]
    if all(isinstance(rows, range) for _, rows in found):
        return dataset, range(len(dataset))
    if all(base is found[0][0] for base, _ in found):
        return found[0][0], [row for _, rows in found for row in rows]
    raise MimicError(
        f"the {type(dataset).__name__} joins subsets of several data sets, whose row numbers do not tell their samples "
        "apart. Name them: WithIds(dataset, ids), with an id of your own for every sample."
    )


def _indices(dataset: Any) -> Iterator[int] | None:
    """Yield the rows that a ``Subset`` takes, counted from 0; ``None`` for any other data set."""
    from torch.utils.data import Subset  # importing the package must not load torch

    if not isinstance(dataset, Subset):
        return None
    length = len(dataset.dataset)  # type: ignore[arg-type]

    def counted() -> Iterator[int]:
        for given in dataset.indices:
            index = operator.index(given)
            if not -length <= index < length:
                raise MimicError(f"the Subset takes row {index} of {length}.")
            yield index % length

    return counted()


def _members(dataset: Any) -> Sequence[Any] | None:
    from torch.utils.data import ChainDataset, ConcatDataset

    return list(dataset.datasets) if isinstance(dataset, ConcatDataset | ChainDataset) else None


def _checks_itself(dataset: Any) -> bool:
    return getattr(dataset, "unique_ids", False) is True


def _check_repeats(dataset: Any, ids: SampleIds) -> None:
    """Raise ``MimicError`` if an id names two samples; a subset may take one sample several times."""
    origins = list(_origins(dataset))
    first: dict[int | str, int] = {}
    for place, each in enumerate(ids):
        other = first.setdefault(each, place)
        if origins[other][:2] != origins[place][:2]:
            raise MimicError(
                f"the samples {other} and {place} of the {type(dataset).__name__} have the same id, {each!r}: "
                f"{origins[other][2]} and {origins[place][2]}. Scores and decisions are kept by id. Give ids to the "
                "whole, WithIds(ConcatDataset([...])), or ids of their own to each part, WithIds(part, ids)."
            )


def _origins(dataset: Any, name: str = "") -> Iterator[tuple[int, int, str]]:
    """Yield of every sample the identity of the data set at the bottom, the row there, and both as a phrase."""
    if (indices := _indices(dataset)) is not None:
        inner = list(_origins(dataset.dataset, name))
        yield from (inner[index] for index in indices)
    elif (members := _members(dataset)) is not None:
        for number, member in enumerate(members):
            yield from _origins(member, f"{name} in part {number + 1}")
    elif _checks_itself(dataset):
        yield from _origins(dataset.dataset, name)
    else:
        rows = len(dataset) if hasattr(dataset, "__len__") else len(dataset.sample_ids())
        for row in range(rows):
            yield id(dataset), row, f"row {row} of {_kind(dataset)}{name}"


def _kind(dataset: Any) -> str:
    return f"a {type(dataset).__name__}"
