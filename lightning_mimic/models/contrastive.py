"""The contrastive loss of every pair, over the pairs of all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mimic.distributed import gather_equal, is_distributed, rank, sum_over_ranks, world_size
from lightning_mimic.errors import MimicError


def pair_losses(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The loss of each pair among the others: the mean of both cross-entropies, of its image and of its text.

    Args:
        images: Embeddings, shape ``(B, K)``, of any length and dtype.
        texts: Those of their captions, in the same order.
        scale: What cosines are multiplied with, one value or one for each pair; at most 100 as CLIP is trained.

    Returns:
        Shape ``(B,)``, in nats, float32 or higher.

    Source: Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, arXiv 2103.00020.

    Example:
        >>> same = torch.eye(2)
        >>> pair_losses(same, same, torch.tensor(10.0)).round(decimals=6)  # log(1 + exp(-10))
        tensor([4.5000e-05, 4.5000e-05])
    """
    # In half precision a logit of 100 is off by more than what tells pairs apart.
    with torch.autocast(images.device.type, enabled=False):
        dtype = torch.promote_types(images.dtype, torch.float32)
        images, texts = F.normalize(images.to(dtype), dim=1), F.normalize(texts.to(dtype), dim=1)
        scale = scale.to(dtype).reshape(-1, 1)
        own = torch.arange(len(images), device=images.device)
        # The vectors are scaled, not the matrix, which would be another one to hold.
        by_image = F.cross_entropy((scale * images) @ texts.T, own, reduction="none")
        by_text = F.cross_entropy((scale * texts) @ images.T, own, reduction="none")
        return (by_image + by_text) / 2


def global_pair_losses(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The losses of all ranks' pairs among each other; with one process those of :func:`pair_losses`.

    Attached to the graph are this rank's embeddings, in every loss, and ``scale`` in its own pairs' losses. So the
    gradients of all ranks add up to that of one process with all pairs, and no reverse pass has to talk to another
    rank. The price: every rank holds matrices of all pairs by all pairs, in float32 64 MiB each for 4,096 pairs. Five
    are there at once while it trains and twelve while the pairs are scored, which is 0.8 GiB for 4,096 pairs and 12
    GiB for 16,384.

    Args:
        images: Embeddings of this rank, shape ``(B, K)``; B the same on all ranks.
        texts: Those of their captions.
        scale: A scalar.

    Returns:
        Shape ``(B · ranks,)``, in the ranks' order.

    Raises:
        MimicError: The ranks have batches of different sizes.
    """
    if not is_distributed():
        return pair_losses(images, texts, scale)
    world, rows = world_size(), len(images)
    sizes = torch.zeros(world, dtype=torch.int64, device=images.device)
    sizes[rank()] = rows
    sum_over_ranks(sizes)
    if bool((sizes != rows).any()):
        raise MimicError(
            f"a contrastive loss is taken over the pairs of all ranks, which must have as many each; these have "
            f"{sizes.tolist()}. Leave out the last incomplete batch (`drop_last=True`)."
        )
    own = slice(rank() * rows, (rank() + 1) * rows)
    images, texts = (_of_all_ranks(each, own) for each in (images, texts))
    is_own = torch.zeros(world * rows, dtype=torch.bool, device=images.device)
    is_own[own] = True
    return pair_losses(images, texts, torch.where(is_own, scale, scale.detach()))


def _of_all_ranks(embeddings: Tensor, own: slice) -> Tensor:
    # Of one length before they travel, because what autocast leaves in half precision is rounded only once so.
    embeddings = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
    others = torch.cat(gather_equal(embeddings))
    return torch.cat([others[: own.start], embeddings, others[own.stop :]])
