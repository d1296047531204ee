"""``mimic-train``: train a model, with or without Grad-Mimic."""

from omegaconf import DictConfig

from lightning_mimic.cli.command import command
from lightning_mimic.cli.errors import quits_at_once


@command("mimic-train", "train")
def main(config: DictConfig) -> float | None:
    """Train as the configuration says."""
    with quits_at_once("mimic-train"):  # loads torch, which help does not need
        from lightning_mimic.cli.training import train_and_measure

    return train_and_measure(config)


if __name__ == "__main__":
    main()
