"""Sample ids of a batch, removal of samples that hold NaN, and descriptions of the data for the ledger."""

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
        batch: Batch from the loader, on its device.
        id_from: User function that returns the ids of a batch. Without it, ids are taken from ``batch.ids``,
            ``batch["id"]`` or ``batch.id``, or from the only part of the batch that has them (where each of several
            loaders contributes a part).
        needed: Whether the ids will be recorded in a ledger.
        wanted: Whether the ids are used for something else, which itself raises an error if they are missing.

    Returns:
        A copy of the ids, one per sample, or ``None`` if the batch has none.

    Raises:
        MimicError: The ids are needed and missing, are not one per sample, are a tensor of another type than integer,
            or are found in several parts of the batch.
    """
    # Ids with no other use still give the number of samples where nothing else in the batch does.
    named = needed or wanted or sample_count(batch) is None
    ids = _find_ids(batch, named) if id_from is None else id_from(batch)
    if ids is None:
        if needed:
            raise MimicError(
                f"`ledger`: the batch (a {type(batch).__name__}) carries no ids, and row numbers would refer to other "
                "samples after a shuffle. Use DataLoader(WithIds(dataset), collate_fn=collate_with_ids), a key or "
                "attribute 'id' in the batch, or `id_from=`. (A hook that returns a new batch drops its ids.)"
            )
        return None
    ids, samples = _plain(ids), sample_count(batch)
    asked = needed or id_from is not None
    if not _one_per_sample(ids):
        if asked:
            raise MimicError(_ids_expected(ids))
        return None  # an unrelated attribute of the user's batch
    if samples not in (None, len(ids)) and (id_from is not None or not _along_second_axis(batch, len(ids))):
        if asked:
            whose = "the batch" if id_from is None else "`id_from`"
            raise MimicError(f"{whose} gave {len(ids)} ids for {samples} samples; expected one id per sample.")
        return None
    if asked or wanted:
        _check_type(ids)
    return _copied(ids)


def _along_second_axis(batch: Any, count: int) -> bool:
    """Return whether the second axis may be that of the samples, as in sequences whose first axis is time."""
    return any(tensor.ndim > 1 and tensor.shape[1] == count for tensor in tensors_of(batch))


def _find_ids(batch: Any, named: bool) -> Any:
    """Return the ids carried by a batch or one of its parts; ``None`` if there are none.

    Args:
        batch: Batch from the loader.
        named: Whether to accept keys and attributes named ``id``, besides ``ids``, and to search the batch's parts.
    """
    ids = _own_ids(batch, named)
    if ids is not None or not named:
        return ids
    parts = {key: _own_ids(part, named) for key, part in parts_of(batch) if not isinstance(part, str)}
    parts = {key: ids for key, ids in parts.items() if ids is not None and _one_per_sample(_plain(ids))}
    if len(parts) > 1:
        raise MimicError(
            f"several parts of the batch have ids: {join_names([str(key) for key in parts])}. Choose the part whose "
            f"samples are scored: `id_from=lambda batch: batch[{next(iter(parts))!r}].ids`."
        )
    return next(iter(parts.values()), None)


def _own_ids(batch: Any, named: bool) -> Any:
    ids = getattr(batch, "ids", None)
    if ids is not None or not named:
        return ids
    if isinstance(batch, Mapping):
        return batch["id"] if "id" in batch.keys() else None  # noqa: SIM118 -- TensorDict supports no other test
    return getattr(batch, "id", None)


def check_ids(ids: Any, samples: int | None) -> Ids:
    """Check the ids given for a batch and return a copy.

    Args:
        ids: Tensor or array of shape ``(B,)``, or a list.
        samples: Number of samples B, or ``None`` where it is not known.

    Raises:
        MimicError: The ids are not one per sample, or are a tensor of another type than integer.
    """
    ids = _plain(ids)
    if not _one_per_sample(ids):
        raise MimicError(_ids_expected(ids))
    if samples is not None and len(ids) != samples:
        raise MimicError(f"`ids` holds {len(ids)} ids for {samples} samples; expected one id per sample.")
    _check_type(ids)
    return _copied(ids)


def _plain(ids: Any) -> Any:
    """Convert an array to a list, and return anything else unchanged."""
    return ids.tolist() if hasattr(ids, "__array__") and not isinstance(ids, Tensor) else ids


def _one_per_sample(ids: Any) -> bool:
    return ids.ndim == 1 if isinstance(ids, Tensor) else isinstance(ids, Sequence) and not isinstance(ids, str)


def _ids_expected(ids: Any) -> str:
    shape = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"type {type(ids).__name__}"
    return f"ids have {shape}; expected a tensor of shape (B,) or a list, one id per sample."


def _check_type(ids: Ids) -> None:
    """Raise ``MimicError`` for a tensor of another type than integer; the ledger checks ids in a list."""
    if not isinstance(ids, Tensor):
        return
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        shown = f", such as {ids[0].item()!r}" if len(ids) else ""  # a host sync, but the run ends here
        raise MimicError(f"ids are a tensor of {ids.dtype}{shown}; ids must be all int or all str.")


def kind_of(ids: Ids | None) -> str | None:
    """Return whether ids are ``"int"`` or ``"str"``."""
    return None if ids is None else "str" if not isinstance(ids, Tensor) and isinstance(ids[0], str) else "int"


def _copied(ids: Ids) -> Ids:
    """Return a copy, because the user may reuse the buffer before the next flush."""
    return ids.clone() if isinstance(ids, Tensor) else ids[:]


def blank_nan_samples(batch: Any, rows: int) -> tuple[Any, Tensor | None]:
    """Return a copy of the batch in which samples that hold NaN are set to zero.

    A weight of 0 cannot remove such a sample from the gradient, because 0 · NaN is NaN. Infinity may be intended (in an
    attention mask) and is left unchanged; the loss shows whether it does harm. Needs no host sync.

    Args:
        batch: Tensors in tuples, lists, mappings or dataclasses; not modified.
        rows: Number of samples; only floating-point tensors whose first axis has this size are examined.

    Returns:
        The copy, of the batch's type, and a mask of the samples without NaN, boolean, shape ``(rows,)``. If the batch
        has no such tensor (for example a joined graph of PyTorch Geometric), the batch itself and ``None``.
    """
    watched = [t for t in tensors_of(batch) if t.ndim and t.shape[0] == rows and t.is_floating_point()]
    if not watched:
        return batch, None
    clean = torch.stack([~torch.isnan(tensor).reshape(rows, -1).any(1) for tensor in watched]).all(0)

    def blanked(tensor: Tensor) -> Tensor:
        made = tensor.clone()  # keeps tensor subclasses such as Image or Mask, which other operations do not
        made.masked_fill_(~clean.view(-1, *[1] * (tensor.ndim - 1)), 0.0)
        return made

    copy = replace_parts(batch, lambda part: any(part is tensor for tensor in watched), blanked)
    if hasattr(batch, "ids") and not hasattr(copy, "ids"):
        copy.ids = batch.ids  # the batch is a single tensor
    return copy, clean


def class_columns(outputs: Any, rows: int) -> dict[str, Tensor]:
    """Return the ledger columns ``label`` and ``predicted``, if a training step returned one class index per row."""
    if not isinstance(outputs, Mapping):
        return {}
    given = {name: outputs[name] for name in ("label", "predicted") if isinstance(outputs.get(name), Tensor)}
    # Copies, because the user may reuse the buffers before the next flush.
    return {n: t.detach().clone() for n, t in given.items() if t.shape == (rows,) and not t.is_floating_point()}


def describe(loader: Any) -> dict[str, Any]:
    """Return the type and the size of a loader's data set, where they are known, for the ledger's description."""
    dataset = getattr(loader, "dataset", None)
    inner = getattr(dataset, "dataset", dataset)  # unwrap WithIds or a Subset
    samples = len(dataset) if isinstance(dataset, Sized) else None
    kind = type(loader if inner is None else inner)
    return {"dataset": f"{kind.__module__}.{kind.__qualname__}", "samples": samples}


def batch_size_of(loader: Any) -> int | None:
    """Return the batch size of a loader or of its batch sampler; ``None`` if neither has one."""
    for source in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(source, "batch_size", None)
        if isinstance(size, int) and size > 0:
            return int(size)
    return None


def class_names_of(*sources: object) -> list[str] | None:
    """Return the class names in the order of the labels; ``None`` if no source has them.

    The names are the attribute ``class_names`` or ``classes`` of a source, or of the object that it wraps (its
    attribute ``dataset``).

    Args:
        sources: Data modules, loaders or data sets, searched in this order.
    """
    for source in sources:
        for _ in range(10):  # limited, in case a wrapper contains itself by mistake
            for attribute in ("class_names", "classes"):
                names = getattr(source, attribute, None)
                if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                    return list(names)
            source = getattr(source, "dataset", None)
    return None
