"""lightly's losses of self-supervised learning, and a classifier on the same backbone."""

import timm
import torch
import torch.nn.functional as F
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


class SimCLROfSamples(TwoViews):
    def sample_losses(self, batch):
        views = torch.cat(batch[:2])
        z = F.normalize(self.head(self.backbone(views)), dim=1)
        similar = (z @ z.T / self.loss.temperature).fill_diagonal_(-torch.inf)
        other = torch.arange(len(z), device=z.device).roll(len(z) // 2)
        return F.cross_entropy(similar, other, reduction="none").view(2, -1).mean(0)

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


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


class SimSiamOfSamples(SimSiam):
    def sample_losses(self, batch):
        one, two = (self.projection(self.backbone(view)) for view in batch[:2])
        forwards = F.cosine_similarity(self.head(one), two.detach())
        return -0.5 * (forwards + F.cosine_similarity(self.head(two), one.detach()))

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


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


def mixed(loss: str, fixed=None) -> Case:
    options = {"loss": getattr(losses, loss)()}
    return Case(f"`{loss}`", TwoViews, views, "head", plain=False, fixed=fixed, options=options, mixes=True)


CASES = [
    mixed("NTXentLoss", SimCLROfSamples),
    mixed("BarlowTwinsLoss"),
    mixed("VICRegLoss"),
    Case("SimSiam, `NegativeCosineSimilarity`", SimSiam, views, "head", fixed=SimSiamOfSamples),
    Case("classifier", Supervised, views, "head"),
]
