"""LightningModule of an image classifier with any backbone, fine-tuned or as a linear probe."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_mimic.errors import MimicError
from lightning_mimic.reference import match_reference, read_reference
from lightning_mimic.trainer_package import pl


class ImageClassifier(pl.LightningModule):
    """Train a backbone with a linear head by cross-entropy, and log the accuracy.

    Args:
        backbone: Module from images ``(B, C, H, W)`` to features ``(B, D)``: a model made by
            :func:`torchvision_backbone` or :func:`timm_backbone`, or your own.
        num_classes: Number of classes, the outputs of the head.
        image_shape: Shape ``(C, H, W)`` of the images; one forward pass on a blank image determines D.
        freeze_backbone: Whether to train only the head (linear probe); the backbone then stays in evaluation mode.
        pretrained: File with initial weights of the backbone, in any format accepted for a reference: a checkpoint of
            such a classifier, or the backbone's published weights. The head is initialised randomly.
        optimizer: Function from parameters to an optimizer.
        scheduler: Function from an optimizer to a learning-rate scheduler, which is stepped every epoch.

    Raises:
        MimicError: ``backbone`` cannot process such images, or does not return features of shape ``(B, D)``.
        ReferenceLoadError: ``pretrained`` cannot be read or does not fit.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        >>> model = ImageClassifier(net, num_classes=10, image_shape=(1, 8, 8))
        >>> model.sample_losses((torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]))).shape
        torch.Size([3])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        image_shape: tuple[int, int, int],
        freeze_backbone: bool = False,
        pretrained: str | Path | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        #: Whether batches hold the frozen backbone's features ``(B, D)`` instead of images; set by
        #: :class:`~lightning_mimic.data.CachedFeatures` while it provides the batches.
        self.takes_features = False
        self.backbone = backbone
        with torch.no_grad():
            backbone.eval()  # keep the blank image out of running statistics
            try:
                features = backbone(torch.zeros(1, *image_shape))
            except RuntimeError as error:
                raise MimicError(
                    f"`backbone` cannot process an image of shape {tuple(image_shape)} (channels, height, width): "
                    f"{str(error).splitlines()[0].rstrip('.')}. Choose another backbone, such as small_images for "
                    "small colour images, or another transform."
                ) from error
            backbone.train()
        if features.ndim != 2:
            raise MimicError(f"`backbone` returns shape {tuple(features.shape)} for one image; expected (1, D).")
        self.head = nn.Linear(features.shape[1], num_classes)
        if pretrained is not None:
            tensors = read_reference(pretrained, argument="pretrained")
            weights = match_reference(tensors, self._backbone_weights(), argument="pretrained")
            self.load_state_dict(weights, strict=False)
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            backbone.requires_grad_(False)
        self._optimizer = optimizer
        self._scheduler = scheduler
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.train()

    def setup(self, stage: str) -> None:
        # Too few outputs would fail in the middle of an epoch, and too many would go unnoticed.
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if classes not in (None, self.head.out_features):
            raise MimicError(
                f"`num_classes` is {self.head.out_features}, but the data have {classes} classes; set "
                f"model.num_classes={classes}."
            )

    def train(self, mode: bool = True) -> "ImageClassifier":
        """Set training mode, except for a frozen backbone, which stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, checking that cached features still belong to the backbone.

        Raises:
            MimicError: The model takes cached features, and the weights are of another backbone.
        """
        for name, own in self._backbone_weights().items() if self.takes_features else ():
            if name in state_dict and not torch.equal(own, state_dict[name].to(own)):
                raise MimicError(
                    f"the weights are of another backbone ({name!r} differs) than the cached features, so that losses "
                    "cannot be computed from these. Train without `features`, or start with this backbone "
                    "(`pretrained`)."
                )
        return super().load_state_dict(state_dict, strict, assign)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of images, or of features ``(B, D)`` while they are cached."""
        if self.takes_features and images.ndim == 2:
            features = images
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
                features = self.backbone(images)
        logits: Tensor = self.head(features)
        return logits

    def sample_losses(self, batch: Any, logits: Tensor | None = None) -> Tensor:
        """Return one loss per sample, as required by the callback.

        Args:
            batch: Images ``(B, C, H, W)`` and int64 labels ``(B,)``.
            logits: Logits of this batch, if already computed.

        Returns:
            Cross-entropy in nats, shape ``(B,)``.
        """
        images, labels = batch
        return F.cross_entropy(self(images) if logits is None else logits, labels, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        logits = self(images)
        loss = self.sample_losses(batch, logits).mean()
        predicted = logits.detach().argmax(1)
        self.train_accuracy(predicted, labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return {"loss": loss, "label": labels, "predicted": predicted}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def configure_optimizers(self) -> pl.utilities.types.OptimizerLRScheduler:
        try:
            optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        except (TypeError, ValueError) as error:
            raise MimicError(f"`optimizer` cannot be built of these settings: {error}.") from error
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "epoch"}}

    def _evaluate(self, batch: Any, stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{stage}/accuracy", accuracy, prog_bar=stage == "val", batch_size=len(labels))

    def _backbone_weights(self) -> dict[str, Tensor]:
        # Integer tensors are counters of batch normalisation, which are not weights.
        state = {f"backbone.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
