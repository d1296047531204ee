"""The contrastive losses of every pair, over the pairs of all ranks: softmax (CLIP) and sigmoid (SigLIP)."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mimic.distributed import gather_equal, is_distributed, rank, sum_over_ranks, world_size
from lightning_mimic.errors import MimicError

#: Pairs whose similarities to all pairs are held at once.
BLOCK_SIZE = 1024


def pair_losses(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None = None, *, block_size: int = BLOCK_SIZE
) -> Tensor:
    """Return the loss of each pair among the others: half of its row and half of its column of the matrix of all pairs.

    Without a bias the loss of CLIP: the mean of both cross-entropies, of the pair's image over all texts and of its
    text over all images. With one that of SigLIP: of every image and text, whether they belong together; the mean over
    the pairs is what open_clip's ``SigLipLoss`` returns.

    Args:
        images: Embeddings, shape ``(B, K)``, of any length and dtype.
        texts: Those of their captions, in the same order.
        scale: What cosines are multiplied by, a scalar tensor other than 0; at most 100 as CLIP is trained.
        bias: What is added to them, a scalar.
        block_size: Pairs whose similarities to all pairs are held at once.

    Returns:
        Shape ``(B,)``, in nats, float32 or higher. It can be differentiated, and its gradients by the incoming ones.

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
    """Return the losses of all ranks' pairs among each other; with one process those of :func:`pair_losses`.

    Attached to the graph are this rank's embeddings, in every loss, and ``scale`` and ``bias`` in its own pairs'
    losses. So the gradients of all ranks add up to that of one process with all pairs, and no reverse pass has to
    talk to another rank. A rank computes the rows and columns of its own pairs, ``block_size`` of them at a time, and
    holds a few matrices of ``block_size`` by all pairs.

    Args:
        images: Embeddings of this rank, shape ``(B, K)``; B the same on all ranks.
        texts: Those of their captions.
        scale: A scalar.
        bias: A scalar; see :func:`pair_losses`.
        block_size: Pairs whose similarities to all pairs are held at once.

    Returns:
        Shape ``(B · ranks,)``, in the ranks' order.

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
            f"a contrastive loss is taken over the pairs of all ranks, which must have as many each; these have "
            f"{sizes.tolist()}. Leave out the last incomplete batch (`drop_last=True`)."
        )
    # Of one length before they travel, because what autocast leaves in half precision is rounded only once so.
    images, texts = _normalised(images), _normalised(texts)
    return _losses(images, texts, gather_equal(images), gather_equal(texts), scale, bias, block_size)


def _normalised(embeddings: Tensor) -> Tensor:
    # In half precision a logit of 100 is off by more than what tells pairs apart.
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
    """All ranks' pairs, and which of them are this rank's.

    Attributes:
        images: Embeddings of unit length, shape ``(N, K)``, without a graph.
        texts: Likewise.
        first: Place of this rank's first pair.
        block_size: Pairs per block.
        sigmoid: The loss is SigLIP's.
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
                # The vectors are scaled, not the matrix, which would be another one to hold.
                logits = torch.addmm(bias, scale * own[side][rows], others.T)
                yield _Block(side, rows, slice(self.first + rows.start, self.first + rows.stop), logits, others)

    def derivatives(self, block: "_Block", norms: Tensor) -> tuple[Tensor, Tensor]:
        """Return half the derivatives of losses by a block's logits, each of shape ``(n, N)``.

        Args:
            block: Its logits.
            norms: Logarithms of the sums over a pair's row and over its column, shape ``(2, N)``.

        Returns:
            Of the loss of the block's row, and of the loss of the column's pair.
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
    """Some of this rank's images beside all texts, or texts beside all images.

    Attributes:
        side: 0 for images, 1 for texts.
        rows: Which of this rank's.
        here: The same among all pairs.
        logits: Shape ``(n, N)``.
        others: The embeddings of the other side, shape ``(N, K)``.
    """

    side: int
    rows: slice
    here: slice
    logits: Tensor
    others: Tensor

    def diagonal(self, matrix: Tensor) -> Tensor:
        """Return a view of the entries of a matrix of this shape that belong to the pairs themselves."""
        return matrix[:, self.here].diagonal()


def _in_full_precision(act: Callable[..., Any]) -> Callable[..., Any]:
    """Run the method of a function without autocast, in which its products would be rounded."""

    @functools.wraps(act)
    def wrapped(ctx: Any, *tensors: Any) -> Any:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return act(ctx, *tensors)

    return wrapped


class _PairLosses(torch.autograd.Function):
    """The losses of all pairs, of which this rank's embeddings are attached."""

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
                # Less the pair's own first: a small difference of large logits would be rounded as they are.
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
    """The gradients of weighted losses, which are linear in the weights and can be differentiated by them."""

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
        # Embeddings lead on to a node that refuses.
        return changes, images, texts, scale, bias, None, None


def _row_sums(by_row: Tensor, logits: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of a block's derivatives over each row, and those of their products with the cosines."""
    summed = by_row.sum(1)
    return summed, ((by_row * logits).sum(1) - bias * summed) / scale


class _OnceOnly(torch.autograd.Function):
    """The identity, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise MimicError(
            "the gradients of a contrastive loss are differentiated by embeddings, scale or bias, which they do not "
            "offer; by the weights of the losses they can be."
        )
