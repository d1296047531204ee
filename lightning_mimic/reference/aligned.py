"""A reference of another initialisation, width or architecture, brought into the trained model's own features.

Networks that were trained apart hold what they know in different bases, so a difference of their weights says nothing.
What can be compared is what they compute: the layer that would turn the model's own features into the reference's
outputs is a point in the model's own weights, and the direction to it means what a direction to a reference should.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic.gradients import Direction, owning_layer
from lightning_mimic.reference.match import fingerprint
from lightning_mimic.reference.model import reference_model
from lightning_mimic.reference.moments import FORGETTING, Moments
from lightning_mimic.reference.read import ReferenceSource
from lightning_mimic.reference.ridge import ridge_fit

#: Samples per feature without which the fit is not used.
SAMPLES_PER_FEATURE = 4


class Aligned:
    """A reference of which only the outputs are used, because its weights mean something else than the model's.

    The target layer is refitted by ridge regression, so that from the model's current features it gives the
    reference's outputs; the direction leads to that layer. The reference runs without gradients in one of ``every``
    steps, and in each of the first until four samples per feature have been seen; until then weights are uniform.

    Args:
        reference: A module of any architecture that gives what the target layer gives (the same classes in the
            same order), or weights for the trained module's own architecture: a path or a state dict.
        inputs: From a batch to what the reference is called with; the first of a tuple or list, if left out.
        every: Scored micro-batches between two refits.
        cache: Keep the reference's outputs by sample id instead of asking for them again. Where a sample is
            the same in every epoch: not with random augmentation.

    Raises:
        ValueError: ``every`` is not a positive whole number.

    Example:
        >>> reference = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> Aligned(reference, inputs=lambda batch: batch["image"]).every
        10
    """

    def __init__(
        self,
        reference: ReferenceSource,
        inputs: Callable[[Any], Any] | None = None,
        every: int = 10,
        *,
        cache: bool = False,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"`every` counts micro-batches between two refits, 1 or more, not {every!r}.")
        self.reference = reference
        self.inputs = first if inputs is None else inputs
        self.every = every
        self.cache = cache


def first(batch: Any) -> Any:
    """The first of a batch's parts, which is what most models are called with; ``ValueError`` if it has none."""
    if isinstance(batch, list | tuple) and batch:
        return batch[0]
    raise ValueError(
        f"the batch is a {type(batch).__name__}; say what of it the reference is called with: "
        "`Aligned(..., inputs=lambda batch: batch['image'])`."
    )


