"""Whether a reference is sure enough, and knows enough, for scores that also hold the model's own outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.distributed import sum_over_ranks

#: Samples after which the running figures have forgotten all but 1/e.
REMEMBERED = 2000
#: Samples without which nothing is said.
MIN_SAMPLES = 256
#: Ratio of margins below which scores prefer another label to the one that the model predicts. On 210 runs (digits,
#: seeds 40 to 44) it was at most 0.51 where references of random weights, of 1 or 3 steps or of one epoch had turned
#: the scores upside down, and at least 0.54 with all others.
LEAST_RATIO = 0.5
#: Share of the model's own right predictions below which the reference knows less than the model.
LEAST_KNOWLEDGE = 0.75


class RunningMargins:
    """How far a reference's outputs stand by what the model predicts, over about the last 2,000 samples of all ranks.

    With z the model's outputs, z' the reference's on the same features and t the class that the model predicts, the
    score of label t exceeds the mean score of the others by ``(z'_t − mean z') − (z_t − mean z)`` times C/(C − 1). A
    reference that is less sure than the model leaves the second part alone, which is the model's own loss upside down.

    And how often both predict the given label, of samples that the model has not trained on: wrong labels lower the
    two alike, so that the one with more of them knows more.

    Args:
        device: On which the outputs are.

    Example:
        >>> running = RunningMargins(torch.device("cpu"))
        >>> outputs = torch.tensor([[2.0, 0.0]]).expand(300, 2)
        >>> running.update(outputs, outputs / 10, torch.zeros(300, dtype=torch.int64))
        >>> running.ratio, running.unsure
        (tensor(0.1000), tensor(True))
    """

    def __init__(self, device: torch.device) -> None:
        # Sums: margins of the reference and the model, samples; right predictions of both, samples not trained on.
        self._sums = torch.zeros(6, device=device)

    @torch.no_grad()
    def update(
        self,
        outputs: Tensor,
        reference_outputs: Tensor,
        labels: Tensor,
        calibrated_outputs: Tensor | None = None,
    ) -> None:
        """Take in a micro-batch, on every rank; no host sync.

        Args:
            outputs: The model's logits, shape ``(B, C)``.
            reference_outputs: The reference's, shape ``(B, C)``.
            labels: Given classes, shape ``(B,)``; rows of −1 are left out.
            calibrated_outputs: The calibrated reference's logits, of samples that the model has not trained on.
        """
        known = (labels >= 0) & torch.isfinite(reference_outputs).all(1)
        predicted = outputs.argmax(1)

        def margin(logits: Tensor) -> Tensor:
            margins = logits.gather(1, predicted[:, None])[:, 0] - logits.mean(1)
            return torch.where(known, margins, 0.0).sum()

        zero = known.new_zeros((), dtype=torch.float32)
        sums = [margin(reference_outputs), margin(outputs), known.sum(), zero, zero, zero]
        if calibrated_outputs is not None:
            right = [known & (each == labels) for each in (calibrated_outputs.argmax(1), predicted)]
            sums[3:] = [*(each.sum() for each in right), known.sum()]
        new = sum_over_ranks(torch.stack([each.to(torch.float32) for each in sums]))
        decay = torch.exp(-new[[2, 5]] / REMEMBERED).repeat_interleave(3)
        self._sums = self._sums * decay + new

    @property
    def ratio(self) -> Tensor:
        """The reference's margin over the model's, a scalar; NaN before the first sample."""
        return self._sums[0] / self._sums[1]

    @property
    def unsure(self) -> Tensor:
        """The reference is less sure than the model, so that its scores are upside down; a boolean scalar."""
        return (self._sums[2] >= MIN_SAMPLES) & (self._sums[0] < LEAST_RATIO * self._sums[1])

    @property
    def knows_less(self) -> Tensor:
        """The reference predicts fewer given labels than the model, so that it can judge none; a boolean scalar."""
        return (self._sums[5] >= MIN_SAMPLES) & (self._sums[3] < LEAST_KNOWLEDGE * self._sums[4])

    def facts(self) -> dict[str, float | None]:
        """Return fields of :class:`~lightning_mimic.reference.Diagnosis` (a host sync); empty before enough samples."""
        theirs, own, samples, right, right_own, unseen = self._sums.tolist()
        if samples < MIN_SAMPLES:
            return {}
        known = unseen >= MIN_SAMPLES
        return {
            "margin_ratio": theirs / own if own else None,
            "agreement": right / unseen if known else None,
            "model_agreement": right_own / unseen if known else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, the same on all ranks."""
        return {"sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._sums = state["sums"].to(self._sums)
