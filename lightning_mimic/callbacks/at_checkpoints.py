"""Scoring without training: a fit whose optimizer stands still, at one checkpoint per epoch."""

import functools
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
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks all files, and takes the optimizer's place."""
        if stage != "fit":
            return
        mimic = _mimic_of(trainer)
        self._check(trainer, mimic)
        pl_module.configure_model()  # so that layers which a module builds there can be compared
        for path in self.checkpoints:
            _tensors(path, pl_module)
        states = [(mimic, "examines"), *((p, "requires_grad") for p in pl_module.parameters())]
        states += [(part, "training") for part in pl_module.modules()]
        self._undo = [functools.partial(setattr, each, name, getattr(each, name)) for each, name in states]
        self._undo.append(wrap_method(pl_module, "configure_optimizers", lambda call: _Still(pl_module)))
        # A model that has trained may be as good as its reference; that says nothing against either.
        mimic.examines = False
        scored = select_parameters(pl_module, "all" if mimic.parameters is None else mimic.parameters)
        pl_module.requires_grad_(False)
        for parameter in scored.values():
            parameter.requires_grad_()
        pl_module.load_state_dict(_tensors(self.checkpoints[0], pl_module))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses to go on with a training."""
        raise ValueError("`ckpt_path` resumes a training, and AtCheckpoints trains nothing; leave it out.")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes to the epoch's checkpoint."""
        pl_module.load_state_dict(_tensors(self.checkpoints[trainer.current_epoch], pl_module))
        if trainer.current_epoch == 0:
            said = [{"file": str(each), "sha256": _digest(each)} for each in self.checkpoints]
            _mimic_of(trainer).note(trainer, {"checkpoints": said})

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Evaluation mode, whatever the module's own hooks have set."""
        pl_module.eval()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that every checkpoint had its turn."""
        if trainer.current_epoch < len(self.checkpoints):
            raise RuntimeError(
                f"the fit ended after {trainer.current_epoch} of {len(self.checkpoints)} checkpoints, so the ledger "
                "lacks the others; leave out what stops it early (`max_time`, EarlyStopping)."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was."""
        self._restore()

    def _check(self, trainer: pl.Trainer, mimic: GradMimic) -> None:
        count = len(self.checkpoints)
        if trainer.max_epochs != count or trainer.max_steps != -1:
            raise ValueError(
                f"{count} checkpoints need max_epochs={count} and no max_steps, and the trainer "
                f"has max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}."
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

    def _restore(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []


class _Still(torch.optim.Optimizer):
    """Has gradients computed, and does nothing with them."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__([p for p in module.parameters() if p.requires_grad], {"lr": 0.0})

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


def _mimic_of(trainer: pl.Trainer) -> GradMimic:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradMimic):
            return callback
    raise ValueError("AtCheckpoints scores with a GradMimic; add one to the trainer's callbacks.")


def _tensors(path: Path, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A file's tensors, one for every one of the module's."""
    tensors = read_reference(path, argument="checkpoints")
    own = module.state_dict()
    only = "a checkpoint of this very module is needed."
    for name in sorted(set(own) - set(tensors)):
        raise ReferenceLoadError(f"{path} lacks {name!r} ({nearest_names(name, tensors)}); {only}")
    for name in sorted(set(tensors) - set(own)):
        module_name = type(module).__name__
        raise ReferenceLoadError(f"{module_name} has no {name!r}, and {path} does ({nearest_names(name, own)}); {only}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)} in {path} and {tuple(own[name].shape)} in {type(module).__name__}"
            raise ReferenceLoadError(f"{name!r} is {shapes}; {only}")
    return tensors


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
