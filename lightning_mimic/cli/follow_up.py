"""The commands that follow a command: from a reference to a run, from scores to a manifest, from that to training."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_mimic.cli.next_command import current_words, new_path, setting, shared_words, shell_line, short_path
from lightning_mimic.curation.reference_facts import ReferenceVerdict, reference_verdict
from lightning_mimic.errors import MimicError
from lightning_mimic.ledger import Ledger
from lightning_mimic.manifest import Manifest
from lightning_mimic.stores import hide_secrets

#: Settings of a data module that matter to training alone.
_OF_TRAINING = ("keep", "zero_shot", "val_shards")


#: Settings of a run that the training of its reference does not share.
_OF_RUN = ("mimic", "logger", "test", "data.train", "data.noise", "data.keep")


def how_to_make(config: DictConfig, name: str) -> str:
    """Return, as a sentence, the command that writes a file that is missing.

    Args:
        config: Of the run that reads the file.
        name: Of the file among the ``paths``.
    """
    words, made_by = current_words(), config.paths.get("made_by", {})
    if name in made_by and not any(word.startswith("data=") for word in words):
        # Weights that are trained otherwise are of no use to the run, and a file elsewhere is not found.
        of_model = [word for word in shared_words(words) if word.startswith(("model/", "model=", "model.backbone"))]
        others = shared_words(words, "experiment", "model", "reference", "seed", "trainer", "features", *_OF_RUN)
        more = [*of_model, *others] if made_by[name].startswith("mimic-train") else []
        return f"It is made by: {' '.join([made_by[name], *([shlex.join(more)] if more else [])])}"
    place = config.paths[name] if isinstance(config.paths[name], str) else "outputs/reference.ckpt"
    own = f"Name a checkpoint that you trust (paths.{name}=...), or train one on checked"
    target = [setting("save_to", hide_secrets(place))]
    if "train" not in config.data:
        return f"{own} samples, with mimic=none {shlex.join(target)}"
    trusted = config.data.get("trusted", 1)
    chosen = ["data.trusted=trusted.csv" if "root" in config.data else "data.trusted=0.1"] if trusted == 0 else []
    fresh = ["model.pretrained=null"] if config.model.get("pretrained") else []
    kept = shared_words(words, f"paths.{name}", *_OF_RUN)
    made = shell_line("mimic-train", *kept, *chosen, *fresh, "data.train=trusted", "mimic=none", *target)
    return f"{own} samples: {made}"


def after_reference(config: DictConfig, words: Sequence[str], saved: Path) -> str:
    """Return the command that trains with a model that was saved.

    Args:
        config: Of the run that saved it.
        words: Of that run's command line.
        saved: The model's file.
    """
    reader = next(iter(config.paths.get("read_by", {}).items()), None)
    place, begin = reader or ("reference", "mimic-train")
    of_reader = ("experiment", "reference") if reader else ()
    more = shared_words(words, "trainer", f"paths.{place}", *of_reader, *_OF_RUN)
    moved = any(word.startswith(("save_to=", f"paths.{place}=")) for word in words)
    if moved or not reader:
        more.append(setting(f"paths.{place}", short_path(saved)))
    return " ".join([begin, *([shlex.join(more)] if more else [])])


def after_plain_training(words: Sequence[str], checkpoints: Path) -> str:
    """Return the command that scores the samples at a run's checkpoints."""
    kept = shared_words(words, "mimic", "logger", "test")
    ledger = setting("ledger", short_path(new_path(checkpoints.with_name("scores"))))
    return shell_line("mimic-score", *kept, setting("checkpoints", short_path(checkpoints)), ledger)


def verdict_on_reference(ledger: str | Path) -> ReferenceVerdict:
    """Return the verdict on the reference with which the last run of a ledger was scored."""
    return reference_verdict(str(ledger), Ledger(ledger).meta["attempts"][-1:])


def after_scores(ledger: Path, words: Sequence[str]) -> str:
    """Return the command that decides which samples of a ledger to keep, or one for a reference that fits.

    Args:
        ledger: The ledger.
        words: Of the command that recorded it.
    """
    # The filter that goes with the weights; a calibrated reference may decide although it is doubtful or unsure.
    by_posterior = Ledger(ledger).meta["attempts"][-1].get("config", {}).get("weighting") == "Posterior"
    accepted = (None, "compatible", "doubtful", "unsure") if by_posterior else (None, "compatible")
    if verdict_on_reference(ledger).stands not in accepted:  # no decision is made from such scores
        again = shell_line("mimic-train", *shared_words(words, "paths.reference"))
        return f"find a reference that fits, and train with it: {again} paths.reference=OTHER.ckpt"
    out = new_path(ledger.with_name("curated"))
    chosen = ["filter=posterior"] if by_posterior else []
    return shell_line("mimic-curate", setting("ledger", short_path(ledger)), *chosen, setting("out", short_path(out)))


