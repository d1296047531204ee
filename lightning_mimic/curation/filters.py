"""Filters: decide which samples to keep, by each sample's means, or by every scoring for an :class:`Ensemble`."""

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
    """The opinion of a filter on the rows of a table.

    Attributes:
        keep: SQL over the columns of :class:`ScoreTable`: true, false, or null for no opinion.
        reason: Why a row for which it is false goes.
        by_row: ``keep`` looks at the columns of its own row alone, so that it can be applied to some of the rows.
    """

    keep: str
    reason: str
    by_row: bool = False


@dataclass(frozen=True)
class Decision:
    """What is decided about samples.

    Attributes:
        query: SQL with ``id``, ``keep`` (null for no opinion), ``votes_keep`` and ``votes``, null unless many voted.
        reason: Why a sample goes.
        facts: What the decision rests on, for the manifest.
        abstains: Why a sample that has a score has no opinion.
        by_sample: The query looks at each sample's own rows alone, so that it can be applied to some of the samples;
            otherwise it must see all at once.
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
    """Return a rule, or raise :class:`CurationError` for what is none."""
    if isinstance(rule, type) or not callable(getattr(rule, "decide", None)):
        kind = rule if isinstance(rule, type) else type(rule)
        raise CurationError(
            f"`filter` is {rule!r} ({kind.__module__}.{kind.__qualname__}); expected a filter of "
            "lightning_mimic.curation, such as Sign() or Posterior(). (Weightings, which lightning_mimic.scorers has, "
            "decide nothing.)"
        )
    decides: DecisionRule = rule
    return decides


class Filter(ABC):
    """A decision rule with one vote; a filter of your own defines :meth:`vote`.

    Attributes:
        rests_on: What a ledger's scores must have, so that the vote means something.
        calibrated: Whether the vote rests on calibrated posteriors alone, which stay right where the reference is
            unsure of itself.
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset()
    calibrated: ClassVar[bool] = False

    @abstractmethod
    def vote(self, table: ScoreTable) -> Vote:
        """Return the vote on each row, for every epoch separately.

        Raises:
            CurationError: Too few rows to say anything.
        """

    def check(self, scores: Scores) -> None:
        """Raise :class:`CurationError` if the vote means nothing for what a ledger's scorer computes."""
        for basis in sorted(self.rests_on):
            missing = missing_basis(scores.config, basis)
            if missing is not None:
                raise CurationError(
                    f"`filter`: {self!r} {_BECAUSE[basis]}, and {scores.ledger.directory} holds {missing}, so that its "
                    f"decisions would mean nothing. {_others(scores)}"
                )

    def decide(self, scores: Scores) -> Decision:
        """Return the vote on the samples' means."""
        self.check(scores)
        table = scores.means()
        vote = self.vote(table)
        query = f"SELECT id, ({vote.keep}) AS keep, NULL::BIGINT AS votes_keep, NULL::BIGINT AS votes FROM {table.name}"
        return Decision(query, vote.reason, {}, by_sample=vote.by_row)


#: What a filter does, by what it rests on.
_BECAUSE: dict[Basis, str] = {
    "zero": "decides by the sign of scores",
    "order": "takes higher scores for better ones",
    "difference": "orders samples by their scores",
    "weights": "decides by weights",
}


def _others(scores: Scores) -> str:
    """Name the filters that mean something for a ledger, as a sentence."""
    by_order = "TopK(fraction=...) (filter=top_k)" if missing_basis(scores.config, "difference") is None else None
    by_posterior = "Posterior() (filter=posterior)" if "posterior" in scores.columns else None
    named = " or ".join(filter(None, (by_posterior, by_order)))
    return f"Take {named}." if named else "Score the samples with MimicScore."


