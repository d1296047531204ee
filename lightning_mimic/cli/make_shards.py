"""``mimic-make-shards``: write the digits with captions as image-text shards."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_mimic.cli.command import command
from lightning_mimic.cli.errors import quits_at_once
from lightning_mimic.cli.next_command import setting, shell_line, short_path
from lightning_mimic.cli.summary import aligned
from lightning_mimic.user_files import user_path

#: Folder in which the experiments look for the shards.
_OF_EXPERIMENT = "outputs/digit_shards"


@command("mimic-make-shards", "make_shards")
def main(config: DictConfig) -> None:
    """Write the shards."""
    with quits_at_once("mimic-make-shards"):  # loads torch, which help does not need
        from lightning_mimic.data.digit_pairs import write_digit_shards

    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    user_path(settings["out"], "out")
    write_digit_shards(**settings)
    moved = [setting("paths.shards", config.out)] if config.out != _OF_EXPERIMENT else []
    following = shell_line("mimic-train", "experiment=clip_digits_reference", *moved)
    print(aligned([("shards", short_path(config.out)), ("next", following)]))  # noqa: T201


if __name__ == "__main__":
    main()
