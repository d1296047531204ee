"""The end of a command: where everything is, the main figures, and the next command to type."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig

from lightning_mimic.cli.follow_up import verdict_on_reference
from lightning_mimic.cli.next_command import short_path

_log = logging.getLogger(__name__)

#: Loggers that print by themselves where they are imported before Hydra has set up logging.
_LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric")


def aligned(rows: Iterable[tuple[str, str]]) -> str:
    """Return rows of a name and a text, the texts below each other.

    Example:
        >>> print(aligned([("ledger", "scores"), ("next", "mimic-curate ledger=scores")]))
        ledger  scores
        next    mimic-curate ledger=scores
    """
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


@contextlib.contextmanager
def logged_run() -> Iterator[None]:
    """Send warnings and Lightning's messages where Hydra sends all others: to the terminal and the log file."""
    for name in _LIGHTNING:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)


def end_run(
    config: DictConfig, places: Mapping[str, Path | str | None], figures: Mapping[str, float], next_command: str
) -> None:
    """Log where everything is that a training run leaves, its figures, the verdict on its reference, and what is next.

    Args:
        config: Of the run.
        places: Name to path; those where nothing is are left out.
        figures: All that was logged; those of the test are shown.
        next_command: Line to type.
    """
    folder = Path(config.paths.output)
    known = dict(places) | {"configuration": folder / ".hydra" / "config.yaml", "log file": folder / "train.log"}
    rows = [(name, short_path(path)) for name, path in known.items() if path is not None and _is_there(path)]
    rows += [(name.replace("/", " "), f"{figure:.4g}") for name, figure in figures.items() if name.startswith("test/")]
    if places.get("ledger") is not None:
        rows.append(("verdict", f"{verdict_on_reference(str(places['ledger']))}."))
    _log.info("\n%s", aligned([*rows, ("next", next_command)]))


def _is_there(path: Path | str) -> bool:
    return not isinstance(path, Path) or path.exists()
