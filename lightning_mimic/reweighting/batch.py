"""The number of samples in a batch, and their ids."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mimic.errors import MimicError

#: One id per sample, in the batch's order.
Ids = Tensor | Sequence[int] | Sequence[str]


def sample_ids(batch: Any, id_from: Callable[[Any], Ids] | None, *, needed: bool, wanted: bool = False) -> Ids | None:
    """The ids of a batch's samples.

    Args:
        batch: What the loader gave, after its transfer.
        id_from: The user's own way to them; else ``batch.ids`` and then ``batch["id"]`` are looked for.
        needed: A ledger waits for them; without one a batch may have none.
        wanted: They serve something else, too, which says itself if there are none.

    Raises:
        ValueError: They are needed and not there, or are not one per sample.
    """
    ids = id_from(batch) if id_from is not None else getattr(batch, "ids", None)
    if ids is None and (needed or wanted) and isinstance(batch, Mapping):
        ids = batch.get("id")
    if ids is None or _one_per_sample(ids):
        pass
    elif not needed and id_from is None:
        return None  # an attribute of the user's own
    else:
        raise MimicError(_ids_expected(ids))
    if ids is None and needed:
        raise MimicError(
            f"`ledger`: the batch (a {type(batch).__name__}) carries no ids, and row numbers would name other samples "
            "after a shuffle. Use DataLoader(WithIds(dataset), collate_fn=collate_with_ids), a key 'id' in the batch, "
            "or `id_from=`."
        )
    return None if ids is None else _copied(ids)


def check_ids(ids: Any, samples: int | None) -> Ids:
    """Return a copy of ids that were given for a batch.

    Args:
        ids: A tensor or an array of shape ``(B,)``, or a list.
        samples: B, where it is known.

    Raises:
        MimicError: They are not one per sample.
    """
    ids = ids.tolist() if hasattr(ids, "__array__") and not isinstance(ids, Tensor) else ids
    if not _one_per_sample(ids):
        raise MimicError(_ids_expected(ids))
    if samples is not None and len(ids) != samples:
        raise MimicError(f"`ids` holds {len(ids)} ids for {samples} samples; expected one for each.")
    return _copied(ids)


def _one_per_sample(ids: Any) -> bool:
    return ids.ndim == 1 if isinstance(ids, Tensor) else isinstance(ids, Sequence) and not isinstance(ids, str)


def _ids_expected(ids: Any) -> str:
    shape = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"type {type(ids).__name__}"
    return f"ids have {shape}; expected a tensor of shape (B,) or a list, one id per sample."


def _copied(ids: Ids) -> Ids:
    """A copy: what is kept until the next flush must not change with the user's buffers."""
    return ids.clone() if isinstance(ids, Tensor) else ids[:]


def sample_count(batch: Any) -> int | None:
    """The number of samples: the leading size that all of the batch's tensors share, ``None`` if they do not."""
    sizes = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def blank_nan_samples(batch: Any, rows: int) -> tuple[Any, Tensor | None]:
    """A copy of the batch in which samples that hold NaN are zero throughout.

    A weight of 0 cannot take such a sample out of the gradient, because 0 · NaN is NaN. Infinity may be meant
    (an attention mask) and is left to the loss to judge.

    Args:
        batch: Tensors in tuples, lists, dicts or dataclasses; left as it is.
        rows: Number of samples; floating-point tensors of this leading size are looked at.

    Returns:
        The copy, and which samples were clean, boolean of shape ``(rows,)``; ``None`` where the batch has no
        such tensor. No host sync.
    """
    watched = [t for t in tensors_of(batch) if t.ndim and t.shape[0] == rows and t.is_floating_point()]
    if not watched:
        return batch, None
    clean = torch.stack([~torch.isnan(tensor).reshape(rows, -1).any(1) for tensor in watched]).all(0)

    def blanked(tensor: Tensor) -> Tensor:
        if not any(tensor is other for other in watched):
            return tensor
        return torch.where(clean.view(-1, *[1] * (tensor.ndim - 1)), tensor, torch.zeros_like(tensor))

    copy = apply_to_collection(batch, Tensor, blanked, allow_frozen=True)
    if hasattr(batch, "ids") and not hasattr(copy, "ids"):
        copy.ids = batch.ids
    return copy, clean


def class_columns(outputs: Any, rows: int) -> dict[str, Tensor]:
    """Return the ledger columns ``label`` and ``predicted``, where a training step gave one class index per row."""
    if not isinstance(outputs, Mapping):
        return {}
    given = {name: outputs[name] for name in ("label", "predicted") if isinstance(outputs.get(name), Tensor)}
    # Copies: what is kept until the next flush must not change with the user's buffers.
    return {n: t.detach().clone() for n, t in given.items() if t.shape == (rows,) and not t.is_floating_point()}


def describe(loader: Any) -> dict[str, Any]:
    """What data a run is scored on, as far as its loader tells."""
    dataset = getattr(loader, "dataset", None)
    inner = getattr(dataset, "dataset", dataset)  # below WithIds or a Subset
    samples = len(dataset) if isinstance(dataset, Sized) else None
    kind = type(loader if inner is None else inner)
    return {"dataset": f"{kind.__module__}.{kind.__qualname__}", "samples": samples}


def class_names_of(*sources: object) -> list[str] | None:
    """Return the names of the classes in the order of the labels, where some source has them.

    They are the attribute ``class_names`` or ``classes`` of a source or of what it wraps (as ``dataset``).

    Args:
        sources: A data module, a loader, a data set.
    """
    for source in sources:
        for _ in range(10):  # a wrapper may, by mistake, wrap itself
            for attribute in ("class_names", "classes"):
                names = getattr(source, attribute, None)
                if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                    return list(names)
            source = getattr(source, "dataset", None)
    return None


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the batch's tensors."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    apply_to_collection(batch, Tensor, collect, allow_frozen=True)
    yield from found
