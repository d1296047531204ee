"""``mimic-train``: train a model, with or without Grad-Mimic, from a Hydra configuration."""

from collections.abc import Sequence
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from lightning_mimic.callbacks import GradMimic
from lightning_mimic.cli.errors import check_inputs_exist
from lightning_mimic.data import CachedFeatures
from lightning_mimic.errors import MimicError
from lightning_mimic.reference import refuse_module_on_features


def train(config: DictConfig, more_callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """Builds what the configuration names, trains, tests and saves.

    Args:
        config: As composed from ``conf/train.yaml``.
        more_callbacks: Beside the configured one.

    Returns:
        The trainer, with the model, its callbacks and ``callback_metrics``.

    Raises:
        MimicError: A file that another run writes is not there; the message has the command.
    """
    check_inputs_exist(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data, model = instantiate(config.data), instantiate(config.model)
    if config.features:
        data = CachedFeatures(data, model, config.features)
    # Of mimic=none an experiment's own settings may be left.
    scores = OmegaConf.select(config, "mimic._target_") is not None
    callbacks = [*([instantiate(config.mimic)] if scores else []), *more_callbacks]
    if config.features:
        for callback in callbacks:
            if isinstance(callback, GradMimic):
                refuse_module_on_features(callback.settings.reference)
    if config.save_epochs_to:
        there = sorted(Path(config.save_epochs_to).glob("*.ckpt"))
        if there and not config.resume:
            raise MimicError(f"`save_epochs_to`: {there[0]} is there already, of another run; name another directory.")
        callbacks.append(
            ModelCheckpoint(
                config.save_epochs_to,
                "{epoch:03d}",
                auto_insert_metric_name=False,
                save_top_k=-1,
                every_n_epochs=1,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
        )
    logger = instantiate(config.logger) if config.get("logger") else False
    trainer: L.Trainer = instantiate(config.trainer, callbacks=callbacks, logger=logger)
    for each in trainer.loggers:
        # Plain containers: a checkpoint must not hold objects that need code to be read.
        each.log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data, ckpt_path=config.resume)
    if config.test:
        trainer.test(model, datamodule=data)
    if config.save_to and not config.trainer.get("fast_dev_run"):
        trainer.save_checkpoint(Path(config.save_to))
    return trainer


@hydra.main(version_base="1.3", config_path="pkg://lightning_mimic.conf", config_name="train")
def main(config: DictConfig) -> None:
    """The command line."""
    train(config)


if __name__ == "__main__":
    main()
