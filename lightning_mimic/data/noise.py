"""Synthetic label noise with its own random generator and a mask of the wrong labels."""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lightning_mimic.errors import MimicError
from lightning_mimic.random_streams import torch_generator


class LabelNoise(Protocol):
    """Interface of label noise for data modules."""

    def __call__(self, labels: Tensor, num_classes: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return noisy labels and a mask of the wrong ones.

        Args:
            labels: True labels, int64, shape ``(n,)``.
            num_classes: Number of classes.
            rows: Row numbers in the training split, int64, shape ``(n,)``.
        """


class SymmetricNoise:
    """Replace ``int(rate · n)`` labels, chosen without replacement, by another class chosen uniformly.

    Args:
        rate: Share of wrong labels, 0 to 1.
        seed: Seed of the noise; the global random state is left unchanged.

    Raises:
        MimicError: ``rate`` is outside 0 to 1.

    Example:
        >>> labels = torch.zeros(10, dtype=torch.int64)
        >>> noisy, wrong = SymmetricNoise(rate=0.4, seed=0)(labels, num_classes=3)
        >>> int(wrong.sum()), bool((noisy != labels).eq(wrong).all())
        (4, True)
    """

    def __init__(self, rate: float = 0.0, seed: int = 0) -> None:
        self.rate = _checked(rate)
        self.seed = seed

    def __call__(self, labels: Tensor, num_classes: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return noisy labels and a mask of the wrong ones.

        Args:
            labels: True labels, int64, shape ``(n,)``.
            num_classes: Number of classes, at least 2.
            rows: Row numbers in the training split; unused.

        Returns:
            Labels, and a boolean tensor of the same shape, ``True`` if the label is now wrong.

        Raises:
            MimicError: There are fewer than two classes, or labels outside them.
        """
        check_labels(labels, num_classes)
        generator = torch_generator(self.seed, "label noise")
        wrong = _drawn(len(labels), self.rate, generator)
        shift = torch.randint(1, num_classes, labels.shape, generator=generator)
        return torch.where(wrong, (labels + shift) % num_classes, labels), wrong


class AsymmetricNoise:
    """Replace ``int(rate · n_c)`` labels of each listed class by the class it is confused with.

    Args:
        rate: Share of wrong labels in each listed class, 0 to 1.
        confusions: Class that replaces each listed class; ``None``: a cycle through all classes.
        seed: Seed of the noise; the global random state is left unchanged.

    Raises:
        MimicError: ``rate`` is outside 0 to 1, or a class is confused with itself.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> AsymmetricNoise(rate=0.5, confusions={0: 1})(labels, num_classes=2)[1].sum()
        tensor(1)
    """

    def __init__(self, rate: float = 0.0, confusions: Mapping[int, int] | None = None, seed: int = 0) -> None:
        self.rate = _checked(rate)
        self.confusions = None if confusions is None else {int(k): int(v) for k, v in confusions.items()}
        if self.confusions and any(k == v for k, v in self.confusions.items()):
            raise MimicError(f"`confusions`: {self.confusions} confuses a class with itself.")
        self.seed = seed

    def __call__(self, labels: Tensor, num_classes: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return noisy labels and a mask of the wrong ones; arguments and shapes as for :class:`SymmetricNoise`."""
        check_labels(labels, num_classes)
        generator = torch_generator(self.seed, "label noise")
        cycle = {c: (c + 1) % num_classes for c in range(num_classes)}
        confusions = cycle if self.confusions is None else self.confusions
        noisy, wrong = labels.clone(), torch.zeros_like(labels, dtype=torch.bool)
        for source, target in sorted(confusions.items()):
            if not (0 <= source < num_classes and 0 <= target < num_classes):
                raise MimicError(f"`confusions`: {source}: {target} is outside the {num_classes} classes.")
            members = (labels == source).nonzero().flatten()
            chosen = members[_drawn(len(members), self.rate, generator)]
            noisy[chosen], wrong[chosen] = target, True
        return noisy, wrong


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Check that there are at least two classes, and that labels lie within them.

    Args:
        labels: Labels counted from 0, int64, shape ``(n,)``.
        num_classes: Number of classes.

    Raises:
        MimicError: There are fewer than two classes, or labels outside them.

    Example:
        >>> check_labels(torch.tensor([0, 3]), num_classes=3)
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: labels run from 0 to 3, outside the 3 classes.
    """
    if num_classes < 2:
        raise MimicError(f"`num_classes` is {num_classes}; a wrong label needs at least 2 classes.")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise MimicError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, outside the {num_classes} classes."
        )


def _drawn(count: int, rate: float, generator: torch.Generator) -> Tensor:
    chosen = torch.zeros(count, dtype=torch.bool)
    # Round before truncating, because 0.29 * 100 is 28.999...
    chosen[torch.randperm(count, generator=generator)[: int(round(rate * count, 9))]] = True
    return chosen


def _checked(rate: float) -> float:
    if not (math.isfinite(rate) and 0 <= rate <= 1):
        raise MimicError(f"`rate` is {rate!r}; expected the share of wrong labels, between 0 and 1.")
    return float(rate)
