"""Snorkel's label model, which combines votes of unknown quality. The only module that imports snorkel."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mimic.errors import CurationError
from lightning_mimic.random_streams import stream_seed

#: The class balance is kept at least this far from 0 and 1.
_EXTREME = 0.02
#: Steps of gradient descent. Snorkel's default of 100 stops far from convergence: with 30 simulated voters, each right
#: three times in four, it reaches an accuracy of 56 % and 1,000 steps 99.2 %; a majority vote has 99.9 %.
_STEPS = 2000
#: Maximum number of random starts. Further starts are needed if a fit comes out with the two classes swapped.
_STARTS = 5


@dataclass(frozen=True)
class FittedLabelModel:
    """Hold the weight of each vote, in log odds that the sample should be kept.

    Attributes:
        keep: Weights of each voter's yes, shape ``(voters,)``; 0 for voters with constant votes.
        drop: Weights of each voter's no, shape ``(voters,)``; 0 for voters with constant votes.
        prior: Log odds before any vote.
        balance: Assumed share of samples to be kept.
        agreement: Share of samples with a vote on which the model agrees with the majority.
    """

    keep: Any
    drop: Any
    prior: float
    balance: float
    agreement: float


def fit_label_model(votes: Any, balance: float, seed: int = 0, steps: int = _STEPS) -> FittedLabelModel:
    """Estimate the voters' accuracies from their agreement, without true labels (Ratner et al., arXiv 1810.02840).

    Args:
        votes: Array of shape ``(samples, voters)``: 1 keep, 0 drop, -1 no vote.
        balance: Prior share of samples to be kept, 0 to 1.
        seed: Seed of the fit; the global random state is left unchanged.
        steps: Number of steps of gradient descent.

    Returns:
        The weights of the votes; a sample is kept if ``prior`` and the weights of its votes sum to 0 or more.

    Raises:
        CurationError: Fewer than three voters vote both ways, the fit fails, or the result contradicts the majority
            from every start.

    Example:
        >>> import numpy as np
        >>> votes = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]] * 10)
        >>> model = fit_label_model(votes, 0.5)
        >>> bool((model.keep > model.drop).all()), model.agreement
        (True, 1.0)
    """
    import numpy as np

    try:
        from snorkel.labeling.model import LabelModel
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise CurationError(
            "the label model needs snorkel: pip install 'lightning-mimic[curation]', or decide by the majority "
            "(filter.by=majority)."
        ) from error
    # Constant votes carry no information, and the fit divides by the variance of the votes.
    informed = [k for k in range(votes.shape[1]) if len(set(np.unique(votes[:, k]).tolist()) - {-1}) == 2]
    if len(informed) < 3:
        raise CurationError(
            f"the label model needs at least 3 voters whose votes vary, but only {len(informed)} of {votes.shape[1]} "
            "do. Score more epochs, add filters, or decide by the majority (filter.by=majority)."
        )
    balance = min(max(balance, _EXTREME), 1 - _EXTREME)
    with _isolated_rng(), threadpool_limits(1):  # more threads are slower on so little data
        for start in range(_STARTS):
            model = LabelModel(cardinality=2, verbose=False)
            drawn = stream_seed(seed, "label model", start)
            try:
                model.fit(
                    votes[:, informed],
                    class_balance=[1 - balance, balance],
                    seed=drawn,
                    n_epochs=steps,
                    progress_bar=False,
                )
            except Exception as error:  # snorkel has no exception type of its own for a diverging fit
                raise CurationError(f"the label model cannot be fitted ({error}); decide by the majority.") from error
            fitted = _with_all_voters(votes, informed, balance, np.log(model.get_conditional_probs()[:, 1:]))
            if fitted.agreement >= 0.5:
                return fitted
    share = 1 - fitted.agreement
    raise CurationError(
        f"the label model contradicts the majority of its voters on {share:.0%} of the samples: the votes fit two "
        f"solutions, and all {_STARTS} starts led to the wrong one. Decide by the majority (filter.by=majority), or "
        "choose filters that agree more."
    )


def _with_all_voters(votes: Any, informed: Sequence[int], balance: float, table: Any) -> FittedLabelModel:
    """Turn the informed voters' log probabilities into weights; the other voters get 0.

    Args:
        votes: Array of shape ``(samples, voters)``: 1 keep, 0 drop, -1 no vote.
        informed: Indices of the voters that were fitted.
        balance: Assumed share of samples to be kept.
        table: Log probabilities by informed voter, vote (drop, keep) and truth (drop, keep).
    """
    import numpy as np

    keep, drop = np.zeros(votes.shape[1]), np.zeros(votes.shape[1])
    keep[informed], drop[informed] = table[:, 1, 1] - table[:, 1, 0], table[:, 0, 1] - table[:, 0, 0]
    prior = float(np.log(balance / (1 - balance)))
    voted = (votes >= 0).any(1)
    kept = prior + (votes == 1) @ keep + (votes == 0) @ drop >= 0
    majority = 2 * (votes == 1).sum(1) >= (votes >= 0).sum(1)
    return FittedLabelModel(keep, drop, prior, balance, float((kept == majority)[voted].mean()))


@contextlib.contextmanager
def _isolated_rng() -> Iterator[None]:
    """Restore the global random generators afterwards, because the fit seeds them."""
    import numpy as np
    import torch  # a dependency of snorkel; importing this package must not load it

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
