"""Both projections of a CLIP, fitted to the embeddings of a reference after these were brought into its frame."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.gradients.layer_rules import find_rule, is_linear
from lightning_mimic.reference.aligned import Aligned, AlignedDirection
from lightning_mimic.reference.aligned_layer import AlignedLayer
from lightning_mimic.reference.model import reference_model
from lightning_mimic.reference.pair_calibration import MIN_PAIRS, PairCalibration, RunningPairCalibration
from lightning_mimic.reference.procrustes import procrustes
from lightning_mimic.reference.ridge import ridge_fit
from lightning_mimic.reference.running_statistics import RunningStatistics

#: Part of the reference's separation of pairs and mismatches, beyond chance, that its alignment must keep.
LEAST_KEPT = 0.75


def has_towers(module: nn.Module) -> bool:
    """Whether a module is a CLIP, with ``encode_image`` and ``encode_text``."""
    return all(callable(getattr(module, f"encode_{tower}", None)) for tower in ("image", "text"))


def aligned_direction(
    aligned: Aligned, module: nn.Module, targets: Mapping[str, nn.Parameter], *, posteriors: bool = False
) -> AlignedDirection:
    """The direction to an aligned reference: of a CLIP both projections are fitted, else one linear layer.

    Args:
        aligned: The reference and how to ask it.
        module: The module that is trained.
        targets: The target parameters by name.
        posteriors: Of a CLIP, ask the reference for the probability of a match of every pair.
    """
    if has_towers(module):
        return AlignedTowers(aligned, module, targets, posteriors=posteriors)
    return AlignedLayer(aligned, module, targets)


@dataclass(frozen=True)
class _Projection:
    """The end of a tower, with what is known of it so far."""

    weight: str
    bias: str | None
    transposed: bool  # an nn.Linear's; a bare matrix has the features first
    frame: RunningStatistics  # the reference's normalised embeddings beside the model's
    layer: RunningStatistics  # the model's features beside the reference's embeddings, as long as the model's


class AlignedTowers(AlignedDirection):
    """From a CLIP's two projections to those that would give the reference's embeddings.

    A contrastive loss does not change when images and texts are rotated together, so embeddings of two CLIPs can only
    be compared after a rotation (:func:`~lightning_mimic.reference.procrustes.procrustes`). Ridge regression is linear
    in its targets: the projections are fitted in the reference's own frame, and the fit is rotated by what is known by
    then, so that the sums of early steps stay good when the rotation gets better.

    Args:
        aligned: The reference and how to ask it.
        module: The module that is trained; has ``encode_image`` and ``encode_text``.
        targets: The two projections, by full name: that of the images below a part called ``visual``.
        posteriors: Ask the reference for every micro-batch, and give each pair's probability of a match.

    Raises:
        MimicError: The targets are not two whole projections.
    """

    def __init__(
        self,
        aligned: Aligned,
        module: nn.Module,
        targets: Mapping[str, nn.Parameter],
        *,
        posteriors: bool = False,
    ) -> None:
        self._images, self._texts = _projections(module, targets)
        self._both = (self._images, self._texts)
        widths = [targets[p.weight].shape[1 if p.transposed else 0] for p in self._both]
        self._width = targets[self._images.weight].shape[0 if self._images.transposed else 1]
        statistics = {"image_frame": self._images.frame, "text_frame": self._texts.frame}
        statistics |= {"image_layer": self._images.layer, "text_layer": self._texts.layer}
        model = reference_model(aligned.reference, module, method="encode_image")
        super().__init__(aligned, model, targets, max(widths), statistics, asks_always=posteriors)
        self._similarities = RunningPairCalibration()  # the reference's own
        self._aligned_similarities = RunningPairCalibration()  # of pairs before they enter the fit

    @property
    def wrong_share(self) -> Tensor:
        """The estimated share of mismatched pairs, a scalar; 0 where nothing is known."""
        return self._similarities.wrong_share

    def calibration(self) -> PairCalibration | None:
        """Return what is known of the reference's own similarities, and the separation of the aligned ones."""
        known, aligned = self._similarities.calibration(), self._aligned_similarities.calibration()
        if known is None:
            return None
        return replace(known, aligned_separation=None if aligned is None else aligned.separation)

    def objection(self) -> str | None:
        """Return why scores towards the alignment say less than the reference does, as a phrase (a host sync)."""
        if self._asks_always:  # the weights do not rest on it
            return None
        known, aligned = self._similarities.calibration(), self._aligned_similarities.calibration()
        if known is None or aligned is None or not known.informative or aligned.samples < MIN_PAIRS:
            return None
        if aligned.separation - 0.5 >= LEAST_KEPT * (known.separation - 0.5):
            return None
        return (
            f"the mimic scores say less than the reference does: to it, a pair is more similar than a mismatch with "
            f"probability {known.separation:.2f}, and to its alignment in the model's features with "
            f"{aligned.separation:.2f}"
        )

    def failure_message(self) -> str | None:
        """Return why alignment failed or says less than the reference, as a sentence (a host sync)."""
        objection = self.objection()
        if objection is None:
            return super().failure_message()
        return f"{objection}. Weigh and filter by the reference's own similarities (`weighting=Posterior()`)."

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to go on as if it had not stopped."""
        own, aligned = self._similarities.state_dict(), self._aligned_similarities.state_dict()
        return super().state_dict() | {"similarities": own, "aligned_similarities": aligned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; begins anew, with a warning, if that was another alignment."""
        super().load_state_dict(state)
        if state["of"] != self._key() or "similarities" not in state:  # not there in older versions
            return
        for name, calibration in (
            ("similarities", self._similarities),
            ("aligned_similarities", self._aligned_similarities),
        ):
            device = self._fitted.device
            calibration.load_state_dict({key: tensor.to(device) for key, tensor in state[name].items()})

    def _run(self, batch: Any, features: Mapping[str, Tensor]) -> Tensor:
        images, texts = (self._aligned.inputs or _pair)(batch)
        with torch.inference_mode():
            embeddings = [self._model.encode_image(images), self._model.encode_text(texts)]  # type: ignore[operator]
            normalised = [F.normalize(each.to(torch.promote_types(each.dtype, torch.float32))) for each in embeddings]
        rows = len(features[self._images.weight])
        shapes = [tuple(each.shape) for each in normalised]
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != rows:
            raise MimicError(
                f"`Aligned`: the reference gives shapes {shapes[0]} and {shapes[1]} for {rows} pairs; expected a row "
                "each, images and texts of one width."
            )
        if not self._aligned.rotate and shapes[0][1] != self._width:
            raise MimicError(
                f"`Aligned(rotate=False)`: the reference's embeddings have {shapes[0][1]} dimensions and the model's "
                f"{self._width}, so they cannot share a frame; leave `rotate` out."
            )
        return torch.cat(normalised, 1)

    def _add(self, features: Mapping[str, Tensor], outputs: Tensor, decay: float) -> Tensor:
        held = []
        for projection, reference in zip(self._both, outputs.chunk(2, dim=1), strict=True):
            x = features[projection.weight]
            own = self._projected(projection, x, self._parameters)
            length = torch.linalg.vector_norm(own, dim=1, keepdim=True)
            held.append(projection.frame.add(reference, own / length, decay))
            held.append(projection.layer.add(x, reference * length, decay))
        return torch.stack(held).all()

    def _fit(self) -> tuple[dict[str, Tensor], Tensor]:
        rotation = None
        if self._aligned.rotate:
            rotation = procrustes([projection.frame for projection in self._both]).matrix  # (d_ref, d)
        fitted, sound = {}, []
        for projection in self._both:
            fit = ridge_fit(projection.layer, self._aligned.penalty)  # from the features to the reference's frame
            weight, bias = fit.weight.T, fit.bias
            if rotation is not None:
                weight, bias = weight @ rotation, bias @ rotation
            fitted[projection.weight] = weight.T if projection.transposed else weight
            if projection.bias is not None:
                fitted[projection.bias] = bias
            sound.append(fit.sound & torch.isfinite(weight).all())
        return fitted, torch.stack(sound).all()

    def _judge(self, features: Mapping[str, Tensor], outputs: Tensor) -> Tensor | None:
        # The features of a sample that held NaN are NaN; what the reference says of it is of a blank.
        clean = torch.stack([torch.isfinite(features[each.weight]).all(1) for each in self._both]).all(0)
        images, texts = torch.where(clean[:, None], outputs, torch.nan).chunk(2, dim=1)
        self._similarities.update(images, texts)
        if self._enough:
            fitted = [self._projected(each, features[each.weight], self._reference) for each in self._both]
            self._aligned_similarities.update(*(F.normalize(each, dim=1) for each in fitted))
        return self._similarities.posteriors(images, texts) if self._asks_always else None

    def _projected(self, projection: _Projection, features: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors[projection.weight].detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            own = features.to(dtype) @ (weight.T if projection.transposed else weight).to(dtype)
        return own if projection.bias is None else own + tensors[projection.bias].detach().to(dtype)


def _projections(module: nn.Module, targets: Mapping[str, nn.Parameter]) -> list[_Projection]:
    """Of the images and of the texts."""
    found = []
    for of_images in (True, False):
        names = [name for name in targets if ("visual" in name.split(".")) == of_images]
        weights = [name for name in names if targets[name].ndim == 2]
        biases = [name for name in names if name not in weights]
        path = weights[0].rpartition(".")[0] if weights else ""
        layer = module.get_submodule(path)
        linear = isinstance(layer, nn.Linear)
        whole = {f"{path}.{n}" for n, _ in layer.named_parameters(recurse=False)} if linear else set(weights)
        # A layer with another rule than nn.Linear's does something else with its matrix than to multiply by it.
        other = find_rule(layer) is not None and not is_linear(layer)
        if len(weights) != 1 or set(names) != whole or other:
            raise MimicError(
                "`parameters`: an aligned CLIP refits both of its projections, that of the images (below `visual`) "
                f"and that of the texts, each a matrix or a whole nn.Linear; not {join_names(sorted(targets))}. Of "
                "open_clip's ViTs these are `towers.visual.proj` and `towers.text_projection`."
            )
        statistics = (RunningStatistics(), RunningStatistics(centred=bool(biases)))
        found.append(_Projection(weights[0], biases[0] if biases else None, linear, *statistics))
    return found


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return batch[0], batch[1]
    raise MimicError(
        f"the batch is a {type(batch).__name__}; say which images and texts of it the reference is called with: "
        "`Aligned(..., inputs=lambda batch: (batch['image'], batch['text']))`."
    )
