"""Batches to compare a training batch with: of the same doubtful data, or of a few trusted samples."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from lightning_mimic.data.splits import LabelledRows, LabelledSplits
from lightning_mimic.errors import MimicError
from lightning_mimic.random_streams import stream_seed, torch_generator


def comparison_loader(data: Any) -> DataLoader:
    """What trains, once more: the same images and given labels in batches of the same size and in an order of its own.

    The training loader's draws stay what they are. Under DDP every rank goes through all of it, in the same order, so
    that any number of processes compares with the same batches. Images are not flipped and not shifted.

    Args:
        data: A data module of labelled images in parts; prepared and set up if it is not yet.

    Raises:
        MimicError: A data module of another kind.

    Example:
        >>> from lightning_mimic.data.digits import DigitsDataModule
        >>> images, labels = next(iter(comparison_loader(DigitsDataModule(batch_size=16))))
        >>> images.shape, labels.shape
        (torch.Size([16, 1, 8, 8]), torch.Size([16]))
    """
    parts = _ready(data)
    loader = parts.train_dataloader()
    return DataLoader(
        loader.dataset,
        batch_size=parts.batch_size,
        # On any number of processes, one: the order of every pass follows from the seed and the pass.
        sampler=DistributedSampler(
            loader.dataset, num_replicas=1, rank=0, seed=stream_seed(parts.seed, "comparison order")
        ),
        num_workers=parts.num_workers,
        collate_fn=loader.collate_fn,
    )


def trusted_loader(data: Any, per_class: int = 5, seed: int = 0) -> Iterable[Any]:
    """One batch of a few trusted samples of every class with their true labels, again and again.

    They come from the parts ``"trusted_fit"`` and ``"trusted_held"``, never from the test set or the noisy part.

    Args:
        data: A data module of labelled images in parts; prepared and set up if it is not yet.
        per_class: Samples of each class.
        seed: Of the draw; the global generator is not touched.

    Returns:
        A list that holds the batch: images, and int64 labels of shape ``(per_class * classes,)``.

    Raises:
        MimicError: A data module of another kind, or too few trusted samples of a class.

    Example:
        >>> from lightning_mimic.data.digits import DigitsDataModule
        >>> (images, labels), = trusted_loader(DigitsDataModule(), per_class=2)
        >>> labels.bincount()
        tensor([2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    if not isinstance(per_class, int) or isinstance(per_class, bool) or per_class < 1:
        raise MimicError(f"`per_class` counts trusted samples of each class, 1 or more, not {per_class!r}.")
    parts = _ready(data)
    rows = parts.rows["trusted"]
    labels = parts.sources["train"].labels[rows]
    order = torch.randperm(len(rows), generator=torch_generator(seed, "trusted batch"))
    drawn: list[Tensor] = []
    for each in range(parts.num_classes):
        of_class = order[labels[order] == each][:per_class]
        if len(of_class) < per_class:
            raise MimicError(
                f"`per_class` is {per_class}, but class {each} has {len(of_class)} trusted samples ({len(rows)} in all "
                "classes). Ask for fewer, or have a larger share of the training split trusted (`trusted` of the "
                "data module; with experiment=paper/... by reference=trusted_split)."
            )
        drawn.append(of_class)
    chosen = torch.cat(drawn)
    samples = LabelledRows(parts.sources["train"].images, rows[chosen], labels[chosen])
    return [default_collate([samples[place] for place in range(len(samples))])]


def _ready(data: Any) -> LabelledSplits:
    if not isinstance(data, LabelledSplits):
        raise MimicError(
            f"`data` is a {type(data).__name__}; expected a data module of labelled images in parts, such as "
            "DigitsDataModule. For other data give the scorer a DataLoader of your own."
        )
    data.prepare_data()
    data.setup()
    return data
