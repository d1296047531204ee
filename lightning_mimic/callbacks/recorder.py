"""Keeps what a fit scores on the device, and brings it to the ledger now and then."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mimic.callbacks.batch import Ids
from lightning_mimic.ledger import Flag, LedgerError, LedgerWriter, nullable_columns, open_run
from lightning_mimic.version import __version__

_WARNINGS = {
    Flag.NONFINITE_LOSS: "{n} samples held NaN or had a loss that is not finite; they got weight 0 and no score. Where "
    "NaN in a batch is meant, on_nonfinite='mask_loss' leaves it to the loss.",
    Flag.ZERO_DIRECTION: "the model stands at its reference, or a second batch has no gradient, so there is no "
    "direction: uniform weights, no scores. If it started there, start from other weights or choose another reference.",
    Flag.ALONE: "a micro-batch held a single sample; its weight is 1 and no reweighting is possible.",
}


class ScoreRecorder:
    """Collects the columns of every scored micro-batch; one host sync per flush, none per step.

    Args:
        writer: Where the rows go; ``None`` keeps only the flags, for the warnings.
        doubts: What the codes of :meth:`add` say.
        expected: Flags that are no news.
        flush_every: Scored micro-batches between two flushes.
    """

    def __init__(
        self,
        writer: LedgerWriter | None,
        doubts: Mapping[int, str],
        expected: Iterable[Flag] = (),
        flush_every: int = 100,
    ) -> None:
        self._writer = writer
        self._said = doubts
        self._flush_every = flush_every
        self._places: list[tuple[int, int, int, Ids | None]] = []
        self._columns: list[dict[str, Tensor]] = []
        self._doubts: list[Tensor] = []
        self._warned = set(expected)

    def add(
        self, epoch: int, step: int, batch: int, ids: Ids | None, columns: Mapping[str, Tensor], doubt: Tensor
    ) -> None:
        """Adds one micro-batch.

        Args:
            epoch: Of the rows.
            step: Optimizer steps done before.
            batch: Index of the micro-batch.
            ids: One per row; needed with a writer.
            columns: Ledger columns of shape ``(B,)`` on the device, ``flag`` as the codes of ``Flag``.
            doubt: 0, or the code of what makes these scores something else than they are called; a scalar.
        """
        self._doubts.append(doubt)
        self._places.append((epoch, step, batch, ids))
        kept = dict(columns) if self._writer else {"flag": columns["flag"]}
        if self._writer and isinstance(ids, Tensor):
            kept["id"] = ids
        self._columns.append(kept)
        if len(self._columns) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Brings everything to the host, commits it and warns of what was flagged, once per kind.

        Raises:
            ValueError: Scores in doubt; what came before them is committed, they and what came after are not.
        """
        doubt = self._drop_doubtful()
        host = _to_host(self._columns)
        while host:
            epoch, step, batch, ids = self._places[0]
            rows = host[0]
            count = len(rows["flag"])
            flags = [Flag(code) for code in rows["flag"].tolist()]
            if self._writer is not None:
                arrays = {name: rows[name].numpy() if name in rows else None for name in nullable_columns()}
                self._writer.append(
                    arrays
                    | {
                        "id": rows["id"].numpy() if "id" in rows else list(ids or ()),
                        "epoch": [epoch] * count,
                        "step": [step] * count,
                        "batch": [batch] * count,
                        "position": range(count),
                        "flag": [flag.name.lower() for flag in flags],
                    }
                )
            # Only now: what could not be appended is still here.
            del self._places[0], self._columns[0], host[0]
            self.warn(Counter(flags))
        if self._writer is not None:
            self._writer.flush()
        if doubt:
            raise ValueError(self._said[doubt])

    def close(self) -> None:
        """Commits the rest, or raises."""
        self.flush()
        if self._writer is not None:
            self._writer.close()

    def _drop_doubtful(self) -> int:
        codes = torch.stack(self._doubts).tolist() if self._doubts else []
        self._doubts = []
        first = next((place for place, code in enumerate(codes) if code), len(codes))
        del self._places[first:], self._columns[first:]
        return codes[first] if first < len(codes) else 0

    def warn(self, flags: Mapping[Flag, int]) -> None:
        """Warns of flagged rows, once per kind of flag."""
        for flag, count in flags.items():
            if flag in _WARNINGS and flag not in self._warned:
                self._warned.add(flag)
                warnings.warn(_WARNINGS[flag].format(n=count), stacklevel=2)


def open_on_all_ranks(
    trainer: pl.Trainer, directory: Path, config: Mapping[str, Any], run: str | None
) -> tuple[str, int]:
    """Opens the ledger on the first rank and tells the others; raises ``LedgerError`` on all of them together.

    Args:
        trainer: Knows the ranks and the step at which a resumed run goes on.
        directory: The ledger's.
        config: What attempts of one run are compared by.
        run: The run that goes on, ``None`` for a new one.

    Returns:
        The run and the attempt.
    """
    opened: tuple[str, int] | str = ""
    if trainer.is_global_zero:
        try:
            notes = {"package_version": __version__, "class_names": class_names_of(trainer)}
            opened = open_run(directory, dict(config), trainer.global_step, run, notes)
        except LedgerError as error:
            opened = str(error)
    opened = trainer.strategy.broadcast(opened)
    if isinstance(opened, str):
        raise LedgerError(opened)
    return opened


def class_names_of(trainer: pl.Trainer) -> list[str] | None:
    """Return the names of the classes in the order of the labels, where the trainer's data have them.

    They are the attribute ``class_names`` or ``classes`` of the data module, or of the training data set or of one that
    it wraps (as ``dataset``).

    Args:
        trainer: With its data module or loader.
    """
    sources = [getattr(trainer, "datamodule", None), getattr(trainer.train_dataloader, "dataset", None)]
    while (wrapped := getattr(sources[-1], "dataset", None)) is not None and len(sources) < 10:
        sources.append(wrapped)
    for source in sources:
        for attribute in ("class_names", "classes"):
            names = getattr(source, attribute, None)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _to_host(columns: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same columns on the CPU, by one transfer per column instead of one per micro-batch."""
    host: list[dict[str, Tensor]] = [{} for _ in columns]
    for name in {name for rows in columns for name in rows}:
        holders = [i for i, rows in enumerate(columns) if name in rows]
        parts = [columns[i][name].detach() for i in holders]
        joined = torch.cat(parts).cpu()
        for i, part in zip(holders, joined.split([len(p) for p in parts]), strict=True):
            host[i][name] = part
    return host
