"""Scoring of a data set at checkpoints, without training, as a Hydra configuration describes it."""

import warnings

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_mimic.callbacks import AtCheckpoints
from lightning_mimic.cli.build import build
from lightning_mimic.cli.errors import check_inputs_exist
from lightning_mimic.cli.next_command import current_words
from lightning_mimic.cli.note_command import note_command
from lightning_mimic.data import CachedFeatures
from lightning_mimic.errors import MimicError
from lightning_mimic.ledger import Ledger
from lightning_mimic.reference import refuse_module_on_features
from lightning_mimic.user_files import user_path


def score(config: DictConfig) -> Ledger:
    """Score the data that the configuration names.

    Args:
        config: As composed from ``conf/score.yaml``.

    Returns:
        The ledger, an epoch per checkpoint.
    """
    if OmegaConf.select(config, "mimic._target_") is None:
        raise MimicError("mimic=none scores nothing; leave it out, or name a scorer (mimic=cosine).")
    user_path(config.ledger, "ledger")
    check_inputs_exist(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data, model = build(config)
    if config.features:
        data = CachedFeatures(data, model, config.features)
    mimic = instantiate(config.mimic, reweight="none", ledger=config.ledger)
    if config.features:
        refuse_module_on_features(mimic.settings.reference)
    given = config.checkpoints
    checkpoints = AtCheckpoints(given if isinstance(given, str) else list(given))
    trainer: L.Trainer = instantiate(
        config.trainer,
        callbacks=[mimic, note_command("mimic-score", current_words()), checkpoints],
        logger=False,
        max_epochs=len(checkpoints.checkpoints),
        limit_val_batches=0,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # as it should be
        trainer.fit(model, datamodule=data)
    return Ledger(config.ledger)
