"""``mimic-report``: one page about a manifest."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_mimic.cli.command import command
from lightning_mimic.cli.progress import shown_progress
from lightning_mimic.curation import report


@command("mimic-report", "report", first="manifest")
def main(config: DictConfig) -> None:
    """Write one page that shows what a manifest decides."""
    settings: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(config, [*_SETTINGS]), resolve=True, throw_on_missing=True
    )
    data = instantiate(config.data) if config.get("data") else None
    with shown_progress(Console()) as progress:
        page = report(dataset=data, progress=progress, **settings)
    print(page)  # noqa: T201


_SETTINGS = ("manifest", "out", "ledger", "spotlight", "title", "most_views", "megabytes", "memory")
