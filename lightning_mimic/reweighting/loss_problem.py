"""Problems that make a loss something else than the plain mean of its samples' losses."""

import enum

from lightning_mimic.reweighting.messages import NOT_PLAIN, NOT_THE_MEAN


class LossProblem(enum.IntFlag):
    """A problem that only the numbers of a step show; kept on the device until the scores are written."""

    NONE = 0
    #: An averaging cross-entropy did not count all targets.
    LEFT_OUT_TARGETS = 1
    #: The loss is not the mean of what ``sample_losses`` returned.
    NOT_THE_MEAN = 2

    @property
    def message(self) -> str:
        """The problem and its fix."""
        if LossProblem.NOT_THE_MEAN in self:
            return NOT_THE_MEAN
        return NOT_PLAIN.format("it left out targets (ignore_index)")