@dataclass(frozen=True)
class Sign(Filter):
    """Keeps what has a score of 0 or more: a step on it moves the model towards the reference, or nowhere.

    The only vote that is not relative to the other samples, so on clean data it can keep all.

    Example:
        >>> Sign()
        Sign()
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset({"zero"})

    def vote(self, table: ScoreTable) -> Vote:
        """Score against 0."""
        return Vote("score >= 0", "mean score below 0", by_row=True)


#: Share of rows above which a posterior that is missing makes a filter refuse.
_MOST_WITHOUT_POSTERIOR = 0.5


@dataclass(frozen=True)
class Posterior(Filter):
    """Keeps what is rather right than wrong: a mean posterior of 0.5 or more.

    The posterior is the probability that the given label is right, by the reference as it was calibrated on the given
    labels while the samples were scored. It does not depend on how far the model has learnt, and where the calibration
    finds no wrong labels it keeps all. A sample that has a score and no posterior has no vote: ``unscored`` of
    :func:`~lightning_mimic.curation.curate` decides on it.

    Raises:
        CurationError: The ledger has no posteriors, none of more than half of its samples, or some that are no
            probabilities; or its reference does not explain the labels, so that none is held to be wrong.

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
                "given labels, or knows far less of them than the model, so that none is held to be wrong. Take "
                "another reference."
            )

    def vote(self, table: ScoreTable) -> Vote:
        """Posterior against 0.5."""
        _check_posteriors(table.database, table.name)
        return Vote("posterior >= 0.5", "posterior below 0.5", by_row=True)

    def decide(self, scores: Scores) -> Decision:
        """Return the vote on the samples' mean posterior, also of those without a score."""
        self.check(scores)
        _check_posteriors(scores.database, scores.samples)
        _check_posteriors(scores.database, scores.scorings().name, most=False)  # a mean hides what is out of range
        query = (
            "SELECT id, posterior >= 0.5 AS keep, NULL::BIGINT AS votes_keep, NULL::BIGINT AS votes "
            f"FROM {scores.samples}"
        )
        return Decision(query, "mean posterior below 0.5", {}, "no posterior", by_sample=True)


def _check_posteriors(database: Database, table: str, *, most: bool = True) -> None:
    """Raise :class:`CurationError` unless most rows of a table have a posterior, and all of these lie in 0 to 1.

    Args:
        database: Where it is.
        table: Its name.
        most: Look at how many have one.
    """
    fix = "They are recorded where the scored layer is one nn.Linear that gives the logits of a cross-entropy."
    if "posterior" not in database.columns(table):
        raise CurationError(f"`filter`: Posterior() needs posteriors, and none were recorded. {fix}")
    rows, known, low, high = database.row(
        f"SELECT count(*), count(posterior), min(posterior), max(posterior) FROM {table}"
    )
    if most and known < (1 - _MOST_WITHOUT_POSTERIOR) * rows:
        raise CurationError(
            f"`filter`: Posterior() needs posteriors, and {rows - known} of {rows} rows have none. {fix} None are "
            "known before the first calibration, so that a longer run has more."
        )
    if known and not 0 <= low <= high <= 1:
        raise CurationError(f"`filter`: the posteriors lie between {low:.4g} and {high:.4g}; expected 0 to 1.")


@dataclass(frozen=True)
class Threshold(Filter):
    """Keeps what weighs ``1/B`` or more in its batch of B, the paper's threshold; uniform weights keep all.

    Drops someone from every batch whose weights are not uniform, also from a clean one.

    Example:
        >>> Threshold()
        Threshold()
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset({"weights"})

    def vote(self, table: ScoreTable) -> Vote:
        """Weight against 1/B, to float32's rounding."""
        return Vote("relative_weight >= 1 - 1e-6", "mean weight below 1/B", by_row=True)


