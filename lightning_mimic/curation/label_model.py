"""Snorkel's label model, and nothing else in the package imports it: what voters of unknown quality say together."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mimic.errors import CurationError
from lightning_mimic.random_streams import stream_seed

#: A share of samples to keep nearer to 0 or 1 than this is no balance to start from.
_EXTREME = 0.02
#: Default steps of its gradient descent. Snorkel's 100 stop far from the end: of 30 simulated voters, each right three
#: times in four, they make 56 % where the majority has 99.9 %, and 1,000 make 99.2 %.
_STEPS = 2000
#: Random points from which the fit starts until one does not come out upside down.
_STARTS = 5


@dataclass(frozen=True)
class FittedLabelModel:
    """The weight of each vote, as log odds that the sample is to be kept.

    Attributes:
        keep: Of each voter's yes, shape ``(voters,)``; 0 for voters who always say the same.
        drop: Of each voter's no.
        prior: Before anyone has voted.
        balance: Share to be kept that was assumed.
        agreement: Share of voted samples on which it says what the majority says.
    """

    keep: Any
    drop: Any
    prior: float
    balance: float
    agreement: float


def fit_label_model(votes: Any, balance: float, seed: int = 0, steps: int = _STEPS) -> FittedLabelModel:
    """Fit voters' accuracies to their agreement, without any truth (Ratner et al., arXiv 1810.02840).

    Args:
        votes: Array of shape ``(samples, voters)``: 1 keep, 0 drop, -1 no vote.
        balance: Share of samples to be kept, as known beforehand.
        seed: Of the fit; the global random state stays as it is.
        steps: Of gradient descent.

    Returns:
        The weights of the votes; a sample is kept if ``prior`` and the weights of its votes sum to 0 or more.

    Raises:
        CurationError: Fewer than three voters with an opinion, or the fit comes out upside down from every start.

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
            "the label model needs snorkel: pip install 'lightning-mimic[curation]', or decide by the majority."
        ) from error
    # Who always says the same says nothing, and the fit divides by how much they differ.
    informed = [k for k in range(votes.shape[1]) if len(set(np.unique(votes[:, k]).tolist()) - {-1}) == 2]
    if len(informed) < 3:
        raise CurationError(
            f"the label model needs at least 3 voters, and of {votes.shape[1]} only {len(informed)} do not say the "
            "same of every sample. Score more epochs, add filters, or decide by the majority."
        )
    balance = min(max(balance, _EXTREME), 1 - _EXTREME)
    with _isolated_rng(), threadpool_limits(1):  # for so little, more threads wait for each other
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
            except Exception as error:  # snorkel has no type of its own for a fit that diverges
                raise CurationError(f"the label model cannot be fitted ({error}); decide by the majority.") from error
            fitted = _of_all_voters(votes, informed, balance, np.log(model.get_conditional_probs()[:, 1:]))
            if fitted.agreement >= 0.5:
                return fitted
    share = 1 - fitted.agreement
    raise CurationError(
        f"the label model says the opposite of the majority of its voters on {share:.0%} of the samples: "
        f"their agreement fits two readings, and from each of {_STARTS} starts it took the wrong one. Decide by the "
        "majority, or choose filters that agree more."
    )


def _of_all_voters(votes: Any, informed: Sequence[int], balance: float, table: Any) -> FittedLabelModel:
    """Turn log probabilities by voter, vote (drop, keep) and truth (drop, keep) into weights; the others have none."""
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
    """Restores the global generators, which the fit seeds."""
    import numpy as np
    import torch  # snorkel's own; importing the package must not load it

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
