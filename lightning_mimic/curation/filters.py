"""Filters that decide which samples to keep, from each sample's mean scores or, in an ensemble, from every scoring."""

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from lightning_mimic.curation.reference_facts import last_calibration
from lightning_mimic.curation.scorer_meaning import Basis, missing_basis
from lightning_mimic.curation.scores import Scores, ScoreTable
from lightning_mimic.database import Database
from lightning_mimic.errors import CurationError
from lightning_mimic.random_streams import stream_seed


@dataclass(frozen=True)
class Vote:
    """Hold the vote of a filter on the rows of a table.

    Attributes:
        keep: SQL over the columns of :class:`ScoreTable`: true, false, or null for no vote.
        reason: Reason recorded for dropped rows.
        by_row: Whether ``keep`` depends on the columns of its own row only, so that it can be evaluated on a subset of
            the rows.
    """

    keep: str
    reason: str
    by_row: bool = False


@dataclass(frozen=True)
class Decision:
    """Hold the decision on samples.

    Attributes:
        query: SQL with the columns ``id``, ``keep`` (null: undecided), ``votes_keep`` and ``votes`` (numbers of votes,
            null for a single vote).
        reason: Reason recorded for dropped samples.
        facts: Figures behind the decision, for the manifest.
        abstains: Reason recorded for samples that have a score and are undecided.
        by_sample: Whether the query depends on each sample's own rows only, so that it can be evaluated on a subset of
            the samples; otherwise it needs all samples at once.
    """

    query: str
    reason: str
    facts: dict[str, Any]
    abstains: str = "no vote on it"
    by_sample: bool = False


class DecisionRule(Protocol):
    """A rule that decides which samples to keep; ``filter`` of :func:`~lightning_mimic.curation.curate`."""

    def decide(self, scores: Scores) -> Decision:
        """Return the decision on each sample that has a score."""


def checked_rule(rule: Any) -> DecisionRule:
    """Return the rule, or raise :class:`CurationError` if it is not a decision rule."""
    if isinstance(rule, type) or not callable(getattr(rule, "decide", None)):
        kind = rule if isinstance(rule, type) else type(rule)
        raise CurationError(
            f"`filter` is {rule!r} ({kind.__module__}.{kind.__qualname__}); expected a filter of "
            "lightning_mimic.curation, such as Sign() or Posterior(). The weightings of lightning_mimic.scorers are "
            "not filters."
        )
    decides: DecisionRule = rule
    return decides


class Filter(ABC):
    """Base class of decision rules with one vote; define :meth:`vote` for a filter of your own.

    Attributes:
        rests_on: Properties of the scores that the vote needs to be meaningful.
        calibrated: Whether the vote depends on calibrated posteriors only, whose calibration itself shows whether the
            reference explains the labels: the verdicts ``doubtful`` and ``unsure`` need no acceptance.
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset()
    calibrated: ClassVar[bool] = False

    @abstractmethod
    def vote(self, table: ScoreTable) -> Vote:
        """Return the vote on each row, for every epoch separately.

        Raises:
            CurationError: There are too few rows for a vote.
        """

    def check(self, scores: Scores) -> None:
        """Raise :class:`CurationError` if the vote is meaningless for the scores of a ledger's scorer."""
        for basis in sorted(self.rests_on):
            missing = missing_basis(scores.config, basis)
            if missing is not None:
                raise CurationError(
                    f"`filter`: {self!r} {_BECAUSE[basis]}, but {scores.ledger.directory} holds {missing}, so that its "
                    f"decisions would be meaningless. {_others(scores)}"
                )

    def decide(self, scores: Scores) -> Decision:
        """Return the decision from the vote on the samples' means."""
        self.check(scores)
        table = scores.means()
        vote = self.vote(table)
        query = f"SELECT id, ({vote.keep}) AS keep, NULL::BIGINT AS votes_keep, NULL::BIGINT AS votes FROM {table.name}"
        return Decision(query, vote.reason, {}, by_sample=vote.by_row)


#: Description of the decision that needs each property of the scores, for messages.
_BECAUSE: dict[Basis, str] = {
    "zero": "decides by the sign of scores",
    "order": "assumes that higher scores are better",
    "difference": "orders samples by their scores",
    "weights": "decides by weights",
}


def _others(scores: Scores) -> str:
    """Return advice that names the filters which are meaningful for a ledger."""
    by_order = "TopK(fraction=...) (filter=top_k)" if missing_basis(scores.config, "difference") is None else None
    by_posterior = "Posterior() (filter=posterior)" if "posterior" in scores.columns else None
    named = " or ".join(filter(None, (by_posterior, by_order)))
    return f"Use {named}." if named else "Score the samples with MimicScore."


