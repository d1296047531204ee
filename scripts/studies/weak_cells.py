"""What the study of weak references trains: digits, noise, references of every quality, and one network per method."""

import functools
import statistics
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mimic import Reweighter
from lightning_mimic.curation import detect
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
EPOCHS = 15

Setting = Literal["frozen", "scratch", "same_start"]


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
    net = ImageClassifier(SmallConvNet(width=16, features=FEATURES), CLASSES, (1, 8, 8))
    return net.to(memory_format=torch.channels_last)  # a quarter faster on a CPU


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
    smoothing: float = 0.0,
    shifts: bool = False,
) -> ImageClassifier:
    """The network, trained on checked samples.

    Args:
        model: It is changed.
        samples: With true labels.
        epochs: At a constant learning rate.
        seed: Of the order.
        smoothing: Of the labels.
        shifts: Shift every batch by up to one pixel.
    """
    order, drawn = torch_generator(seed, "training order"), torch_generator(seed, "shifts")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
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
FEW = {"frozen": 17, "scratch": 24, "same_start": 24}
#: By what an overconfident reference's last layer is multiplied.
OVERCONFIDENT = 5.0


@dataclass(frozen=True)
class Recipe:
    """How a reference is made of the checked images.

    Attributes:
        epochs: Of its training.
        samples: How many of them it sees; all, if ``None``.
        smoothing: Of the labels.
        sharpened: Factor on its last layer.
        noise: Standard deviation of noise on its weights, over that of each tensor.
    """

    epochs: int
    samples: int | None = None
    smoothing: float = 0.0
    sharpened: float = 1.0
    noise: float = 0.0


def recipe(setting: Setting, reference: str) -> Recipe:
    """How a reference of this name is made."""
    epochs, long = REFERENCE_EPOCHS, 3 * REFERENCE_EPOCHS  # few images make few steps
    return {
        "good": Recipe(epochs),
        "weak": Recipe(long, FEW[setting]),
        "one_epoch": Recipe(1),
        "overconfident": Recipe(epochs, 100, sharpened=OVERCONFIDENT),
        "n20": Recipe(long, 20),
        "n50": Recipe(long, 50),
        "smoothed": Recipe(epochs, smoothing=0.5),
        "noised": Recipe(epochs, noise=1.0),
    }[reference]


def made(recipe: Recipe, model: ImageClassifier, checked: Samples, seed: int) -> ImageClassifier:
    """A reference: the model, trained on checked samples as the recipe has it."""
    seen = checked if recipe.samples is None else checked.first(recipe.samples)
    taught(model, seen, recipe.epochs, seed, smoothing=recipe.smoothing)
    drawn = torch_generator(seed, "reference noise")
    for p in model.parameters():
        p.add_(recipe.noise * p.std() * torch.randn(p.shape, generator=drawn))
    for p in model.head.parameters():
        p.mul_(recipe.sharpened)
    return model


@dataclass(frozen=True)
class Cell:
    """What every method of a cell is given.

    Attributes:
        setting: ``"frozen"``: a linear layer on features of a backbone that the checked images trained, as they did the
            reference, a layer on the same features. ``"scratch"``: a convolutional network, with a reference that began
            from other weights. ``"same_start"``: the same, with one that began from the model's.
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
        return start(self.setting, self.seed)


def make_cell(setting: Setting, noise: str, reference: str, seed: int, phase: str) -> Cell:
    """Samples, labels and reference of a cell.

    Args:
        setting: See :class:`Cell`.
        noise: One of ``0``, ``20``, ``40``, ``60`` (% of labels drawn anew among the other classes), ``pairs`` (40 %
            become the next class), ``instance`` (40 %, where an annotator is least sure).
        reference: See :func:`recipe`.
        seed: Of everything.
        phase: See :func:`images`.
    """
    parts = inputs(setting, seed, phase)
    given, wrong = label_noise(noise, seed)(parts["noisy"].labels, CLASSES)
    trained = trained_reference(setting, reference, seed)
    return Cell(setting, parts["noisy"], given, wrong, parts["evaluation"], trained, seed)


def label_noise(noise: str, seed: int) -> LabelNoise:
    """By its name."""
    if noise == "pairs":
        return AsymmetricNoise(0.4, seed=seed)
    if noise == "instance":
        parts = images(seed, "choose")
        seen = Samples(parts["checked"].inputs[100:], parts["checked"].labels[100:])
        annotator = taught(conv_net(seed + 3 * OTHER_START), seen, 20, seed)
        return InstanceNoise(0.4, annotator(parts["noisy"].inputs))
    return SymmetricNoise(int(noise) / 100, seed)


def start(setting: Setting, seed: int) -> ImageClassifier:
    """A fresh network."""
    return head(seed) if setting == "frozen" else conv_net(seed)


# A process computes many cells of a seed.
@functools.cache
def inputs(setting: Setting, seed: int, phase: str) -> dict[str, Samples]:
    """The parts of a seed as the setting's network takes them."""
    parts = images(seed, phase)
    if setting != "frozen":
        return parts
    return {name: Samples(backbone(seed)(each.inputs), each.labels) for name, each in parts.items()}


