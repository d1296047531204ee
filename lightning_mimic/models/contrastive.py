"""Contrastive losses per pair, over the pairs of all ranks: softmax (CLIP) and sigmoid (SigLIP)."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mimic.distributed import gather_equal, is_distributed, rank, sum_over_ranks, world_size
from lightning_mimic.errors import MimicError

#: Default number of pairs whose similarities to all pairs are in memory at once.
BLOCK_SIZE = 1024


def pair_losses(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None = None, *, block_size: int = BLOCK_SIZE
) -> Tensor:
    """Return the contrastive loss of each pair: half of its row and half of its column in the matrix of all pairs.

    Without a bias, it is the loss of CLIP: the mean of two cross-entropies, that of the pair's image over all texts and
    that of its text over all images. With a bias, it is the loss of SigLIP, a binary classification of each image and
    text as matching or not; its mean over the pairs equals open_clip's ``SigLipLoss``.

    Args:
        images: Embeddings, shape ``(B, K)``, of any norm and dtype.
        texts: Embeddings of the captions, shape ``(B, K)``, in the same order.
        scale: Factor for cosine similarities, a scalar tensor other than 0; CLIP limits it to 100.
        bias: Scalar added to the scaled similarities; ``None`` for the loss of CLIP.
        block_size: Number of pairs whose similarities to all pairs are in memory at once.

    Returns:
        Losses, shape ``(B,)``, in nats, in float32 or higher precision. They can be differentiated, and their gradients
        can be differentiated with respect to the incoming gradients.

    Source: Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, arXiv 2103.00020;
    Zhai et al., *Sigmoid Loss for Language Image Pre-Training*, arXiv 2303.15343.

    Example:
        >>> same = torch.eye(2)
        >>> pair_losses(same, same, torch.tensor(10.0)).round(decimals=6)  # log(1 + exp(-10))
        tensor([4.5000e-05, 4.5000e-05])
    """
    images, texts = _normalised(images), _normalised(texts)
    return _losses(images, texts, [images.detach()], [texts.detach()], scale, bias, block_size)


def global_pair_losses(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None = None, *, block_size: int = BLOCK_SIZE
) -> Tensor:
    """Return the contrastive losses of the pairs of all ranks; with one process equal to :func:`pair_losses`.

    All losses depend on this rank's embeddings in the autograd graph; ``scale`` and ``bias`` are in the graph of the
    losses of this rank's own pairs only. Therefore the gradients of all ranks add up to the gradient of one process
    with all pairs, and the backward pass needs no communication. Each rank computes the rows and columns of its own
    pairs, ``block_size`` at a time, and holds a few matrices of ``block_size`` rows and a column for each pair.

    Args:
        images: Embeddings of this rank, shape ``(B, K)``, with the same B on all ranks.
        texts: Embeddings of the captions, shape ``(B, K)``.
        scale: Factor for cosine similarities, a scalar.
        bias: Scalar added to the scaled similarities; see :func:`pair_losses`.
        block_size: Number of pairs whose similarities to all pairs are in memory at once.

    Returns:
        Losses, shape ``(B · ranks,)``, in nats, in the order of the ranks.

    Raises:
        MimicError: The ranks have batches of different sizes.
    """
    if not is_distributed():
        return pair_losses(images, texts, scale, bias, block_size=block_size)
    world, rows = world_size(), len(images)
    sizes = torch.zeros(world, dtype=torch.int64, device=images.device)
    sizes[rank()] = rows
    sum_over_ranks(sizes)
    if bool((sizes != rows).any()):
        raise MimicError(
            f"the ranks have batches of {sizes.tolist()} pairs; a contrastive loss over all ranks needs batches of "
            "equal size. Leave out the last incomplete batch (`drop_last=True`)."
        )
    # Normalise before gathering, so that half-precision embeddings from autocast are rounded only once.
    images, texts = _normalised(images), _normalised(texts)
    return _losses(images, texts, gather_equal(images), gather_equal(texts), scale, bias, block_size)


def _normalised(embeddings: Tensor) -> Tensor:
    # In half precision, the rounding error of a logit near 100 exceeds the differences between pairs.
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)


def _losses(
    images: Tensor,
    texts: Tensor,
    all_images: list[Tensor],
    all_texts: list[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    if block_size < 1:
        raise MimicError(f"`block_size` is {block_size}; expected a whole number of 1 or more.")
    first = rank() * len(images) if len(all_images) > 1 else 0
    shift = scale.new_zeros(()) if bias is None else bias.reshape(())
    pairs = _Pairs(torch.cat(all_images), torch.cat(all_texts), first, block_size, sigmoid=bias is not None)
    losses: Tensor = _PairLosses.apply(images, texts, scale.to(images.dtype).reshape(()), shift.to(images.dtype), pairs)
    return losses


@dataclass(frozen=True)
class _Pairs:
    """Hold the pairs of all ranks, and the position of this rank's pairs.

    Attributes:
        images: Embeddings of unit norm, shape ``(N, K)``, detached.
        texts: Embeddings of unit norm, shape ``(N, K)``, detached.
        first: Index of this rank's first pair among all pairs.
        block_size: Number of pairs per block.
        sigmoid: Whether the loss is that of SigLIP.
    """

    images: Tensor
    texts: Tensor
    first: int
    block_size: int
    sigmoid: bool

    def blocks(self, own: tuple[Tensor, Tensor], scale: Tensor, bias: Tensor) -> Iterator["_Block"]:
        """Yield the similarities of this rank's images to all texts, and of its texts to all images, block by block."""
        for side, others in enumerate((self.texts, self.images)):
            for start in range(0, len(own[side]), self.block_size):
                rows = slice(start, min(start + self.block_size, len(own[side])))
                # Scaling the vectors instead of the product saves another matrix in memory.
                logits = torch.addmm(bias, scale * own[side][rows], others.T)
                yield _Block(side, rows, slice(self.first + rows.start, self.first + rows.stop), logits, others)

    def derivatives(self, block: "_Block", norms: Tensor) -> tuple[Tensor, Tensor]:
        """Return half the derivatives of losses with respect to a block's logits.

        Args:
            block: Block of logits.
            norms: Log-sum-exp over each pair's row and over its column, shape ``(2, N)``.

        Returns:
            Derivatives of the loss of the row's pair, and of the loss of the column's pair, each of shape ``(n, N)``.
        """
        if self.sigmoid:
            by_row = block.logits.sigmoid()  # -z · sigmoid(-z · logit), z = 1 for a pair and -1 for others
            block.diagonal(by_row).sub_(1)
            by_row.mul_(0.5)
            return by_row, by_row
        by_row = (block.logits - norms[block.side, block.here, None]).exp_().mul_(0.5)
        by_column = (block.logits - norms[1 - block.side]).exp_().mul_(0.5)
        for each in (by_row, by_column):
            block.diagonal(each).sub_(0.5)
        return by_row, by_column


