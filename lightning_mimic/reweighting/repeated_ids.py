"""Ids that repeat within a batch or an epoch: one sample drawn twice, or two samples that share an id."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.batches import tensors_of
from lightning_mimic.errors import MimicError
from lightning_mimic.reweighting.batch import Ids

#: Odd and large, so that several integers of a sample make one that other integers hardly make.
_FACTOR = 0x9E3779B97F4A7C15 - 2**64


class RepeatedIds:
    """Compares rows that have the same id: in a batch the whole rows, in an epoch their classes and other integers.

    Without repeats it costs a set of the ids. Rows are compared in the first :attr:`BATCHES` batches with repeats, at
    a host sync in each. In an epoch, the integers of each sample stay on the device for :attr:`BATCHES` batches, and
    the first :attr:`IDS` ids are remembered.
    """

    BATCHES = 100
    IDS = 1 << 17

    def __init__(self) -> None:
        self._left = self.BATCHES
        self._warned = False
        self._epoch = -1
        self._waiting: list[tuple[Ids, Tensor]] = []
        # Of this epoch, by id.
        self._known: dict[int | str, int] = {}

    def remember(self, batch: Any, ids: Ids, epoch: int) -> None:
        """Compare a batch with the earlier ones of its epoch, now or later.

        Args:
            batch: From a single loader, which gives each sample once, or several times as it is.
            ids: One per sample.
            epoch: Its number.

        Raises:
            MimicError: See :meth:`compare`.
        """
        if epoch != self._epoch:
            self.compare()
            self._known, self._epoch = {}, epoch
        mixed: Tensor | None = None
        for tensor in tensors_of(batch):
            inexact = tensor.is_floating_point() or tensor.is_complex()
            if tensor.shape != (len(ids),) or inexact or tensor.layout != torch.strided:
                continue
            values = tensor.detach().to(torch.int64, copy=True)  # the module may change its batch
            if mixed is None or mixed.device == values.device:
                mixed = values if mixed is None else mixed * _FACTOR + values
        if mixed is not None:
            self._waiting.append((ids, mixed))
        if len(self._waiting) >= self.BATCHES:
            self.compare()

    def compare(self) -> None:
        """Compare the batches that wait with the earlier ones of the epoch, at one host sync.

        Raises:
            MimicError: Two rows of one id differ in the integers of shape ``(B,)``.

        Example:
            >>> repeats = RepeatedIds()
            >>> for label in (0, 1):
            ...     repeats.remember((torch.zeros(1, 2), torch.tensor([label])), ["a"], epoch=3)
            >>> repeats.compare()
            Traceback (most recent call last):
            ...
            lightning_mimic.errors.MimicError: the id 'a' came twice in epoch 3, with other values in a tensor of ...
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        mixed = iter(torch.cat([each for _, each in waiting]).tolist())
        for ids, _ in waiting:
            for each in ids.tolist() if isinstance(ids, Tensor) else ids:
                value = next(mixed)
                if self._known.get(each, value) != value:
                    raise MimicError(
                        f"the id {each!r} came twice in epoch {self._epoch}, with other values in a tensor of shape "
                        "(B,), such as labels: the id names two samples. Scores and decisions are kept by id; give "
                        "each sample an id of its own, as WithIds(ConcatDataset([...])) does for joined data sets."
                    )
                if len(self._known) < self.IDS:
                    self._known[each] = value

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
