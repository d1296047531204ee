"""``mimic-train``: train a model, with or without Grad-Mimic."""

from omegaconf import DictConfig

from lightning_mimic.cli.command import command


@command("mimic-train", "train")
def main(config: DictConfig) -> float | None:
    """Train as the configuration says."""
    from lightning_mimic.cli.training import train_and_measure  # loads torch, which help does not need

    return train_and_measure(config)


if __name__ == "__main__":
    main()
