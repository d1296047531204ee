"""Problems with the loss or the batch that only the values of a step reveal."""

import enum

from lightning_mimic.reweighting.messages import MEANT_NAN, NOT_CROSS_ENTROPY, NOT_THE_MEAN, UNEQUAL_TARGETS


class LossProblem(enum.IntFlag):
    """A problem that only the values of a step reveal; kept on the device until the scores are written."""

    NONE = 0
    #: A cross-entropy averages over targets, and samples have different numbers of targets that count.
    UNEQUAL_TARGETS = 1
    #: The loss is not the mean of the losses that ``sample_losses`` returned.
    NOT_THE_MEAN = 2
    #: The batch holds NaN, which the module's code may handle on purpose, and these samples were masked.
    MEANT_NAN = 4
    #: Labels are needed, and the loss is not a cross-entropy from which they can be recovered.
    NOT_CROSS_ENTROPY = 8

    @property
    def message(self) -> str:
        """Message that names the problem and its fix."""
        if LossProblem.NOT_THE_MEAN in self:
            return NOT_THE_MEAN
        if LossProblem.NOT_CROSS_ENTROPY in self:
            return NOT_CROSS_ENTROPY
        return MEANT_NAN if LossProblem.MEANT_NAN in self else UNEQUAL_TARGETS
