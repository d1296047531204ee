"""Plain training, the callback, and two ways to do the same job by hand."""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchvision.models import resnet50, vit_b_16

from lightning_mimic import GradMimic
from scripts.benchmarks.training_steps import UnusableError

TEMPERATURE = 1.0
METHODS = {
    "plain": "plain training",
    "again": "plain training again: the noise",
    "ours": "GradMimic",
    "kept": "GradMimic with keep_output_gradients",
    "vmap": "torch.func.vmap(grad) of the whole model; with all parameters its gradients also make the step",
    "loop": "one torch.autograd.grad per sample's loss, with retain_graph",
}


@dataclass(frozen=True)
class Model:
    """An architecture, where its targets are, and what it takes."""

    build: Callable[[], nn.Module]
    last: str
    mlp: str
    shape: tuple[int, ...] = (3, 224, 224)
    classes: int = 1000

    def path(self, target: str) -> str | None:
        """Return the module of a target; ``None`` for all parameters."""
        return {"last": self.last, "mlp": self.mlp}.get(target)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, *self.shape), torch.randint(self.classes, (size,))


def vit_tiny() -> nn.Module:
    import timm  # large, and seldom needed here

    net: nn.Module = timm.create_model("vit_tiny_patch16_224")
    return net


def small_net() -> nn.Module:
    layers = {"body": nn.Linear(6, 8), "tanh": nn.Tanh(), "mlp": nn.Linear(8, 8), "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers | {"head": nn.Linear(8, 4)}))


MODELS = {
    "vit_b_16": Model(vit_b_16, "heads", "encoder.layers.encoder_layer_11.mlp"),
    # It has no MLP; its last block stands for it.
    "resnet50": Model(resnet50, "fc", "layer4.2"),
    "vit_tiny": Model(vit_tiny, "head", "blocks.11.mlp"),
    "small": Model(small_net, "head", "mlp", (6,), 4),  # to try the tool
}


class Plain(L.LightningModule):
    """A module as users have it, with nothing of ours."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Baseline(Plain):
    """Scores and weights the samples by hand; the gradients of the samples are up to the subclass."""

    def __init__(self, net: nn.Module, path: str | None, reference: Path) -> None:
        super().__init__(net)
        names = [name for name, _ in net.named_parameters() if path is None or name.startswith(f"{path}.")]
        tensors = torch.load(reference, weights_only=True)
        self.reference = {name: tensors[name] for name in names}

    def on_fit_start(self) -> None:
        self.reference = {name: tensor.to(self.device) for name, tensor in self.reference.items()}

    def targets(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.net.named_parameters() if name in self.reference}

    def losses(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels, reduction="none")

    def direction(self) -> tuple[dict[str, Tensor], Tensor]:
        """The way to the reference, and its length."""
        v = {name: self.reference[name] - p.detach() for name, p in self.targets().items()}
        return v, torch.stack([tensor.norm() for tensor in v.values()]).norm()


class Vmapped(Baseline):
    """All samples' gradients at once, each as large as its parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        targets = self.targets().items()
        gradients = self.per_sample(*batch)
        v, length = self.direction()
        # Mixed precision is for the layers; autocast would round the scores too.
        with torch.autocast(self.device.type, enabled=False):
            scores = -torch.stack([gradients[n].flatten(1) @ v[n].flatten() for n in v]).sum(0) / length
            weights = torch.softmax(scores / TEMPERATURE, 0)
            if len(targets) == len(list(self.net.parameters())):
                # Every gradient that the step needs is here already, so that no second pass is: theirs is this sum's.
                return torch.stack([(p * torch.tensordot(weights, gradients[n], 1)).sum() for n, p in targets]).sum()
        return (weights * self.losses(batch)).sum()

    def per_sample(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        targets = {name: p.detach() for name, p in self.targets().items()}
        named = itertools.chain(self.net.named_parameters(), self.net.named_buffers())
        others = {name: tensor.detach() for name, tensor in named if name not in targets}

        def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.net, (parameters, others), (image[None],)), label[None])

        return vmap(grad(loss), in_dims=(None, 0, 0))(targets, images, labels)


class Looped(Baseline):
    """A backward pass per sample, through the whole batch's graph."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, targets = self.losses(batch), self.targets()
        v, length = self.direction()
        dots = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(targets.values()), retain_graph=True)
            dots.append(torch.stack([(g * v[n]).sum() for n, g in zip(targets, gradients, strict=True)]).sum())
        weights = torch.softmax(-torch.stack(dots) / length / TEMPERATURE, 0)
        return (weights * losses).sum()


def method_of(
    method: str, net: nn.Module, path: str | None, reference: Path
) -> tuple[L.LightningModule, list[L.Callback]]:
    """Return the module and the callbacks of a method; a ``path`` of ``None`` stands for all parameters."""
    if method in ("plain", "again"):
        return Plain(net), []
    if method == "ours":
        parameters = "all" if path is None else f"net.{path}"
        return Plain(net), [GradMimic(reference, parameters, temperature=TEMPERATURE)]
    if method in ("kept", "vmap") and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
        raise UnusableError("not with BatchNorm")
    if method == "kept" and path is not None:
        raise UnusableError("only with all parameters")
    if method == "kept":
        return Plain(net), [GradMimic(reference, "all", temperature=TEMPERATURE, keep_output_gradients=True)]
    return {"vmap": Vmapped, "loop": Looped}[method](net, path, reference), []
