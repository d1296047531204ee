"""Looks at the reference while the first batches train, and then says what it is worth."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic.reference import Diagnosis
from lightning_mimic.reference.diagnose import SAMPLES, estimate, losses_and_gaps, own_random_numbers, sums_of
from lightning_mimic.reference.moments import over_ranks


class Checkup:
    """Gathers what speaks for and against a reference; over once enough samples of all ranks were seen.

    Nothing that trains notices: the reference is a copy in evaluation mode, and takes two forward passes per batch,
    one with the labels as given and one with the labels exchanged.

    Args:
        facts: Fields of :class:`~lightning_mimic.reference.Diagnosis` that are known beforehand.
        model: The reference with a method ``sample_losses``; ``None`` where it cannot be run.
        device: Where ranks talk to each other.
    """

    def __init__(self, facts: dict[str, Any], model: nn.Module | None, device: torch.device) -> None:
        self._facts = facts
        self._model = model
        self._sums = torch.zeros(5, 3, dtype=torch.float64)
        self._device = device
        #: What it cost so far.
        self.seconds = 0.0

    @property
    def seen(self) -> int:
        """Samples of this rank so far."""
        return int(self._sums[0, 0])

    @torch.no_grad()
    def add(self, batch: Any, towards: Tensor | None, losses: Tensor | None, rows: int) -> Diagnosis | None:
        """Takes in a micro-batch, on every rank; a host sync.

        Args:
            batch: What training_step got.
            towards: The samples' mimic scores, shape ``(B,)``; ``None`` without a direction.
            losses: The model's losses, where they are known.
            rows: Samples of this rank.

        Returns:
            The diagnosis, with the last batch that it takes.
        """
        started = time.perf_counter()
        theirs = gaps = None
        if self._model is not None:
            with own_random_numbers(self._device):
                theirs, gaps = losses_and_gaps(self._model, batch)
        empty = torch.zeros(0)
        parts = [sums_of(empty if part is None else part) for part in (towards, gaps, losses, theirs)]
        self._sums += torch.stack([sums_of(torch.ones(rows)), *parts])
        samples, *estimates = over_ranks(self._sums.to(self._device, copy=True)).cpu()
        self.seconds += time.perf_counter() - started
        if samples[0] < SAMPLES:
            return None
        score, knowledge, loss, reference_loss = map(estimate, estimates)
        return Diagnosis(
            samples=int(samples[0]),
            score=score,
            knowledge=knowledge,
            loss=None if loss is None else loss.mean,
            reference_loss=None if reference_loss is None else reference_loss.mean,
            **self._facts,
        )
