"""``mimic-report``: one page about a manifest."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_mimic.cli.command import command
from lightning_mimic.cli.follow_up import ledgers_of, training_on, words_of
from lightning_mimic.cli.next_command import short_path
from lightning_mimic.cli.progress import shown_progress
from lightning_mimic.cli.summary import aligned
from lightning_mimic.curation import report
from lightning_mimic.curation.report_page import opened_manifest
from lightning_mimic.user_files import user_path


@command("mimic-report", "report", first="manifest")
def main(config: DictConfig) -> None:
    """Write one page that shows what a manifest decides."""
    settings: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(config, [*_SETTINGS]), resolve=True, throw_on_missing=True
    )
    data = instantiate(config.data) if config.get("data") else None
    replaces = (user_path(settings["out"], "out") / "index.html").exists()
    with shown_progress(Console()) as progress:
        page = report(dataset=data, progress=progress, **settings)
    rows = [("page", short_path(page)), ("", "open it in a browser")]
    if replaces:
        rows.append(("", "an earlier page of this name was replaced"))
    found = opened_manifest(settings["manifest"])
    words = next(filter(None, map(words_of, ledgers_of([found]))), [])
    training = training_on(found.path, words)
    print(aligned([*rows, *([("next", training)] if training else [])]))  # noqa: T201


_SETTINGS = ("manifest", "out", "ledger", "spotlight", "title", "most_views", "megabytes", "memory")
