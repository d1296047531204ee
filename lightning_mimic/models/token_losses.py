"""Losses per sequence for models that predict a class for each token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mimic.errors import MimicError


def token_losses(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the cross-entropy of each sequence, averaged over its targets.

    Most language models return the mean loss over all tokens of a batch. This is not a plain mean over sequences if
    these have different numbers of targets; call this function in ``sample_losses`` instead.

    Args:
        logits: Logits, shape ``(B, ..., C)``; for a language model ``logits[:, :-1]``, those that predict the next
            token.
        targets: Class indices, shape ``(B, ...)``; for a language model ``labels[:, 1:]``.
        ignore_index: Value of targets that are ignored, such as padding. A sequence without other targets has loss 0.

    Returns:
        Losses in nats, shape ``(B,)``, in float32 or higher precision.

    Raises:
        MimicError: The shapes of logits and targets do not match.

    Example:
        >>> logits = torch.zeros(2, 3, 4)
        >>> token_losses(logits, torch.tensor([[0, 1, 2], [3, -100, -100]]))
        tensor([1.3863, 1.3863])
    """
    if logits.shape[:-1] != targets.shape or logits.ndim < 2:
        raise MimicError(
            f"`token_losses`: logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}; expected "
            "(B, ..., C) and (B, ...), one class index for each vector of logits."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(dtype),
        targets.reshape(-1),
        reduction="none",
        ignore_index=ignore_index,
    )
    counts = (targets != ignore_index).reshape(len(targets), -1).sum(1)
    return flat.view(len(targets), -1).sum(1) / counts.clamp(min=1)
