"""LightningModule that trains a CLIP or SigLIP of open_clip on image-text pairs."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_mimic.distributed import gather_rows
from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.models.contrastive import BLOCK_SIZE, global_pair_losses, pair_losses
from lightning_mimic.models.zero_shot import ZeroShot, recall_at_k
from lightning_mimic.reference import match_reference, read_reference
from lightning_mimic.trainer_package import pl

Tower = Literal["image", "text"]
#: Maximum factor for cosine similarities, as in the training of CLIP.
MAX_SCALE = 100.0
#: Learning rate and weight decay of open_clip and DataComp; see :func:`with_open_clip_moments` for betas and eps.
ADAMW = partial(torch.optim.AdamW, lr=5e-4, weight_decay=0.2)
# Projections of open_clip's towers into the shared embedding space, including towers of timm, ResNet and HuggingFace.
_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "image": ("visual.proj", "visual.head.proj", "visual.head.mlp.fc2", "visual.attnpool.c_proj"),
    "text": ("text_projection", "text.text_projection", "text.proj"),
}


class CLIP(pl.LightningModule):
    """Train an image and a text tower of open_clip with a contrastive loss over the pairs of all ranks.

    The loss is that of CLIP, or that of SigLIP if the towers have a ``logit_bias``.

    A batch is ``(images, texts)``: images ``(B, 3, H, W)`` from the towers' transform, and int64 tokens ``(B, L)``. A
    batch for evaluation may also be ``(images, labels)`` with int64 labels ``(B,)``; it is classified by ``zero_shot``.
    The module logs ``train/loss``, ``val/loss`` (over the batch of one process, so that it depends on the batch size),
    ``val/image_to_text_R@k``, ``val/text_to_image_R@k`` and ``val/zero_shot_accuracy``, and the same as ``test/``.

    Args:
        towers: ``open_clip.create_model(...)``, ``open_clip.CLIP(...)`` or ``open_clip.CustomTextCLIP(...)``; with
            ``init_logit_bias`` they are trained as a SigLIP.
        pretrained: Checkpoint with initial weights, in any form accepted for a reference: a path, or
            ``open_clip:ARCHITECTURE/TAG``.
        locked: Towers to freeze, ``"image"`` or ``"text"``; their projections into the shared space are still trained.
        grad_checkpointing: Whether to recompute activations in the backward pass, to save memory.
        zero_shot: Class names and templates for evaluation on labelled images.
        optimizer: Function from parameter groups to an optimizer. There are two groups; that of biases, norms, other
            vectors and the logit scale has no weight decay. A ``partial`` of AdamW without ``betas`` or ``eps`` uses
            those of open_clip: 0.9, 0.98 and 1e-6 if the image tower is a vision transformer, otherwise 0.9, 0.999 and
            1e-8.
        warmup_steps: Number of steps over which the learning rate rises linearly from zero; afterwards it follows a
            cosine to zero at the end of the fit.
        block_size: Number of this rank's pairs whose similarities to the pairs of all ranks are in memory at once. The
            loss needs about six matrices with this number of rows, and a column for each pair.

    Raises:
        MimicError: ``towers`` is not a CLIP, ``block_size`` is not a positive whole number, or ``locked`` names an
            unknown tower.
        ReferenceLoadError: ``pretrained`` cannot be read or does not fit.

    Example:
        >>> import open_clip
        >>> vision, text = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16}, {"layers": 1, "width": 64}
        >>> model = CLIP(open_clip.CLIP(32, vision, text | {"context_length": 8, "heads": 2}))
        >>> model.sample_losses((torch.zeros(3, 3, 16, 16), torch.ones(3, 8, dtype=torch.int64))).shape
        torch.Size([3])
    """

    def __init__(
        self,
        towers: nn.Module,
        pretrained: str | Path | None = None,
        locked: Sequence[Tower] = (),
        grad_checkpointing: bool = False,
        zero_shot: ZeroShot | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
        warmup_steps: int = 500,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        super().__init__()
        if not callable(getattr(towers, "encode_text", None)) or not hasattr(towers, "logit_scale"):
            raise MimicError(
                f"`towers` is a {type(towers).__name__}; expected a CLIP of open_clip: `open_clip.create_model(...)`."
            )
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
            raise MimicError(f"`block_size` is {block_size!r}; expected a whole number of 1 or more.")
        self.towers = towers
        self.block_size = block_size
        if pretrained is not None:
            wanted = {n: t for n, t in towers.state_dict().items() if t.is_floating_point()}
            tensors = read_reference(pretrained, argument="pretrained")
            towers.load_state_dict(match_reference(tensors, wanted, argument="pretrained"), strict=False)
        self.locked = [_checked_tower(tower) for tower in locked]
        for tower in self.locked:
            self._lock(tower)
        if grad_checkpointing:
            towers.set_grad_checkpointing()  # type: ignore[operator]
        self.zero_shot = zero_shot
        self._optimizer = with_open_clip_moments(optimizer, towers)
        self.warmup_steps = warmup_steps
        self._classifier: Tensor | None = None
        self._evaluated: list[tuple[Tensor, Tensor, Tensor]] = []
        classes = 2 if zero_shot is None else max(2, len(zero_shot.class_names))
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")
        self.train()

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Return the embeddings of images, shape ``(B, K)``."""
        embeddings: Tensor = self.towers.encode_image(images, normalize=normalize)  # type: ignore[operator]
        return embeddings

    def encode_text(self, texts: Tensor, normalize: bool = False) -> Tensor:
        """Return the embeddings of captions, shape ``(B, K)``."""
        embeddings: Tensor = self.towers.encode_text(texts, normalize=normalize)  # type: ignore[operator]
        return embeddings

    @property
    def scale(self) -> Tensor:
        """Factor for cosine similarities, a scalar."""
        return self._logit_scale.exp().reshape(())

    @property
    def bias(self) -> Tensor | None:
        """Scalar added to scaled cosine similarities; ``None`` for a CLIP, whose loss has no bias."""
        bias = getattr(self.towers, "logit_bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def sample_losses(self, batch: Any) -> Tensor:
        """Return one loss per pair, as required by the callback.

        Args:
            batch: Images ``(B, 3, H, W)`` and tokens ``(B, L)``.

        Returns:
            Losses in nats, shape ``(B,)``; with several ranks, shape ``(B · ranks,)`` in the order of the ranks. See
            :func:`~lightning_mimic.models.global_pair_losses`.
        """
        images, texts = batch
        embedded = self.encode_image(images), self.encode_text(texts)
        return global_pair_losses(*embedded, self.scale, self.bias, block_size=self.block_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.sample_losses(batch)
        rows = len(batch[0])
        self.log("train/loss", losses.detach().mean(), on_step=True, on_epoch=True, batch_size=rows)
        # Compensate for DDP, which averages over ranks, because each rank has only a part of every pair's gradient.
        return losses.mean() * (len(losses) // rows)

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._logit_scale.clamp_(0, math.log(MAX_SCALE))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def on_validation_epoch_end(self) -> None:
        self._retrieve("val")

    def on_test_epoch_end(self) -> None:
        self._retrieve("test")

    def train(self, mode: bool = True) -> "CLIP":
        """Set training mode, except for locked towers, which stay in evaluation mode."""
        super().train(mode)
        for name, child in self.towers.named_children():
            if ("image" if name == "visual" else "text") in self.locked:
                child.eval()
        return self

    def configure_optimizers(self) -> pl.utilities.types.OptimizerLRScheduler:
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        vectors = [p for p in trained.values() if p.ndim < 2]
        matrices = [p for p in trained.values() if p.ndim >= 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        try:
            optimizer = self._optimizer(groups)
        except (TypeError, ValueError) as error:
            raise MimicError(f"`optimizer` cannot be built of these settings: {error}.") from error
        steps = self.trainer.estimated_stepping_batches
        if steps < 0 or math.isinf(steps):  # -1 for data without a length
            raise MimicError(
                "the learning rate schedule needs the number of steps, which is unknown: set `max_steps` of the "
                "trainer; or set `max_epochs`, and give the data a length (`samples_per_epoch`, or `sizes.json` beside "
                "the shards)."
            )
        factor = partial(_warmup_cosine, warmup=self.warmup_steps, steps=int(steps))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _logit_scale(self) -> Tensor:
        scale = self.towers.logit_scale
        assert isinstance(scale, Tensor)
        return scale

    def _evaluate(self, batch: Any, stage: str, accuracy: MulticlassAccuracy) -> None:
        images, others = batch
        embedded = self.encode_image(images, normalize=True)
        # Loaders with pairs and loaders with labels log different metrics, so their names need no loader index.
        log = partial(self.log, on_epoch=True, add_dataloader_idx=False, batch_size=len(images))
        if others.ndim == 1:
            if self.zero_shot is None:
                raise MimicError("a batch has labelled images, but the model has no `zero_shot`; give class names.")
            if self._classifier is None:
                self._classifier = self.zero_shot.weights(self)
            accuracy(embedded @ self._classifier.to(embedded.dtype), others)
            log(f"{stage}/zero_shot_accuracy", accuracy, prog_bar=True)
            return
        texts = self.encode_text(others, normalize=True)
        losses = pair_losses(embedded, texts, self.scale, self.bias, block_size=self.block_size)
        log(f"{stage}/loss", losses.mean(), sync_dist=True)
        self._evaluated.append((embedded.float(), texts.float(), others))

    def _retrieve(self, stage: str) -> None:
        evaluated, self._evaluated, self._classifier = self._evaluated, [], None
        if not evaluated:
            return
        images, texts, tokens = map(torch.cat, zip(*evaluated, strict=True))
        if self.trainer.world_size > 1:  # ranks may have different numbers of pairs
            images, texts, tokens = (torch.cat(gather_rows(each)) for each in (images, texts, tokens))
        _, which = torch.unique(tokens, dim=0, return_inverse=True)
        found = recall_at_k(images, texts, which.unsqueeze(0) == which.unsqueeze(1))
        self.log_dict({f"{stage}/{name}": value for name, value in found.items()}, sync_dist=True)

    def _lock(self, tower: Tower) -> None:
        of_images = tower == "image"
        kept = [path for path in _PROJECTIONS[tower] if _has_module(self.towers, path)]
        if not kept:
            raise MimicError(
                f"`locked`: the {tower} tower of {type(self.towers).__name__} has none of the known projections, which "
                f"are still trained: {', '.join(_PROJECTIONS[tower])}."
            )
        for name, parameter in self.towers.named_parameters():
            inside = name.startswith("visual.") == of_images and not name.startswith("logit_")
            if inside and not any(name == path or name.startswith(f"{path}.") for path in kept):
                parameter.requires_grad_(False)


def with_open_clip_moments(
    optimizer: Callable[..., torch.optim.Optimizer], towers: nn.Module
) -> Callable[..., torch.optim.Optimizer]:
    """Return the optimizer with open_clip's defaults for ``betas`` and ``eps`` if it is an AdamW without them.

    open_clip chooses them by whether the architecture's name contains "ViT". Towers do not have this name, so they are
    chosen here by the class of the image tower, or of the timm model in it.

    Args:
        optimizer: Function that makes the optimizer; anything but a ``partial`` of ``torch.optim.AdamW`` is returned
            unchanged.
        towers: Towers of the model.

    Example:
        >>> with_open_clip_moments(partial(torch.optim.AdamW, lr=0.1, eps=1e-7), nn.Module()).keywords
        {'betas': (0.9, 0.999), 'eps': 1e-07, 'lr': 0.1}
    """
    if not isinstance(optimizer, partial) or optimizer.func is not torch.optim.AdamW:
        return optimizer
    visual = getattr(towers, "visual", None)
    kinds = [type(each).__name__ for each in (visual, getattr(visual, "trunk", None))]
    is_vit = any(kind.startswith("VisionTransformer") for kind in kinds)
    moments: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6} if is_vit else {"betas": (0.9, 0.999), "eps": 1e-8}
    return partial(torch.optim.AdamW, *optimizer.args, **moments | optimizer.keywords)


def _checked_tower(tower: str) -> Tower:
    for known in get_args(Tower):
        if tower == known:
            return known  # type: ignore[no-any-return]
    raise MimicError(f"`locked`: there is no tower {tower!r}; {nearest_names(tower, get_args(Tower))}.")


def _has_module(towers: nn.Module, path: str) -> bool:
    at: Any = towers
    for part in path.split("."):
        at = getattr(at, part, None)
    return isinstance(at, nn.Parameter | nn.Module)


def _warmup_cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