@dataclass(frozen=True)
class Sign(Filter):
    """Keep samples with a score of 0 or more: a training step on them does not move the model away from the reference.

    The vote is independent of the other samples, so that it can keep all of a clean data set.

    Example:
        >>> Sign()
        Sign()
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset({"zero"})

    def vote(self, table: ScoreTable) -> Vote:
        """Compare the score with 0."""
        return Vote("score >= 0", "mean score below 0", by_row=True)


#: Largest share of rows without a posterior with which a filter still decides.
_MOST_WITHOUT_POSTERIOR = 0.5


@dataclass(frozen=True)
class Posterior(Filter):
    """Keep samples whose label is more likely right than wrong: a mean posterior of 0.5 or more.

    The posterior is the probability that the given label is right, according to the reference, which was calibrated on
    the given labels while the samples were scored. It does not depend on the progress of training, and if the
    calibration finds no wrong labels, all samples are kept. A sample with a score but without a posterior has no vote;
    ``unscored`` of :func:`~lightning_mimic.curation.curate` decides on it.

    Raises:
        CurationError: The ledger has no posteriors, more than half of its samples have none, or some are outside 0 to
            1; or the reference does not explain the labels, so that no label can be called wrong.

    Example:
        >>> Posterior()
        Posterior()
    """

    calibrated: ClassVar[bool] = True

    def check(self, scores: Scores) -> None:
        """Raise :class:`CurationError` if the reference could not be calibrated."""
        calibration = last_calibration(scores.attempts)
        if isinstance(calibration, dict) and calibration.get("informative") is False:
            raise CurationError(
                f"`filter`: Posterior() cannot decide on {scores.ledger.directory}: the reference does not explain the "
                "given labels, or far worse than the model, so that no label can be called wrong. Use another "
                "reference."
            )

    def vote(self, table: ScoreTable) -> Vote:
        """Compare the posterior with 0.5."""
        _check_posteriors(table.database, table.name)
        return Vote("posterior >= 0.5", "posterior below 0.5", by_row=True)

    def decide(self, scores: Scores) -> Decision:
        """Return the decision from the samples' mean posteriors, including samples without a score."""
        self.check(scores)
        _check_posteriors(scores.database, scores.samples)
        _check_posteriors(scores.database, scores.scorings().name, most=False)  # a mean can hide values out of range
        query = (
            "SELECT id, posterior >= 0.5 AS keep, NULL::BIGINT AS votes_keep, NULL::BIGINT AS votes "
            f"FROM {scores.samples}"
        )
        return Decision(query, "mean posterior below 0.5", {}, "no posterior", by_sample=True)


def _check_posteriors(database: Database, table: str, *, most: bool = True) -> None:
    """Raise :class:`CurationError` unless most rows of a table have a posterior, and all posteriors lie in 0 to 1.

    Args:
        database: Database with the table.
        table: Name of the table.
        most: Whether to check how many rows have a posterior.
    """
    fix = "They are recorded if the scored layer is one nn.Linear that outputs the logits of a cross-entropy."
    if "posterior" not in database.columns(table):
        raise CurationError(f"`filter`: Posterior() needs posteriors, but none were recorded. {fix}")
    rows, known, low, high = database.row(
        f"SELECT count(*), count(posterior), min(posterior), max(posterior) FROM {table}"
    )
    if most and known < (1 - _MOST_WITHOUT_POSTERIOR) * rows:
        raise CurationError(
            f"`filter`: Posterior() needs posteriors, but {rows - known} of {rows} rows have none. {fix} Rows before "
            "the first calibration have none, so a longer run records more of them."
        )
    if known and not 0 <= low <= high <= 1:
        raise CurationError(f"`filter`: the posteriors lie between {low:.4g} and {high:.4g}; expected 0 to 1.")


@dataclass(frozen=True)
class Threshold(Filter):
    """Keep samples whose weight in their batch of ``B`` samples is ``1/B`` or more, the paper's threshold.

    Uniform weights keep all samples. Every batch with other weights loses at least one sample, even a clean batch.

    Example:
        >>> Threshold()
        Threshold()
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset({"weights"})

    def vote(self, table: ScoreTable) -> Vote:
        """Compare the weight with 1/B, up to float32 rounding."""
        return Vote("relative_weight >= 1 - 1e-6", "mean weight below 1/B", by_row=True)


@dataclass(frozen=True)
class KMeans(Filter):
    """Keep the upper of two clusters of scores, found by k-means; drops samples even from clean data.

    Args:
        seed: Seed of the initial cluster centres.

    Example:
        >>> KMeans(seed=1)
        KMeans(seed=1)
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset({"order"})

    seed: int = 0

    def vote(self, table: ScoreTable) -> Vote:
        """Compare the score with the midpoint between the two cluster centres."""
        from sklearn.cluster import KMeans as Clusters
        from sklearn.exceptions import ConvergenceWarning

        def cut(scores: Any) -> float:
            if len(scores) < 2:
                return -math.inf
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # raised if all scores are equal
                found = Clusters(2, n_init=1, random_state=stream_seed(self.seed, "k-means")).fit(scores[:, None])
            return float(found.cluster_centers_.mean()) if len(set(found.labels_.tolist())) == 2 else -math.inf

        return _by_cut(table, cut, "mean score in the lower of two clusters (below {})")


