"""How much of a data set is good, as an estimate that trusted samples calibrate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.random_streams import stream_seed

#: What keeps a sample: a mean score of 0 or more, or a reference that predicts its label.
Basis = Literal["sign", "agreement"]

#: Trusted samples must be kept this much more often with true labels than with wrong ones, or nothing can be said.
_LEAST_DIFFERENCE = 0.2
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Quality:
    """An estimated share of good samples, ``(kept − f) / (t − f)``, cut to 0 and 1.

    Attributes:
        estimate: Share of samples that are good.
        low: Lower end of the 95 % interval, a bootstrap over data and trusted samples.
        high: Upper end.
        share_kept: Share of the data that is kept.
        kept_if_right: That share of the trusted samples with their true labels, ``t``.
        kept_if_wrong: And with wrong ones, ``f``.
        samples: In the data.
        trusted: Samples that calibrate.
        basis: What keeps a sample: ``"sign"``, a mean score of 0 or more; ``"agreement"``, a reference that predicts
            the given label, which does not depend on how far the model has learnt.
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
    """The share of good samples in data of which a share was kept.

    Of right samples a share ``t`` is kept and of wrong ones a share ``f``, so of a mixture ``q t + (1 − q) f``. Trusted
    samples that trained neither the reference nor the model tell ``t`` and ``f``.

    Args:
        kept: Samples of the data that are kept, by the basis.
        samples: All of them.
        right: Whether each trusted sample is kept with its true label, shape ``(n,)``.
        wrong: Whether the same sample is kept with a wrong label, shape ``(n,)``, or with each of k, ``(n, k)``.
        seed: Of the bootstrap.
        basis: See :class:`Quality`.
        told_apart_at_first: The trusted samples' first scores told wrong labels apart, for the message where their
            means do not.

    Raises:
        CurationError: Nothing to count, trusted samples that are not the same ones, or that are kept as often with
            wrong labels as with true ones.

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
            f"trusted samples are kept or not, with as many wrong labels each ({error}); expected booleans of shape "
            "(n,) and (n,) or (n, k)."
        ) from error
    if right.ndim != 1 or wrong.ndim not in (1, 2):
        raise CurationError(
            f"trusted samples have shapes {right.shape} and {wrong.shape}; expected (n,) and (n,) or (n, k)."
        )
    given, wrong = wrong, wrong.mean(1) if wrong.ndim > 1 and wrong.size else wrong
    if len(right) != len(wrong) or not wrong.size:
        raise CurationError(
            f"{len(right)} trusted samples with true labels and {len(wrong)} with wrong ones; each must be scored both "
            "ways."
        )
    if not (np.isfinite(right).all() and np.isfinite(wrong).all()):
        raise CurationError("some trusted samples are neither kept nor not (NaN); leave those without a score out.")
    if not (np.isin(right, (0, 1)).all() and np.isin(given, (0, 1)).all()):
        raise CurationError("some trusted samples are neither kept nor not: expected booleans, or 0 and 1.")
    if not all(isinstance(count, int | np.integer) for count in (kept, samples)) or not 0 <= kept <= samples > 0:
        raise CurationError(f"{kept} kept of {samples} samples; there must be samples, and no more kept than these.")
    t, f = float(right.mean()), float(wrong.mean())
    if t - f < _LEAST_DIFFERENCE:
        raise CurationError(_not_told_apart(t, f, basis, told_apart_at_first))
    generator = np.random.default_rng(stream_seed(seed, "bootstrap"))
    # A sample's answers are drawn together; there are few different ones.
    answers, counts = np.unique(np.stack([right, wrong], 1), axis=0, return_counts=True)
    # Half a sample of either kind is drawn from as well: fifty of fifty have no spread, and could have been 49.
    answers = np.concatenate([answers, [[1.0, 0.0], [0.0, 1.0]]])
    chances = np.concatenate([counts, [0.5, 0.5]]) / (len(right) + 1)
    drawn = generator.multinomial(len(right), chances, _RESAMPLES) @ answers / len(right)
    shares = generator.binomial(samples, kept / samples, _RESAMPLES) / samples
    difference = drawn[:, 0] - drawn[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimates = (shares - drawn[:, 1]) / difference
    # Where a resample does not tell right from wrong, anything is possible: half at each end.
    lost = difference <= 0
    estimates[lost] = np.where(np.arange(int(lost.sum())) % 2, 1.0, 0.0)
    low, high = np.clip(np.quantile(estimates, (0.025, 0.975)), 0, 1)
    estimate = min(max((kept / samples - f) / (t - f), 0.0), 1.0)
    return Quality(estimate, float(low), float(high), kept / samples, t, f, samples, len(right), basis)


def tells_apart(right: Any, wrong: Any) -> bool:
    """Whether trusted samples are kept enough more often with true labels than with wrong ones.

    Args:
        right: As for :func:`estimate_quality`.
        wrong: Likewise.

    Example:
        >>> tells_apart([True, True, False], [[False], [False], [False]])
        True
    """
    import numpy as np

    return len(right) > 0 and float(np.mean(right)) - float(np.mean(wrong)) >= _LEAST_DIFFERENCE


def _not_told_apart(t: float, f: float, basis: Basis, told_apart_at_first: bool) -> str:
    """Say what is at fault where trusted samples are not kept more often with true labels than with wrong ones."""
    if basis == "agreement":
        return (
            f"the reference predicts wrong labels of trusted samples ({f:.0%}) about as often as their true ones "
            f"({t:.0%}): it does not know these classes. Take another reference."
        )
    found = (
        f"trusted samples are kept as often with wrong labels ({f:.0%}) as with true ones ({t:.0%}): these scores "
        "cannot tell them apart. "
    )
    if told_apart_at_first:
        return (
            f"{found}Their first scores could: the model has overtaken its reference since, or stands at it. Score "
            "earlier checkpoints only."
        )
    return (
        f"{found}Look at the reference (`lightning_mimic.diagnose`), or align it: it does not know these labels, or is "
        "less sure of them than the model is, which then has nothing to learn from it."
    )
