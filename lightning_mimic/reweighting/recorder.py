"""Buffer of scores on the device, flushed to the ledger periodically."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mimic.errors import MimicError
from lightning_mimic.ledger import Flag, LedgerWriter, nullable_columns
from lightning_mimic.reweighting.batch import Ids
from lightning_mimic.reweighting.loss_problem import LossProblem

_WARNINGS = {
    Flag.NONFINITE_LOSS: "{n} samples held NaN or had a loss that is not finite; they got weight 0 and no score. If "
    "NaN in a batch is intended, use on_nonfinite='mask_loss', which leaves the batch unchanged.",
    Flag.ZERO_DIRECTION: "the model stands at its reference (equal weights), or a reference batch has no gradient, so "
    "there is no direction: weights are uniform and there are no scores. If training started at the reference, start "
    "from other weights or choose another reference.",
    Flag.ALONE: "a micro-batch held a single sample; its weight is 1 and no reweighting is possible.",
}

#: Number of scored micro-batches between two flushes.
FLUSH_EVERY = 100


@dataclass(frozen=True)
class Position:
    """Position of a micro-batch in a training run.

    Attributes:
        epoch: Index of the epoch, from 0.
        step: Number of optimizer steps done before.
        batch: Index of the micro-batch within the epoch.
        assumed: Whether the epoch was not given; there can then be only one.
    """

    epoch: int
    step: int
    batch: int
    assumed: bool = False


class ScoreRecorder:
    """Buffer the columns of every scored micro-batch, with one host sync per flush and none per step.

    Args:
        writer: Writer of the ledger; if ``None``, only the flags are buffered, for the warnings.
        expected: Flags that should not trigger a warning.
    """

    def __init__(self, writer: LedgerWriter | None, expected: Iterable[Flag] = ()) -> None:
        self._writer = writer
        self._positions: list[tuple[Position, Ids | None]] = []
        self._columns: list[dict[str, Tensor]] = []
        self._problems: list[Tensor] = []
        self._warned = set(expected)
        self._first_ids: frozenset[int | str] = frozenset()

    def add(self, position: Position, ids: Ids | None, columns: Mapping[str, Tensor], problem: Tensor) -> None:
        """Add one micro-batch.

        Args:
            position: Position of the micro-batch.
            ids: One id per row; required with a writer.
            columns: Ledger columns of shape ``(B,)`` on the device, ``flag`` as the codes of ``Flag``.
            problem: Code of a :class:`LossProblem`, a scalar on the device.
        """
        self._problems.append(problem)
        self._positions.append((position, ids))
        kept = dict(columns) if self._writer else {"flag": columns["flag"]}
        if self._writer and isinstance(ids, Tensor):
            kept["id"] = ids
        self._columns.append(kept)
        if len(self._columns) >= FLUSH_EVERY:
            self.flush()

    def check_ids(self, ids: Ids | None) -> None:
        """Raise ``LedgerError`` for ids that the ledger cannot store together with the earlier ones; no host sync."""
        if self._writer is not None and ids is not None and not (isinstance(ids, Tensor) and ids.is_cuda):
            self._writer.check_ids(ids.numpy() if isinstance(ids, Tensor) else ids)

    def flush(self) -> None:
        """Copy all buffered rows to the host, write them, and warn of flagged rows, once per kind of flag.

        Raises:
            MimicError: A loss had a :class:`LossProblem`. Earlier micro-batches are written; the scores of this one and
                of later ones are discarded.
        """
        problem = self._drop_problems()
        host = _to_host(self._columns)
        while host:
            position, ids = self._positions[0]
            rows = host[0]
            count = len(rows["flag"])
            flags = [Flag(code) for code in rows["flag"].tolist()]
            if self._writer is not None:
                if position.assumed:
                    self._check_epoch(rows["id"].tolist() if "id" in rows else list(ids or ()))
                arrays = {name: rows[name].numpy() if name in rows else None for name in nullable_columns()}
                self._writer.append(
                    arrays
                    | {
                        "id": rows["id"].numpy() if "id" in rows else list(ids or ()),
                        "epoch": [position.epoch] * count,
                        "step": [position.step] * count,
                        "batch": [position.batch] * count,
                        "position": range(count),
                        "flag": [flag.name.lower() for flag in flags],
                    }
                )
            # Deleted only now, so that rows that could not be appended stay in the buffer.
            del self._positions[0], self._columns[0], host[0]
            self.warn(Counter(flags))
        if self._writer is not None:
            self._writer.flush()
        if problem:
            raise MimicError(problem.message)

    @property
    def unwritten(self) -> int:
        """Number of rows for the ledger that are only in memory."""
        if self._writer is None:
            return 0
        return self._writer.pending + sum(len(rows["flag"]) for rows in self._columns)

    def commit(self) -> int:
        """Commit all rows so far. A failed write is retried before its error is raised.

        Returns:
            Number of this rank's rows in the ledger.
        """
        self.flush()
        if self._writer is None:
            return 0
        self._writer.commit()
        return self._writer.rows

    def warn(self, flags: Mapping[Flag, int]) -> None:
        """Warn of flagged rows, once per kind of flag."""
        for flag, count in flags.items():
            if flag in _WARNINGS and flag not in self._warned:
                self._warned.add(flag)
                warnings.warn(_WARNINGS[flag].format(n=count), stacklevel=2)

    def _check_epoch(self, ids: list[int | str]) -> None:
        """Raise ``MimicError`` if a second epoch has begun and no epoch was given: its rows would count as repeats."""
        for repeated in sorted(self._first_ids.intersection(ids), key=str)[:1]:
            raise MimicError(
                f"`epoch`: the sample {repeated!r} was scored again, but no epoch was given, so all micro-batches "
                "count as epoch 0. Pass the index of the epoch: `reweighter.step(batch, ids=ids, epoch=epoch)`."
            )
        self._first_ids = self._first_ids or frozenset(ids)

    def _drop_problems(self) -> LossProblem:
        codes = torch.stack(self._problems).tolist() if self._problems else []
        self._problems = []
        first = next((place for place, code in enumerate(codes) if code), len(codes))
        del self._positions[first:], self._columns[first:]
        return LossProblem(codes[first] if first < len(codes) else 0)


def _to_host(columns: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the columns on the CPU, with one transfer per column instead of one per micro-batch."""
    host: list[dict[str, Tensor]] = [{} for _ in columns]
    # Columns are joined per dtype: ids may be signed in one micro-batch and unsigned in another.
    for name, kind in {(name, rows[name].dtype) for rows in columns for name in rows}:
        holders = [i for i, rows in enumerate(columns) if name in rows and rows[name].dtype == kind]
        parts = [columns[i][name].detach() for i in holders]
        joined = torch.cat(parts).cpu()
        for i, part in zip(holders, joined.split([len(p) for p in parts]), strict=True):
            host[i][name] = part
    return host
