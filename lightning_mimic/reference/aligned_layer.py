"""The last linear layer of a model, fitted to what a reference says of the same samples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import is_linear, owning_layer
from lightning_mimic.reference.aligned import Aligned, AlignedDirection
from lightning_mimic.reference.model import reference_model
from lightning_mimic.reference.ridge import ridge_fit
from lightning_mimic.reference.running_statistics import RunningStatistics


class AlignedLayer(AlignedDirection):
    """From one linear layer to that which would give the reference's outputs.

    Args:
        aligned: The reference and how to ask it.
        module: The module that is trained.
        targets: All parameters of its target layer, by full name.

    Raises:
        MimicError: The target is not one whole linear layer, or ``rotate`` is off.
    """

    def __init__(self, aligned: Aligned, module: nn.Module, targets: Mapping[str, nn.Parameter]) -> None:
        if not aligned.rotate:
            raise MimicError(
                "`Aligned(rotate=False)`: only the embeddings of a CLIP are rotated (a module with `encode_image` and "
                f"`encode_text`), and this is a {type(module).__name__}; leave `rotate` out."
            )
        path, layer = owning_layer(module, targets)
        whole = {f"{path}.{name}" for name, _ in layer.named_parameters(recurse=False)}
        if not isinstance(layer, nn.Linear) or not is_linear(layer) or set(targets) != whole:
            raise MimicError(
                f"`parameters`: an aligned reference refits one whole nn.Linear, not {', '.join(sorted(targets))} of a "
                f"{type(layer).__name__}. Name the path of the model's last linear layer."
            )
        model = reference_model(aligned.reference, module, method="forward")
        # Without a bias the layer's outputs are fitted about zero.
        self._layer = RunningStatistics(centred=layer.bias is not None)
        super().__init__(aligned, model, targets, layer.in_features, {"layer": self._layer})
        self._weight, self._bias = f"{path}.weight", f"{path}.bias" if layer.bias is not None else None

    def _run(self, batch: Any, features: Mapping[str, Tensor]) -> Tensor:
        shape = (*features[self._weight].shape[:-1], len(self[self._weight]))
        with torch.inference_mode():
            outputs = self._model((self._aligned.inputs or _first)(batch))
        if not isinstance(outputs, Tensor):
            raise MimicError(f"`Aligned`: the reference gives a {type(outputs).__name__}; expected a tensor.")
        if outputs.shape != shape:
            raise MimicError(
                f"`Aligned`: the reference gives shape {tuple(outputs.shape)} where the target layer gives {shape}; "
                "both must say the same things (classes, in one order) of the same samples."
            )
        return outputs

    def _add(self, features: Mapping[str, Tensor], outputs: Tensor, decay: float) -> Tensor:
        return self._layer.add(features[self._weight].flatten(0, -2), outputs.flatten(0, -2), decay)

    def _fit(self) -> tuple[dict[str, Tensor], Tensor]:
        fit = ridge_fit(self._layer, self._aligned.penalty)
        return {self._weight: fit.weight} | ({} if self._bias is None else {self._bias: fit.bias}), fit.sound


def _first(batch: Any) -> Any:
    if isinstance(batch, list | tuple) and batch:
        return batch[0]
    raise MimicError(
        f"the batch is a {type(batch).__name__}; say what of it the reference is called with: "
        "`Aligned(..., inputs=lambda batch: batch['image'])`."
    )
