"""Detection of different samples that share an id within a batch or an epoch."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.batches import tensors_of
from lightning_mimic.errors import MimicError
from lightning_mimic.reweighting.batch import Ids

#: Odd and large hash multiplier, so that different integers of a sample rarely combine to the same value.
_FACTOR = 0x9E3779B97F4A7C15 - 2**64


class RepeatedIds:
    """Compare rows that have the same id: whole rows within a batch, class labels and other integers within an epoch.

    A sample may be drawn twice; two samples must not share an id. Without repeats, the cost is building a set of the
    ids. Within a batch, rows are compared in the first :attr:`BATCHES` batches with repeats, with one host sync each.
    Within an epoch, the integers of the samples stay on the device for :attr:`BATCHES` batches, and the first
    :attr:`IDS` ids are remembered.
    """

    BATCHES = 100
    IDS = 1 << 17

    def __init__(self) -> None:
        self._left = self.BATCHES
        self._warned = False
        self._epoch = -1
        self._waiting: list[tuple[Ids, Tensor]] = []
        # Combined integers of this epoch's samples, by id.
        self._known: dict[int | str, int] = {}

    def remember(self, batch: Any, ids: Ids, epoch: int) -> None:
        """Queue a batch for comparison with the earlier batches of its epoch, and compare when the queue is full.

        Args:
            batch: Batch from a single loader, which may repeat samples but does not change their integers.
            ids: One id per sample.
            epoch: Index of the epoch.

        Raises:
            MimicError: Two rows of one id differ; see :meth:`compare`.
        """
        if epoch != self._epoch:
            self.compare()
            self._known, self._epoch = {}, epoch
        combined: Tensor | None = None
        for tensor in tensors_of(batch):
            inexact = tensor.is_floating_point() or tensor.is_complex()
            if tensor.shape != (len(ids),) or inexact or tensor.layout != torch.strided:
                continue
            values = tensor.detach().to(torch.int64, copy=True)  # a copy, as the module may modify the batch
            if combined is None or combined.device == values.device:
                combined = values if combined is None else combined * _FACTOR + values
        if combined is not None:
            self._waiting.append((ids, combined))
        if len(self._waiting) >= self.BATCHES:
            self.compare()

    def compare(self) -> None:
        """Compare the queued batches with the earlier ones of the epoch, with one host sync.

        Raises:
            MimicError: Two rows of one id differ in the batch's integer tensors of shape ``(B,)``.

        Example:
            >>> repeats = RepeatedIds()
            >>> for label in (0, 1):
            ...     repeats.remember((torch.zeros(1, 2), torch.tensor([label])), ["a"], epoch=3)
            >>> repeats.compare()
            Traceback (most recent call last):
            ...
            lightning_mimic.errors.MimicError: the id 'a' came twice in epoch 3, with different values in a tensor ...
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        combined = iter(torch.cat([each for _, each in waiting]).tolist())
        for ids, _ in waiting:
            for each in ids.tolist() if isinstance(ids, Tensor) else ids:
                value = next(combined)
                if self._known.get(each, value) != value:
                    raise MimicError(
                        f"the id {each!r} came twice in epoch {self._epoch}, with different values in a tensor of "
                        "shape (B,), such as labels: the id names two samples. Scores and decisions are stored by id; "
                        "give each sample an id of its own, as WithIds(ConcatDataset([...])) does for joined data sets."
                    )
                if len(self._known) < self.IDS:
                    self._known[each] = value

    def check(self, batch: Any, ids: Ids) -> None:
        """Compare the rows of a batch that have the same id.

        Args:
            batch: Batch from the loader.
            ids: One id per sample. Tensors on an accelerator are skipped, because reading them needs a host sync.

        Raises:
            MimicError: Rows of one id differ in a tensor of shape ``(B,)``, such as labels, which random augmentation
                does not change.

        Warns:
            UserWarning: Rows of one id differ in another tensor, which may be due to augmentation; once.

        Example:
            >>> RepeatedIds().check((torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])), ["a", "a"])
            Traceback (most recent call last):
            ...
            lightning_mimic.errors.MimicError: rows 0 and 1 of a batch have the same id, 'a', but 0 and 1 in a tensor...
        """
        if not self._left or (isinstance(ids, Tensor) and ids.device.type != "cpu"):
            return
        listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if len(set(listed)) == len(listed):
            return
        self._left -= 1
        first: dict[int | str, int] = {}
        rows = [first.setdefault(each, row) for row, each in enumerate(listed)]
        for tensor in sorted(tensors_of(batch), key=lambda each: each.ndim):  # compare labels first
            if tensor.ndim and len(tensor) == len(rows) and tensor.layout == torch.strided:
                self._compare(tensor.detach(), rows, listed)

    def _compare(self, tensor: Tensor, rows: list[int], listed: list[Any]) -> None:
        """Compare each row of a tensor with the first row of the same id."""
        other = tensor[rows]
        differs = (tensor != other) & ~(tensor.isnan() & other.isnan())
        found = differs.reshape(len(rows), -1).any(1).nonzero().flatten().tolist()
        if not found:
            return
        row = found[0]
        which = f"rows {rows[row]} and {row} of a batch have the same id, {listed[row]!r}, but"
        if tensor.ndim == 1:
            raise MimicError(
                f"{which} {other[row].item()} and {tensor[row].item()} in a tensor of shape (B,): the id names two "
                "samples. Scores and decisions are stored by id; give each sample an id of its own."
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{which} differ in a tensor of shape {tuple(tensor.shape)}. This is expected if one sample was drawn "
                "twice and augmented at random; two different samples would share one row of the ledger, so give each "
                "an id of its own.",
                stacklevel=2,
            )