def after_manifest(manifest: Path, ledgers: Sequence[str]) -> list[tuple[str, str]]:
    """Return the commands that show the samples of a manifest, and that train on what it keeps.

    Args:
        manifest: The manifest's file.
        ledgers: Places of the scores behind it; the first one that tells how its samples were trained on counts.
    """
    place, words = next(((each, words) for each in ledgers if (words := words_of(each))), (None, None))
    beside = manifest.parent if manifest.name == "manifest.parquet" else manifest
    page = [setting("manifest", short_path(manifest)), *data_words(words or [])]
    if place is not None:
        page.append(setting("ledger", short_path(place)))
    page.append(setting("out", short_path(new_path(beside.with_name("report")))))
    training = training_on(manifest, words or [])
    found = [("next", shell_line("mimic-report", *page))]
    return [*found, ("then", training)] if training else found


def training_on(manifest: Path, words: Sequence[str]) -> str | None:
    """Return the command that trains on what a manifest keeps; ``None`` where that is not known.

    Args:
        manifest: The manifest's file.
        words: Of the command that recorded the scores.
    """
    config = _composed("train", shared_words(words))
    if not words or config is None or "keep" not in config.data:
        return None
    kept = shared_words(words, "data.keep")
    return shell_line("mimic-train", *kept, setting("data.keep", short_path(manifest)))


def ledgers_of(manifests: Sequence[Any]) -> list[str]:
    """Return the places of the scores behind manifests, as far as these name any."""
    found = []
    for each in manifests:
        try:
            ledger = (each if isinstance(each, Manifest) else Manifest(each)).provenance.get("ledger")
        except MimicError:  # a table of another kind
            continue
        if isinstance(ledger, Mapping) and isinstance(ledger.get("directory"), str):
            found.append(ledger["directory"])
    return found


def words_of(ledger: str | Path) -> list[str] | None:
    """Return the words of the command that recorded a ledger; ``None`` where it was no command, or is not known."""
    try:
        words = Ledger(ledger).meta["attempts"][-1].get("command")
    except MimicError:  # it may be gone
        return None
    return [str(word) for word in words] if isinstance(words, list) else None


def data_words(words: Sequence[str]) -> list[str]:
    """Return the words that give mimic-report the samples of a run; none, where they cannot be told.

    Args:
        words: Of the command that recorded the run's scores.
    """
    ours = _composed("train", shared_words(words)) if words else None
    if ours is None:
        return []
    made = ours.hydra.runtime.choices.items()
    # Of a group from which nothing is chosen, no word can say so.
    choices = {name: choice for name, choice in made if name.split("/")[0] == "data" and choice is not None}
    groups = [setting(name, choice) for name, choice in choices.items()]
    default = _composed("report", groups)
    if default is None:
        return []
    plain = _composed("report", [setting("data", choices["data"])])
    needless = {} if plain is None else plain.hydra.runtime.choices
    chosen = [word for name, word in zip(choices, groups, strict=True) if needless.get(name) != choices[name]]
    found = [setting("data", choices["data"]), *(word for word in chosen if not word.startswith("data="))]
    for name, raw in _leaves(OmegaConf.to_container(ours.data), "data"):
        if name.split(".")[1] in _OF_TRAINING:
            continue
        value = None if "${paths.output}" in str(raw) else _selected(ours, name)
        if value != _selected(default, name):
            found.append(setting(name, value))
    return found


def _composed(root: str, words: Sequence[str]) -> DictConfig | None:
    """Compose a configuration within a command; ``None`` where the words are not of this release."""
    try:
        return GlobalHydra.instance().config_loader().load_configuration(root, list(words), RunMode.RUN)
    except (HydraException, OmegaConfBaseException):
        return None


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}")
    else:
        yield name, value


def _selected(config: DictConfig, name: str) -> Any:
    """Return a setting without interpolations; an ellipsis where it has none that can be resolved."""
    try:
        value = OmegaConf.select(config, name, default=...)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        return ...
