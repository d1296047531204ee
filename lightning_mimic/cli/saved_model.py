"""The file that a run saves its model in, which replaces an earlier one of the same settings only."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_mimic.cli.next_command import new_path
from lightning_mimic.errors import MimicError
from lightning_mimic.reference.read_file import read_file
from lightning_mimic.stores import hide_secrets
from lightning_mimic.user_files import user_path

#: Key of a checkpoint under which the settings of its run are.
SETTINGS = "lightning_mimic_settings"

#: Settings that a trained model depends on, and those below them that it does not.
_OF_MODEL = ("data", "model", "mimic", "trainer", "seed")
_ELSEWHERE = {"mimic.ledger", "data.rejects", "trainer.default_root_dir", "trainer.log_every_n_steps"}
_ELSEWHERE |= {f"trainer.enable_{each}" for each in ("checkpointing", "model_summary", "progress_bar")}


def settings_of_model(config: DictConfig) -> dict[str, Any]:
    """Return the settings that a trained model depends on, as plain containers without a URL's signature.

    Args:
        config: As composed from ``conf/train.yaml``.

    Example:
        >>> config = OmegaConf.create({"seed": 0, "trainer": {"max_epochs": 3, "log_every_n_steps": 1}, "test": True})
        >>> settings_of_model(config)
        {'trainer.max_epochs': 3, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for name in _OF_MODEL:
        for place, node, key in _leaves(config, name):
            if place not in _ELSEWHERE:
                # Plain containers: a checkpoint must not hold objects that need code to be read.
                value = OmegaConf.to_object(node[key]) if OmegaConf.is_config(node[key]) else node[key]
                found[place] = hide_secrets(value) if isinstance(value, str) else value
    return found


def model_file(config: DictConfig, settings: Mapping[str, Any], resumed: Mapping[str, Any]) -> tuple[Path | None, bool]:
    """Return the file to save a model in, and whether it replaces an earlier one.

    Args:
        config: With ``save_to``.
        settings: From :func:`settings_of_model`.
        resumed: Content of the checkpoint that the run goes on from; empty for a new run.

    Raises:
        MimicError: The path is no regular file, or holds a model that was trained with other settings.
    """
    if config.save_to is None:
        return None, False
    path = user_path(config.save_to, "save_to")
    # Into a directory Lightning would write under a random name, and take its permissions away.
    if path.is_symlink() or (path.exists() and not path.is_file()) or path.name == "":
        raise MimicError(f"`save_to`: {path} is there and is no regular file; name a file, such as model.ckpt.")
    if config.trainer.get("fast_dev_run") or not path.exists():
        return path, False
    theirs = _recorded(path)
    if theirs is None or theirs not in (settings, resumed.get(SETTINGS)):
        why = "of unknown settings" if theirs is None else f"of another run: {_difference(settings, theirs)}"
        raise MimicError(
            f"`save_to`: {path} is there already, {why}. Name another file (save_to={new_path(path)}), or delete it."
        )
    return path, True


def _leaves(node: Any, key: Any, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Place, container and key of all settings that are no container themselves."""
    place = f"{above}{key}"
    if OmegaConf.is_missing(node, key) or (isinstance(key, str) and key not in node):
        return
    value = node[key]
    if not OmegaConf.is_config(value) or not len(value):
        yield place, node, key
        return
    for each in value if OmegaConf.is_dict(value) else range(len(value)):
        yield from _leaves(value, each, f"{place}.")


def _recorded(path: Path) -> Mapping[str, Any] | None:
    """Return the settings with which a model was trained; ``None`` where its file does not hold them."""
    try:
        content = read_file(path, "save_to")
    except MimicError:
        return None
    settings = content.get(SETTINGS) if isinstance(content, Mapping) else None
    return settings if isinstance(settings, Mapping) else None


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return how the settings of a run differ from those of an earlier one, by one setting nearest to the root."""
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    name = min(differing, key=lambda name: (name.count("."), name))
    return f"`{name}` was {theirs.get(name)!r} there and is {ours.get(name)!r} here"
