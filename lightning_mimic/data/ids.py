"""Batches that carry the ids of their samples and keep their type."""

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

#: Ids of a batch: int64 or uint64 tensor of shape (B,), or a list of str.
BatchIds = Tensor | list[str]


class _CarriesIds:
    """Mixin that keeps ``ids`` through copies, pinning and the transfer to a device; the ids stay on the host.

    It is the first base of a class whose second base is the type of the batch, see :func:`_carrying`. A DataLoader
    calls ``pin_memory`` and Lightning calls ``to`` if a batch has these methods; otherwise they would make a new
    container, which would lose the ids.
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
    """Return a subclass of ``kind`` that carries ids."""
    members: dict[str, Any] = {"__module__": __name__}
    if kind is Tensor:  # makes results of operations plain tensors
        members["__torch_function__"] = torch._C._disabled_torch_function_impl
    return type(f"{kind.__name__}WithIds", (_CarriesIds, kind), members)


def _as_class(batch: Any, kind: Any, plain: Any) -> Any:
    """Return a shallow copy of a batch as an instance of another class.

    Args:
        batch: Tensor or collection; it is not changed.
        kind: Class of the copy: the plain class, or its subclass that carries ids.
        plain: Plain class of the batch.
    """
    if isinstance(batch, Tensor):
        return batch.as_subclass(kind)
    copied = batch
    if isinstance(batch, tuple):
        made: Any = tuple.__new__(kind, batch)
    elif isinstance(batch, list | dict):
        made = kind.__new__(kind)
    elif hasattr(plain, "__copy__"):  # such as UserDict, which copies the attribute with its items
        made, copied = kind.__new__(kind), plain.__copy__(batch)
    else:  # the way Lightning's transfer constructs it
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
    """Return a batch of the same type that carries ids.

    Collections and tensors become instances of a subclass, which keeps the ids when copies and transfers make new
    objects; any other object (a dataclass, a batch of graphs) gets the ids as an attribute.

    Args:
        batch: Batch; a collection or tensor is not changed.
        ids: Ids of the samples; ``None`` if they were lost because other code made a new batch from the items.

    Raises:
        TypeError: The batch accepts no attributes, or is an instance of a subclass of Tensor.
    """
    kind: Any = type(batch)
    if not issubclass(kind, _CarriesIds) and isinstance(batch, Tensor | Mapping | Sequence):
        if isinstance(batch, str | bytes) or (isinstance(batch, Tensor) and kind is not Tensor):
            raise TypeError(f"a {kind.__name__} cannot carry ids.")
        batch = _as_class(batch, _carrying(kind), kind)
    if ids is not None:
        # Bypasses __setattr__, because the batch may be frozen or move its attributes to a device.
        vars(batch)["ids"] = ids
    return batch


class SampleWithId:
    """Hold one sample and its id, as passed from :class:`WithIds` to :func:`collate_with_ids`."""

    __slots__ = ("id", "sample")

    def __init__(self, sample: Any, id: int | str) -> None:
        self.sample = sample
        self.id = id


class WithIds(Dataset[SampleWithId]):
    """Add ids to the samples of a data set; use it with ``collate_fn=collate_with_ids``.

    Args:
        dataset: Map-style data set.
        ids: One int or str per sample. ``None``: ids that the samples already have (in a ``Subset`` of a ``WithIds``),
            otherwise row numbers; in a ``Subset``, those of the whole data set, so that a sample keeps its id.

    Raises:
        TypeError: The data set is iterable-style and has no indices; put an id into its samples instead.
        MimicError: The number of ids differs from the number of samples, ids repeat, ids are neither all int nor all
            str, or they are left out for a concatenation of subsets of several data sets.

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
                f"WithIds needs a map-style dataset, but {type(dataset).__name__} has no indices; put an id into each "
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
        # Unlike NumPy integers, bool is not accepted as int.
        kinds = {
            bool if isinstance(i, bool) else int if isinstance(i, Integral) else str if isinstance(i, str) else type(i)
            for i in ids or ()
        }
        if ids is not None and kinds not in ({int}, {str}, set()):
            raise MimicError(
                f"WithIds: ids have types {', '.join(sorted(k.__name__ for k in kinds))}; expected all int or all str."
            )
        if kinds == {int}:
            try:
                id_array(ids)  # checks that they fit into 64 bits
            except LedgerError as error:
                raise MimicError(f"WithIds: {error}") from error
        self.dataset = dataset
        self.ids = ids
        self._named: Sequence[int | str] | None = ids
        if ids is None and hasattr(dataset, "__len__"):
            own = sample_ids(dataset)
            self._named = row_ids(dataset) if own is None else own

    #: Ids are known to be unique.
    unique_ids = True

    def __len__(self) -> int:
        return len(self.dataset)

    def sample_ids(self) -> Sequence[int | str]:
        """Return the ids of the samples in the order of the data set."""
        return range(len(self)) if self._named is None else self._named

    def __getitem__(self, index: int) -> SampleWithId:
        sample = self.dataset[index]
        if isinstance(sample, SampleWithId):  # of a wrapped WithIds, whose ids are replaced
            sample = sample.sample
        return SampleWithId(sample, index if self._named is None else self._named[index])


