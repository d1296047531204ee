"""A module of another library, how it is tried, and what is found."""

import importlib
import inspect
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mimic import GradMimic, MimicError
from lightning_mimic.ledger import Ledger

SAMPLES = 4
#: A larger deviation from the slow computation, relative to the largest score, is a wrong score. By precision.
TOLERANCE = {"64-true": 1e-5, "32-true": 1e-3}


@dataclass(frozen=True)
class Case:
    """A module and its data.

    Attributes:
        name: In the table.
        module: Makes it, with random weights.
        batches: From a batch size to batches of the same samples in the same order, at least :data:`SAMPLES` of them.
        layer: Path of the last layer, which is scored alone, too.
        plain: Its loss is the plain mean of losses of which each is a sample's own: refusing it is a gap.
        fixed: Makes the module with the lines that make it work.
        precision: Of the Trainer, for the scores and for the slow computation.
        note: Further remark.
        options: Of ``module`` and ``fixed``.
        lines: The class with these lines, where ``fixed`` is a function.
        settings: Of the callback, together with ``fixed``.
        mixes: A sample's own loss depends on the others of the batch, as in contrastive learning.
        slow: The case whose samples are those that this one makes out of its batch.
    """

    name: str
    module: Callable[..., L.LightningModule]
    batches: Callable[[int], Iterable[Any]]
    layer: str
    plain: bool = True
    fixed: Callable[..., L.LightningModule] | None = None
    precision: str = "64-true"
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    slow: "Case | None" = None
    lines: type | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    mixes: bool = False


@dataclass
class Trial:
    """What was found with one choice of parameters.

    Attributes:
        parameters: ``"all"``, or the path of a layer.
        result: ``"works"``, ``"wrong"`` (scored, and not as each sample alone), ``"refused"`` (by a sentence of this
            package) or ``"fails"`` (any other exception).
        reason: The sentence, or the exception.
        deviation: From the slow computation, relative to the largest score.
        training: The sentence, where the module is refused with dropout and batch normalisation on, and not without.
        needs: What makes it work, where something does: ``"loss='mean'"``, or ``"sample_losses"``.
    """

    parameters: str
    result: str
    reason: str = ""
    deviation: float | None = None
    training: str = ""
    needs: str = ""


@dataclass
class Found:
    """What was found for a case.

    Attributes:
        name: Of the case.
        plain: As in the case.
        note: As in the case.
        lines: That make it work, as the class of the case has them.
        trials: By parameters.
    """

    name: str
    plain: bool
    note: str
    lines: str = ""
    trials: list[Trial] = field(default_factory=list)


def try_case(case: Case) -> dict[str, Any]:
    """Score a case with all parameters and with its last layer, and compare with the slow computation.

    Args:
        case: The module and its data.

    Returns:
        A :class:`Found`, as JSON can hold it.
    """
    found = Found(case.name, case.plain, case.note)
    fit(case, made(case, case.module, train=True), first(case, SAMPLES)[0])  # the case itself is sound
    slow = SlowScores(case.slow or case, (case.slow or case).module)
    ways = [("loss='mean'", case.module, slow, {"loss": "mean"})] if case.plain else []
    if case.fixed is not None:
        given = "".join(f" and {name}={value!r}" for name, value in case.settings.items())
        ways.append((f"sample_losses{given}", case.fixed, SlowScores(case, case.fixed), dict(case.settings)))
    for parameters in ("all", case.layer):
        trial = _try(case, case.module, slow, parameters)
        found.trials.append(trial)
        for needs, make, right, options in ways:
            if trial.result != "refused" or trial.needs:
                continue
            again = _try(case, make, right, parameters, **options)
            if again.result not in ("works", "wrong"):
                trial.reason += f"\n[with {needs}: {again.result}: {again.reason}]"
            else:
                trial.needs, trial.deviation = needs, again.deviation
                trial.result = "wrong" if again.result == "wrong" else trial.result
    if case.fixed is not None and any(trial.needs.startswith("sample_losses") for trial in found.trials):
        found.lines = textwrap.dedent(inspect.getsource(case.lines or case.fixed))
    return asdict(found)


def _try(
    case: Case, make: Callable[..., L.LightningModule], slow: "SlowScores", parameters: str, **options: Any
) -> Trial:
    """Score one batch, as it is trained and then without dropout and with fixed batch statistics."""
    training = ""
    try:
        scores(case, make, parameters, train=True, **options)
    except MimicError as error:
        training = str(error)
    except Exception:
        return Trial(parameters, "fails", _last_lines())
    try:
        found = scores(case, make, parameters, train=False, **options)
    except MimicError as error:
        return Trial(parameters, "refused", str(error))
    except Exception:
        return Trial(parameters, "fails", _last_lines())
    right = slow.scores(parameters)
    deviation = ((found - right).abs().max() / right.abs().max()).item()
    result = "works" if deviation < TOLERANCE[case.precision] else "wrong"
    return Trial(parameters, result, deviation=deviation, training=training)


