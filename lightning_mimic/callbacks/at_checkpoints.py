"""Scoring without training, at one checkpoint per epoch."""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lightning_mimic.callbacks.grad_mimic import GradMimic
from lightning_mimic.callbacks.trainer_support import backward_scale, loss_of
from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.files import fetched
from lightning_mimic.gradients import select_parameters
from lightning_mimic.reference import Aligned, ReferenceLoadError, read_reference
from lightning_mimic.reference.read_folder import is_index
from lightning_mimic.reweighting import Reweighter
from lightning_mimic.reweighting.recorder import Position
from lightning_mimic.reweighting.reference_batches import evaluating
from lightning_mimic.stores import path_of
from lightning_mimic.trainer_package import fabric_of, package_of, pl


class AtCheckpoints(pl.Callback):
    """Score samples at checkpoints, with the :class:`~lightning_mimic.GradMimic` of the same trainer; train nothing.

    ``fit`` iterates the training data once per checkpoint; epoch *k* of the ledger is checkpoint *k*. The module is in
    evaluation mode, so that scores are the samples' own; only the scored parameters need gradients, so that one last
    layer costs little more than a forward pass. No optimizer takes a step, and of other callbacks only the hooks of
    the fit are called, not those of epochs and batches. The module is left at the last checkpoint, otherwise as it was.

    Args:
        checkpoints: Files with the whole module's weights, ``.ckpt``, ``.pt`` or ``.safetensors``; or a directory,
            which stands for its ``.ckpt`` files in the order of their names; or URLs of these. The trainer's
            ``max_epochs`` is their number.

    Raises:
        MimicError: No checkpoints, another number of epochs, a trainer without GradMimic; with an
            :class:`~lightning_mimic.Aligned` reference, whose fit belongs to one state of the model, several
            checkpoints.
        ReferenceLoadError: A file that cannot be read, or is of another module.

    Example:
        >>> from lightning_mimic import GradMimic
        >>> mimic = GradMimic("clean.ckpt", "head", reweight="none", ledger="scores/")
        >>> callbacks = [mimic, AtCheckpoints(["epoch1.ckpt", "epoch2.ckpt"])]
    """

    def __init__(self, checkpoints: str | Path | Sequence[str | Path]) -> None:
        if isinstance(checkpoints, str | Path):
            folder = path_of(checkpoints, "checkpoints")
            checkpoints = sorted(folder.glob("*.ckpt")) if folder.is_dir() else []
            if not checkpoints:
                raise MimicError(
                    f"`checkpoints` is {str(folder)!r}; expected a directory of .ckpt files, or a list of files."
                )
        if not checkpoints:
            raise MimicError("`checkpoints` is empty; expected a directory of .ckpt files, or a list of files.")
        #: In the order of the ledger's epochs.
        self.checkpoints = [path_of(path, "checkpoints") for path in checkpoints]
        # Progress bars of the trainer that are off meanwhile.
        self._hidden_bars: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check all files."""
        if stage != "fit":
            return
        self._check(trainer, _mimic_of(trainer))
        pl_module.configure_model()  # so that layers which a module builds there can be compared
        for path in self.checkpoints:
            _tensors(path, pl_module)
        pl_module.load_state_dict(_tensors(self.checkpoints[0], pl_module))
        bar: Any = trainer.progress_bar_callback
        if bar is not None and not bar.is_disabled:
            bar.disable()  # it would show a training
            self._hidden_bars.append(bar)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to continue a training."""
        raise MimicError("`ckpt_path` resumes a training, and AtCheckpoints trains nothing; leave it out.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score at every checkpoint; the trainer's own loop then finds all epochs done."""
        mimic = _mimic_of(trainer)
        mimic.on_train_start(trainer, pl_module)  # whichever of the two comes first
        reweighter = mimic.reweighter
        package, strategy = package_of(trainer), trainer.strategy
        parallel = isinstance(strategy, package.strategies.ParallelStrategy)
        alone = strategy.block_backward_sync() if parallel else nullcontext()  # type: ignore[attr-defined]
        # Scores that need no gradient are still found by the graph between the loss and some parameters.
        scored = reweighter.targets or select_parameters(pl_module, "all")
        steps = itertools.count()
        with evaluating(pl_module, scored), alone, self._progress(trainer) as progress:
            for path in self.checkpoints:
                pl_module.load_state_dict(_tensors(path, pl_module))
                for batch_idx, batch in enumerate(_epoch_of(trainer)):
                    position = Position(trainer.current_epoch, next(steps), batch_idx)
                    if mimic.should_score(trainer):
                        _score(trainer, reweighter, batch, position)
                    progress.update()
                reweighter.flush()
                trainer.fit_loop.epoch_progress.increment_processed()
                trainer.fit_loop.epoch_progress.increment_completed()
        files = [{"file": str(each), "sha256": _digest(each)} for each in self.checkpoints]
        reweighter.note({"checkpoints": files})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the trainer its own progress bar back."""
        while self._hidden_bars:
            self._hidden_bars.pop().enable()

    def _progress(self, trainer: pl.Trainer) -> Any:
        """Return a progress bar over the batches of all checkpoints, shown where the trainer would show one."""
        total = len(self.checkpoints) * trainer.num_training_batches
        return package_of(trainer).callbacks.progress.tqdm_progress.Tqdm(
            desc="scoring",
            total=int(total) if total < float("inf") else None,
            disable=not self._hidden_bars or not trainer.is_global_zero,
        )

    def _check(self, trainer: pl.Trainer, mimic: GradMimic) -> None:
        count = len(self.checkpoints)
        if trainer.max_epochs != count or trainer.max_steps != -1:
            raise MimicError(
                f"{count} checkpoints need max_epochs={count} and no max_steps, and the trainer "
                f"has max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}."
            )
        if isinstance(trainer.strategy, package_of(trainer).strategies.ModelParallelStrategy):
            raise MimicError(
                "AtCheckpoints loads whole checkpoints, and ModelParallelStrategy shards the model. Score on a single "
                "device or with strategy='ddp'."
            )
        if isinstance(mimic.settings.reference, Aligned) and len(set(self.checkpoints)) > 1:
            raise MimicError(
                "an aligned reference is fitted to one state of the model; score one checkpoint at a time, each into a "
                "ledger of its own. (The same one twice gives scores to the samples before the fit as well.)"
            )
        if mimic.settings.direction == "start":
            raise MimicError(
                "`direction='start'` takes the weights with which a training begins, and AtCheckpoints trains nothing; "
                "leave it out."
            )
        if mimic.settings.on_doubtful == "align":
            raise MimicError(
                "`on_doubtful='align'` decides while a model begins to train; for scoring give the reference as it is, "
                "or as lightning_mimic.Aligned(...)."
            )


def _score(trainer: pl.Trainer, reweighter: Reweighter, batch: Any, position: Position) -> None:
    """Score one micro-batch, with the arguments that the trainer's own loop gives to training_step."""
    module = trainer.lightning_module
    _call_module(trainer, "on_train_batch_start", batch, position.batch)
    module.eval()  # whatever the module's own hooks have set
    with reweighter.begin(batch, None, position, backward_scale(trainer, module)) as step:
        arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), step.batch, position.batch)
        outputs = _call(trainer, "training_step", *arguments.values())
        loss = loss_of(outputs)
        if loss is not None:
            step.after_forward(loss, backward_follows=False)
        reweighter.end(step, outputs)


