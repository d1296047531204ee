"""What the callback must know of a batch: how many samples, and which."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mimic.gradients import finite_rows

#: One id per sample, in the batch's order.
Ids = Tensor | Sequence[int] | Sequence[str]


def sample_ids(batch: Any, id_from: Callable[[Any], Ids] | None, *, needed: bool) -> Ids | None:
    """The ids of a batch's samples.

    Args:
        batch: What the loader gave, after its transfer.
        id_from: The user's own way to them; else ``batch.ids`` and then ``batch["id"]`` are looked for.
        needed: A ledger waits for them; without one a batch may have none.

    Raises:
        ValueError: They are needed and not there, or are not one per sample.
    """
    ids: Ids | None
    if id_from is not None:
        ids = id_from(batch)
    elif (ids := getattr(batch, "ids", None)) is None and isinstance(batch, Mapping):
        ids = batch.get("id")
    if isinstance(ids, Tensor) and ids.ndim != 1:
        raise ValueError(f"ids have shape {tuple(ids.shape)}; expected one id per sample, shape (B,).")
    if ids is None and needed:
        raise ValueError(
            f"`ledger`: the batch (a {type(batch).__name__}) carries no ids, and row numbers would name other samples "
            "after a shuffle. Use DataLoader(WithIds(dataset), collate_fn=collate_with_ids), a key 'id' in the batch, "
            "or `id_from=`."
        )
    return ids


def sample_count(batch: Any) -> int | None:
    """The number of samples: the leading size that all of the batch's tensors share, ``None`` if they do not."""
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def zero_nonfinite_samples(batch: Any, rows: int) -> tuple[Any, Tensor | None]:
    """A copy of the batch in which samples that hold NaN or infinity are zero throughout.

    A weight of 0 cannot take such a sample out of the gradient, because 0 · NaN is NaN.

    Args:
        batch: Tensors in tuples, lists, dicts or dataclasses; left as it is.
        rows: Number of samples; floating-point tensors of this leading size are looked at.

    Returns:
        The copy, and which samples were clean, boolean of shape ``(rows,)``; ``None`` where the batch has no
        such tensor. No host sync.
    """
    watched = [t for t in _tensors(batch) if t.ndim and t.shape[0] == rows and t.is_floating_point()]
    if not watched:
        return batch, None
    clean = torch.stack([finite_rows(tensor) for tensor in watched]).all(0)

    def zeroed(tensor: Tensor) -> Tensor:
        if not any(tensor is other for other in watched):
            return tensor
        return torch.where(clean.view(-1, *[1] * (tensor.ndim - 1)), tensor, torch.zeros_like(tensor))

    copy = apply_to_collection(batch, Tensor, zeroed)
    if hasattr(batch, "ids"):
        copy.ids = batch.ids
    return copy, clean


def class_columns(outputs: Any, rows: int) -> dict[str, Tensor]:
    """The ledger columns ``label`` and ``predicted``, where training_step returned them, one class index per row."""
    if not isinstance(outputs, Mapping):
        return {}
    given = {name: outputs[name] for name in ("label", "predicted") if isinstance(outputs.get(name), Tensor)}
    return {n: t.detach() for n, t in given.items() if t.shape == (rows,) and not t.is_floating_point()}


def describe(loader: Any) -> dict[str, Any]:
    """What data a run is scored on, as far as its loader tells."""
    dataset = getattr(loader, "dataset", None)
    inner = getattr(dataset, "dataset", dataset)  # below WithIds or a Subset
    samples = len(dataset) if isinstance(dataset, Sized) else None
    return {"dataset": f"{type(inner).__module__}.{type(inner).__qualname__}", "samples": samples}


def _tensors(batch: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    yield from found
