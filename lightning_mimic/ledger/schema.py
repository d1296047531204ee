"""The flags of a ledger's rows."""

import enum


class Flag(enum.IntEnum):
    """What happened to a row; the name in lower case is what the ledger stores."""

    OK = 0
    #: The sample's loss (or, without a loss vector, its gradient) was not finite: weight 0, no score.
    NONFINITE_LOSS = 1
    #: Its gradient left float16's range under a gradient scaler: passed on as it was, no score.
    OVERFLOW = 2
    #: There was no direction, so no score and uniform weights: the model stood at its reference, or the reference was
    #: not aligned yet.
    ZERO_DIRECTION = 3
    #: The only sample of its micro-batch: weight 1, whatever its score.
    ALONE = 4
