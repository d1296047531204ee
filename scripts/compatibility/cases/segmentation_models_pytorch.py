"""segmentation_models_pytorch's losses on a U-Net."""

import torch
from segmentation_models_pytorch import Unet, losses

from scripts.compatibility.case import Case
from scripts.compatibility.data import batches_of
from scripts.compatibility.modules import Trained

CLASSES, SIZE = 3, 32


class Segmentation(Trained):
    def __init__(self, kind: str, classes: int = CLASSES, **options) -> None:
        super().__init__()
        self.model = Unet("tu-test_resnet", encoder_weights=None, classes=classes)
        self.loss = getattr(losses, kind)(**options)

    def training_step(self, batch, batch_idx):
        images, masks = batch
        return self.loss(self.model(images), masks)


class SegmentationOfSamples(Segmentation):
    def sample_losses(self, batch):
        images, masks = batch
        predicted = self.model(images)
        return torch.stack([self.loss(p[None], y[None]) for p, y in zip(predicted, masks, strict=True)])

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


def case(kind: str, plain: bool, mode: str | None = "multiclass", **options) -> Case:
    def batches(size: int):
        images = torch.randn(4, 3, SIZE, SIZE).to(torch.float32 if kind == "LovaszLoss" else torch.float64)
        masks = torch.randint(0, CLASSES, (4, SIZE, SIZE))
        masks[0, :7] = 0
        if mode in ("binary", "multilabel"):
            masks = torch.nn.functional.one_hot(masks, CLASSES).permute(0, 3, 1, 2).double()
            masks = masks[:, :1] if mode == "binary" else masks
        return batches_of((images, masks), size)

    given = ([mode] if mode else []) + [f"{name}={value}" for name, value in options.items()]
    classes = 1 if mode == "binary" else CLASSES
    own = {} if kind.startswith("Soft") else {"mode": mode}
    return Case(
        f"`{kind}`, {', '.join(given)}",
        Segmentation,
        batches,
        "model.segmentation_head.0",
        plain=plain,
        fixed=SegmentationOfSamples,
        precision="32-true" if kind == "LovaszLoss" else "64-true",
        options={"kind": kind, "classes": classes, **own, **options},
    )


CASES = [
    case("DiceLoss", False),
    case("DiceLoss", False, "binary"),
    case("JaccardLoss", False),
    case("TverskyLoss", False),
    case("LovaszLoss", False),
    case("LovaszLoss", True, per_image=True),
    case("FocalLoss", True),
    case("FocalLoss", True, "binary"),
    case("FocalLoss", False, "binary", normalized=True),
    case("FocalLoss", False, ignore_index=0),
    case("SoftBCEWithLogitsLoss", True, "multilabel"),
    case("SoftCrossEntropyLoss", True, "multiclass", smooth_factor=0.1),
]
