"""Training of a model, with or without Grad-Mimic, as a Hydra configuration describes it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from lightning_mimic.callbacks import GradMimic, SuspiciousImages
from lightning_mimic.cli.build import build
from lightning_mimic.cli.errors import check_inputs_exist
from lightning_mimic.data import CachedFeatures
from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.reference import refuse_module_on_features
from lightning_mimic.reference.read_file import read_file
from lightning_mimic.stores import hide_secrets, path_of
from lightning_mimic.user_files import user_path


def train(config: DictConfig, more_callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """Builds what the configuration names, trains, tests and saves.

    Args:
        config: As composed from ``conf/train.yaml``.
        more_callbacks: Beside the configured one.

    Returns:
        The trainer, with the model, its callbacks and ``callback_metrics``.

    Raises:
        MimicError: A file that another run writes is not there, and the message has the command; or no training step
            was done.
    """
    check_inputs_exist(config)
    (resume, resumed), save_to = _existing(config.resume), _writable(config.save_to)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data, model = build(config)
    _check_fits(resume, resumed, model)
    if config.features:
        data = CachedFeatures(data, model, config.features)
    callbacks = _callbacks(config, more_callbacks, resumed=resume is not None)
    logger = instantiate(config.logger) if config.get("logger") else False
    trainer: L.Trainer = instantiate(config.trainer, callbacks=callbacks, logger=logger)
    if trainer.accumulate_grad_batches < 1:
        raise MimicError(f"`trainer.accumulate_grad_batches` is {trainer.accumulate_grad_batches}; expected 1 or more.")
    for each in trainer.loggers:
        # Plain containers: a checkpoint must not hold objects that need code to be read.
        each.log_hyperparams(OmegaConf.to_container(without_secrets(config), resolve=True))  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data, ckpt_path=None if resume is None else os.fspath(resume))
    _check_trained(trainer)
    if config.test:
        trainer.test(model, datamodule=data)
    if save_to is not None and not config.trainer.get("fast_dev_run"):
        trainer.save_checkpoint(os.fspath(save_to))
    return trainer


def _callbacks(config: DictConfig, more: Sequence[L.Callback], *, resumed: bool) -> list[L.Callback]:
    """Build the callbacks that the configuration names, with more of them."""
    # Of mimic=none an experiment's own settings may be left.
    scores = OmegaConf.select(config, "mimic._target_") is not None
    callbacks = [*([instantiate(config.mimic)] if scores else []), *more]
    if config.features:
        for callback in callbacks:
            if isinstance(callback, GradMimic):
                refuse_module_on_features(callback.settings.reference)
    if config.suspicious_images:
        callbacks.append(SuspiciousImages(config.suspicious_images))
    if config.save_epochs_to:
        callbacks.append(_every_epoch(path_of(config.save_epochs_to, "save_epochs_to"), resumed=resumed))
    return callbacks


def without_secrets(config: DictConfig) -> DictConfig:
    """Return a configuration whose URLs have no signatures, for loggers.

    Args:
        config: Any; it is returned itself if it has none.

    Example:
        >>> without_secrets(OmegaConf.create({"root": "https://host/a.ckpt?Signature=1f"}))
        {'root': 'https://host/a.ckpt'}
    """
    text = OmegaConf.to_yaml(config, resolve=True)
    shown = hide_secrets(text)
    return config if shown == text else OmegaConf.create(shown)  # type: ignore[return-value]


def _every_epoch(directory: Path, *, resumed: bool) -> ModelCheckpoint:
    """Return a callback that saves the model after every epoch."""
    there = sorted(directory.glob("*.ckpt"))
    if there and not resumed:
        raise MimicError(f"`save_epochs_to`: {there[0]} is there already, of another run; name another directory.")
    return ModelCheckpoint(
        os.fspath(directory),
        "{epoch:03d}",
        auto_insert_metric_name=False,
        save_top_k=-1,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _existing(resume: str | None) -> tuple[Path | None, Mapping[str, Any]]:
    """Return the path of a checkpoint to go on from, and what it holds."""
    if resume is None:
        return None, {}
    path = path_of(resume, "resume")
    if not path.is_file():
        near = nearest_names(path.name, [each.name for each in path.parent.glob("*")])
        raise MimicError(f"`resume`: there is no file {path}; {near}.")
    # Lightning would unpickle whatever there is, and compares no checksums.
    content = read_file(path, "resume")
    if not isinstance(content, Mapping) or not {"state_dict", "loops", "optimizer_states"} <= set(content):
        raise MimicError(
            f"`resume`: {path} holds no run to go on from, but at most a model; expected a checkpoint that Lightning "
            "wrote while it trained. Weights to begin with are given by `model.pretrained`."
        )
    return path, content


def _check_fits(path: Path | None, resumed: Mapping[str, Any], model: L.LightningModule) -> None:
    """Refuse a checkpoint of a run that trained another model, or other parameters of it."""
    if path is None:
        return
    ours, theirs = (
        {n: tuple(t.shape) for n, t in each.items()} for each in (model.state_dict(), resumed["state_dict"])
    )
    trained = sum(p.requires_grad for p in model.parameters())
    before = [sum(len(group["params"]) for group in each["param_groups"]) for each in resumed["optimizer_states"]]
    if ours != theirs or before != [trained]:
        other = next((n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)), None)
        why = f"{other!r} differs" if other else f"{', '.join(map(str, before))} tensors trained, and {trained} do here"
        raise MimicError(
            f"`resume`: {path} is of a run that trained another model: {why}. Give the settings of that run, or begin "
            "anew from its weights (`model.pretrained`)."
        )


def _writable(save_to: str | None) -> Path | None:
    """Return the path of a file to save a model in, which may be there already."""
    if save_to is None:
        return None
    path = user_path(save_to, "save_to")
    # Into a directory Lightning would write under a random name, and take its permissions away.
    if path.is_symlink() or (path.exists() and not path.is_file()) or path.name == "":
        raise MimicError(f"`save_to`: {path} is there and is no regular file; name a file, such as model.ckpt.")
    return path


def _check_trained(trainer: L.Trainer) -> None:
    if trainer.global_step == 0:
        raise MimicError(
            "no training step was done, so there is no trained model: "
            f"{trainer.num_training_batches} batches per epoch, max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}."
        )


class _LoggedFigures(L.Callback):
    """Keeps what was logged, also by the fit before a test."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer)

    def _keep(self, trainer: L.Trainer) -> None:
        self.figures |= {name: float(figure) for name, figure in trainer.callback_metrics.items()}

    def named(self, name: str) -> float:
        if name not in self.figures:
            raise MimicError(f"`optimized_metric`: {name!r} was not logged; {nearest_names(name, self.figures)}.")
        return self.figures[name]


def train_and_measure(config: DictConfig) -> float | None:
    """Train as the configuration says, and return the figure that a sweeper optimises, if it names one."""
    name = config.optimized_metric
    logged = _LoggedFigures()
    train(config, [logged] if name else [])
    return logged.named(name) if name else None
