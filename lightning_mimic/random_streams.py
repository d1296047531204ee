"""Random numbers by seed and purpose, so that no two kinds of draw of one seed coincide.

Torch's samplers, Lightning's ``DistributedSampler`` and much user code draw ``torch.randperm`` from the bare seed.
Label noise that did the same would choose the very samples that such a sampler puts first.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal, get_args

from lightning_mimic.errors import nearest_names

if TYPE_CHECKING:  # curation draws, too, and may not load torch when it is imported
    from torch import Generator

#: What the package draws at random.
Purpose = Literal[
    "test split",
    "trusted split",
    "label noise",
    "training order",
    "comparison order",
    "trusted batch",
    "flips",
    "shifts",
    "shard order",
    "loader workers",
    "captions",
    "reference batches",
    "rule check",
    "bootstrap",
    "k-means",
    "mixture",
    "label model",
    "random selection",
    "reference noise",
]


def stream_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """Return the seed of the random stream that serves one purpose.

    Args:
        seed: The user's.
        purpose: What is drawn.
        place: Where in the run, if every place has a stream of its own: an epoch, a rank.

    Returns:
        32 bits: NumPy's generators take no more, and torch's on the CPU use no more.

    Raises:
        ValueError: A purpose that :data:`Purpose` does not list.

    Example:
        >>> stream_seed(0, "label noise") == stream_seed(0, "label noise")
        True
        >>> len({stream_seed(0, "label noise"), stream_seed(0, "training order"), stream_seed(1, "label noise")})
        3
    """
    if purpose not in get_args(Purpose):
        raise ValueError(f"{purpose!r} is no purpose; {nearest_names(purpose, get_args(Purpose))}")
    named = "/".join(map(str, (int(seed), purpose, *place)))
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:4], "big")


def torch_generator(seed: int, purpose: Purpose, *place: int) -> Generator:
    """Return a torch generator for one purpose; arguments as for :func:`stream_seed`.

    Example:
        >>> import torch
        >>> torch.randperm(5, generator=torch_generator(0, "label noise"))
        tensor([0, 2, 3, 1, 4])
    """
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, purpose, *place))
