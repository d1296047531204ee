"""Batches that carry their samples' ids, and are otherwise what they were."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from lightning_mimic.errors import MimicError
from lightning_mimic.trainer_package import pl

#: int64 tensor of shape (B,), or a list of str.
BatchIds = Tensor | list[str]


class _CarriesIds:
    """Keeps ``ids`` through pinning and the transfer to a device; they themselves stay on the host.

    A DataLoader calls ``pin_memory`` and Lightning calls ``to`` where a batch has them, instead of making a
    new container of its items, which would lose the ids.
    """

    ids: BatchIds

    def pin_memory(self) -> Any:
        return self._changed(apply_to_collection(self._plain(), Tensor, Tensor.pin_memory))

    def to(self, device: torch.device | str, **kwargs: Any) -> Any:
        return self._changed(pl.utilities.move_data_to_device(self._plain(), device))

    def _plain(self) -> Any:
        raise AssertionError  # pragma: no cover

    def _changed(self, items: Any) -> Any:
        if not hasattr(self, "ids"):
            raise MimicError(
                "the batch's ids were lost where a new container was made of its items, as precision='64-true' and "
                "'bf16-true' do. Give dict batches with a key 'id', or tell ids with `id_from=`."
            )
        changed = type(self)(items)  # type: ignore[call-arg]
        changed.ids = self.ids
        return changed


class TupleWithIds(_CarriesIds, tuple[Any, ...]):
    """A tuple batch with ``ids``."""

    def _plain(self) -> Any:
        return tuple(self)


class ListWithIds(_CarriesIds, list[Any]):
    """A list batch with ``ids``."""

    def _plain(self) -> Any:
        return list(self)


class DictWithIds(_CarriesIds, dict[Any, Any]):
    """A dict batch with ``ids``."""

    def _plain(self) -> Any:
        return dict(self)


_CONTAINERS: dict[type, type] = {tuple: TupleWithIds, list: ListWithIds, dict: DictWithIds}


class SampleWithId:
    """One sample and its id, on the way from :class:`WithIds` to :func:`collate_with_ids`."""

    __slots__ = ("id", "sample")

    def __init__(self, sample: Any, id: int | str) -> None:
        self.sample = sample
        self.id = id


class WithIds(Dataset[SampleWithId]):
    """A dataset whose samples know who they are; goes with ``collate_fn=collate_with_ids``.

    Args:
        dataset: A map-style dataset of tuples or dicts.
        ids: One int or str per sample; indices into ``dataset``, if left out (a Subset counts its own).

    Raises:
        TypeError: An iterable-style dataset, which has no indices; put an id into its samples.
        MimicError: The number of ids is not that of the samples, ids repeat, or are neither all int nor all str.

    Example:
        >>> pairs = [(torch.zeros(2), 0), (torch.ones(2), 1)]
        >>> loader = torch.utils.data.DataLoader(WithIds(pairs, ["a", "b"]), 2, collate_fn=collate_with_ids)
        >>> x, y = batch = next(iter(loader))
        >>> batch.ids
        ['a', 'b']
    """

    def __init__(self, dataset: Any, ids: Any = None) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"WithIds needs a map-style dataset, and {type(dataset).__name__} has no indices; put an id into each "
                "sample (key 'id'), or use GradMimic's `id_from=`."
            )
        if ids is not None and not isinstance(ids, list | tuple):
            ids = list(ids.tolist() if hasattr(ids, "tolist") else ids)  # a tensor, an array, a column of a table
        if ids is not None and len(ids) != len(dataset):
            raise MimicError(f"WithIds: {len(ids)} ids for {len(dataset)} samples.")
        if ids is not None and len(set(ids)) != len(ids):
            raise MimicError(
                f"WithIds: {len(ids) - len(set(ids))} of {len(ids)} ids repeat; each sample needs its own."
            )
        # bool is a kind of its own, numpy's integers are not.
        kinds = {
            bool if isinstance(i, bool) else int if isinstance(i, Integral) else str if isinstance(i, str) else type(i)
            for i in ids or ()
        }
        if ids is not None and kinds not in ({int}, {str}, set()):
            raise MimicError(
                f"WithIds: ids have types {', '.join(sorted(k.__name__ for k in kinds))}; all int or all str."
            )
        self.dataset = dataset
        self.ids = ids

    def __len__(self) -> int:
        return len(self.dataset)

    def sample_ids(self) -> Sequence[int | str]:
        """The samples' ids in the data set's order."""
        return range(len(self)) if self.ids is None else self.ids

    def __getitem__(self, index: int) -> SampleWithId:
        return SampleWithId(self.dataset[index], index if self.ids is None else self.ids[index])


def collate_with_ids(samples: Sequence[SampleWithId], collate_fn: Callable[[list[Any]], Any] = default_collate) -> Any:
    """Collates the samples of a :class:`WithIds` dataset into an ordinary batch that also has ``.ids``.

    Args:
        samples: What the dataset gave.
        collate_fn: The collation of the samples themselves; for one of your own pass
            ``functools.partial(collate_with_ids, collate_fn=mine)``.

    Returns:
        The tuple, list or dict that ``collate_fn`` returns, unpacked as ever, with ``.ids``: int64 tensor of
        shape ``(B,)``, or list of str. In torch 2.9 and before, a loader with ``pin_memory=True`` makes a plain list
        of a tuple and drops its ids; return a list or dict there.

    Raises:
        TypeError: ``collate_fn`` returns something else, which could not carry ids.
    """
    batch = collate_fn([s.sample for s in samples])
    kind = _CONTAINERS.get(type(batch))
    if kind is None:
        raise TypeError(
            f"collate_with_ids: the batch is a {type(batch).__name__}, which cannot carry ids; return a tuple, list or "
            "dict, or use GradMimic's `id_from=`."
        )
    carrying = kind(batch)
    ids = [s.id for s in samples]
    carrying.ids = ids if isinstance(ids[0], str) else torch.tensor(ids, dtype=torch.int64)
    return carrying
