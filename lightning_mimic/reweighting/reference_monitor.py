"""Diagnosis of the reference on the first samples of a training."""

import time
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mimic import distributed
from lightning_mimic.errors import MimicError
from lightning_mimic.ledger import Flag
from lightning_mimic.reference import Diagnosis
from lightning_mimic.reference.diagnose import estimate, isolated_rng, losses_and_label_gaps, sums_of
from lightning_mimic.reweighting.weigh import StepResult

#: What to do about a reference that the diagnosis does not find compatible.
OnDoubtful = Literal["warn", "raise", "align"]


class ReferenceMonitor:
    """Gathers evidence about a reference while the first samples train.

    Training is unaffected: the reference is a copy in evaluation mode, and takes two forward passes per batch,
    one with the labels as given and one with the labels exchanged.

    Args:
        facts: Fields of :class:`~lightning_mimic.reference.Diagnosis` that are known beforehand.
        model: The reference with a method ``sample_losses``; ``None`` where it cannot be run.
        device: On which the ranks exchange sums.
        samples: How many of all ranks a diagnosis takes.
    """

    def __init__(self, facts: dict[str, Any], model: nn.Module | None, device: torch.device, samples: int) -> None:
        self._facts = facts
        self._model = model
        self._sums = torch.zeros(5, 3, dtype=torch.float64)
        self._device = device
        self._samples = samples
        self._seconds = 0.0

    @property
    def seen(self) -> int:
        """Samples of this rank so far."""
        return int(self._sums[0, 0])

    @torch.no_grad()
    def update(self, batch: Any, result: StepResult, scores: Tensor | None) -> Diagnosis | None:
        """Take in a micro-batch, on every rank; a host sync.

        Args:
            batch: What the training step got.
            result: Of the micro-batch.
            scores: The samples' mimic scores, shape ``(B,)``; ``None`` where they say nothing about the reference.

        Returns:
            The diagnosis, with the last batch that it takes.
        """
        started = time.perf_counter()
        reference_losses = gaps = None
        if self._model is not None:
            with isolated_rng(self._device):
                reference_losses, gaps = losses_and_label_gaps(self._model, batch)
        losses = result.losses
        if losses is not None:
            losses = torch.where(result.flags == Flag.NONFINITE_LOSS, torch.nan, losses.float())
        empty = torch.zeros(0)
        parts = [sums_of(empty if part is None else part) for part in (scores, gaps, losses, reference_losses)]
        self._sums += torch.stack([sums_of(torch.ones(len(result))), *parts])
        samples, *estimates = distributed.sum_over_ranks(self._sums.to(self._device, copy=True)).cpu()
        self._seconds += time.perf_counter() - started
        if samples[0] < self._samples:
            return None
        score, label_gap, loss, reference_loss = map(estimate, estimates)
        return Diagnosis(
            samples=int(samples[0]),
            score=score,
            label_gap=label_gap,
            loss=None if loss is None else loss.mean,
            reference_loss=None if reference_loss is None else reference_loss.mean,
            **self._facts,
        )

    def report(
        self,
        diagnosis: Diagnosis,
        on_doubtful: OnDoubtful,
        *,
        aligned: bool,
        uniform: bool,
        rests_on_margins: bool,
    ) -> str:
        """Warn of a reference that is not compatible.

        Args:
            diagnosis: From :meth:`update`.
            on_doubtful: What to do in this case.
            aligned: The reference is aligned.
            uniform: Weights stay uniform, because no direction means anything.
            rests_on_margins: The weights are of scores that are not calibrated.

        Returns:
            What was found, if that is no problem; else an empty string.

        Raises:
            MimicError: It is a problem, and ``on_doubtful`` is ``"raise"``.
        """
        message = f"{diagnosis}. Looking at it took {self._seconds:.1f} s."
        if diagnosis.verdict == "compatible":
            return message
        if on_doubtful == "align" and aligned and not uniform:
            return f"{message} It is aligned from here on."
        fix = " Give it as lightning_mimic.Aligned(...), or compare losses with the scorer RhoLoss."
        if diagnosis.verdict != "unsure":
            message += fix if diagnosis.alignable and not aligned else " Use another reference."
        if uniform:
            message += " Weights stay uniform."
        else:
            message += unsure_response(diagnosis, rests_on_margins=rests_on_margins)
        if on_doubtful == "raise":
            raise MimicError(message)
        warn_once_for_all_ranks(message)
        return ""

    def warn_if_unaligned(self) -> None:
        """Warn, at the end of a run, that too few samples were seen to know whether to align the reference."""
        if self.seen:
            warn_once_for_all_ranks(
                f"the fit ended after {self.seen} of the {self._samples} samples that it takes to judge the "
                "reference, so all weights were uniform. Train longer, or give it as lightning_mimic.Aligned(...)."
            )


def unsure_response(diagnosis: Diagnosis, *, rests_on_margins: bool) -> str:
    """Return what an unsure reference means for the weights, as sentences after a blank; empty if it is none.

    Args:
        diagnosis: With figures on both networks' outputs.
        rests_on_margins: The weights are of scores that are not calibrated.
    """
    if not diagnosis.unsure:
        return ""
    uniform = diagnosis.knows_less or rests_on_margins
    response = " Weights are uniform as long as it is so unsure." if uniform else ""
    if diagnosis.verdict != "unsure":
        return response
    if diagnosis.knows_less:
        return f"{response} Use another reference."
    if rests_on_margins:
        return f"{response} Calibrate it: `weighting=Posterior()`, or `scorer=MimicScore(calibrated=True)`."
    return " The weights go by what is calibrated, and are not affected."


def report_unsure(diagnosis: Diagnosis, on_doubtful: OnDoubtful, *, rests_on_margins: bool) -> None:
    """Warn of a reference that has turned out unsure after its diagnosis; on every rank.

    Args:
        diagnosis: With the verdict.
        on_doubtful: What to do in this case.
        rests_on_margins: The weights are of scores that are not calibrated.

    Raises:
        MimicError: ``on_doubtful`` is ``"raise"``.
    """
    message = f"{diagnosis}.{unsure_response(diagnosis, rests_on_margins=rests_on_margins)}"
    if on_doubtful == "raise":
        raise MimicError(message)
    warn_once_for_all_ranks(message)


def warn_once_for_all_ranks(message: str) -> None:
    """Warn, on the first rank only."""
    if distributed.rank() == 0:
        warnings.warn(message, stacklevel=3)
