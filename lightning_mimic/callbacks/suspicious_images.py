"""The most suspicious images of an epoch, in the trainer's loggers."""

from typing import Any

import torch
from torch import Tensor

from lightning_mimic import distributed
from lightning_mimic.batches import tensors_of
from lightning_mimic.callbacks.grad_mimic import GradMimic
from lightning_mimic.errors import MimicError
from lightning_mimic.trainer_package import pl

#: Score, id (or place in the batch) and image of a sample.
Found = tuple[float, str, Tensor]


class SuspiciousImages(pl.Callback):
    """Log the images with the lowest scores of an epoch, to TensorBoard or Weights & Biases.

    Stands behind :class:`~lightning_mimic.GradMimic` among the callbacks. Images are those of the batch, augmented as
    they train; normalised ones are stretched to 0 to 1. Costs a host sync in each step of the epochs that are logged.

    Args:
        every_n_epochs: Log in every n-th epoch.
        samples: Number of images, over all ranks.

    Raises:
        MimicError: An argument below 1; at the start of ``fit``, no GradMimic in front of it, or no logger that takes
            images; in training, a batch without images.

    Example:
        >>> SuspiciousImages(every_n_epochs=0)
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `every_n_epochs` is 0; expected a whole number of 1 or more.
    """

    def __init__(self, every_n_epochs: int = 1, samples: int = 16) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("samples", samples)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise MimicError(f"`{name}` is {value!r}; expected a whole number of 1 or more.")
        self.every_n_epochs = every_n_epochs
        self.samples = samples
        self._lowest: list[Found] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(each, GradMimic) for each in callbacks[: callbacks.index(self)]):
            raise MimicError("SuspiciousImages shows what GradMimic scores; put it behind a GradMimic in `callbacks`.")
        if not any(_takes_images(logger) for logger in trainer.loggers):
            kinds = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
            raise MimicError(
                f"SuspiciousImages needs a logger that takes images, a TensorBoardLogger or WandbLogger; the trainer "
                f"has {kinds}."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        mimic = next(each for each in trainer.callbacks if isinstance(each, GradMimic))  # type: ignore[attr-defined]
        if mimic.last_step is None:
            return
        result, ids = mimic.last_step
        images = _images_in(batch)
        if images is None or len(images) != len(result):
            raise MimicError(
                f"SuspiciousImages: the batch (a {type(batch).__name__}) holds no tensor of {len(result)} images; "
                "expected one of shape (B, C, H, W) with 1, 3 or 4 channels."
            )
        scores = torch.where(torch.isfinite(result.scores), result.scores, torch.inf).float()
        lowest, rows = torch.topk(scores, min(self.samples, len(scores)), largest=False)
        for score, row in zip(lowest.tolist(), rows.tolist(), strict=True):
            if score < torch.inf:
                name = f"batch {batch_idx}, row {row}" if ids is None else str(_item(ids, row))
                self._lowest.append((score, name, images[row].detach().float().cpu()))
        self._lowest = sorted(self._lowest, key=_score)[: self.samples]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        found = [each for of_rank in distributed.gather_objects(self._lowest) for each in of_rank]
        self._lowest = []
        found = sorted(found, key=_score)[: self.samples]
        if not trainer.is_global_zero or not found:
            return
        captions = [f"{name}: {score:.3g}" for score, name, _ in found]
        pictures = [_stretched(image) for _, _, image in found]
        for logger in trainer.loggers:
            _log(logger, pictures, captions, trainer.global_step)


TAG = "mimic/most_suspicious"


def _score(found: Found) -> float:
    return found[0]


def _item(ids: Any, row: int) -> Any:
    return ids[row].item() if isinstance(ids, Tensor) else ids[row]


def _takes_images(logger: Any) -> bool:
    return hasattr(logger, "log_image") or hasattr(logger.experiment, "add_image")


def _log(logger: Any, images: list[Tensor], captions: list[str], step: int) -> None:
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(TAG, [image.permute(1, 2, 0).numpy() for image in images], step=step, caption=captions)
    elif hasattr(logger.experiment, "add_image"):  # TensorBoard
        for place, image in enumerate(images):
            logger.experiment.add_image(f"{TAG}/{place:03d}", image, step)
        logger.experiment.add_text(TAG, "\n".join(f"- {caption}" for caption in captions), step)


def _images_in(batch: Any) -> Tensor | None:
    """Return the first tensor of a batch that holds images."""
    return next((each for each in tensors_of(batch) if each.ndim == 4 and each.shape[1] in (1, 3, 4)), None)


def _stretched(image: Tensor) -> Tensor:
    low, high = float(image.min()), float(image.max())
    if low >= 0 and high <= 1:
        return image
    return (image - low) / max(high - low, 1e-12)
