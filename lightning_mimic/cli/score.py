"""``mimic-score``: score a data set at checkpoints, without training."""

from omegaconf import DictConfig

from lightning_mimic.cli.command import command
from lightning_mimic.cli.errors import quits_at_once
from lightning_mimic.cli.follow_up import after_scores, verdict_on_reference
from lightning_mimic.cli.next_command import current_words, short_path
from lightning_mimic.cli.summary import aligned


@command("mimic-score", "score")
def main(config: DictConfig) -> None:
    """Score the data that the configuration names."""
    with quits_at_once("mimic-score"):  # loads torch, which help does not need
        from lightning_mimic.cli.scoring import score
    from lightning_mimic.distributed import rank

    place = score(config).directory
    if rank() == 0:
        rows = [("ledger", short_path(place)), ("verdict", f"{verdict_on_reference(place)}.")]
        print(aligned([*rows, ("next", after_scores(place, current_words()))]))  # noqa: T201


if __name__ == "__main__":
    main()
