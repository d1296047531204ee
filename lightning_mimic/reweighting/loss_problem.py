"""Problems that make a loss something else than the plain mean of its samples' losses."""

import enum

from lightning_mimic.reweighting.messages import MEANT_NAN, NOT_CROSS_ENTROPY, NOT_THE_MEAN, UNEQUAL_TARGETS


class LossProblem(enum.IntFlag):
    """A problem that only the numbers of a step show; kept on the device until the scores are written."""

    NONE = 0
    #: An averaging cross-entropy did not count as many targets of each sample.
    UNEQUAL_TARGETS = 1
    #: The loss is not the mean of what ``sample_losses`` returned.
    NOT_THE_MEAN = 2
    #: The batch holds NaN, which the module may mean, and samples that hold it were taken out of the batch.
    MEANT_NAN = 4
    #: Labels are needed, and the loss is not the cross-entropy that shows them.
    NOT_CROSS_ENTROPY = 8

    @property
    def message(self) -> str:
        """The problem and its fix."""
        if LossProblem.NOT_THE_MEAN in self:
            return NOT_THE_MEAN
        if LossProblem.NOT_CROSS_ENTROPY in self:
            return NOT_CROSS_ENTROPY
        return MEANT_NAN if LossProblem.MEANT_NAN in self else UNEQUAL_TARGETS
