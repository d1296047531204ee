"""Whether a reference is sure enough for scores that also hold the model's own outputs."""

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


class RunningMargins:
    """How far a reference's outputs stand by what the model predicts, over about the last 2,000 samples of all ranks.

    With z the model's outputs, z' the reference's on the same features and t the class that the model predicts, the
    score of label t exceeds the mean score of the others by ``(z'_t − mean z') − (z_t − mean z)`` times C/(C − 1). A
    reference that is less sure than the model leaves the second part alone, which is the model's own loss upside down.

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
        # Sums: margins of the reference and the model, samples.
        self._sums = torch.zeros(3, device=device)

    @torch.no_grad()
    def update(self, outputs: Tensor, reference_outputs: Tensor, labels: Tensor) -> None:
        """Take in a micro-batch, on every rank; no host sync.

        Args:
            outputs: The model's logits, shape ``(B, C)``.
            reference_outputs: The reference's, shape ``(B, C)``.
            labels: Given classes, shape ``(B,)``; rows of −1 are left out.
        """
        known = (labels >= 0) & torch.isfinite(reference_outputs).all(1)
        predicted = outputs.argmax(1)

        def margin(logits: Tensor) -> Tensor:
            margins = logits.gather(1, predicted[:, None])[:, 0] - logits.mean(1)
            return torch.where(known, margins, 0.0).sum()

        sums = [margin(reference_outputs), margin(outputs), known.sum().float()]
        new = sum_over_ranks(torch.stack(sums))
        self._sums = self._sums * torch.exp(-new[2] / REMEMBERED) + new

    @property
    def ratio(self) -> Tensor:
        """The reference's margin over the model's, a scalar; NaN before the first sample."""
        return self._sums[0] / self._sums[1]

    @property
    def unsure(self) -> Tensor:
        """The reference is less sure than the model, so that its scores are upside down; a boolean scalar."""
        return (self._sums[2] >= MIN_SAMPLES) & (self._sums[0] < LEAST_RATIO * self._sums[1])

    def facts(self) -> dict[str, float | None]:
        """Return fields of :class:`~lightning_mimic.reference.Diagnosis` (a host sync); empty before enough samples."""
        theirs, own, samples = self._sums.tolist()
        return {} if samples < MIN_SAMPLES else {"margin_ratio": theirs / own if own else None}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, the same on all ranks."""
        return {"sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._sums = state["sums"].to(self._sums)