@dataclass(frozen=True)
class _Block:
    """Hold the logits of some of this rank's images with all texts, or of some of its texts with all images.

    Attributes:
        side: 0 if the rows are images, 1 if they are texts.
        rows: Positions of the rows among this rank's pairs.
        here: Positions of the rows among all pairs.
        logits: Logits, shape ``(n, N)``.
        others: Embeddings of the columns, shape ``(N, K)``.
    """

    side: int
    rows: slice
    here: slice
    logits: Tensor
    others: Tensor

    def diagonal(self, matrix: Tensor) -> Tensor:
        """Return a view of the entries of a matrix ``(n, N)`` whose row and column are the same pair."""
        return matrix[:, self.here].diagonal()


def _in_full_precision(act: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method of an autograd function without autocast, which would round its products."""

    @functools.wraps(act)
    def wrapped(ctx: Any, *tensors: Any) -> Any:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return act(ctx, *tensors)

    return wrapped


class _PairLosses(torch.autograd.Function):
    """Losses of all pairs as a function of this rank's embeddings, scale and bias."""

    @staticmethod
    @_in_full_precision
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, pairs: _Pairs) -> Tensor:
        losses, norms = images.new_zeros(len(images)), images.new_zeros(2, len(images))
        for block in pairs.blocks((images, texts), scale, bias):
            own = block.diagonal(block.logits)
            if pairs.sigmoid:
                own.neg_()  # softplus(-z · logit)
                losses[block.rows] += F.softplus(block.logits).sum(1) / 2
            else:
                # Subtract the pair's own logit first, because a small difference of large logits loses precision.
                shift = own.clone()
                cross_entropy = block.logits.sub_(shift[:, None]).logsumexp(1)
                norms[block.side, block.rows] = cross_entropy + shift
                losses[block.rows] += cross_entropy / 2
        if len(pairs.images) > len(images):
            losses, *norms_of = torch.cat(gather_equal(torch.cat([losses[None], norms])), 1)
            norms = torch.stack(norms_of)
        ctx.save_for_backward(images, texts, scale, bias, norms)
        ctx.pairs = pairs
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        images, texts, scale, bias, norms = ctx.saved_tensors
        guarded = (_OnceOnly.apply(each) for each in (images, texts, scale, bias))
        return (*_PairGradients.apply(gradient, *guarded, norms, ctx.pairs), None)


class _PairGradients(torch.autograd.Function):
    """Gradients of weighted losses, which are linear in the weights and differentiable with respect to them."""

    @staticmethod
    @_in_full_precision
    def forward(
        ctx: Any,
        weights: Tensor,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        norms: Tensor,
        pairs: _Pairs,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(images, texts, scale, bias, norms)
        ctx.pairs = pairs
        found = torch.empty_like(images), torch.empty_like(texts)
        of_scale, of_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        for block in pairs.blocks((images, texts), scale, bias):
            by_row, by_column = pairs.derivatives(block, norms)
            own = weights[block.here]
            summed, cosines = _row_sums(by_row, block.logits, scale, bias)
            of_scale += own @ cosines
            of_bias += own @ summed
            found[block.side][block.rows] = scale * (own[:, None] * by_row + by_column * weights) @ block.others
        return *found, of_scale, of_bias

    @staticmethod
    @_in_full_precision
    def backward(ctx: Any, *along: Tensor) -> tuple[Any, ...]:
        images, texts, scale, bias, norms = ctx.saved_tensors
        changes = torch.zeros_like(norms[0])
        for block in ctx.pairs.blocks((images, texts), scale, bias):
            by_row, by_column = ctx.pairs.derivatives(block, norms)
            summed, cosines = _row_sums(by_row, block.logits, scale, bias)
            changes[block.here] += along[2] * cosines + along[3] * summed
            change = scale * along[block.side][block.rows] @ block.others.T
            changes[block.here] += (by_row * change).sum(1)
            changes += (by_column * change).sum(0)
        # The other inputs lead to nodes that raise an error if they are differentiated.
        return changes, images, texts, scale, bias, None, None


def _row_sums(by_row: Tensor, logits: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row sums of a block's derivatives, and those of their products with the cosine similarities."""
    summed = by_row.sum(1)
    return summed, ((by_row * logits).sum(1) - bias * summed) / scale


class _OnceOnly(torch.autograd.Function):
    """The identity, which raises an error if it is differentiated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise MimicError(
            "the gradients of a contrastive loss cannot be differentiated with respect to embeddings, scale or bias, "
            "only with respect to the weights of the losses."
        )
