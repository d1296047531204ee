"""The choice of the scoring method, from a micro-batch's graph; checked again every epoch."""

from dataclasses import dataclass
from typing import Literal

from lightning_mimic import distributed
from lightning_mimic.errors import MimicError
from lightning_mimic.reweighting.forward import Forward
from lightning_mimic.reweighting.messages import SHARDED, UNKEPT
from lightning_mimic.reweighting.methods import (
    DoubleBackward,
    InBackward,
    NoGradient,
    ReversePass,
    ScoringMethod,
    ScoringTask,
    only_call,
    refuse_uncovered,
    samples_are_apart,
)

#: Whose gradient is scored: a sample's own loss's, its contribution to a total that mixes samples, or none.
ScoreKind = Literal["own_loss", "contribution", "no_gradient"]

#: Consecutive micro-batches that are checked while some gradient is zero, as that of a dead unit.
MAX_CHECKS = 20


@dataclass(frozen=True)
class Choice:
    """The method that was chosen.

    Attributes:
        method: Scores the samples.
        kind: Whose gradient is scored.
        pending: A gradient of zero showed nothing of some parameters; the next micro-batch is to be looked at, too.
        checks: Consecutive micro-batches that were checked.
    """

    method: ScoringMethod
    kind: ScoreKind
    pending: bool = False
    checks: int = 1


def choose_method(task: ScoringTask, forward: Forward, previous: Choice | None) -> Choice:
    """Choose the cheapest method that gives the scores of this micro-batch's samples.

    Args:
        task: What the run scores.
        forward: The micro-batch after its forward pass.
        previous: What was chosen before; another method is refused then.

    Raises:
        MimicError: The scores would not be those of the samples, or the weights would not reach all
            parameters; names which, and what to do.
    """
    _refuse_static_graph(forward)
    choice = _choose(task, forward, previous) if task.targets else Choice(NoGradient(task), "no_gradient")
    if previous is not None and type(choice.method) is not type(previous.method):
        raise MimicError(
            f"the samples can no longer be scored as in the first step ({previous.method.description}), only otherwise "
            f"({choice.method.description}), and scores of the two kinds do not mix. Start another run."
        )
    choice.method.check_products()
    if task.keeps and not isinstance(choice.method, ReversePass):
        raise MimicError(UNKEPT.format(choice.method.description))
    refuse_uncovered(task, forward, choice.method.gate_edge(forward))
    return choice


def _choose(task: ScoringTask, forward: Forward, previous: Choice | None) -> Choice:
    if forward.of_all_ranks:
        return _double(task, forward, None)
    refusal: ValueError | None = None
    checks = 1 + (previous.checks if previous is not None and previous.pending else 0)
    pending = mixed = False
    method: InBackward | ReversePass
    if only_call(task, forward) is not None:
        method = InBackward(task)
    elif task.whole:
        refusal = MimicError(SHARDED)
        if forward.losses is None:
            raise refusal
        return _double(task, forward, refusal)
    else:
        # The same object as before knows that it has seen all parameters once.
        known = None if previous is None else previous.method
        method = known if isinstance(known, ReversePass) else ReversePass(task)
    wrong_rule = _wrong_rule(forward)
    try:
        rows, mixed = method.observed(forward)
        if not mixed:
            pending = not samples_are_apart(task, forward, rows)
    except ValueError as error:  # not raised before the other ranks have been asked
        refusal = error
    pending = distributed.any_rank(pending and checks < MAX_CHECKS, forward.loss.device)
    refused = distributed.any_rank(refusal is not None, forward.loss.device)
    if wrong_rule is not None:  # whatever other method there may be
        raise wrong_rule
    if forward.losses is None and refusal is not None:
        raise refusal
    if forward.losses is not None and refused:
        return _double(task, forward, refusal)
    return Choice(method, "contribution" if mixed else "own_loss", pending, checks)


def _wrong_rule(forward: Forward) -> MimicError | None:
    """Return what is wrong with a rule that a user registered for an observed layer."""
    try:
        for call in forward.calls.calls:
            call.check_rule()
    except MimicError as error:
        return error
    return None


def _refuse_static_graph(forward: Forward) -> None:
    """Raise ``MimicError`` where a reverse pass for the scores would pass for the backward pass."""
    for node in forward.graph.order:
        wrapper = node.ddp_weakref() if hasattr(node, "ddp_weakref") else None
        if wrapper is not None and wrapper.static_graph:
            raise MimicError(
                "the model is a DistributedDataParallel with `static_graph=True`, which begins to exchange gradients "
                "in the first reverse pass, and the scores take one before the backward pass. Leave `static_graph` out."
            )


def _double(task: ScoringTask, forward: Forward, refusal: ValueError | None) -> Choice:
    method = DoubleBackward(task)
    method.check_products()
    method.check(forward, refusal)
    return Choice(method, "own_loss")
