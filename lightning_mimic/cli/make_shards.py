"""``mimic-make-shards``: write the digits with captions as image-text shards."""

from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_mimic.cli.errors import exit_on_user_error
from lightning_mimic.data.digit_pairs import write_digit_shards


@hydra.main(version_base="1.3", config_path="pkg://lightning_mimic.conf", config_name="make_shards")
def main(config: DictConfig) -> None:
    """The command line."""
    with exit_on_user_error("mimic-make-shards"):
        settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        write_digit_shards(**settings)
    print(config.out)  # noqa: T201


if __name__ == "__main__":
    main()