@dataclass(frozen=True)
class Mixture(Filter):
    """Keep the upper of two normal components of the scores, or all samples if one component is enough.

    Two components are used if the Bayesian information criterion prefers them and 0 lies between their means. The
    criterion alone would split every skewed distribution, including those of clean data.

    Args:
        seed: Seed of the initial components.

    Example:
        >>> Mixture(seed=1)
        Mixture(seed=1)
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset({"zero"})

    seed: int = 0

    def vote(self, table: ScoreTable) -> Vote:
        """Compare the score with the point where both components are equally likely."""
        return _by_cut(table, self._cut, "mean score in the lower of two components (below {})")

    def _cut(self, scores: Any) -> float:
        import numpy as np
        from sklearn.mixture import GaussianMixture

        spread = float(scores.std())
        if len(scores) < 4 or spread <= 1e-12 * float(abs(scores).max()):
            return -math.inf
        # Standardised, because scikit-learn's lower bound on variances is an absolute number.
        values = ((scores - scores.mean()) / spread)[:, None]
        two = GaussianMixture(2, random_state=stream_seed(self.seed, "mixture")).fit(values)
        if two.bic(values) >= GaussianMixture(1).fit(values).bic(values):
            return -math.inf
        low, high = np.sort(two.means_.ravel())
        zero = -scores.mean() / spread
        if not low < zero < high:
            return -math.inf
        between = np.linspace(low, high, 1001)
        upper = two.predict(between[:, None]) == two.means_.argmax()
        # If one component is more likely on the whole interval, there is no cut.
        return float(between[upper.argmax()] * spread + scores.mean()) if upper.any() and not upper[0] else -math.inf


@dataclass(frozen=True)
class TopK(Filter):
    """Keep the samples with the highest scores; ties are broken in favour of smaller ids.

    Args:
        fraction: Share of the samples to keep, above 0 and at most 1.
        count: Number of samples to keep; give either this or ``fraction``.
        per_class: Whether to apply ``fraction`` or ``count`` to each class separately; needs recorded labels.

    Raises:
        CurationError: Both or neither of ``fraction`` and ``count`` are given, or one is out of range; or ``per_class``
            is set and labels are missing.

    Example:
        >>> TopK(fraction=0.3)
        TopK(fraction=0.3, count=None, per_class=False)
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset({"difference"})

    fraction: float | None = None
    count: int | None = None
    per_class: bool = False

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.count is None):
            raise CurationError("TopK needs exactly one of `fraction` and `count`.")
        if self.fraction is not None and (isinstance(self.fraction, bool) or not 0 < self.fraction <= 1):
            raise CurationError(f"`fraction` is {self.fraction!r}; expected above 0 and at most 1.")
        if self.count is not None and (type(self.count) is not int or self.count <= 0):
            raise CurationError(f"`count` is {self.count!r}; expected a whole number above 0.")

    def vote(self, table: ScoreTable) -> Vote:
        """Compare the rank with k."""
        if self.per_class and table.database.value(f"SELECT count(*) FROM {table.name} WHERE label IS NULL"):
            raise CurationError(
                "`per_class`: some samples have no label. To record labels, let training_step return a dict with "
                "class indices under 'label' beside 'loss'."
            )
        group = "epoch, label" if self.per_class else "epoch"
        most = str(self.count) if self.fraction is None else f"round({self.fraction} * count(*) OVER ({_PART}{group}))"
        rank = f"row_number() OVER ({_PART}{group} ORDER BY score DESC, id)"
        which = f"{self.fraction:.4g}" if self.fraction is not None else str(self.count)
        return Vote(f"{rank} <= {most}", f"not in the top {which}{' of its class' if self.per_class else ''}")


_PART = "PARTITION BY "


def _by_cut(table: ScoreTable, cut: Any, reason: str) -> Vote:
    """Vote to keep scores at or above their epoch's cut, computed by ``cut`` from sampled scores in ascending order."""
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    with threadpool_limits(1):  # more threads are slower on so little data
        cuts = {epoch: cut(scores) for epoch, scores in table.sampled_scores.items()}
    if not cuts:
        raise CurationError("no sample has a score, so there is nothing to cut.")
    keep = f"score >= {by_epoch(table.epochs, cuts)}"
    (first, *more) = cuts.values()
    return Vote(keep, reason.format("the cut of its epoch" if more else f"{first:.4g}"), by_row=True)


def by_epoch(epochs: tuple[int, ...], values: dict[int, float]) -> str:
    """Return SQL for the value that belongs to a row's epoch; null if there is none.

    Example:
        >>> by_epoch((3, 5), {3: 1.5, 5: -2.0})
        "(['1.5', NULL, '-2.0']::DOUBLE[])[epoch - 2]"
    """
    literals = [repr(str(values[e])) if e in values else "NULL" for e in range(epochs[0], epochs[-1] + 1)]
    return f"([{', '.join(literals)}]::DOUBLE[])[epoch - {epochs[0] - 1}]"
