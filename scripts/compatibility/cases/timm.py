"""timm's models, losses and mixing of images."""

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from scripts.compatibility.case import Case
from scripts.compatibility.data import batches_of
from scripts.compatibility.modules import Trained

CLASSES, SIZE = 4, 32


class Classifier(Trained):
    def __init__(self, loss, name: str = "test_resnet", **options) -> None:
        super().__init__()
        self.model = timm.create_model(name, num_classes=CLASSES, **options)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return self.loss(self.model(images), labels)


def mixing(**options) -> Mixup:
    np.random.seed(0)
    return Mixup(num_classes=CLASSES, label_smoothing=0.1, **options)


class MixingClassifier(Classifier):
    def __init__(self, loss, mixup) -> None:
        super().__init__(loss)
        self.mixup = mixup()

    def training_step(self, batch, batch_idx):
        return super().training_step(self.mixup(*batch), batch_idx)


def images(size: int):
    return batches_of((torch.randn(4, 3, SIZE, SIZE).double(), torch.arange(4) % CLASSES), size)


def several_labels(size: int):
    return batches_of((torch.randn(4, 3, SIZE, SIZE).double(), torch.randint(0, 2, (4, CLASSES)).double()), size)


def mixed(mixup):
    def batches(size: int):
        x, y = next(iter(images(4)))
        x, soft = mixup()(x, y)
        return batches_of((x, soft.double()), size)

    return batches


def case(name: str, loss, batches=images, plain: bool = True, **options) -> Case:
    return Case(name, Classifier, batches, "model.fc", plain=plain, options={"loss": loss, **options})


def in_step(name: str, mixup) -> Case:
    slow = case(name, SoftTargetCrossEntropy(), mixed(mixup))
    return Case(
        name,
        MixingClassifier,
        images,
        "model.fc",
        options={"loss": SoftTargetCrossEntropy(), "mixup": mixup},
        slow=slow,
    )


def mix():
    return mixing(mixup_alpha=0.8)


def cut():
    return mixing(mixup_alpha=0.0, cutmix_alpha=1.0)


def mix_elements():
    return mixing(mixup_alpha=0.8, mode="elem")


CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8,) * 4}
VIT = {"img_size": SIZE, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}

CASES = [
    case("cross-entropy", torch.nn.CrossEntropyLoss()),
    case("`LabelSmoothingCrossEntropy`", LabelSmoothingCrossEntropy(0.1)),
    case("`BinaryCrossEntropy`", BinaryCrossEntropy(0.1)),
    case("`AsymmetricLossMultiLabel`", AsymmetricLossMultiLabel(), several_labels),
    case("`SoftTargetCrossEntropy`, `Mixup` in the collate function", SoftTargetCrossEntropy(), mixed(mix)),
    in_step("`Mixup` in training_step", mix),
    in_step("`Mixup` by element in training_step", mix_elements),
    in_step("CutMix in training_step", cut),
    Case(
        "vision transformer",
        Classifier,
        images,
        "model.head",
        options={"loss": torch.nn.CrossEntropyLoss(), "name": "vit_tiny_patch16_224", **VIT},
    ),
    Case(
        "ConvNeXt",
        Classifier,
        images,
        "model.head.fc",
        options={
            "loss": torch.nn.CrossEntropyLoss(),
            "name": "convnext_atto",
            "depths": (1, 1, 1, 1),
            "dims": (8,) * 4,
        },
    ),
]
