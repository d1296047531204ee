"""Small labelled pictures and classifiers of them, for the tests of cached features."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.data.cached_features import CachedFeatures
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.data.splits import LabelledSplits, Source
from lightning_mimic.models.image_classifier import ImageClassifier
from support.ranks import strategy
from support.toys import trainer

CLASSES, TRAIN, TEST = 4, 60, 10


class SmallImages(LabelledSplits):
    """Random images of 3 × 16 × 16 whose ids are text, a few of them trusted."""

    num_classes = CLASSES

    def __init__(self, of: int = 0, **options: Any) -> None:
        super().__init__(**{"noise": SymmetricNoise(0.4), "flip": True, "batch_size": 8} | options)
        self.of = of

    def read(self) -> Mapping[str, Source]:
        drawn = torch.Generator().manual_seed(self.of)
        images = torch.rand(TRAIN + TEST, 3, 16, 16, generator=drawn)
        labels = torch.randint(CLASSES, (TRAIN + TEST,), generator=drawn)
        ids = [f"{row}.png" for row in range(TRAIN)]
        return {
            "train": Source(images[:TRAIN], labels[:TRAIN], lambda: f"train {self.of}", ids),
            "test": Source(images[TRAIN:], labels[TRAIN:], lambda: f"test {self.of}"),
        }

    def divide(self, labels: Tensor) -> Mapping[str, Tensor]:
        noisy, fit, held = torch.arange(TRAIN).split([TRAIN - 16, 8, 8])
        return {"noisy": noisy, "trusted_fit": fit, "trusted_held": held, "test": torch.arange(TEST)}


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten()]
    net = nn.Sequential(*layers)
    net[1].running_var.fill_(0.1)
    return net


def vision_transformer() -> nn.Module:
    import torchvision  # not needed by processes that are spawned

    net = torchvision.models.VisionTransformer(16, 8, 2, 2, 24, 48)
    net.heads = nn.Identity()
    return net


def classifier(backbone: Callable[[], nn.Module] = convolutions, seed: int = 0, **options: Any) -> ImageClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageClassifier(backbone(), CLASSES, (3, 16, 16), **{"freeze_backbone": True} | options)


def reference_of(model: ImageClassifier) -> dict[str, Tensor]:
    """The model with another head."""
    return {name: t + 1 if name.startswith("head") else t for name, t in model.state_dict().items()}


def of(data: LabelledSplits, model: ImageClassifier, folder: Path | None) -> pl.LightningDataModule:
    return data if folder is None else CachedFeatures(data, model, folder)


def assert_alike(cached: dict[str, Any], plain: dict[str, Any]) -> None:
    for name in ("head", "metrics"):
        torch.testing.assert_close(cached[name], plain[name], rtol=1e-5, atol=1e-5)
    assert len(cached["rows"]["id"]) == len(plain["rows"]["id"]) > 0
    for name, values in plain["rows"].items():
        if name in ("score", "weight", "loss"):
            torch.testing.assert_close(torch.tensor(cached["rows"][name]), torch.tensor(values), rtol=1e-4, atol=1e-5)
        else:
            assert cached["rows"][name] == values


def train_on_a_rank(rank: int, folder: Path) -> None:
    """A head on images and one on features, by one of two processes; saved."""
    for name, features in (("plain", None), ("cached", folder / "features")):
        model = classifier()
        callback = GradMimic(reference_of(model), "head", ledger=folder / name)
        trainer(callback, epochs=2, strategy=strategy(), devices=2).fit(model, of(SmallImages(), model, features))
        torch.save(model.head.state_dict(), folder / f"{name}-{rank}.pt")


def of_a_rank(rank: int, folder: Path, name: str) -> dict[str, Any]:
    """What it saved, and the scores of both."""
    rows = Ledger(folder / name).table().sort_by([("epoch", "ascending"), ("id", "ascending")])
    said = {column: rows[column].to_pylist() for column in ("id", "epoch", "rank", "score", "weight", "loss")}
    return {"head": torch.load(folder / f"{name}-{rank}.pt", weights_only=True), "metrics": {}, "rows": said}
