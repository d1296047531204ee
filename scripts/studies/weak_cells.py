"""What the study of weak references trains: digits, noise, references of every quality, and one network per method."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import AsymmetricNoise, LabelNoise, SymmetricNoise
from lightning_mimic.models import ImageClassifier, SmallConvNet
from lightning_mimic.random_streams import torch_generator
from scripts.studies.digits import OTHER_START

CLASSES = 10
BATCH = 32
FEATURES = 128
#: Noisy images that train; the rest validates while settings are chosen.
TRAINED = 800
REFERENCE_EPOCHS = 80

Setting = Literal["frozen", "scratch"]


class InstanceNoise:
    """Gives a share of the samples, those of which an annotator is least sure, the class that he takes them for next.

    Args:
        rate: Share of wrong labels.
        outputs: The annotator's logits of the samples, shape ``(n, C)``.
    """

    def __init__(self, rate: float, outputs: Tensor) -> None:
        self.rate = rate
        self.outputs = outputs

    def __call__(self, labels: Tensor, num_classes: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noisy labels and the mask of wrong ones."""
        right = F.one_hot(labels, num_classes).bool()
        others = self.outputs.masked_fill(right, -torch.inf)
        margin = self.outputs[right] - others.amax(1)
        wrong = torch.zeros_like(labels, dtype=torch.bool)
        wrong[margin.argsort()[: round(self.rate * len(labels))]] = True
        return torch.where(wrong, others.argmax(1), labels), wrong


