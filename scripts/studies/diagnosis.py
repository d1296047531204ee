"""How often the verdict on a reference is right, on networks, rates of noise and seeds that set no threshold."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import MLP

from lightning_mimic import diagnose
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.models import ImageClassifier, SmallConvNet
from lightning_mimic.random_streams import torch_generator
from scripts.studies.digits import OTHER_START, noisy_digits
from scripts.studies.lab import Lab
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table, percent

EPOCHS = 60
RATES = (0.0, 0.2, 0.5)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv, 512 features": lambda: SmallConvNet(width=8),
    "conv, 2048 features": lambda: SmallConvNet(width=32),
    "conv, 64 features": lambda: SmallConvNet(features=64),
    "conv, 512 narrow features": lambda: SmallConvNet(features=512),
    "MLP": lambda: nn.Sequential(nn.Flatten(), MLP(64, [128, 96]), nn.ReLU()),
}
GOOD, BAD = {"compatible"}, {"doubtful", "unrelated"}
#: What is right to say of each kind of reference, as it then scores: see docs/evidence/diagnosis.md.
CASES = {
    "shared frozen backbone": GOOD,
    "shared start, all parameters": GOOD,
    "shared start, last layer": BAD,
    "other start, all parameters": {"unrelated"},
    "other start, last layer": {"unrelated"},
    "other width": {"unrelated"},
    "the model plus noise 0.3": BAD,
    "the model plus noise 1": BAD,
    "the model plus noise 3": BAD,
    "reference of shuffled labels, shared start": BAD,
    "head of shuffled labels, frozen backbone": BAD,
}


def examined(network: str, seed: int) -> dict[str, Any]:
    """The verdict on every kind of reference at every rate."""
    digits = DigitsDataModule(train="trusted", split_seed=seed, seed=seed)
    digits.setup()
    trusted = digits.rows["trusted"]
    images, labels = digits.images(trusted), digits.sources["train"].labels[trusted]
    shuffled = labels[torch.randperm(len(labels), generator=torch_generator(seed, "random selection"))]
    model, other = (classifier(network, seed + more) for more in (0, OTHER_START))
    same = taught(model, images, labels, seed)
    frozen = classifier(network, seed + 2 * OTHER_START)
    frozen.backbone.load_state_dict(same.backbone.state_dict())
    frozen.backbone.requires_grad_(False)
    wider = taught(classifier("conv, 2048 features", seed + OTHER_START, width=24), images, labels, seed)
    elsewhere = taught(other, images, labels, seed)
    given = {
        "shared frozen backbone": (frozen, same, "head"),
        "shared start, all parameters": (model, same, "all"),
        "shared start, last layer": (model, same, "head"),
        "other start, all parameters": (model, elsewhere, "all"),
        "other start, last layer": (model, elsewhere, "head"),
        "other width": (model, wider, "all"),
        "reference of shuffled labels, shared start": (model, taught(model, images, shuffled, seed), "all"),
        "head of shuffled labels, frozen backbone": (frozen, taught(frozen, images, shuffled, seed), "head"),
    }
    drawn = torch_generator(seed, "reference noise")
    for size in (0.3, 1.0, 3.0):
        given[f"the model plus noise {size:g}"] = (model, noised(model, size, drawn), "all")
    return {
        f"{case}|{rate}": diagnose(start, reference, noisy_digits(seed, rate).train_dataloader(), parameters).verdict
        for rate in RATES
        for case, (start, reference, parameters) in given.items()
    }


def classifier(network: str, seed: int, width: int | None = None) -> ImageClassifier:
    """A fresh one."""
    torch.manual_seed(seed)
    backbone = NETWORKS[network]() if width is None else SmallConvNet(width=width)
    return ImageClassifier(backbone, 10, (1, 8, 8))


def taught(start: ImageClassifier, images: Tensor, labels: Tensor, seed: int) -> ImageClassifier:
    """A copy, trained on these labels."""
    model, order = copy.deepcopy(start), torch_generator(seed, "training order")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=order).split(32):
            optimizer.zero_grad()
            model.sample_losses((images[chosen], labels[chosen])).mean().backward()
            optimizer.step()
    return model


@torch.no_grad()
def noised(model: ImageClassifier, size: float, drawn: torch.Generator) -> ImageClassifier:
    """A copy with noise, in units of each tensor's standard deviation."""
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p += size * p.std() * torch.randn(p.shape, generator=drawn)
    return copied


def report(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """How often it is right."""
    results = lab.map("verdicts", examined, [(network, seed) for network in NETWORKS for seed in lab.seeds])
    cells, rights = {}, 0
    for case, right in CASES.items():
        said = {rate: Counter(result[f"{case}|{rate}"] for result in results) for rate in RATES}
        good = sum(count for counter in said.values() for verdict, count in counter.items() if verdict in right)
        rights += good
        cells[case, "right to say"] = " or ".join(sorted(right))
        for rate, counter in said.items():
            verdicts = ", ".join(f"{verdict} {count}" for verdict, count in counter.most_common())
            cells[case, f"{percent(rate)} wrong labels"] = verdicts
        cells[case, "right"] = f"{good} of {len(RATES) * len(results)}"
    title = (
        f"{len(NETWORKS)} networks, {len(lab.seeds)} seeds: {rights} of {len(CASES) * len(RATES) * len(results)} right"
    )
    yield Table("diagnosis", title, "reference", cells)


#: The seeds 0 to 3 had been looked at before a threshold was settled.
STUDY = Study("How often is the verdict on a reference right?", {"verdicts": Part(report)}, seeds=(4, 5))