def scores(
    case: Case, make: Callable[..., L.LightningModule], parameters: str, *, train: bool, **options: Any
) -> Tensor:
    """The scores that the callback writes to its ledger in the first step of a fit.

    Args:
        case: The module and its data.
        make: Makes the module.
        parameters: Of the callback.
        train: With dropout and the batch's own statistics.
        options: Of the callback.
    """
    module = made(case, make, train)
    with tempfile.TemporaryDirectory() as folder:
        callback = GradMimic(
            {name: value.detach() for name, value in moved(module).items()},
            parameters,
            reweight="none",
            ledger=Path(folder) / "scores",
            id_from=lambda batch: list(range(SAMPLES)),
            diagnose_reference=False,
            **options,
        )
        fit(case, module, first(case, SAMPLES)[0], callback)
        table = Ledger(Path(folder) / "scores").table().sort_by("id")
    return torch.tensor(table["score"].to_pylist(), dtype=torch.float64)


class SlowScores:
    """The scores from the gradient of each sample in a batch and a fit of its own, in float64.

    Args:
        case: The module and its data.
        make: Makes the module.
    """

    def __init__(self, case: Case, make: Callable[..., L.LightningModule]) -> None:
        self._case = case
        self._make = make

    @cached_property
    def _gradients(self) -> list[Mapping[str, Tensor]]:
        if self._case.mixes:
            return self._of_rows()
        found = []
        for batch in first(self._case, 1):
            module = made(self._case, self._make, train=False)
            module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.0)
            kept = _KeepGradients()
            fit(self._case, module, batch, kept)
            found.append(kept.gradients)
        return found

    def _of_rows(self) -> list[Mapping[str, Tensor]]:
        module = made(self._case, self._make, train=False)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        losses = module.sample_losses(first(self._case, SAMPLES)[0])
        rows = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
        return [dict(zip(named, row, strict=True)) for row in rows]

    def scores(self, parameters: str) -> Tensor:
        """Return the scores over some parameters, of shape ``(SAMPLES,)``."""
        module = made(self._case, self._make, train=False)
        reference = moved(module)
        names = [n for n, p in module.named_parameters() if p.requires_grad and _chosen(n, parameters)]
        steps = {name: (reference[name] - module.get_parameter(name)).detach().double() for name in names}
        length = sum(step.square().sum() for step in steps.values()) ** 0.5
        dots = [sum((g[name].double() * step).sum() for name, step in steps.items()) for g in self._gradients]
        return -torch.stack(dots) / length


def made(case: Case, make: Callable[..., L.LightningModule], train: bool) -> L.LightningModule:
    """Return the module, always with the same weights."""
    torch.manual_seed(0)
    module = make(**case.options)
    return (module.double() if case.precision == "64-true" else module).train(train)


def moved(module: L.LightningModule) -> dict[str, Tensor]:
    """Return weights a random step away from a module's, always the same."""
    generator = torch.Generator().manual_seed(1)
    draws = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in module.named_parameters()}
    return {name: p + 0.02 * draws[name].to(p) for name, p in module.named_parameters()}


def first(case: Case, size: int) -> list[Any]:
    """Return the first batches of a size."""
    torch.manual_seed(2)
    batches = iter(case.batches(size))
    return [next(batches) for _ in range(SAMPLES // size)]


def fit(case: Case, module: L.LightningModule, batch: Any, *callbacks: L.Callback) -> None:
    """Train one step on one batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _package_of(module).Trainer(
            accelerator="cpu",
            precision=case.precision,
            max_steps=1,
            callbacks=[_WithoutSchedules(), *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        torch.manual_seed(3)
        trainer.fit(module, DataLoader([batch], batch_size=None, collate_fn=_as_it_is))


class _WithoutSchedules(L.Callback):
    """Removes schedules of the learning rate, some of which wait for a validation that one step does not have."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.lr_scheduler_configs = []


class _KeepGradients(L.Callback):
    """Keeps the gradients of a step."""

    def __init__(self) -> None:
        self.gradients: Mapping[str, Tensor] = {}

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in pl_module.named_parameters()
        }


def _package_of(module: L.LightningModule) -> Any:
    """Return the one of Lightning's two packages that a module comes from."""
    names = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
    return importlib.import_module("pytorch_lightning") if "pytorch_lightning" in names else L


def _chosen(name: str, parameters: str) -> bool:
    return parameters == "all" or name.startswith(f"{parameters}.")


def _as_it_is(batch: Any) -> Any:
    return batch


def _last_lines() -> str:
    return traceback.format_exc(limit=-3).strip()
