"""Diagnose a reference before it is used."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_mimic.batches import sample_count, tensors_of, to_device, with_parts
from lightning_mimic.distributed import is_distributed, rank
from lightning_mimic.errors import MimicError, ReferenceLoadError
from lightning_mimic.gradients import Direction, LossGradients, select_parameters
from lightning_mimic.gradients.graph import Graph
from lightning_mimic.gradients.nodes import grad_fn_of
from lightning_mimic.reference.diagnosis import Diagnosis, Estimate
from lightning_mimic.reference.match import aliases_of, match_reference
from lightning_mimic.reference.model import reference_model
from lightning_mimic.reference.read import ReferenceSource, read_reference
from lightning_mimic.sharding import full_tensor, sharded_modules

#: Enough for a verdict where six labels in ten are wrong.
SAMPLES = 512
#: Points at which the loss is evaluated, from the model (0) to the reference (1).
PATH = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def diagnose(
    module: nn.Module,
    reference: ReferenceSource,
    loader: Iterable[Any],
    parameters: str | Sequence[str] = "all",
    *,
    samples: int = SAMPLES,
) -> Diagnosis:
    """Diagnose a reference: whether the direction from a model towards it is meaningful.

    Works on a copy in evaluation mode; module and reference stay as they are.

    Args:
        module: The model as it will start, with a method ``sample_losses(batch)``.
        reference: As for :class:`~lightning_mimic.GradMimic`.
        loader: Batches as training gets them, noise and all. The labels are everything after a tuple's first part.
        parameters: Those that will be scored.
        samples: How many to look at.

    Returns:
        The figures, and their ``verdict``.

    Raises:
        ReferenceLoadError: The reference cannot be read.
        MimicError: No ``sample_losses``, unknown parameters, an empty loader, or a model that stands at its reference.

    Example:
        >>> class Net(nn.Linear):
        ...     def sample_losses(self, batch):
        ...         return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
        >>> x = torch.linspace(-1, 1, 512).unsqueeze(1)
        >>> net = Net(1, 2)
        >>> knowing = {"weight": net.weight + torch.tensor([[-3.0], [3.0]]), "bias": torch.zeros(2)}
        >>> y = (x > 0).long().flatten()
        >>> order = torch.arange(512).view(2, 256).T.flatten()  # the classes in turn
        >>> print(diagnose(net, knowing, [(x[order], y[order])]).label_gap.missing)
        False
    """
    if not callable(getattr(module, "sample_losses", None)):
        raise MimicError(
            f"diagnose() needs the loss of every sample: give {type(module).__name__} a method `sample_losses(batch)` "
            "that returns one loss per sample. GradMimic looks at a reference without it, too, in the first steps."
        )
    if sharded_modules(module):
        raise MimicError(
            f"diagnose() works on a copy of the module, and {type(module).__name__} is sharded (`fully_shard`); "
            "diagnose before it is sharded."
        )
    targets = select_parameters(module, parameters)
    tensors = read_reference(reference)
    try:
        held = match_reference(tensors, targets, aliases_of(module))
    except ReferenceLoadError as error:
        return Diagnosis(mismatch=str(error))
    model = copy.deepcopy(module).eval().requires_grad_(False)
    moved = {name: model.get_parameter(name) for name in targets}
    for parameter in moved.values():
        parameter.requires_grad_()
    device = next(iter(moved.values())).device
    direction = Direction(held, moved)
    if direction.vanishes(direction.norm()):
        raise MimicError("the model stands at its reference, so there is no way between them to look at.")
    with isolated_rng(device):
        batches = _first(loader, samples, device)
        scores = torch.cat([_scores(model, batch, moved, direction) for batch in batches])
        whole = whole_reference(reference, module)
        gaps = [] if whole is None else [losses_and_label_gaps(whole, batch) for batch in batches]
        losses = _path_losses(model, batches, moved, direction)
    known = [gap for _, gap in gaps if gap is not None]
    theirs = estimate(sums_of(torch.cat([losses for losses, _ in gaps]))) if gaps else None
    return Diagnosis(
        samples=len(scores),
        **weight_similarity(module, tensors, targets, held),
        rest_trains=rest_trains(module, targets),
        score=estimate(sums_of(scores)),
        label_gap=estimate(sums_of(torch.cat(known))) if known else None,
        loss=losses[0.0],
        reference_loss=None if theirs is None else theirs.mean,
        path_losses=losses,
    )


@torch.no_grad()
def weight_similarity(
    module: nn.Module, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], held: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Compare the weights of a reference with those of a model, as fields of :class:`Diagnosis`.

    Args:
        module: The model.
        tensors: The reference's.
        targets: The model's target parameters.
        held: The reference's of the same names.
    """
    pairs = {name: (full_tensor(p.detach()).to(held[name]), held[name]) for name, p in targets.items()}
    # Vectors (biases, scales) begin alike in every network; only matrices tell related networks from unrelated ones.
    matrices = {n: p for n, p in module.named_parameters() if p.ndim > 1 and n not in targets}
    try:
        others = match_reference(tensors, matrices, aliases_of(module)) if matrices else {}
    except ReferenceLoadError:  # it holds only a part of the model
        others = {}
    # One at a time: whole matrices of a sharded model are copies.
    compared = ((full_tensor(matrices[name].detach()).to(tensor), tensor) for name, tensor in others.items())
    own = [pair for pair in pairs.values() if pair[0].ndim > 1]
    if len(own) == 1 and not matrices:
        own = []  # a single layer takes the data as they are, whatever the start
    return {
        "cosines": {name: _cosine([pair]) for name, pair in pairs.items()},
        "distances": {name: float((theirs - own).norm() / own.norm()) for name, (own, theirs) in pairs.items()},
        "weight_cosine": _cosine(compared if matrices else own),
    }


