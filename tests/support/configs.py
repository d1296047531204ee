"""Configurations composed as the commands compose them."""

from pathlib import Path

from hydra import compose, initialize_config_module

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
# What else than mimic-train may have a group, and what such a command cannot do without.
SCORE, CURATE = ["ledger=scores", "checkpoints=[a.ckpt]"], ["ledger=scores"]
QUIET = ["trainer.enable_progress_bar=false", "logger=none", "trainer.enable_checkpointing=false"]


def composed(folder: Path, *overrides: str, root: str = "train"):
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        paths = [f"paths.output={folder}", f"paths.reference={folder / 'reference.ckpt'}"]
        return compose(root, overrides=[*(paths if root in ("train", "score") else []), *overrides])