@dataclass(frozen=True)
class Samples:
    """Inputs of a network with their labels.

    Attributes:
        inputs: Images, or features of a frozen backbone.
        labels: The true ones.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Samples":
        return Samples(self.inputs[:count], self.labels[:count])


@functools.cache
def images(seed: int, phase: str) -> dict[str, Samples]:
    """The three parts of a seed: checked images, noisy ones, and those that evaluate.

    Args:
        seed: Of the split.
        phase: ``"choose"``, in which the test images are not read, or ``"report"``.
    """
    digits = DigitsDataModule(split_seed=seed)
    digits.setup()
    noisy = digits.rows["noisy"]
    rows = {"checked": digits.rows["trusted"], "noisy": noisy[:TRAINED]}
    rows["evaluation"] = noisy[TRAINED:] if phase == "choose" else digits.rows["test"]
    labels = digits.sources["train"].labels
    return {name: Samples(digits.images(chosen), labels[chosen]) for name, chosen in rows.items()}


def conv_net(seed: int) -> ImageClassifier:
    """A fresh network for images."""
    torch.manual_seed(seed)
    return ImageClassifier(SmallConvNet(width=16, features=FEATURES), CLASSES, (1, 8, 8))


def head(seed: int) -> ImageClassifier:
    """A fresh linear layer for the features of a frozen backbone."""
    torch.manual_seed(seed)
    return ImageClassifier(nn.Identity(), CLASSES, (FEATURES,))  # type: ignore[arg-type]


def taught(
    model: ImageClassifier,
    samples: Samples,
    epochs: int,
    seed: int,
    *,
    learning_rate: float = 1e-3,
    smoothing: float = 0.0,
    shifts: bool = False,
) -> ImageClassifier:
    """The network, trained on checked samples.

    Args:
        model: It is changed.
        samples: With true labels.
        epochs: At a constant learning rate.
        seed: Of the order.
        learning_rate: Of AdamW.
        smoothing: Of the labels.
        shifts: Shift every batch by up to one pixel.
    """
    order, drawn = torch_generator(seed, "training order"), torch_generator(seed, "shifts")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(epochs):
        for chosen in torch.randperm(len(samples), generator=order).split(BATCH):
            inputs = samples.inputs[chosen]
            if shifts:
                down, right = torch.randint(0, 3, (2,), generator=drawn).tolist()
                inputs = F.pad(inputs, (1, 1, 1, 1))[..., down : down + 8, right : right + 8]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), samples.labels[chosen], label_smoothing=smoothing).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


#: Checked images of which a reference is about 70 % accurate; chosen on the seeds that choose.
FEW = {"frozen": 17, "scratch": 24}
#: By what an overconfident reference's last layer is multiplied.
OVERCONFIDENT = 5.0


@dataclass(frozen=True)
class Recipe:
    """How a reference is made of the checked images.

    Attributes:
        samples: How many of them it sees; all, if ``None``.
        epochs: Of its training.
        smoothing: Of the labels.
        sharpened: Factor on its last layer.
        noise: Standard deviation of noise on its weights, over that of each tensor.
    """

    samples: int | None = None
    epochs: int = REFERENCE_EPOCHS
    smoothing: float = 0.0
    sharpened: float = 1.0
    noise: float = 0.0


def recipe(setting: Setting, reference: str) -> Recipe:
    """Of a reference by its name."""
    return {
        "good": Recipe(),
        "70 %": Recipe(FEW[setting], 3 * REFERENCE_EPOCHS),
        "one epoch": Recipe(epochs=1),
        "overconfident": Recipe(100, sharpened=OVERCONFIDENT),
        "20 images": Recipe(20, 3 * REFERENCE_EPOCHS),
        "50 images": Recipe(50, 3 * REFERENCE_EPOCHS),
        "label-smoothed": Recipe(smoothing=0.5),
        "noised": Recipe(noise=1.0),
    }[reference]


def made(recipe: Recipe, model: ImageClassifier, checked: Samples, seed: int, learning_rate: float) -> ImageClassifier:
    """A reference: the model, trained on checked samples as the recipe has it."""
    seen = checked if recipe.samples is None else checked.first(recipe.samples)
    taught(model, seen, recipe.epochs, seed, learning_rate=learning_rate, smoothing=recipe.smoothing)
    drawn = torch_generator(seed, "reference noise")
    for p in model.parameters():
        p += recipe.noise * p.std() * torch.randn(p.shape, generator=drawn)
    for p in model.head.parameters():
        p *= recipe.sharpened
    return model


@dataclass(frozen=True)
class Cell:
    """What every method of a cell is given.

    Attributes:
        setting: ``"frozen"``: a linear layer on features of a backbone that the checked images trained, as the
            reference. ``"scratch"``: a convolutional network; the reference began from other weights.
        train: Noisy samples.
        given: Their labels.
        wrong: Which of these are.
        evaluation: Validation or test samples.
        reference: Trained on the checked samples.
        seed: Of the model's start and of the order.
    """

    setting: Setting
    train: Samples
    given: Tensor
    wrong: Tensor
    evaluation: Samples
    reference: ImageClassifier
    seed: int

    def fresh(self) -> ImageClassifier:
        """The model before its training."""
        return head(self.seed) if self.setting == "frozen" else conv_net(self.seed)


NOISES: dict[str, Callable[[int], LabelNoise]] = {
    "0 %": lambda seed: SymmetricNoise(0.0, seed),
    "20 %": lambda seed: SymmetricNoise(0.2, seed),
    "40 %": lambda seed: SymmetricNoise(0.4, seed),
    "60 %": lambda seed: SymmetricNoise(0.6, seed),
    "40 % pairs": lambda seed: AsymmetricNoise(0.4, seed=seed),
}


def make_cell(setting: Setting, noise: str, reference: str, seed: int, phase: str) -> Cell:
    """Samples, labels and reference of a cell."""
    parts = images(seed, phase)
    if setting == "frozen":
        backbone = taught(conv_net(seed + 2 * OTHER_START), parts["checked"], REFERENCE_EPOCHS, seed, shifts=True).backbone
        parts = {name: Samples(backbone(each.inputs), each.labels) for name, each in parts.items()}
    start = head(seed + OTHER_START) if setting == "frozen" else conv_net(seed + OTHER_START)
    trained = made(recipe(setting, reference), start, parts["checked"], seed, 1e-3)
    given, wrong = NOISES[noise](seed)(parts["noisy"].labels, CLASSES)
    return Cell(setting, parts["noisy"], given, wrong, parts["evaluation"], trained, seed)
