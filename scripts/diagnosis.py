"""How often the verdict on a reference is right, on networks, rates of noise and seeds that set no threshold."""

import copy
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits_runs import at_work, parsed, parser_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.ops import MLP

from lightning_mimic import diagnose
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.models import ImageClassifier, SmallConvNet

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
# What is right to say of each kind of reference, as it then scores: see docs/results.md.
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


@dataclass(frozen=True)
class Look:
    """A network and a seed; all cases and rates of noise."""

    network: str
    seed: int


def examined(look: Look) -> dict[str, Any]:
    """The verdict on every kind of reference at every rate."""
    digits = DigitsDataModule(train="trusted", seed=look.seed)
    digits.setup()
    trusted = digits.train_dataloader().dataset
    images = torch.stack([trusted[i].sample[0] for i in range(len(trusted))])
    labels = torch.stack([trusted[i].sample[1] for i in range(len(trusted))])
    generator = torch.Generator().manual_seed(look.seed)
    shuffled = labels[torch.randperm(len(labels), generator=generator)]
    model, other = (classifier(look.network, look.seed + shift) for shift in (0, 1000))
    same = taught(model, images, labels, look.seed)
    frozen = classifier(look.network, look.seed + 2000)
    frozen.backbone.load_state_dict(same.backbone.state_dict())
    frozen.backbone.requires_grad_(False)
    wider = taught(classifier("conv, 2048 features", look.seed + 1000, width=24), images, labels, look.seed)
    given = {
        "shared frozen backbone": (frozen, same, "head"),
        "shared start, all parameters": (model, same, "all"),
        "shared start, last layer": (model, same, "head"),
        "other start, all parameters": (model, taught(other, images, labels, look.seed), "all"),
        "other start, last layer": (model, taught(other, images, labels, look.seed), "head"),
        "other width": (model, wider, "all"),
        "reference of shuffled labels, shared start": (model, taught(model, images, shuffled, look.seed), "all"),
        "head of shuffled labels, frozen backbone": (frozen, taught(frozen, images, shuffled, look.seed), "head"),
    }
    for size in (0.3, 1.0, 3.0):
        given[f"the model plus noise {size:g}"] = (model, noised(model, size, generator), "all")
    verdicts = {}
    for rate in RATES:
        noisy = DigitsDataModule(noise=SymmetricNoise(rate, seed=look.seed), seed=look.seed)
        noisy.setup()
        for case, (start, reference, parameters) in given.items():
            found = diagnose(start, reference, noisy.train_dataloader(), parameters)
            verdicts[f"{case}|{rate}"] = found.verdict
    return {"network": look.network, "seed": look.seed, "verdicts": verdicts}


def classifier(network: str, seed: int, width: int | None = None) -> ImageClassifier:
    """A fresh one."""
    torch.manual_seed(seed)
    backbone = NETWORKS[network]() if width is None else SmallConvNet(width=width)
    return ImageClassifier(backbone, 10, (1, 8, 8))


def taught(start: ImageClassifier, images: Tensor, labels: Tensor, seed: int) -> ImageClassifier:
    """A copy, trained on these labels."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=generator).split(32):
            optimizer.zero_grad()
            model.sample_losses((images[chosen], labels[chosen])).mean().backward()
            optimizer.step()
    return model


@torch.no_grad()
def noised(model: ImageClassifier, size: float, generator: torch.Generator) -> ImageClassifier:
    """A copy with noise, in units of each tensor's standard deviation."""
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p += size * p.std() * torch.randn(p.shape, generator=generator)
    return copied


def main() -> None:
    arguments = parsed(parser_of(__doc__, "outputs/diagnosis"))
    console, out, started = Console(width=120), Path(arguments.out), time.monotonic()
    with at_work(console, examined) as work:
        results = work("looking", [Look(network, seed) for network in NETWORKS for seed in arguments.seeds])
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2))
    table = Table(title=f"{len(NETWORKS)} networks, {len(arguments.seeds)} seeds")
    for head in ("reference", "right to say", *(f"{rate:.0%} wrong labels" for rate in RATES), "right"):
        table.add_column(head, no_wrap=True)
    for case, right in CASES.items():
        said = {rate: Counter(r["verdicts"][f"{case}|{rate}"] for r in results) for rate in RATES}
        good = sum(count for counter in said.values() for verdict, count in counter.items() if verdict in right)
        shown = (", ".join(f"{verdict} {count}" for verdict, count in said[rate].most_common()) for rate in RATES)
        table.add_row(case, " or ".join(sorted(right)), *shown, f"{good} of {len(RATES) * len(results)}")
    console.print(table)
    console.print(f"\nWritten in {time.monotonic() - started:.0f} s: {out / 'results.json'}", highlight=False)


if __name__ == "__main__":
    main()
