"""Checks of trainers and modules that the callback can serve."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.batches import parts_of
from lightning_mimic.errors import MimicError
from lightning_mimic.reference import Aligned, ReferenceSource, refuse_module_on_features
from lightning_mimic.reweighting.hooks import wrap_method
from lightning_mimic.trainer_package import package_of, pl


def check_packages(trainer: object, module: object) -> None:
    """Raise ``TypeError`` if trainer and module come from different ones of Lightning's two packages."""
    package = package_of(trainer)
    if not isinstance(module, package.LightningModule):
        name = f"{type(module).__module__}.{type(module).__name__}"
        raise TypeError(
            f"the Trainer is one of `{package.__name__}`, and the module {name} is none of its LightningModules. "
            "Import both from `lightning` (`import lightning as L`), or both from `pytorch_lightning`: their classes "
            "do not mix."
        )


def check_support(trainer: pl.Trainer, module: pl.LightningModule, reference: ReferenceSource | Aligned | None) -> None:
    """Raise ``MimicError`` for trainers, modules and references with which weights or scores would be wrong."""
    strategy, package = trainer.strategy, package_of(trainer)
    kinds = package.strategies
    known = isinstance(strategy, kinds.SingleDeviceStrategy | kinds.DDPStrategy | kinds.ModelParallelStrategy)
    if not known or isinstance(strategy, kinds.DeepSpeedStrategy):
        raise MimicError(
            f"GradMimic runs on a single device, under DDP and under ModelParallelStrategy with `fully_shard`; "
            f"{type(strategy).__name__} splits or replaces parameters and gradients in ways that are not tested with "
            "it. Use strategy='ddp'."
        )
    elsewhere = "lightning_mimic.Reweighter serves training loops of your own."
    if not module.automatic_optimization:
        raise MimicError(
            f"GradMimic needs automatic optimization; {type(module).__name__} steps its optimizers by hand. {elsewhere}"
        )
    if package.utilities.signature_utils.is_param_in_hook_signature(
        module.training_step, "dataloader_iter", explicit=True
    ):
        raise MimicError(
            "GradMimic must see each batch before training_step does; take `batch` instead of `dataloader_iter`."
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise MimicError(
            f"LBFGS evaluates a batch several times per step, which GradMimic does not follow. {elsewhere}"
        )
    if getattr(module, "takes_features", False):
        refuse_module_on_features(reference)


def keep_ids(trainer: pl.Trainer) -> Callable[[], None]:
    """Keep the ids of batches that ``precision="64-true"`` and ``"bf16-true"`` convert before their transfer.

    Lightning makes a new batch of the converted items there.

    Returns:
        A function that undoes it.
    """

    def around(call: Callable[[Any], Any], batch: Any) -> Any:
        converted = call(batch)
        _give_ids(batch, converted)
        return converted

    return wrap_method(trainer.precision_plugin, "convert_input", around)


def _give_ids(batch: Any, converted: Any) -> None:
    if converted is batch or type(converted) is not type(batch):
        return
    ids = getattr(batch, "ids", None)
    if ids is not None and getattr(converted, "ids", None) is None:
        converted.ids = ids
    for (_, part), (_, new) in zip(parts_of(batch), parts_of(converted), strict=False):
        _give_ids(part, new)  # several loaders give a part each


def backward_scale(trainer: pl.Trainer, module: pl.LightningModule) -> Tensor | None:
    """Return by what the backward pass multiplies the loss against underflow, read without waiting for the device.

    Returns:
        A scalar; ``None`` without a gradient scaler.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=module.device))
    return scale / trainer.accumulate_grad_batches


def loss_of(outputs: Any) -> Tensor | None:
    """Return the loss of what a training_step returned; ``None`` if there is none that can be differentiated."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.grad_fn is not None else None


def with_loss(outputs: Any, loss: Tensor) -> Any:
    """Return what a training_step returned, with a loss in the place of its own."""
    if loss is loss_of(outputs):
        return outputs
    return {**outputs, "loss": loss} if isinstance(outputs, Mapping) else loss