class AlignedDirection(Direction):
    """From the target layer to the layer that would give the reference's outputs; zero until that is known.

    Args:
        aligned: The reference and how to ask it.
        module: The module that is trained.
        targets: All parameters of its target layer, by full name.

    Raises:
        ValueError: The target is not one whole linear layer.
    """

    def __init__(self, aligned: Aligned, module: nn.Module, targets: Mapping[str, nn.Parameter]) -> None:
        path, layer = owning_layer(module, targets)
        whole = {f"{path}.{name}" for name, _ in layer.named_parameters(recurse=False)}
        if not isinstance(layer, nn.Linear) or set(targets) != whole:
            raise ValueError(
                f"`parameters`: an aligned reference refits one whole nn.Linear, not {', '.join(sorted(targets))} of a "
                f"{type(layer).__name__}. Name the path of the model's last linear layer."
            )
        super().__init__(targets, targets)
        self._aligned = aligned
        # In the trained model's precision, which is that of its batches.
        self._model = reference_model(aligned.reference, module, method="forward").to(layer.weight.dtype)
        self._weight, self._bias = f"{path}.weight", f"{path}.bias" if layer.bias is not None else None
        self._needed = SAMPLES_PER_FEATURE * layer.in_features
        # Without a bias the layer's outputs are fitted about zero.
        self._moments = Moments(centred=layer.bias is not None)
        self._outputs: dict[int | str, Tensor] = {}
        self._steps = 0
        self._enough = False
        device = layer.weight.device
        self._fitted = torch.zeros((), dtype=torch.bool, device=device)
        #: Of the reference's weights.
        self.fingerprint = fingerprint(self._model.state_dict())
        #: Refits whose equations could not be solved; what was fitted before them stays.
        self.failed = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def observe(self, batch: Any, ids: Tensor | Sequence[int] | Sequence[str] | None, features: Tensor) -> None:
        """Takes in a micro-batch where its turn has come; after its forward pass, on every rank.

        Args:
            batch: What training_step got.
            ids: Its samples', for the cache.
            features: What the target layer got, shape ``(B, ..., D)``.

        Raises:
            ValueError: The reference does not give what the layer gives.
        """
        due = not self._enough or self._steps % self._aligned.every == 0
        self._steps += 1
        if not due:
            return
        outputs = self._ask(batch, ids, (*features.shape[:-1], len(self[self._weight])))
        forgetting = FORGETTING if self._enough else 1.0
        held = self._moments.add(features.flatten(0, -2), outputs.flatten(0, -2), forgetting)
        # A host sync, in the first steps only; of all ranks' samples, so that they agree.
        self._enough = self._enough or bool(self._moments.count >= self._needed)
        if self._enough:
            self._refit(held)

    def vanishes(self, norm: Tensor) -> Tensor:
        """Whether there is no direction yet, or none any more (a boolean scalar, no host sync)."""
        return ~self._fitted | super().vanishes(norm)

    def complaint(self) -> str | None:
        """What did not work out, as a sentence (a host sync); ``None`` if all did."""
        if not self._enough and self._steps:
            return (
                f"the reference was never aligned, so all weights were uniform: {int(self._moments.count)} samples of "
                f"the {self._needed} that it takes were seen. Train longer, or name a narrower layer."
            )
        if self.failed:
            return (
                f"{int(self.failed)} times the reference could not be aligned (constant or infinite features); the "
                "last alignment that worked was kept, and weights were uniform before the first."
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to go on as if it had not stopped."""
        return {
            "of": self._key(),
            "steps": self._steps,
            "enough": self._enough,
            "fitted": self._fitted,
            "failed": self.failed,
            "moments": self._moments.state_dict(),
            "reference": dict(self._reference),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; begins anew, with a warning, if that was of another reference or layer."""
        if state["of"] != self._key():
            warnings.warn(
                "the checkpoint's alignment is of another reference or another target layer, so it begins anew.",
                stacklevel=2,
            )
            return
        device = self._fitted.device
        self._steps, self._enough = state["steps"], state["enough"]
        self._fitted, self.failed = state["fitted"].to(device), state["failed"].to(device)
        self._moments.load_state_dict({name: tensor.to(device) for name, tensor in state["moments"].items()})
        self.point_to({name: tensor.to(device) for name, tensor in state["reference"].items()})

    def _key(self) -> str:
        return f"{self.fingerprint} {self._weight} {tuple(self[self._weight].shape)}"

    def _ask(self, batch: Any, ids: Tensor | Sequence[int] | Sequence[str] | None, shape: tuple[int, ...]) -> Tensor:
        if not self._aligned.cache:
            return self._run(batch, shape)
        if ids is None:
            raise ValueError(
                "`Aligned(cache=True)` keeps outputs by sample id, and the batch carries none. Use "
                "DataLoader(WithIds(dataset), collate_fn=collate_with_ids), or leave the cache off."
            )
        keys: list[int | str] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if not all(key in self._outputs for key in keys):
            self._outputs.update(zip(keys, self._run(batch, shape).cpu(), strict=True))
        return torch.stack([self._outputs[key] for key in keys]).to(self._fitted.device)

    def _run(self, batch: Any, shape: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            outputs = self._model(self._aligned.inputs(batch))
        if not isinstance(outputs, Tensor):
            raise ValueError(f"`Aligned`: the reference gives a {type(outputs).__name__}; expected a tensor.")
        if outputs.shape != shape:
            raise ValueError(
                f"`Aligned`: the reference gives shape {tuple(outputs.shape)} where the target layer gives {shape}; "
                "both must say the same things (classes, in one order) of the same samples."
            )
        return outputs

    def _refit(self, held: Tensor) -> None:
        fit = ridge_fit(self._moments)
        sound = fit.sound & held
        found = {self._weight: fit.weight} | ({} if self._bias is None else {self._bias: fit.bias})
        self.point_to({name: torch.where(sound, tensor, self._reference[name]) for name, tensor in found.items()})
        self._fitted = self._fitted | sound
        self.failed = self.failed + ~sound
