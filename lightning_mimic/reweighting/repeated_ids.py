"""Ids that repeat within a batch: one sample drawn twice, or two samples that share an id."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.batches import tensors_of
from lightning_mimic.errors import MimicError
from lightning_mimic.reweighting.batch import Ids


class RepeatedIds:
    """Compares the rows of a batch that have the same id.

    Without repeats it costs a set of the ids. Rows are compared in the first :attr:`BATCHES` batches with repeats, at
    a host sync in each.
    """

    BATCHES = 100

    def __init__(self) -> None:
        self._left = self.BATCHES
        self._warned = False

    def check(self, batch: Any, ids: Ids) -> None:
        """Compare what a batch holds under one id; warn once of rows that may be one sample, changed at random.

        Args:
            batch: From the loader.
            ids: One per sample. Tensors on an accelerator are not read, since that would wait for it.

        Raises:
            MimicError: Rows of one id differ in a tensor of shape ``(B,)``, such as labels, which random changes of a
                sample leave as they are.

        Example:
            >>> RepeatedIds().check((torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])), ["a", "a"])
            Traceback (most recent call last):
            ...
            lightning_mimic.errors.MimicError: rows 0 and 1 of a batch have the same id, 'a', but 0 and 1 in a tensor...
        """
        if not self._left or (isinstance(ids, Tensor) and ids.device.type != "cpu"):
            return
        named = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if len(set(named)) == len(named):
            return
        self._left -= 1
        first: dict[int | str, int] = {}
        rows = [first.setdefault(each, row) for row, each in enumerate(named)]
        for tensor in sorted(tensors_of(batch), key=lambda each: each.ndim):  # labels first
            if tensor.ndim and len(tensor) == len(rows) and tensor.layout == torch.strided:
                self._compare(tensor.detach(), rows, named)

    def _compare(self, tensor: Tensor, rows: list[int], named: list[Any]) -> None:
        """Compare each row of a tensor with another one, which is itself or has the same id."""
        other = tensor[rows]
        differs = (tensor != other) & ~(tensor.isnan() & other.isnan())
        found = differs.reshape(len(rows), -1).any(1).nonzero().flatten().tolist()
        if not found:
            return
        row = found[0]
        which = f"rows {rows[row]} and {row} of a batch have the same id, {named[row]!r}, but"
        if tensor.ndim == 1:
            raise MimicError(
                f"{which} {other[row].item()} and {tensor[row].item()} in a tensor of shape (B,): the id names two "
                "samples. Scores and decisions are kept by id; give each sample an id of its own."
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{which} differ in a tensor of shape {tuple(tensor.shape)}. That is right for a sample that was drawn "
                "twice and changed at random; two samples would share one row of the ledger and need ids of their own.",
                stacklevel=2,
            )