def collate_with_ids(samples: Sequence[SampleWithId], collate_fn: Callable[[list[Any]], Any] = default_collate) -> Any:
    """Collate the samples of a :class:`WithIds` data set into an ordinary batch with an attribute ``ids``.

    The batch keeps the type that ``collate_fn`` returns: tensor, tuple, named tuple, list, dict, ``OrderedDict``,
    ``BatchEncoding``, dataclass, or ``Batch`` of PyTorch Geometric. Its ids are kept by worker processes, pinned
    memory, copies and transfers, and stay on the host. Operations on a tensor return plain tensors.

    Args:
        samples: Samples from the data set.
        collate_fn: Function that collates the samples without their ids; it must keep all of them in their order. To
            use your own, pass ``functools.partial(collate_with_ids, collate_fn=mine)`` to the loader.

    Returns:
        The result of ``collate_fn``, with ``ids``: a tensor of shape ``(B,)``, int64, or uint64 if an id is 2^63 or
        above; or a list of str. Up to torch 2.9, a loader with ``pin_memory=True`` drops the ids of a tuple; return a
        list or dict instead.

    Raises:
        TypeError: The samples have no ids, or ``collate_fn`` returns an object that cannot carry them.
        MimicError: The batch already has ``ids``, or ``collate_fn`` sorted or removed samples in place.

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
                "WithIds(dataset) instead of the data set."
            )
    given = [s.sample for s in samples]
    batch = collate_fn(given)
    places = {id(s.sample): place for place, s in enumerate(samples)}
    moved = [place for place, sample in enumerate(given) if places.get(id(sample), place) != place]
    if len(given) != len(samples) or (moved and len(places) == len(samples)):
        raise MimicError(
            "collate_with_ids: `collate_fn` sorted or removed samples in place, so that ids would be assigned to the "
            "wrong samples. Keep all samples in their order, or put an id into each sample (key 'id') instead of using "
            "WithIds."
        )
    if getattr(batch, "ids", None) is not None:
        raise MimicError(
            f"collate_with_ids: the batch (a {type(batch).__name__}) has `ids` of its own. If they name its "
            "samples, leave out WithIds and collate_with_ids; otherwise rename the attribute."
        )
    ids = [s.id for s in samples]
    try:
        return _with_ids(batch, ids if isinstance(ids[0], str) else _as_tensor(ids))
    except TypeError as error:
        raise TypeError(
            f"collate_with_ids: the batch is a {type(batch).__name__}, which cannot carry ids; return a tensor, tuple, "
            "list, dict or an object that accepts attributes, add a field `id` to it, or use GradMimic's `id_from=`."
        ) from error


def _as_tensor(ids: list[Any]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64 if max(ids) < 2**63 else torch.uint64)