@dataclass(frozen=True)
class KMeans(Filter):
    """Keeps the upper of two clusters, by k-means in one dimension; always drops someone.

    Args:
        seed: Of its start.

    Example:
        >>> KMeans(seed=1)
        KMeans(seed=1)
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset({"order"})

    seed: int = 0

    def vote(self, table: ScoreTable) -> Vote:
        """Score against the middle between the two centres."""
        from sklearn.cluster import KMeans as Clusters
        from sklearn.exceptions import ConvergenceWarning

        def cut(scores: Any) -> float:
            if len(scores) < 2:
                return -math.inf
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # of scores that are all the same
                found = Clusters(2, n_init=1, random_state=stream_seed(self.seed, "k-means")).fit(scores[:, None])
            return float(found.cluster_centers_.mean()) if len(set(found.labels_.tolist())) == 2 else -math.inf

        return _by_cut(table, cut, "mean score in the lower of two clusters (below {})")


@dataclass(frozen=True)
class Mixture(Filter):
    """Keeps the upper of two normal components, and all where two are not warranted.

    They are if the Bayesian information criterion says so and their means lie on both sides of 0: towards the reference
    and away from it. The criterion alone splits every skewed cloud, also of clean data.

    Args:
        seed: Of its start.

    Example:
        >>> Mixture(seed=1)
        Mixture(seed=1)
    """

    rests_on: ClassVar[frozenset[Basis]] = frozenset({"zero"})

    seed: int = 0

    def vote(self, table: ScoreTable) -> Vote:
        """Score against where both components are equally likely."""
        return _by_cut(table, self._cut, "mean score in the lower of two components (below {})")

    def _cut(self, scores: Any) -> float:
        import numpy as np
        from sklearn.mixture import GaussianMixture

        spread = float(scores.std())
        if len(scores) < 4 or spread <= 1e-12 * float(abs(scores).max()):
            return -math.inf
        # In units of their spread, because the smallest variance allowed is an absolute one.
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
        # Where one is the likelier all the way, there is nothing to cut.
        return float(between[upper.argmax()] * spread + scores.mean()) if upper.any() and not upper[0] else -math.inf


@dataclass(frozen=True)
class TopK(Filter):
    """Keeps those with the highest scores; of equals, those with the smallest ids.

    Args:
        fraction: Of the samples, above 0 and at most 1.
        count: Of samples; this or ``fraction``.
        per_class: So many of every class; needs recorded labels.

    Raises:
        CurationError: Both or neither, or out of range; no labels were recorded.

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
            raise CurationError("top k needs either `fraction` or `count`.")
        if self.fraction is not None and (isinstance(self.fraction, bool) or not 0 < self.fraction <= 1):
            raise CurationError(f"`fraction` is {self.fraction!r}; expected above 0 and at most 1.")
        if self.count is not None and (type(self.count) is not int or self.count <= 0):
            raise CurationError(f"`count` is {self.count!r}; expected a whole number above 0.")

    def vote(self, table: ScoreTable) -> Vote:
        """Rank against k."""
        if self.per_class and table.database.value(f"SELECT count(*) FROM {table.name} WHERE label IS NULL"):
            raise CurationError(
                "`per_class`: some samples have no label. Let training_step return a dict with class indices 'label' "
                "beside 'loss', so that they are recorded."
            )
        group = "epoch, label" if self.per_class else "epoch"
        most = str(self.count) if self.fraction is None else f"round({self.fraction} * count(*) OVER ({_PART}{group}))"
        rank = f"row_number() OVER ({_PART}{group} ORDER BY score DESC, id)"
        which = f"{self.fraction:.4g}" if self.fraction is not None else str(self.count)
        return Vote(f"{rank} <= {most}", f"not in the top {which}{' of its class' if self.per_class else ''}")


_PART = "PARTITION BY "


def _by_cut(table: ScoreTable, cut: Any, reason: str) -> Vote:
    """A score at least that of its epoch's cut, found on sampled scores in ascending order."""
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    with threadpool_limits(1):  # for so little, more threads wait for each other
        cuts = {epoch: cut(scores) for epoch, scores in table.sampled_scores.items()}
    if not cuts:
        raise CurationError("no sample has a score, so there is nothing to cut.")
    keep = f"score >= {by_epoch(table.epochs, cuts)}"
    (first, *more) = cuts.values()
    return Vote(keep, reason.format("the cut of its epoch" if more else f"{first:.4g}"), by_row=True)


def by_epoch(epochs: tuple[int, ...], values: dict[int, float]) -> str:
    """SQL for the value of a row's epoch; null where there is none.

    Example:
        >>> by_epoch((3, 5), {3: 1.5, 5: -2.0})
        "(['1.5', NULL, '-2.0']::DOUBLE[])[epoch - 2]"
    """
    literals = [repr(str(values[e])) if e in values else "NULL" for e in range(epochs[0], epochs[-1] + 1)]
    return f"([{', '.join(literals)}]::DOUBLE[])[epoch - {epochs[0] - 1}]"
