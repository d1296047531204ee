"""Training of a model, with or without Grad-Mimic, as a Hydra configuration describes it."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf

from lightning_mimic.callbacks import GradMimic, SuspiciousImages
from lightning_mimic.cli.build import build
from lightning_mimic.cli.errors import check_inputs_exist
from lightning_mimic.cli.follow_up import after_plain_training, after_reference, after_scores
from lightning_mimic.cli.next_command import current_words
from lightning_mimic.cli.note_command import note_command
from lightning_mimic.cli.saved_model import SETTINGS, model_file, settings_of_model
from lightning_mimic.cli.summary import end_run, logged_run
from lightning_mimic.data import CachedFeatures
from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.reference import refuse_module_on_features
from lightning_mimic.reference.read_file import read_file
from lightning_mimic.stores import hide_secrets, path_of


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
    resume, resumed = _existing(config.resume)
    settings = settings_of_model(config)  # before they are completed by the data
    save_to, replaces = model_file(config, settings, resumed)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data, model = build(config)
    _check_fits(resume, resumed, model)
    if config.features:
        data = CachedFeatures(data, model, config.features)
    callbacks = _callbacks(config, more_callbacks, resumed=resume is not None)
    callbacks.append(LambdaCallback(on_save_checkpoint=partial(_add_settings, settings)))
    logger = _logger(config) if config.get("logger") else False
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
        if replaces:
            rank_zero_info(f"{save_to} is replaced: an earlier run with the same settings had saved it.")
    return trainer


def _logger(config: DictConfig) -> Any:
    """Build the logger, whose package may be missing."""
    try:
        return instantiate(config.logger)
    except InstantiationException as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        name = str(config.logger.get("_target_")).rpartition(".")[2]
        raise MimicError(
            f"`logger`: {name} needs a package that is not installed: pip install 'lightning-mimic[loggers]'"
        ) from error


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
    elif config.trainer.get("enable_checkpointing", True) and not config.trainer.get("fast_dev_run"):
        # Hydra takes these names as they are, unlike Lightning's, which contain `=`.
        name = "epoch_{epoch:03d}-step_{step}"
        callbacks.append(ModelCheckpoint(_checkpoints(config), name, auto_insert_metric_name=False))
    return callbacks


def _add_settings(
    settings: dict[str, Any], trainer: L.Trainer, module: L.LightningModule, state: dict[str, Any]
) -> None:
    state[SETTINGS] = settings


def _checkpoints(config: DictConfig) -> str:
    return f"{config.trainer.get('default_root_dir') or '.'}/checkpoints"


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
    logged, words = _LoggedFigures(), current_words()
    with logged_run():
        trainer = train(config, [logged, note_command("mimic-train", words)])
        if trainer.is_global_zero and not config.trainer.get("fast_dev_run"):
            _end(config, trainer, logged.figures, words)
    return logged.named(name) if name else None


def _end(config: DictConfig, trainer: L.Trainer, figures: Mapping[str, float], words: Sequence[str]) -> None:
    """Log what the run leaves, and the next command."""
    scored = any(isinstance(each, GradMimic) and each.settings.ledger is not None for each in trainer.callbacks)  # type: ignore[attr-defined]
    ledger = path_of(config.mimic.ledger, "ledger") if scored else None
    saved = None if config.save_to is None else path_of(config.save_to, "save_to")
    checkpoints = path_of(config.save_epochs_to or _checkpoints(config), "save_epochs_to")
    folders = [getattr(each, "log_dir", None) or each.save_dir for each in trainer.loggers]
    places = {"model": saved, "checkpoints": checkpoints, "ledger": ledger}
    places["logs"] = path_of(folders[0], "save_dir") if folders and folders[0] else None
    if ledger is not None:
        following = after_scores(ledger, words)
    elif saved is not None:
        following = after_reference(config, words, saved)
    else:
        following = after_plain_training(words, checkpoints)
    end_run(config, places, figures, following)
