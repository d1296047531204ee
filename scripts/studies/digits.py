"""What the studies on the digits share: references, plain training's learning rate and epochs, and tables' rows."""

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from torch import Tensor

from lightning_mimic.cli.build import build
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.reference import reference_model
from scripts.studies.lab import Lab, Runs, best

EACH_EPOCH = "+study.each_epoch=true"
#: The split of a run goes by its seed, so that the seeds differ in it, too.
SPLIT = "data.split_seed=${seed}"
#: By what the seed of a reference that begins from other weights is more than its run's.
OTHER_START = 1000


def references(lab: Lab, name: str, *fixed: str, more: int = 0, train: str | None = None) -> Runs:
    """References from trusted images; while settings are chosen, from those that do not validate.

    Args:
        lab: Runs them.
        name: Folder; :func:`path_of` has a run's reference.
        fixed: Overrides.
        more: By what their seeds are more than the runs'.
        train: The images, if others.
    """
    images = train or ("trusted_fit" if lab.phase == "choose" else "trusted")
    split = f'data.split_seed="${{add:${{seed}},-{more}}}"'
    saved = "paths.reference=${hydra:runtime.output_dir}/model.ckpt"
    common = ["experiment=digits_reference", f"data.train={images}", split, saved, EACH_EPOCH]
    return lab.sweep(name, {"seed": [seed + more for seed in lab.seeds]}, *common, *fixed)


def path_of(lab: Lab, name: str, more: int = 0) -> str:
    """Override that gives a run the reference of its split."""
    return f'paths.reference="{lab.out}/{name}/${{add:${{seed}},{more}}}/model.ckpt"'


def choose_plain(lab: Lab, name: str, rates: Sequence[float], epochs: int, fixed: Sequence[str]) -> tuple[float, int]:
    """Learning rate and epochs at which plain training is most accurate on the validation images."""
    each = {"model.optimizer.lr": rates, "seed": lab.seeds}
    runs = lab.sweep(name, each, *fixed, "mimic=none", f"trainer.max_epochs={epochs}", EACH_EPOCH, SPLIT)
    return best({rate: [run.result["curves"]["accuracy"] for run in runs.where(lr=rate)] for rate in rates})


def gaps(runs: Runs, others: Runs, figure: str) -> list[float]:
    """The last epoch's accuracy less another run's figure, seed by seed, in points."""
    return [a - b for a, b in zip(runs.values("accuracy"), others.values(figure), strict=True)]


def noisy_digits(seed: int, rate: float) -> DigitsDataModule:
    """The images of a run with their true and given labels."""
    digits = DigitsDataModule(noise=SymmetricNoise(rate, seed=seed), split_seed=seed, seed=seed)
    digits.setup()
    return digits


@torch.no_grad()
def reference_logits(path: Path, images: Tensor, *overrides: str) -> Tensor:
    """What a reference says of images.

    Args:
        path: Of its checkpoint.
        images: Shape ``(n, 1, 8, 8)``.
        overrides: Of its model.

    Returns:
        Shape ``(n, 10)``.
    """
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        _, model = build(compose("train", overrides=list(overrides)))
    logits: Tensor = reference_model(path, model, "forward")(images)
    return logits