@functools.cache
def backbone(seed: int) -> nn.Module:
    """Frozen, of a network that the checked images trained."""
    checked = images(seed, "choose")["checked"]
    return taught(conv_net(seed + 2 * OTHER_START), checked, REFERENCE_EPOCHS, seed, shifts=True).backbone


@functools.cache
def trained_reference(setting: Setting, reference: str, seed: int) -> ImageClassifier:
    """A reference; from the model's own initial weights only where the setting is so."""
    begun = start(setting, seed + OTHER_START * (setting != "same_start"))
    return made(recipe(setting, reference), begun, inputs(setting, seed, "choose")["checked"], seed)


class Means:
    """Mean of a figure for every sample over the epochs; NaN is left out."""

    def __init__(self, samples: int) -> None:
        self._sums, self._counts = torch.zeros(samples), torch.zeros(samples)

    def add(self, rows: Tensor, values: Tensor) -> None:
        self._sums[rows] += torch.where(values.isnan(), 0.0, values)
        self._counts[rows] += (~values.isnan()).float()

    def values(self) -> Tensor:
        """NaN where a sample has none."""
        return self._sums / self._counts


@dataclass(frozen=True)
class Fit:
    """What a training has shown.

    Attributes:
        accuracies: On the evaluation samples, after every epoch.
        effective_share: Mean over the batches of the effective sample size, over their size.
        scores: Mean score of every sample; NaN where it has none, as without a reweighter.
        posteriors: The same of the probability that the label is right.
        wrong_share: Estimated share of wrong labels at the end; ``None`` where it is not known.
    """

    accuracies: list[float]
    effective_share: float
    scores: Tensor
    posteriors: Tensor
    wrong_share: float | None

    def figures(self) -> dict[str, Any]:
        """Accuracies and the effective share."""
        return {"last": self.accuracies[-1], "best": max(self.accuracies), "ess": self.effective_share}


def fit(
    cell: Cell,
    model: ImageClassifier,
    learning_rate: float,
    *,
    reweighter: Reweighter | None = None,
    keep: Tensor | None = None,
    rows: Tensor | None = None,
) -> Fit:
    """Train a network on the noisy samples of a cell, with AdamW and a cosine schedule.

    Args:
        cell: With the samples.
        model: A fresh one.
        learning_rate: At the start.
        reweighter: Of this model; it is closed at the end.
        keep: The samples that count where there is none; all, if left out.
        rows: The samples that train; all, if left out.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    order = torch_generator(cell.seed, "training order")
    rows = torch.arange(len(cell.train)) if rows is None else rows
    keep = torch.ones(len(cell.train)) if keep is None else keep.float()
    scores, posteriors, shares, accuracies = Means(len(keep)), Means(len(keep)), [], []
    wrong_share = None
    for epoch in range(EPOCHS):
        for places in torch.randperm(len(rows), generator=order).split(BATCH):
            chosen = rows[places]
            batch = (cell.train.inputs[chosen], cell.given[chosen])
            optimizer.zero_grad()
            if reweighter is None:
                weights = keep[chosen]
                (weights @ model.sample_losses(batch) / weights.sum().clamp(min=1)).backward()
                shares.append(float(weights.mean()))
            else:
                with reweighter.step(batch, epoch=epoch) as step:
                    result = step.backward(model.sample_losses(step.batch).mean())
                columns = result.columns()
                scores.add(chosen, columns["score"])
                if "posterior" in columns:
                    posteriors.add(chosen, columns["posterior"])
                shares.append(float(result.weights.ess) / len(chosen))
                wrong_share = result.wrong_share
            optimizer.step()
        schedule.step()
        accuracies.append(accuracy(model, cell.evaluation))
    if reweighter is not None:
        reweighter.close()
    share = None if wrong_share is None else float(wrong_share)
    return Fit(accuracies, statistics.fmean(shares), scores.values(), posteriors.values(), share)


@torch.no_grad()
def accuracy(model: ImageClassifier, samples: Samples) -> float:
    """Share of samples whose class is predicted."""
    return float((model(samples.inputs).argmax(1) == samples.labels).float().mean())


def found(scores: Tensor, dropped: Tensor | None, wrong: Tensor) -> dict[str, float]:
    """How well scores and decisions find the wrong labels; of clean samples only the share that is kept.

    Args:
        scores: Lower is more suspicious; a sample without one is as suspicious as the median one.
        dropped: The decision; ``None`` where the scores make none.
        wrong: The truth.
    """
    known = ~scores.isnan()
    if not known.any():
        return {}
    scores = torch.where(known, scores, scores[known].median())
    decided = torch.zeros_like(wrong) if dropped is None else dropped
    figures = {"kept": float((~decided).float().mean())}
    if wrong.any():
        figures |= {name: asdict(detect(scores, decided, wrong))[name] for name in ("auroc", "average_precision", "f1")}
    return figures if dropped is not None else {k: v for k, v in figures.items() if k not in ("kept", "f1")}
