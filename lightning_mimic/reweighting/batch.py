"""The ids of a batch's samples, the samples that hold NaN, and what a run notes about its data."""

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.batches import parts_of, replace_parts, sample_count, tensors_of
from lightning_mimic.errors import MimicError, join_names

#: One id per sample, in the batch's order.
Ids = Tensor | Sequence[int] | Sequence[str]


def sample_ids(batch: Any, id_from: Callable[[Any], Ids] | None, *, needed: bool, wanted: bool = False) -> Ids | None:
    """Return the ids of a batch's samples.

    Args:
        batch: From the loader, on its device.
        id_from: The user's function from a batch to its ids. If left out they are ``batch.ids``, ``batch["id"]`` or
            ``batch.id``, or those of the one part of the batch that has them (where several loaders give a part each).
        needed: They are to be recorded.
        wanted: They serve something else, which refuses a batch without them itself.

    Returns:
        A copy; ``None`` if there are none.

    Raises:
        MimicError: They are needed and not there, are not one per sample, are a tensor of no ints, or several
            parts have them.
    """
    # If they serve nothing else, they are looked for where they alone give the number of samples.
    named = needed or wanted or sample_count(batch) is None
    ids = _find_ids(batch, named) if id_from is None else id_from(batch)
    if ids is None:
        if needed:
            raise MimicError(
                f"`ledger`: the batch (a {type(batch).__name__}) carries no ids, and row numbers would name other "
                "samples after a shuffle. Use DataLoader(WithIds(dataset), collate_fn=collate_with_ids), a key or "
                "attribute 'id' in the batch, or `id_from=`. (A hook that makes a new batch leaves out its ids.)"
            )
        return None
    ids, samples = _plain(ids), sample_count(batch)
    asked = needed or id_from is not None
    if not _one_per_sample(ids):
        if asked:
            raise MimicError(_ids_expected(ids))
        return None  # an attribute of the user's own
    if samples not in (None, len(ids)) and (id_from is not None or not _along_second_axis(batch, len(ids))):
        if asked:
            whose = "the batch" if id_from is None else "`id_from`"
            raise MimicError(f"{whose} gave {len(ids)} ids for {samples} samples; expected one for each.")
        return None
    if asked or wanted:
        _check_type(ids)
    return _copied(ids)


def _along_second_axis(batch: Any, count: int) -> bool:
    """Whether the samples may lie along the second axis, as in sequences with the time first."""
    return any(tensor.ndim > 1 and tensor.shape[1] == count for tensor in tensors_of(batch))


def _find_ids(batch: Any, named: bool) -> Any:
    """Return the ids that a batch, or one of its parts, carries; ``None`` if there are none.

    Args:
        batch: From the loader.
        named: Take what is called ``id``, too, and look into the parts.
    """
    ids = _own_ids(batch, named)
    if ids is not None or not named:
        return ids
    parts = {key: _own_ids(part, named) for key, part in parts_of(batch) if not isinstance(part, str)}
    parts = {key: ids for key, ids in parts.items() if ids is not None and _one_per_sample(_plain(ids))}
    if len(parts) > 1:
        raise MimicError(
            f"the parts {join_names([str(key) for key in parts])} of the batch have ids each; choose those of the "
            f"samples that are scored: `id_from=lambda batch: batch[{next(iter(parts))!r}].ids`."
        )
    return next(iter(parts.values()), None)


def _own_ids(batch: Any, named: bool) -> Any:
    ids = getattr(batch, "ids", None)
    if ids is not None or not named:
        return ids
    if isinstance(batch, Mapping):
        return batch["id"] if "id" in batch.keys() else None  # noqa: SIM118 -- all that TensorDict has
    return getattr(batch, "id", None)


def check_ids(ids: Any, samples: int | None) -> Ids:
    """Return a copy of ids that were given for a batch.

    Args:
        ids: A tensor or an array of shape ``(B,)``, or a list.
        samples: B, where it is known.

    Raises:
        MimicError: They are not one per sample, or a tensor of no ints.
    """
    ids = _plain(ids)
    if not _one_per_sample(ids):
        raise MimicError(_ids_expected(ids))
    if samples is not None and len(ids) != samples:
        raise MimicError(f"`ids` holds {len(ids)} ids for {samples} samples; expected one for each.")
    _check_type(ids)
    return _copied(ids)


def _plain(ids: Any) -> Any:
    """Return an array as a list, and anything else as it is."""
    return ids.tolist() if hasattr(ids, "__array__") and not isinstance(ids, Tensor) else ids


def _one_per_sample(ids: Any) -> bool:
    return ids.ndim == 1 if isinstance(ids, Tensor) else isinstance(ids, Sequence) and not isinstance(ids, str)


def _ids_expected(ids: Any) -> str:
    shape = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"type {type(ids).__name__}"
    return f"ids have {shape}; expected a tensor of shape (B,) or a list, one id per sample."


def _check_type(ids: Ids) -> None:
    """Raise ``MimicError`` for a tensor of no ints; the ledger looks at ids in a list."""
    if not isinstance(ids, Tensor):
        return
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        shown = f", such as {ids[0].item()!r}" if len(ids) else ""  # a host sync, but the run ends here
        raise MimicError(f"ids are a tensor of {ids.dtype}{shown}; ids must be all int or all str.")


def kind_of(ids: Ids | None) -> str | None:
    """Return whether ids are ``"int"`` or ``"str"``."""
    return None if ids is None else "str" if not isinstance(ids, Tensor) and isinstance(ids[0], str) else "int"


def _copied(ids: Ids) -> Ids:
    """A copy: what is kept until the next flush must not change with the user's buffers."""
    return ids.clone() if isinstance(ids, Tensor) else ids[:]


def blank_nan_samples(batch: Any, rows: int) -> tuple[Any, Tensor | None]:
    """Return a copy of the batch in which samples that hold NaN are zero throughout.

    A weight of 0 cannot take such a sample out of the gradient, because 0 · NaN is NaN. Infinity may be meant
    (an attention mask) and is left to the loss to judge.

    Args:
        batch: Tensors in tuples, lists, mappings or dataclasses; not changed.
        rows: Number of samples; floating-point tensors of this leading size are looked at.

    Returns:
        The copy, of the batch's type, and which samples were clean, boolean of shape ``(rows,)``; the batch itself and
        ``None`` where it has no such tensor, as the joined graphs of PyTorch Geometric have none. No host sync.
    """
    watched = [t for t in tensors_of(batch) if t.ndim and t.shape[0] == rows and t.is_floating_point()]
    if not watched:
        return batch, None
    clean = torch.stack([~torch.isnan(tensor).reshape(rows, -1).any(1) for tensor in watched]).all(0)

    def blanked(tensor: Tensor) -> Tensor:
        made = tensor.clone()  # an image or a mask stays one, which the result of an operation on it is not
        made.masked_fill_(~clean.view(-1, *[1] * (tensor.ndim - 1)), 0.0)
        return made

    copy = replace_parts(batch, lambda part: any(part is tensor for tensor in watched), blanked)
    if hasattr(batch, "ids") and not hasattr(copy, "ids"):
        copy.ids = batch.ids  # a bare tensor
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


def batch_size_of(loader: Any) -> int | None:
    """Return the number of samples in a loader's batches, where the loader or its sampler of batches has it."""
    for source in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(source, "batch_size", None)
        if isinstance(size, int) and size > 0:
            return int(size)
    return None


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
