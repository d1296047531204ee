"""A CLIP over open_clip's towers, trained on image-text pairs."""

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
#: Cosines are multiplied with at most this, as CLIP was trained.
MAX_SCALE = 100.0
#: As open_clip and DataComp train; see :func:`with_open_clip_moments` for the rest.
ADAMW = partial(torch.optim.AdamW, lr=5e-4, weight_decay=0.2)
# Where open_clip's towers end in the space that they share; timm's, ResNet's and HuggingFace's towers included.
_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "image": ("visual.proj", "visual.head.proj", "visual.head.mlp.fc2", "visual.attnpool.c_proj"),
    "text": ("text_projection", "text.text_projection", "text.proj"),
}


class CLIP(pl.LightningModule):
    """Two towers of open_clip under a contrastive loss over the pairs of all ranks.

    The loss is CLIP's, or that of SigLIP where the towers have a ``logit_bias``.

    A batch is ``(images, texts)``: ``(B, 3, H, W)`` as the towers' transform makes them, and int64 tokens ``(B, L)``.
    A batch that evaluates may also be ``(images, labels)``, int64 ``(B,)``, which are classified by ``zero_shot``. Logs
    ``train/loss``, ``val/loss`` (of a process's batch; depends on its size), ``val/image_to_text_R@k``,
    ``val/text_to_image_R@k`` and ``val/zero_shot_accuracy``, and the same as ``test/``.

    Args:
        towers: ``open_clip.create_model(...)``, ``open_clip.CLIP(...)`` or ``open_clip.CustomTextCLIP(...)``; with
            ``init_logit_bias`` they are trained as a SigLIP.
        pretrained: A checkpoint (anything a reference may be: a path, or ``open_clip:ARCHITECTURE/TAG``) whose weights
            are taken over.
        locked: Towers that do not train, ``"image"`` and ``"text"``, but for their projections into the shared space.
        grad_checkpointing: Compute activations anew in the backward pass, to save memory.
        zero_shot: Names and templates of the classes of labelled images.
        optimizer: From parameter groups to an optimizer. The groups are two: weight decay is none for biases, norms,
            other vectors and the logit scale. An AdamW (a ``partial`` of it) without ``betas`` or ``eps`` gets
            open_clip's: 0.9, 0.98 and 1e-6 where the image tower is a vision transformer, else 0.9, 0.999 and 1e-8.
        warmup_steps: Over which the learning rate rises from zero, linearly; then it falls as a cosine, to zero at
            the end of the fit.
        block_size: Pairs of this rank whose similarities to all ranks' pairs are held at once. The loss needs about
            six matrices of so many rows and as many columns as there are pairs.

    Raises:
        MimicError: Towers of another kind, or an unknown one to lock.
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
        self.locked = [_known(tower) for tower in locked]
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
        """Embeddings of images, shape ``(B, K)``."""
        embeddings: Tensor = self.towers.encode_image(images, normalize=normalize)  # type: ignore[operator]
        return embeddings

    def encode_text(self, texts: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings of captions, shape ``(B, K)``."""
        embeddings: Tensor = self.towers.encode_text(texts, normalize=normalize)  # type: ignore[operator]
        return embeddings

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with, a scalar."""
        return self._logit_scale.exp().reshape(())

    @property
    def bias(self) -> Tensor | None:
        """What is added to scaled cosines, a scalar; ``None`` for a CLIP, whose loss does not depend on it."""
        bias = getattr(self.towers, "logit_bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def sample_losses(self, batch: Any) -> Tensor:
        """One loss per pair, the contract with the callback.

        Args:
            batch: Images and tokens.

        Returns:
            Half of each pair's row and half of its column, shape ``(B,)``; ``(B · ranks,)`` where there are several, of
            all ranks' pairs in their order (:func:`~lightning_mimic.models.global_pair_losses`).
        """
        images, texts = batch
        embedded = self.encode_image(images), self.encode_text(texts)
        return global_pair_losses(*embedded, self.scale, self.bias, block_size=self.block_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.sample_losses(batch)
        rows = len(batch[0])
        self.log("train/loss", losses.detach().mean(), on_step=True, on_epoch=True, batch_size=rows)
        # DDP averages over ranks, and each holds its own part of every pair's gradient.
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
        """Training mode, in which locked towers stay in evaluation mode."""
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
        if steps < 0 or math.isinf(steps):  # it says -1 where the data has no length
            raise MimicError(
                "the learning rate falls to zero at the end of the fit, and it is not known where that is: give the "
                "trainer `max_steps`, or the data a length (`samples_per_epoch`, `sizes.json` beside the shards) and "
                "the trainer `max_epochs`."
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
        # Each of the loaders has its own figures.
        log = partial(self.log, on_epoch=True, add_dataloader_idx=False, batch_size=len(images))
        if others.ndim == 1:
            if self.zero_shot is None:
                raise MimicError("labelled images came to evaluate, and the model has no `zero_shot` to name classes.")
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
        if self.trainer.world_size > 1:  # ranks may have had different numbers of pairs
            images, texts, tokens = (torch.cat(gather_rows(each)) for each in (images, texts, tokens))
        _, which = torch.unique(tokens, dim=0, return_inverse=True)
        found = recall_at_k(images, texts, which.unsqueeze(0) == which.unsqueeze(1))
        self.log_dict({f"{stage}/{name}": value for name, value in found.items()}, sync_dist=True)

    def _lock(self, tower: Tower) -> None:
        of_images = tower == "image"
        kept = [path for path in _PROJECTIONS[tower] if _is_there(self.towers, path)]
        if not kept:
            raise MimicError(
                f"`locked`: the {tower} tower of {type(self.towers).__name__} has none of the projections that could "
                f"go on training: {', '.join(_PROJECTIONS[tower])}."
            )
        for name, parameter in self.towers.named_parameters():
            inside = name.startswith("visual.") == of_images and not name.startswith("logit_")
            if inside and not any(name == path or name.startswith(f"{path}.") for path in kept):
                parameter.requires_grad_(False)


def with_open_clip_moments(
    optimizer: Callable[..., torch.optim.Optimizer], towers: nn.Module
) -> Callable[..., torch.optim.Optimizer]:
    """Return an AdamW whose ``betas`` and ``eps``, where they are left out, are those that open_clip trains with.

    open_clip goes by the architecture's name, "ViT" or not, which towers do not know; here it is the class of the image
    tower, or of timm's model within.

    Args:
        optimizer: Any that is no ``partial`` of ``torch.optim.AdamW`` is returned as it is.
        towers: Of the model.

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


def _known(tower: str) -> Tower:
    for known in get_args(Tower):
        if tower == known:
            return known  # type: ignore[no-any-return]
    raise MimicError(f"`locked`: there is no tower {tower!r}; {nearest_names(tower, get_args(Tower))}.")


def _is_there(towers: nn.Module, path: str) -> bool:
    at: Any = towers
    for part in path.split("."):
        at = getattr(at, part, None)
    return isinstance(at, nn.Parameter | nn.Module)


def _warmup_cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
