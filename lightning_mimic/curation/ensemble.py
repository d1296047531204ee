"""Ensemble of filters: one vote per filter and epoch on each sample, combined into one decision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lightning_mimic.curation.filters import Decision, Filter, KMeans, Mixture, Posterior, Threshold, Vote, by_epoch
from lightning_mimic.curation.label_model import fit_label_model
from lightning_mimic.curation.scorer_meaning import missing_basis
from lightning_mimic.curation.scores import Scores, ScoreTable
from lightning_mimic.errors import CurationError, nearest_names

By = Literal["label_model", "majority"]


@dataclass(frozen=True)
class Ensemble:
    """Combine the votes of several filters in several epochs.

    Each pair of a filter and an epoch is a voter, and votes on the samples that were scored in that epoch.

    Args:
        filters: Filters that vote; by default the paper's: threshold, k-means and mixture.
        by: ``"label_model"``: weak supervision weights the voters by their agreement (Ratner et al., arXiv 1810.02840,
            the paper's choice; at least three voters). ``"majority"``: a sample is dropped if more than half of its
            votes are against it.
        seed: Seed of the label model.

    Raises:
        CurationError: There are no filters, or ``by`` has another value.

    Example:
        >>> from lightning_mimic.curation import Sign
        >>> Ensemble([Sign()], by="majority").by
        'majority'
    """

    filters: Sequence[Filter] = (Threshold(), KMeans(), Mixture())
    by: By = "label_model"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise CurationError(f"`by` is {self.by!r}; {nearest_names(str(self.by), get_args(By))}.")
        if not self.filters or not all(isinstance(one, Filter) for one in self.filters):
            raise CurationError(f"`filters` is {self.filters!r}; expected filters such as [Threshold(), KMeans()].")

    def decide(self, scores: Scores) -> Decision:
        """Return the decision on each sample from all votes on it.

        Raises:
            CurationError: A filter is meaningless for the scores of the ledger, fewer than three voters vote both ways,
                or the label model contradicts the majority of the voters.
        """
        for one in self.filters:
            one.check(scores)
        good = self._good(scores)
        table = scores.scorings()
        voters = len(self.filters) * len(table.epochs)
        if self.by == "label_model" and voters < 3:
            raise CurationError(
                f"the label model needs at least 3 voters; {len(self.filters)} filters in {len(table.epochs)} epochs "
                f"make {voters}. Score more epochs, add filters, or decide by the majority (filter.by=majority)."
            )
        votes = [one.vote(table) for one in self.filters]
        view = replace(table, name=f"{table.name}_votes")
        by_row = all(vote.by_row for vote in votes)
        columns = ", ".join(f"({vote.keep}) AS v{k}" for k, vote in enumerate(votes))
        selected = f"SELECT id, epoch, {columns} FROM"
        table.database.run(f"CREATE OR REPLACE VIEW {view.name} AS {selected} {table.name}")
        facts: dict[str, Any] = {"voters": voters}
        weights, prior = None, 0.0
        if self.by == "label_model":
            means = f"SELECT {good} AS good FROM {table.sample} GROUP BY id"
            balance = float(table.database.value(f"SELECT avg(good::INT) FROM ({means})"))
            sampled = f"{selected} {table.sample}" if by_row else f"FROM {view.name} WHERE {view.sampled}"
            weights, prior, found = self._weights(view, sampled, len(votes), balance)
            facts |= found
        query, reason = _tally(view, votes, weights, prior), f"outvoted ({self.by.replace('_', ' ')})"
        return Decision(query, reason, facts, by_sample=by_row)

    def _good(self, scores: Scores) -> str:
        """Return SQL for whether a sample's scorings favour it; their share is the label model's class balance."""
        if any(isinstance(one, Posterior) for one in self.filters):
            return "avg(posterior) >= 0.5"
        missing = missing_basis(scores.config, "zero")
        if missing is not None and self.by == "label_model":
            raise CurationError(
                "`filter`: the label model needs the share of scores of 0 or more, but "
                f"{scores.ledger.directory} holds {missing}. Decide by the majority (filter.by=majority)."
            )
        return "avg(score) >= 0"

    def _weights(
        self, view: ScoreTable, sampled: str, filters: int, balance: float
    ) -> tuple[list[dict[bool, dict[int, float]]], float, dict[str, Any]]:
        """Return the log odds of each voter's yes and no by filter and epoch, the prior log odds, and facts on the fit.

        Args:
            view: Votes on all rows.
            sampled: Query for the votes on the sampled samples.
            filters: Number of filters.
            balance: Prior share of samples to be kept, 0 to 1.
        """
        import numpy as np

        columns = ", ".join(f"coalesce(v{k}::INT, -1) AS v{k}" for k in range(filters))
        found = view.database.arrays(f"SELECT id, epoch, {columns} FROM ({sampled}) ORDER BY id, epoch")
        ids, row = np.unique(found["id"], return_inverse=True)
        column = np.searchsorted(view.epochs, found["epoch"])
        votes = np.full((len(ids), filters * len(view.epochs)), -1, dtype=np.int64)
        for k in range(filters):
            votes[row, k * len(view.epochs) + column] = found[f"v{k}"]
        model = fit_label_model(votes, balance, self.seed)
        # Sums of multiples of a power of two are exact, so that the order in which votes are added does not matter.
        largest = abs(model.prior) + float(np.maximum(abs(model.keep), abs(model.drop)).sum())
        step = 2.0 ** (math.frexp(largest)[1] - 52)
        keep, drop, prior = (np.round(each / step) * step for each in (model.keep, model.drop, model.prior))
        weights: list[dict[bool, dict[int, float]]] = []
        for k in range(filters):
            part = slice(k * len(view.epochs), (k + 1) * len(view.epochs))
            yes, no = keep[part].tolist(), drop[part].tolist()
            weights.append(
                {True: dict(zip(view.epochs, yes, strict=True)), False: dict(zip(view.epochs, no, strict=True))}
            )
        return weights, float(prior), {"class_balance": model.balance, "agreement_with_majority": model.agreement}


def _tally(
    view: ScoreTable, votes: Sequence[Vote], weights: list[dict[bool, dict[int, float]]] | None, prior: float
) -> str:
    names = [f"v{k}" for k in range(len(votes))]
    yes = " + ".join(f"coalesce({v}::INT, 0)" for v in names)
    cast = " + ".join(f"({v} IS NOT NULL)::INT" for v in names)
    evidence, verdict = "", "2 * votes_keep - votes"
    if weights is not None:
        parts = [
            f"CASE WHEN {v} THEN {by_epoch(view.epochs, by[True])} "
            f"WHEN NOT {v} THEN {by_epoch(view.epochs, by[False])} ELSE 0 END"
            for v, by in zip(names, weights, strict=True)
        ]
        evidence, verdict = f", sum({' + '.join(parts)}) AS evidence", f"{prior!r} + evidence"
    # Both counts in one exact number, to save memory: the database holds a sum per row until it merges a sample's rows.
    both = f"sum(({yes} + {_SHIFT} * ({cast}))::DOUBLE)"
    return f"""SELECT id, CASE WHEN votes > 0 THEN {verdict} >= 0 END AS keep, votes_keep, votes FROM (
        SELECT *, (tally // {_SHIFT})::BIGINT AS votes, (tally % {_SHIFT})::BIGINT AS votes_keep
        FROM (SELECT id, {both} AS tally{evidence} FROM {view.name} GROUP BY id))"""


#: Larger than the number of votes on a sample.
_SHIFT = 2**26