def _epoch_of(trainer: pl.Trainer) -> Iterator[Any]:
    """Iterate the training batches once, as the trainer's own loop gives them to the module."""
    trainer.fit_loop.setup_data()  # loads them again where the trainer is to do that every few epochs
    combined: Any = trainer.fit_loop._combined_loader
    if combined._mode == "sequential":
        raise MimicError(
            "CombinedLoader(mode='sequential') gives batches of several data sets, whose ids may be the same, and "
            "`fit` takes no such loader either; give one loader of WithIds(ConcatDataset([...]))."
        )
    for each in combined.flattened:
        fabric_of(package_of(trainer)).utilities.data._set_sampler_epoch(each, trainer.current_epoch)
    _call_module(trainer, "on_train_epoch_start")
    module = trainer.lightning_module
    limit = trainer.num_training_batches
    for batch, _, _ in itertools.islice(iter(combined), None if limit == float("inf") else int(limit)):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield _call(trainer, "batch_to_device", batch, dataloader_idx=0)


def _call_module(trainer: pl.Trainer, hook: str, *args: Any) -> None:
    """Call a hook of the module as the trainer's own loop does."""
    package_of(trainer).trainer.call._call_lightning_module_hook(trainer, hook, *args)


def _call(trainer: pl.Trainer, hook: str, *args: Any, **kwargs: Any) -> Any:
    """Call a hook of the strategy as the trainer's own loop does, so that the module may log within it."""
    return package_of(trainer).trainer.call._call_strategy_hook(trainer, hook, *args, **kwargs)


def _mimic_of(trainer: pl.Trainer) -> GradMimic:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradMimic):
            return callback
    raise MimicError("AtCheckpoints scores with a GradMimic; add one to the trainer's callbacks.")


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
    """The hash of a file; of a checkpoint of several files that of their names and contents."""
    several = path.is_dir() or is_index(path)
    folder = path if path.is_dir() else path.parent
    digest = hashlib.sha256()
    for each in sorted(file for file in folder.iterdir() if file.is_file()) if several else [path]:
        if several:
            digest.update(f"{each.name}\0{each.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with fetched(each) as content, content.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
