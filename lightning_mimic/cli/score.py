"""``mimic-score``: score a data set at checkpoints, without training."""

from omegaconf import DictConfig

from lightning_mimic.cli.command import command


@command("mimic-score", "score")
def main(config: DictConfig) -> None:
    """Score the data that the configuration names."""
    from lightning_mimic.cli.scoring import score  # loads torch, which help does not need

    print(score(config).directory)  # noqa: T201


if __name__ == "__main__":
    main()
