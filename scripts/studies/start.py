"""The direction to a reference of the same start: from the current weights, or from those with which the run began."""

import copy
from collections.abc import Iterator
from typing import Any

import torch

from lightning_mimic import Reweighter
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.metrics.detection import detect
from lightning_mimic.models import ImageClassifier, SmallConvNet
from lightning_mimic.random_streams import torch_generator
from scripts.studies.digits import noisy_digits
from scripts.studies.lab import Lab
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table, percent

EPOCHS = (1, 2, 5, 20, 80)  # of the reference's training
TRAINED = 15  # epochs of the model's
RATE = 0.4
TEMPERATURES: tuple[float | str, ...] = (0.1, "auto")
PARAMETERS = ("all", "head")
DIRECTIONS = ("current", "start")


def trained(seed: int) -> dict[str, Any]:
    """Figures of all methods with all references of one seed."""
    trusted = DigitsDataModule(train="trusted", split_seed=seed, seed=seed)
    trusted.setup()
    rows = trusted.rows["trusted"]
    images, labels = trusted.images(rows), trusted.sources["train"].labels[rows]
    torch.manual_seed(seed)
    start = ImageClassifier(SmallConvNet(width=16, features=128), 10, (1, 8, 8))
    found: dict[str, Any] = {"plain": fit(start, None, seed, "all", "current", 1.0)}
    model, order = copy.deepcopy(start), torch_generator(seed, "training order")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(1, EPOCHS[-1] + 1):
        for chosen in torch.randperm(len(images), generator=order).split(32):
            optimizer.zero_grad()
            model.sample_losses((images[chosen], labels[chosen])).mean().backward()
            optimizer.step()
        if epoch not in EPOCHS:
            continue
        found[f"reference {epoch}"] = {"accuracy": accuracy(model, seed)}
        for parameters in PARAMETERS:
            for direction in DIRECTIONS:
                for temperature in TEMPERATURES:
                    key = f"{parameters} {direction} {temperature} {epoch}"
                    found[key] = fit(start, model, seed, parameters, direction, temperature)
    return found


def fit(
    start: ImageClassifier,
    reference: ImageClassifier | None,
    seed: int,
    parameters: str,
    direction: Any,
    temperature: Any,
) -> dict[str, float]:
    """Train a copy on noisy labels; returns its accuracy, and how well the mean scores find the wrong labels."""
    digits = noisy_digits(seed, RATE)
    rows = digits.rows["noisy"]
    images, given = digits.images(rows), digits.given_labels
    model, order = copy.deepcopy(start), torch_generator(seed, "training order")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scores = torch.zeros(len(rows))
    steps = TRAINED * -(-len(rows) // 32)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    settings: dict[str, Any] = {"temperature": temperature, "direction": direction, "diagnose_reference": False}
    reweighter = None if reference is None else Reweighter(model, copy.deepcopy(reference), parameters, **settings)
    for epoch in range(TRAINED):
        for chosen in torch.randperm(len(rows), generator=order).split(32):
            optimizer.zero_grad()
            batch = images[chosen], given[chosen]
            if reweighter is None:
                model.sample_losses(batch).mean().backward()
            else:
                with reweighter.step(batch, epoch=epoch) as step:
                    result = step.backward(model.sample_losses(step.batch).mean())
                scores[chosen] += result.scores.nan_to_num()
            optimizer.step()
            schedule.step()
    if reweighter is not None:
        reweighter.close()
    found = detect(scores, scores <= 0, digits.wrong)
    return {"accuracy": accuracy(model, seed), "auroc": 100 * found.auroc, "f1": 100 * found.f1}


@torch.no_grad()
def accuracy(model: ImageClassifier, seed: int) -> float:
    """On the test images."""
    images, labels = next(iter(noisy_digits(seed, 0.0).test_dataloader()))
    return 100 * float((model(images).argmax(1) == labels).float().mean())


def report(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """What is learnt and found with references of more and more epochs."""
    results = lab.map("start", trained, [(seed,) for seed in lab.seeds])
    for parameters in PARAMETERS:
        cells: dict[tuple[str, str], list[float]] = {}
        for epochs in EPOCHS:
            for direction in DIRECTIONS:
                row = f"reference of {epochs} epochs; {direction}"
                cells[row, "the reference"] = [result[f"reference {epochs}"]["accuracy"] for result in results]
                for temperature in TEMPERATURES:
                    key = f"{parameters} {direction} {temperature} {epochs}"
                    for figure, head in (("accuracy", "accuracy"), ("auroc", "AUROC"), ("f1", "F1 of the sign")):
                        cells[row, f"{head}, τ {temperature}"] = [result[key][figure] for result in results]
        for temperature in TEMPERATURES:
            cells["plain training", f"accuracy, τ {temperature}"] = [result["plain"]["accuracy"] for result in results]
        title = f"{percent(RATE)} wrong labels, the whole network from the reference's start, scored: {parameters}"
        yield Table(f"start_{parameters}", title, "direction", cells)


STUDY = Study("The direction from the starting weights", {"start": Part(report)}, seeds=(40, 41, 42, 43, 44))
