"""lightly's losses of self-supervised learning, and a classifier on the same backbone."""

import timm
import torch
from lightly import loss as losses
from lightly.models.modules import SimCLRProjectionHead, SimSiamPredictionHead, SimSiamProjectionHead

from scripts.compatibility.case import Case
from scripts.compatibility.data import batches_of
from scripts.compatibility.modules import Trained

SIZE = 32


class TwoViews(Trained):
    def __init__(self, loss) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.head = SimCLRProjectionHead(96, 32, 16)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        one, two, _ = batch
        return self.loss(self.head(self.backbone(one)), self.head(self.backbone(two)))


class SimSiam(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.projection = SimSiamProjectionHead(96, 32, 16)
        self.head = SimSiamPredictionHead(16, 8, 16)
        self.loss = losses.NegativeCosineSimilarity()

    def training_step(self, batch, batch_idx):
        one, two = (self.projection(self.backbone(view)) for view in batch[:2])
        return 0.5 * (self.loss(self.head(one), two.detach()) + self.loss(self.head(two), one.detach()))


class Supervised(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.head = torch.nn.Linear(96, 3)
        self.loss = torch.nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        view, _, labels = batch
        return self.loss(self.head(self.backbone(view)), labels)


def views(size: int):
    def view():
        return torch.randn(4, 3, SIZE, SIZE).double()

    return batches_of((view(), view(), torch.arange(4) % 3), size)


CASES = [
    Case("SimCLR, `NTXentLoss`", TwoViews, views, "head", plain=False, options={"loss": losses.NTXentLoss()}),
    Case("`BarlowTwinsLoss`", TwoViews, views, "head", plain=False, options={"loss": losses.BarlowTwinsLoss()}),
    Case("`VICRegLoss`", TwoViews, views, "head", plain=False, options={"loss": losses.VICRegLoss()}),
    Case("SimSiam, `NegativeCosineSimilarity`", SimSiam, views, "head"),
    Case("classifier", Supervised, views, "head"),
]
