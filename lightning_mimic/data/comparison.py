"""Reference batches for scorers that compare: a second pass over the training data, or a few trusted samples."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from lightning_mimic.data.splits import LabelledRows, LabelledSplits
from lightning_mimic.errors import MimicError
from lightning_mimic.random_streams import stream_seed, torch_generator


def comparison_loader(data: Any) -> DataLoader:
    """Return a second loader of the training images and given labels, with the same batch size and its own order.

    The random numbers of the training loader do not change. With DDP, each rank iterates over all images in the same
    order, so that the batches do not depend on the number of processes. Images are neither flipped nor shifted.

    Args:
        data: Data module of labelled images in parts; it is prepared and set up if necessary.

    Raises:
        MimicError: ``data`` has another type.

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
        # One replica on any number of processes: the order depends on the seed and the epoch only.
        sampler=DistributedSampler(
            loader.dataset, num_replicas=1, rank=0, seed=stream_seed(parts.seed, "comparison order")
        ),
        num_workers=parts.num_workers,
        collate_fn=loader.collate_fn,
    )


def trusted_loader(data: Any, per_class: int = 5, seed: int = 0) -> Iterable[Any]:
    """Return an iterable over one batch of a few trusted samples of each class, with their true labels.

    The samples are from the parts ``"trusted_fit"`` and ``"trusted_held"``, never from the test set or the noisy part.

    Args:
        data: Data module of labelled images in parts; it is prepared and set up if necessary.
        per_class: Number of samples of each class.
        seed: Seed of the selection; the global random state is left unchanged.

    Returns:
        A list with the batch: images, and int64 labels of shape ``(per_class * classes,)``.

    Raises:
        MimicError: ``data`` has another type, or a class has too few trusted samples.

    Example:
        >>> from lightning_mimic.data.digits import DigitsDataModule
        >>> (images, labels), = trusted_loader(DigitsDataModule(), per_class=2)
        >>> labels.bincount()
        tensor([2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    if not isinstance(per_class, int) or isinstance(per_class, bool) or per_class < 1:
        raise MimicError(f"`per_class` is {per_class!r}; expected a number of trusted samples per class, 1 or more.")
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
                "classes). Choose a smaller number, or a larger trusted share of the training split (`trusted` of the "
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
