"""TorchGeo's tasks."""

import torch
from torchgeo.trainers import (
    ClassificationTask,
    MultiLabelClassificationTask,
    PixelwiseRegressionTask,
    RegressionTask,
    SemanticSegmentationTask,
)

from scripts.compatibility.case import Case
from scripts.compatibility.data import batches_of

CLASSES, SIZE = 3, 32


def images(key: str, labels):
    """Batches of images, with labels drawn by a function of their shape."""

    def batches(size: int):
        return batches_of({"image": torch.randn(4, 3, SIZE, SIZE).double(), key: labels()}, size)

    return batches


class OwnLosses(SemanticSegmentationTask):
    def sample_losses(self, batch):
        predicted = self(batch["image"]).squeeze(1)
        return torch.stack([self.criterion(p[None], y[None]) for p, y in zip(predicted, batch["mask"], strict=True)])

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


class OwnLossesOfClasses(ClassificationTask):
    def sample_losses(self, batch):
        predicted = self(batch["image"]).squeeze(1)
        return torch.stack([self.criterion(p[None], y[None]) for p, y in zip(predicted, batch["label"], strict=True)])

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


def classified(loss: str, plain: bool, **options) -> Case:
    labels = (lambda: torch.arange(4) % 2) if loss == "bce" else lambda: torch.arange(4) % CLASSES
    task = {"task": "binary"} if loss == "bce" else {"num_classes": CLASSES}
    return Case(
        f"`ClassificationTask`, {loss}" + "".join(f", {name}" for name in options),
        ClassificationTask,
        images("label", labels),
        "model.fc",
        plain=plain,
        fixed=OwnLossesOfClasses,
        options={"model": "test_resnet", "loss": loss, **task, **options},
    )


def segmented(loss: str, plain: bool, **options) -> Case:
    def masks():
        masks = torch.randint(0, 2 if loss == "bce" else CLASSES, (4, SIZE, SIZE))
        masks[0, :5] = 0
        return masks

    task = {"task": "binary"} if loss == "bce" else {"num_classes": CLASSES}
    return Case(
        f"`SemanticSegmentationTask`, {loss}" + "".join(f", {name}" for name in options),
        SemanticSegmentationTask,
        images("mask", masks),
        "model.segmentation_head.0",
        plain=plain,
        fixed=OwnLosses,
        options={"model": "unet", "backbone": "tu-test_resnet", "loss": loss, **task, **options},
    )


CASES = [
    classified("ce", True),
    classified("ce", False, class_weights=[1.0, 2.0, 3.0]),
    classified("bce", True),
    classified("jaccard", False),
    classified("focal", False),
    segmented("ce", True),
    segmented("ce", False, ignore_index=0),
    segmented("bce", True),
    segmented("jaccard", False),
    segmented("focal", False),
    Case(
        "`MultiLabelClassificationTask`, bce",
        MultiLabelClassificationTask,
        images("label", lambda: torch.randint(0, 2, (4, CLASSES))),
        "model.fc",
        options={"model": "test_resnet", "num_classes": CLASSES, "loss": "bce"},
    ),
    Case(
        "`RegressionTask`, mse",
        RegressionTask,
        images("label", lambda: torch.randn(4)),
        "model.fc",
        options={"model": "test_resnet", "num_outputs": 1},
    ),
    Case(
        "`PixelwiseRegressionTask`, mae",
        PixelwiseRegressionTask,
        images("mask", lambda: torch.randn(4, SIZE, SIZE)),
        "model.segmentation_head.0",
        options={"model": "unet", "backbone": "tu-test_resnet", "loss": "mae"},
    ),
]
