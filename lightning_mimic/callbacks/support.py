"""Which trainers and modules the callback can serve; the others are refused in a sentence."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_mimic.gradients import LayerGradients, owning_layer
from lightning_mimic.scorers import Compares, Need, Scorer

Result = TypeVar("Result")

#: What only one layer's gradients have, in words.
OF_ONE_LAYER: dict[Need, str] = {
    "norms": "the norms of per-sample gradients",
    "gram": "the inner products of per-sample gradients",
}


def check_packages(trainer: object, module: object) -> None:
    """Raises ``TypeError`` when trainer or module come from the other of Lightning's two packages."""
    for role, thing, kind in (("Trainer", trainer, pl.Trainer), ("module", module, pl.LightningModule)):
        if not isinstance(thing, kind):
            raise TypeError(
                f"GradMimic is a callback of the package `lightning`, but the {role} is a "
                f"{type(thing).__module__}.{type(thing).__name__}. Import both from `lightning` (`import lightning as "
                "L`); `pytorch_lightning` is another package, and their classes do not mix."
            )


def check_support(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raises ``ValueError`` for strategies and optimizers under which weights or scores would be wrong."""
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"GradMimic runs on a single device and under DDP; {type(strategy).__name__} splits or replaces "
            "parameters and gradients in ways that are not tested with it. Use strategy='ddp'."
        )
    elsewhere = (
        "The functions in lightning_mimic.gradients and lightning_mimic.scorers serve training loops of your own."
    )
    if not module.automatic_optimization:
        raise ValueError(
            f"GradMimic needs automatic optimization; {type(module).__name__} steps its optimizers by hand. {elsewhere}"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            "GradMimic must see each batch before training_step does; take `batch` instead of `dataloader_iter`."
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(
            f"LBFGS evaluates a batch several times per step, which GradMimic does not follow. {elsewhere}"
        )


def check_scorer(scorer: Scorer, *, reference: bool, parameters: bool) -> None:
    """Raises ``ValueError`` unless exactly what the scorer needs is given; nothing is ignored in silence.

    Args:
        scorer: The scorer.
        reference: A reference is given.
        parameters: Parameters are named.
    """
    if isinstance(scorer, type) or not isinstance(getattr(scorer, "needs", None), frozenset) or not callable(scorer):
        raise ValueError(f"`scorer` is {scorer!r}; expected an object such as lightning_mimic.scorers.MimicScore().")
    name = type(scorer).__name__
    of_reference = {"reference_losses"} if isinstance(scorer, Compares) else {"dot", "reference_losses"}
    if reference and "dot" in scorer.needs - of_reference:
        raise ValueError(
            f"`reference` is given, but {name} takes its direction from the batches of its `loader`; leave it out."
        )
    for argument, given, needed, example in (
        ("reference", reference, of_reference, "a checkpoint's path"),
        ("parameters", parameters, {"dot", "norms", "gram"}, "a layer's path or 'all'"),
    ):
        if given and not scorer.needs & needed:
            raise ValueError(f"`{argument}` is given, but {name} takes none; leave it out.")
        if not given and scorer.needs & needed:
            raise ValueError(f"`{argument}` is missing; {name} needs one: {example}.")


def check_needs(scorer: Scorer, module: pl.LightningModule, targets: Mapping[str, nn.Parameter]) -> None:
    """Raises ``ValueError`` if the scorer needs what neither the module nor its parameters can give."""
    name = type(scorer).__name__
    by_losses = scorer.needs & {"losses", "reference_losses"} or isinstance(scorer, Compares)
    if by_losses and not callable(getattr(module, "sample_losses", None)):
        raise ValueError(
            f"{name} needs the loss of every sample: give {type(module).__name__} a method `sample_losses(batch)` that "
            "returns one loss per sample, and average it in training_step."
        )
    for need in sorted(scorer.needs & OF_ONE_LAYER.keys()):
        path, layer = owning_layer(module, targets)
        if need not in LayerGradients.products_of(layer):
            raise ValueError(
                f"{name} needs {OF_ONE_LAYER[need]}, which are known for nn.Linear; {path!r} is a "
                f"{type(layer).__name__}."
            )


def amp_scale(trainer: pl.Trainer, module: pl.LightningModule) -> Tensor | None:
    """The gradient scaler's factor, read without waiting for the device; ``None`` without a scaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones((), device=module.device))


def on_all_ranks(act: Callable[[], Result], what: str) -> Result:
    """Does it, and raises on all ranks if it fails on one, so that none waits for another.

    Args:
        act: What this rank does.
        what: What another rank did, if that is what failed.
    """
    error: Exception | None = None
    try:
        result = act()
    except Exception as caught:  # whatever it is, the other ranks must hear of it before it is raised
        error = caught
    failures = _gather_errors(error)
    if error is not None:
        raise error
    if failures:
        raise ValueError(f"another rank {what}: {failures[0]}")
    return result


def _gather_errors(error: Exception | None) -> list[str]:
    message = None if error is None else str(error)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [] if message is None else [message]
    messages: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, message)
    return [f"rank {rank}: {text}" for rank, text in enumerate(messages) if text is not None]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank (a host sync)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, which must have as many each, in the ranks' order."""
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    torch.distributed.all_gather(parts, rows)
    return torch.cat(parts)


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialised else 1
