"""What the benchmark measures: plain training, the callback, and two ways to do the same job without it."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50, vit_b_16

from lightning_mimic import GradMimic

TEMPERATURE = 1.0
NOISE = 0.01  # between the model and its reference
CLASSES, IMAGE = 1000, (3, 224, 224)
METHODS = {
    "plain": "plain training",
    "again": "plain training again: the noise",
    "ours": "GradMimic",
    "vmap": "torch.func.vmap(grad) of the whole model; with all parameters its gradients also make the step",
    "loop": "one torch.autograd.grad per sample's loss, with retain_graph",
}


@dataclass(frozen=True)
class Model:
    """An architecture, and where its targets are; the target "all" is ``None`` everywhere."""

    build: Callable[[], nn.Module]
    last: str
    mlp: str

    def path(self, target: str) -> str | None:
        return {"last": self.last, "mlp": self.mlp, "all": None}[target]


MODELS = {
    "vit_b_16": Model(vit_b_16, "heads", "encoder.layers.encoder_layer_11.mlp"),
    # It has no MLP; its last block stands for it.
    "resnet50": Model(resnet50, "fc", "layer4.2"),
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


class Unusable(Exception):  # noqa: N818 - a finding, not an error
    """The method cannot train this model; the reason in a word."""


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
        gradients, losses = self.per_sample(*batch)
        v, length = self.direction()
        # Mixed precision is for the layers; autocast would round the scores too.
        with torch.autocast(self.device.type, enabled=False):
            scores = -torch.stack([gradients[n].flatten(1) @ v[n].flatten() for n in v]).sum(0) / length
            weights = torch.softmax(scores / TEMPERATURE, 0)
            if len(v) == len(list(self.net.parameters())):
                # Every gradient that the step needs is here already: no second pass.
                weighted = [torch.tensordot(weights, gradients[n], 1) for n in v]
                return HandedOver.apply((weights * losses).sum(), weighted, *self.targets().values())
        return (weights * self.losses(batch)).sum()

    def per_sample(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        targets = {name: p.detach() for name, p in self.targets().items()}
        named = itertools.chain(self.net.named_parameters(), self.net.named_buffers())
        others = {name: tensor.detach() for name, tensor in named if name not in targets}

        def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.net, (parameters, others), (image[None],)), label[None])

        return vmap(grad_and_value(loss), in_dims=(None, 0, 0))(targets, images, labels)


class HandedOver(torch.autograd.Function):
    """A loss whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(factor * gradient for gradient in ctx.gradients)


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
    """The module and the callbacks of a method.

    Args:
        method: One of ``METHODS``.
        net: What is trained.
        path: The target within ``net``; ``None``: all parameters.
        reference: As :func:`save_reference` wrote it.
    """
    if method in ("plain", "again"):
        return Plain(net), []
    if method == "ours":
        parameters = "all" if path is None else f"net.{path}"
        return Plain(net), [GradMimic(reference, parameters, temperature=TEMPERATURE)]
    if method == "vmap" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
        raise Unusable("not with BatchNorm")
    return {"vmap": Vmapped, "loop": Looped}[method](net, path, reference), []


def save_reference(net: nn.Module, path: Path) -> Path:
    """A checkpoint that differs from the model by a little noise."""
    generator = torch.Generator().manual_seed(1)
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=NOISE)
    torch.save(state, path)
    return path


@dataclass
class Repeated:
    """A loader that gives one batch again and again; a list would be taken for several loaders."""

    batch: Any
    times: int

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch, self.times)

    def __len__(self) -> int:
        return self.times


def quiet_trainer(callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(callbacks=callbacks, max_epochs=1, devices=1, **dict.fromkeys(quiet, False), **options)


class FlopCount(L.Callback):
    """Counts the arithmetic of chosen steps, their backward passes and hooks included; ``flops`` by step."""

    def __init__(self, steps: Iterable[int] = ()) -> None:
        self.steps = set(steps)
        self.flops: dict[int, int] = {}
        self._counter: FlopCounterMode | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx in self.steps:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops[batch_idx] = self._counter.get_total_flops()
            self._counter = None


class KeepGradient(L.Callback):
    """What the optimizer is given, as one vector."""

    gradient: Tensor

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters()])


def small_net() -> nn.Module:
    layers = {"body": nn.Linear(6, 8), "tanh": nn.Tanh(), "mlp": nn.Linear(8, 8), "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers | {"head": nn.Linear(8, 4)})).double()


def check_agreement(folder: Path) -> None:
    """Raises ``AssertionError`` unless all methods hand the optimizer the same gradient, on a small net in float64."""
    generator = torch.Generator().manual_seed(2)
    images = 3 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    batch = images, torch.randint(4, (5,), generator=generator)
    small = Model(small_net, "head", "mlp")
    for target in ("last", "mlp", "all"):
        given: dict[str, Tensor] = {}
        for method in METHODS:
            torch.manual_seed(0)
            net = small.build()
            module, callbacks = method_of(method, net, small.path(target), save_reference(net, folder / "small.pt"))
            keep = KeepGradient()
            quiet_trainer([*callbacks, keep], accelerator="cpu").fit(module, Repeated(batch, 1))
            given[method] = keep.gradient
        for method in ("vmap", "loop"):
            torch.testing.assert_close(given[method], given["ours"], rtol=1e-9, atol=1e-12)
        assert (given["plain"] - given["ours"]).norm() > 1e-2 * given["plain"].norm(), "the weights do nothing"
