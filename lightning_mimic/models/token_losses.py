"""Per-sequence losses of models that predict a class for every token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mimic.errors import MimicError


def token_losses(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Return every sequence's cross-entropy, averaged over its own targets.

    The mean over all tokens of a batch, which most language models return, is no plain mean over its sequences as soon
    as they hold different numbers of targets. This is one to average: call it in ``sample_losses``.

    Args:
        logits: Shape ``(B, ..., C)``; of a language model those of the tokens before the targets, ``logits[:, :-1]``.
        targets: Class indices, shape ``(B, ...)``; of a language model ``labels[:, 1:]``.
        ignore_index: Marks targets that do not count (padding). A sequence without any other has the loss 0.

    Returns:
        Shape ``(B,)``, in float32 or higher.

    Raises:
        MimicError: Logits and targets do not fit together.

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
