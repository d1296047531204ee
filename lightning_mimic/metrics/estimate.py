"""Estimate of the share of good samples in a data set, calibrated on trusted samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.random_streams import stream_seed

#: Criterion by which a sample is kept: its mean score is 0 or more, or the reference predicts its label.
Basis = Literal["sign", "agreement"]

#: Least difference between the shares of trusted samples kept with true and with wrong labels; below it, there is no
#: estimate.
_LEAST_DIFFERENCE = 0.2
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Quality:
    """An estimated share of good samples, ``(share_kept − f) / (t − f)``, clipped to 0 to 1.

    Attributes:
        estimate: Estimated share of good samples.
        low: Lower end of the 95 % interval, from a bootstrap over the data and the trusted samples.
        high: Upper end of the interval.
        share_kept: Share of the data that is kept.
        kept_if_right: Share of the trusted samples kept with their true labels, ``t``.
        kept_if_wrong: Share of the trusted samples kept with wrong labels, ``f``.
        samples: Number of samples in the data.
        trusted: Number of trusted samples.
        basis: Criterion by which a sample is kept: ``"sign"``, its mean score is 0 or more; ``"agreement"``, the
            reference predicts its given label, which does not depend on how far training has progressed.
    """

    estimate: float
    low: float
    high: float
    share_kept: float
    kept_if_right: float
    kept_if_wrong: float
    samples: int
    trusted: int
    basis: Basis = "sign"

    def __str__(self) -> str:
        return f"{self.estimate:.1%} (95 % interval {self.low:.1%} to {self.high:.1%}, {self.trusted} trusted samples)"


def estimate_quality(
    kept: int,
    samples: int,
    right: Sequence[bool] | Any,
    wrong: Sequence[Any] | Any,
    *,
    seed: int = 0,
    basis: Basis = "sign",
    told_apart_at_first: bool = False,
) -> Quality:
    """Estimate the share of good samples from the share of samples that is kept.

    If a share ``t`` of the right samples and a share ``f`` of the wrong ones is kept, then data of which a share ``q``
    is right has the share ``q t + (1 − q) f`` kept. ``t`` and ``f`` are measured on trusted samples, on which neither
    the reference nor the model was trained.

    Args:
        kept: Number of samples of the data that are kept, by the basis.
        samples: Number of samples in the data.
        right: Whether each trusted sample is kept with its true label, shape ``(n,)``.
        wrong: Whether the same samples are kept with a wrong label, shape ``(n,)``, or with each of ``k`` wrong labels,
            shape ``(n, k)``.
        seed: Seed of the bootstrap.
        basis: Criterion by which samples are kept; see :class:`Quality`.
        told_apart_at_first: Whether the first scores of the trusted samples separated true from wrong labels. Only used
            in the error message if their mean scores do not.

    Raises:
        CurationError: The data or the trusted samples are empty, their counts or shapes do not match, a value is not
            boolean, or the trusted samples are not kept clearly more often with true labels than with wrong ones.

    Example:
        >>> print(estimate_quality(600, 1000, [True] * 95 + [False] * 5, [False] * 100).estimate)
        0.631578947368421
    """
    import numpy as np

    if basis not in get_args(Basis):
        raise CurationError(f"`basis` is {basis!r}; {nearest_names(str(basis), get_args(Basis))}.")
    try:
        right, wrong = np.asarray(right, dtype=float), np.asarray(wrong, dtype=float)
    except (TypeError, ValueError) as error:
        raise CurationError(
            f"`right` and `wrong` cannot be read as arrays ({error}); expected booleans of shape (n,) and (n,) or "
            "(n, k), with equally many wrong labels for each trusted sample."
        ) from error
    if right.ndim != 1 or wrong.ndim not in (1, 2):
        raise CurationError(
            f"`right` has shape {right.shape} and `wrong` has shape {wrong.shape}; expected (n,) and (n,) or (n, k)."
        )
    given, wrong = wrong, wrong.mean(1) if wrong.ndim > 1 and wrong.size else wrong
    if len(right) != len(wrong) or not wrong.size:
        raise CurationError(
            f"got {len(right)} trusted samples with true labels and {len(wrong)} with wrong labels; every trusted "
            "sample must be scored with both, and there must be at least one."
        )
    if not (np.isfinite(right).all() and np.isfinite(wrong).all()):
        raise CurationError(
            "`right` or `wrong` holds NaN or infinity; expected booleans. Leave out trusted samples without a score."
        )
    if not (np.isin(right, (0, 1)).all() and np.isin(given, (0, 1)).all()):
        raise CurationError("`right` or `wrong` holds other values than 0 and 1; expected booleans.")
    if not all(isinstance(count, int | np.integer) for count in (kept, samples)) or not 0 <= kept <= samples > 0:
        raise CurationError(
            f"`kept` is {kept} and `samples` is {samples}; expected integers with 0 <= kept <= samples and at least "
            "one sample."
        )
    t, f = float(right.mean()), float(wrong.mean())
    if t - f < _LEAST_DIFFERENCE:
        raise CurationError(_not_told_apart(t, f, basis, told_apart_at_first))
    generator = np.random.default_rng(stream_seed(seed, "bootstrap"))
    # The values of one trusted sample are resampled together; there are few distinct combinations.
    answers, counts = np.unique(np.stack([right, wrong], 1), axis=0, return_counts=True)
    # Add half a sample of each kind, so that 50 kept of 50 does not yield an interval of width zero.
    answers = np.concatenate([answers, [[1.0, 0.0], [0.0, 1.0]]])
    chances = np.concatenate([counts, [0.5, 0.5]]) / (len(right) + 1)
    drawn = generator.multinomial(len(right), chances, _RESAMPLES) @ answers / len(right)
    shares = generator.binomial(samples, kept / samples, _RESAMPLES) / samples
    difference = drawn[:, 0] - drawn[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimates = (shares - drawn[:, 1]) / difference
    # A resample that does not separate right from wrong leaves the share undetermined: put half of these at each end.
    lost = difference <= 0
    estimates[lost] = np.where(np.arange(int(lost.sum())) % 2, 1.0, 0.0)
    low, high = np.clip(np.quantile(estimates, (0.025, 0.975)), 0, 1)
    estimate = min(max((kept / samples - f) / (t - f), 0.0), 1.0)
    return Quality(estimate, float(low), float(high), kept / samples, t, f, samples, len(right), basis)


def tells_apart(right: Any, wrong: Any) -> bool:
    """Return whether trusted samples are kept more often with true labels than with wrong ones, by 0.2 or more.

    Args:
        right: Whether each trusted sample is kept with its true label; see :func:`estimate_quality`.
        wrong: Whether the same samples are kept with wrong labels; see :func:`estimate_quality`.

    Example:
        >>> tells_apart([True, True, False], [[False], [False], [False]])
        True
    """
    import numpy as np

    return len(right) > 0 and float(np.mean(right)) - float(np.mean(wrong)) >= _LEAST_DIFFERENCE


def _not_told_apart(t: float, f: float, basis: Basis, told_apart_at_first: bool) -> str:
    """Return the error message for trusted samples that are kept about as often with wrong as with true labels."""
    if basis == "agreement":
        return (
            f"the reference predicts the wrong labels of trusted samples ({f:.0%}) about as often as their true labels "
            f"({t:.0%}), so it does not know these classes. Use another reference."
        )
    found = (
        f"trusted samples are kept as often with wrong labels ({f:.0%}) as with true labels ({t:.0%}): these scores "
        "cannot separate them. "
    )
    if told_apart_at_first:
        return (
            f"{found}Their first scores did: the model has since reached or overtaken its reference. Score earlier "
            "checkpoints only."
        )
    return (
        f"{found}The reference does not know these labels, or is less certain of them than the model, which then has "
        "nothing to learn from it. Check the reference with `lightning_mimic.diagnose`, or align it."
    )
