"""Batches that carry their samples' ids, and are otherwise what they were."""

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_mimic.dataset_ids import row_ids, sample_ids
from lightning_mimic.errors import LedgerError, MimicError
from lightning_mimic.ledger import id_array
from lightning_mimic.trainer_package import pl

#: int64 or uint64 tensor of shape (B,), or a list of str.
BatchIds = Tensor | list[str]


class _CarriesIds:
    """Keeps ``ids`` through copies, pinning and the transfer to a device; they themselves stay on the host.

    First base of a class whose second base is the batch's own, see :func:`_carrying`. A DataLoader calls ``pin_memory``
    and Lightning calls ``to`` where a batch has them, instead of making a new container of its items, which would lose
    the ids.
    """

    ids: BatchIds

    def pin_memory(self, *device: Any) -> Any:
        own = getattr(super(), "pin_memory", None)
        return self._given_ids(pin_memory(self._plain()) if own is None else own(*device))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        own = getattr(super(), "to", None)
        if own is not None:
            return self._given_ids(own(*args, **kwargs))
        device = args[0] if args else kwargs["device"]
        return self._given_ids(pl.utilities.move_data_to_device(self._plain(), device))

    def __copy__(self) -> Any:
        return self._given_ids(self._plain())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _with_ids(copy.deepcopy(self._plain(), memo), copy.deepcopy(vars(self).get("ids"), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _with_ids, (self._plain(), vars(self).get("ids"))

    def _plain(self) -> Any:
        plain = type(self).__bases__[1]
        return _as_class(self, plain, plain)

    def _given_ids(self, batch: Any) -> Any:
        return batch if batch is self else _with_ids(batch, vars(self).get("ids"))


@functools.cache
def _carrying(kind: type) -> type:
    """Return the class of batches that are a ``kind`` and carry ids."""
    members: dict[str, Any] = {"__module__": __name__}
    if kind is Tensor:  # results of operations are plain tensors
        members["__torch_function__"] = torch._C._disabled_torch_function_impl
    return type(f"{kind.__name__}WithIds", (_CarriesIds, kind), members)


def _as_class(batch: Any, kind: Any, plain: Any) -> Any:
    """Return a shallow copy of a batch as an instance of another class.

    Args:
        batch: A tensor or a collection; not changed.
        kind: The plain class, or the one derived from it that carries ids.
        plain: The plain class.
    """
    if isinstance(batch, Tensor):
        return batch.as_subclass(kind)
    copied = batch
    if isinstance(batch, tuple):
        made: Any = tuple.__new__(kind, batch)
    elif isinstance(batch, list | dict):
        made = kind.__new__(kind)
    elif hasattr(plain, "__copy__"):  # copies the attribute that holds the items
        made, copied = kind.__new__(kind), plain.__copy__(batch)
    else:  # as Lightning's transfer makes it
        made = copied = kind(dict(batch) if isinstance(batch, Mapping) else list(batch))
    attributes = getattr(made, "__dict__", {})
    attributes.update(getattr(copied, "__dict__", {}))
    attributes.pop("ids", None)
    if isinstance(batch, defaultdict):
        made.default_factory = batch.default_factory
    if isinstance(batch, list):
        made.extend(batch)
    elif isinstance(batch, dict):
        made.update(batch)
    return made


def _with_ids(batch: Any, ids: Any) -> Any:
    """Return a batch as one of its own type that carries ids.

    Collections and tensors become instances of a derived class, because copies and transfers make new ones of them;
    any other object (a dataclass, joined graphs) keeps the ids as an attribute.

    Args:
        batch: Not changed, if it is a collection or a tensor.
        ids: One per sample; ``None`` if they were lost, because somebody made a new batch of the items.

    Raises:
        TypeError: The batch takes no attributes, or is a tensor of a class of its own.
    """
    kind: Any = type(batch)
    if not issubclass(kind, _CarriesIds) and isinstance(batch, Tensor | Mapping | Sequence):
        if isinstance(batch, str | bytes) or (isinstance(batch, Tensor) and kind is not Tensor):
            raise TypeError(f"a {kind.__name__} cannot carry ids.")
        batch = _as_class(batch, _carrying(kind), kind)
    if ids is not None:
        vars(batch)["ids"] = ids  # not by its __setattr__: it may be frozen, or move its attributes to a device
    return batch


class SampleWithId:
    """One sample and its id, on the way from :class:`WithIds` to :func:`collate_with_ids`."""

    __slots__ = ("id", "sample")

    def __init__(self, sample: Any, id: int | str) -> None:
        self.sample = sample
        self.id = id


class WithIds(Dataset[SampleWithId]):
    """A dataset of samples with their ids; goes with ``collate_fn=collate_with_ids``.

    Args:
        dataset: A map-style dataset.
        ids: One int or str per sample. If left out, they are those that the samples have already (of a ``Subset`` of a
            ``WithIds``), or else row numbers: of a ``Subset`` those of the whole, so that a sample keeps its id.

    Raises:
        TypeError: An iterable-style dataset, which has no indices; put an id into its samples.
        MimicError: The number of ids is not that of the samples, an id names two of them, ids are neither all int nor
            all str, or they are left out where subsets of several data sets are joined.

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
        if kinds == {int}:
            try:
                id_array(ids)  # within 64 bits
            except LedgerError as error:
                raise MimicError(f"WithIds: {error}") from error
        self.dataset = dataset
        self.ids = ids
        self._named: Sequence[int | str] | None = ids
        if ids is None and hasattr(dataset, "__len__"):
            own = sample_ids(dataset)
            self._named = row_ids(dataset) if own is None else own

    #: No id names two samples; that has been looked at.
    unique_ids = True

    def __len__(self) -> int:
        return len(self.dataset)

    def sample_ids(self) -> Sequence[int | str]:
        """The samples' ids in the data set's order."""
        return range(len(self)) if self._named is None else self._named

    def __getitem__(self, index: int) -> SampleWithId:
        sample = self.dataset[index]
        if isinstance(sample, SampleWithId):  # of a data set with ids, which are given anew
            sample = sample.sample
        return SampleWithId(sample, index if self._named is None else self._named[index])


def collate_with_ids(samples: Sequence[SampleWithId], collate_fn: Callable[[list[Any]], Any] = default_collate) -> Any:
    """Collate the samples of a :class:`WithIds` dataset into an ordinary batch that also has ``.ids``.

    The batch is still what ``collate_fn`` makes: a tensor; a tuple, a named one, too; a list; a dict, an
    ``OrderedDict``, a ``BatchEncoding``; a dataclass; a ``Batch`` of PyTorch Geometric. Its ids stay with it, on the
    host, in workers, pinned memory, copies and transfers. An operation on a tensor gives a plain one.

    Args:
        samples: From the dataset.
        collate_fn: The collation of the samples themselves, which must keep all of them in their order; for one of your
            own pass ``functools.partial(collate_with_ids, collate_fn=mine)``.

    Returns:
        What ``collate_fn`` returns, with ``.ids``: a tensor of shape ``(B,)``, int64, or uint64 if an id is 2^63 or
        above; or a list of str. In torch 2.9 and
        before, a loader with ``pin_memory=True`` drops the ids of a tuple; return a list or dict there.

    Raises:
        TypeError: The samples have no ids, or ``collate_fn`` returns something that cannot carry them.
        MimicError: The batch has ``ids`` of its own, or ``collate_fn`` sorted or removed samples in place.

    Example:
        >>> loader = torch.utils.data.DataLoader(WithIds(torch.eye(2)), 2, collate_fn=collate_with_ids)
        >>> batch = next(iter(loader))
        >>> batch.sum(), batch.ids
        (tensor(2.), tensor([0, 1]))
    """
    for sample in samples:
        if not isinstance(sample, SampleWithId):
            raise TypeError(
                f"collate_with_ids: a sample is a {type(sample).__name__} without an id; give the loader "
                "WithIds(dataset) in the place of the data set."
            )
    given = [s.sample for s in samples]
    batch = collate_fn(given)
    places = {id(s.sample): place for place, s in enumerate(samples)}
    moved = [place for place, sample in enumerate(given) if places.get(id(sample), place) != place]
    if len(given) != len(samples) or (moved and len(places) == len(samples)):
        raise MimicError(
            "collate_with_ids: `collate_fn` sorted or removed samples in the list that it was given, so that their ids "
            "would be those of others. Put an id into each sample (a key 'id') in the place of WithIds, or keep all "
            "samples in their order."
        )
    if getattr(batch, "ids", None) is not None:
        raise MimicError(
            f"collate_with_ids: the batch (a {type(batch).__name__}) has `ids` of its own. If they name its samples, "
            "leave out WithIds and collate_with_ids; otherwise give the attribute another name."
        )
    ids = [s.id for s in samples]
    try:
        return _with_ids(batch, ids if isinstance(ids[0], str) else _as_tensor(ids))
    except TypeError as error:
        raise TypeError(
            f"collate_with_ids: the batch is a {type(batch).__name__}, which cannot carry ids; return a tensor, tuple, "
            "list, dict or an object that takes attributes, put a field `id` into it, or use GradMimic's `id_from=`."
        ) from error


def _as_tensor(ids: list[Any]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64 if max(ids) < 2**63 else torch.uint64)
