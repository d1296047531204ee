"""Scoring without training: a fit whose optimizer stands still, at one checkpoint per epoch."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_mimic.callbacks.grad_mimic import GradMimic
from lightning_mimic.callbacks.hooks import wrap_method
from lightning_mimic.gradients import nearest_names, select_parameters
from lightning_mimic.reference import Aligned, ReferenceLoadError, read_reference


class AtCheckpoints(Callback):
    """Has a :class:`~lightning_mimic.GradMimic` score at checkpoints, and changes no weight.

    Epoch *k* of the ledger is checkpoint *k*. The module is in evaluation mode, so that scores are the samples' own;
    only the scored parameters need gradients, so that one last layer costs little more than a forward pass. The module
    is left at the last checkpoint, otherwise as it was.

    Args:
        checkpoints: Files with the whole module's weights, ``.ckpt``, ``.pt`` or ``.safetensors``; or a directory,
            which stands for its ``.ckpt`` files in the order of their names. The trainer's ``max_epochs`` is their
            number.

    Raises:
        ValueError: No checkpoints, another number of epochs, a trainer without GradMimic; with an
            :class:`~lightning_mimic.Aligned` reference, whose fit belongs to one state of the model, several
            checkpoints.
        ReferenceLoadError: A file that cannot be read, or is of another module.

    Example:
        >>> from lightning_mimic import GradMimic
        >>> mimic = GradMimic("clean.ckpt", "head", reweight=False, ledger="scores/")
        >>> callbacks = [mimic, AtCheckpoints(["epoch1.ckpt", "epoch2.ckpt"])]
    """

    def __init__(self, checkpoints: str | Path | Sequence[str | Path]) -> None:
        if isinstance(checkpoints, str | Path):
            given, folder = checkpoints, Path(checkpoints).expanduser()
            checkpoints = sorted(folder.glob("*.ckpt")) if folder.is_dir() else []
            if not checkpoints:
                raise ValueError(
                    f"`checkpoints` is {str(given)!r}; expected a directory of .ckpt files, or a list of files."
                )
        if not checkpoints:
            raise ValueError("`checkpoints` is empty; expected a directory of .ckpt files, or a list of files.")
        #: In the order of the ledger's epochs.
        self.checkpoints = [Path(path).expanduser() for path in checkpoints]
        self._undo: Callable[[], None] | None = None
        self._trainable: list[torch.nn.Parameter] = []
        self._was_training: list[torch.nn.Module] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks all files, and takes the optimizer's place."""
        mimic = _mimic_of(trainer)
        if trainer.max_epochs != len(self.checkpoints):
            raise ValueError(
                f"{len(self.checkpoints)} checkpoints need max_epochs={len(self.checkpoints)}, and the trainer has "
                f"max_epochs={trainer.max_epochs}."
            )
        if isinstance(mimic.reference, Aligned) and len(set(self.checkpoints)) > 1:
            raise ValueError(
                "an aligned reference is fitted to one state of the model; score one checkpoint at a time, each into a "
                "ledger of its own. (The same one twice gives scores to the samples before the fit as well.)"
            )
        if mimic.on_doubtful == "align":
            raise ValueError(
                "`on_doubtful='align'` decides while a model begins to train; for scoring give the reference as it is, "
                "or as lightning_mimic.Aligned(...)."
            )
        for path in reversed(self.checkpoints):
            _load(path, pl_module)
        scored = select_parameters(pl_module, "all" if mimic.parameters is None else mimic.parameters)
        kept = {id(parameter) for parameter in scored.values()}
        self._trainable = [p for p in pl_module.parameters() if p.requires_grad and id(p) not in kept]
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        self._was_training = [part for part in pl_module.modules() if part.training]
        pl_module.eval()
        self._undo = wrap_method(pl_module, "configure_optimizers", lambda call: _Still(pl_module))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes to the epoch's checkpoint."""
        _load(self.checkpoints[trainer.current_epoch], pl_module)
        if trainer.current_epoch == 0:
            said = [{"file": str(each), "sha256": _digest(each)} for each in self.checkpoints]
            _mimic_of(trainer).note(trainer, {"checkpoints": said})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was."""
        self._restore()

    def _restore(self) -> None:
        if self._undo is None:
            return
        self._undo()
        for parameter in self._trainable:
            parameter.requires_grad_()
        for part in self._was_training:
            part.training = True
        self._undo, self._trainable, self._was_training = None, [], []


class _Still(torch.optim.Optimizer):
    """Has gradients computed, and does nothing with them."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__([p for p in module.parameters() if p.requires_grad], {})

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


def _mimic_of(trainer: pl.Trainer) -> GradMimic:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradMimic):
            return callback
    raise ValueError("AtCheckpoints scores with a GradMimic; add one to the trainer's callbacks, in front of it.")


def _load(path: Path, module: torch.nn.Module) -> None:
    try:
        tensors = read_reference(path)
    except ReferenceLoadError as error:
        raise ReferenceLoadError(str(error).replace("`reference`", "`checkpoints`")) from error
    own = module.state_dict()
    missing = sorted(set(own) - set(tensors))
    strange = sorted(set(tensors) - set(own))
    if missing or strange:
        name, there = (missing[0], tensors) if missing else (strange[0], own)
        where = f"{path} lacks" if missing else f"{type(module).__name__} does not have, and {path} does,"
        raise ReferenceLoadError(
            f"{where} {name!r} ({nearest_names(name, there)}); a checkpoint of this very module is needed."
        )
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ReferenceLoadError(f"{path} does not fit {type(module).__name__}: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