def rest_trains(module: nn.Module, targets: Mapping[str, Tensor]) -> bool:
    """Return whether weights besides the targets train."""
    return any(p.requires_grad for name, p in module.named_parameters() if name not in targets)


def exchange_labels(batch: Any) -> tuple[Any, Tensor] | None:
    """Return the batch with each sample's labels given to the next one, and the samples whose labels change.

    ``None`` if the batch is not inputs and labels.

    Example:
        >>> other, differs = exchange_labels((torch.zeros(3, 1), torch.tensor([0, 2, 2])))
        >>> other[1], differs
        (tensor([2, 0, 2]), tensor([ True,  True, False]))
    """
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        return None
    if not all(isinstance(part, Tensor) and part.ndim for part in batch):
        return None
    labels = [part.roll(1, 0) for part in batch[1:]]
    differs = torch.stack(
        [(a != b).flatten(1).any(1) if a.ndim > 1 else a != b for a, b in zip(batch[1:], labels, strict=True)]
    )
    return with_parts(batch, dict(enumerate(labels, 1))), differs.any(0)


def sums_of(values: Tensor) -> Tensor:
    """Count, sum and sum of squares of what is finite, float64; of several ranks or batches they add up."""
    values = values.detach().cpu().double()
    values = values[torch.isfinite(values)]
    return torch.stack([torch.ones_like(values), values, values.square()]).sum(1)


def estimate(sums: Tensor) -> Estimate | None:
    """Mean and standard error; ``None`` of fewer than two values.

    Example:
        >>> estimate(sums_of(torch.tensor([1.0, 2.0, 3.0])))  # doctest: +ELLIPSIS
        Estimate(mean=2.0, error=0.577..., count=3)
    """
    count, total, squares = sums.tolist()
    if count < 2:
        return None
    mean = total / count
    variance = max(squares - total * mean, 0.0) / (count - 1)
    return Estimate(mean, (variance / count) ** 0.5, int(count))


@torch.no_grad()
def losses_and_label_gaps(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return the reference's losses, and how much higher they are with exchanged labels, where these differ."""
    losses: Tensor = model.sample_losses(batch)  # type: ignore[operator]
    other = exchange_labels(batch)
    if other is None:
        return losses, None
    changed, differs = other
    gaps: Tensor = model.sample_losses(changed) - losses  # type: ignore[operator]
    if len(gaps) != len(differs):  # losses of all ranks' samples, in their order
        if not is_distributed():
            raise MimicError(
                f"`sample_losses` returned {len(gaps)} losses for {len(differs)} samples; expected one per sample."
            )
        own = slice(rank() * len(differs), None)
        losses, gaps = losses[own][: len(differs)], gaps[own][: len(differs)]
    return losses, gaps[differs]


def whole_reference(source: ReferenceSource, module: nn.Module) -> nn.Module | None:
    """The reference as a model that can be asked for its losses, where it is one and can be copied."""
    if not callable(getattr(module, "sample_losses", None)):
        return None
    try:
        model = reference_model(source, module)
    except (ReferenceLoadError, RuntimeError, TypeError):  # only a part of it, or nothing that deepcopy takes
        return None
    return model.to(next(module.parameters()).dtype)


def isolated_rng(device: torch.device) -> AbstractContextManager[None]:
    """Return a context within which the global random state is saved and restored."""
    return torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])


def _scores(model: nn.Module, batch: Any, targets: Mapping[str, nn.Parameter], direction: Direction) -> Tensor:
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the attention that can be differentiated twice
        losses = model.sample_losses(batch)  # type: ignore[operator]
        rows = LossGradients(losses, targets)
        rows.check(Graph(grad_fn_of(losses)))
        return (-rows.dot(direction) / direction.norm()).detach()


def _cosine(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Between the concatenations of the first and the second of the pairs; ``None`` if there are none."""
    products = [torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).double().cpu() for a, b in pairs]
    if not products:
        return None
    both, first, second = torch.stack(products).sum(0).tolist()
    return float(both / max((first * second) ** 0.5, 1e-300))


@torch.no_grad()
def _path_losses(
    model: nn.Module, batches: Sequence[Any], targets: Mapping[str, nn.Parameter], direction: Direction
) -> dict[float, float]:
    start = {name: p.detach().clone() for name, p in targets.items()}
    difference = dict(direction)
    path_losses = {}
    for t in PATH:
        for name, p in targets.items():
            p.copy_(start[name] + t * difference[name])
        losses = torch.cat([model.sample_losses(batch) for batch in batches])  # type: ignore[operator]
        path_losses[t] = float(losses[torch.isfinite(losses)].mean())
    return path_losses


def _first(loader: Iterable[Any], samples: int, device: torch.device) -> list[Any]:
    """Batches from the loader's start, until there are enough samples in them."""
    batches, seen = [], 0
    for batch in loader:
        batches.append(to_device(batch, device))
        seen += sample_count(batch) or len(next(tensors_of(batch), ()))
        if seen >= samples:
            break
    if not batches:
        raise MimicError("`loader` gives no batches.")
    return batches
