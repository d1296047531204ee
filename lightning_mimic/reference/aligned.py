"""A reference of another initialisation, width or architecture, brought into the trained model's own features.

Networks that were trained apart hold what they know in different bases, so a difference of their weights says nothing.
What can be compared is what they compute: the layer that would turn the model's own features into the reference's
outputs is a point in the model's own weights, and the direction to it means what a direction to a reference should.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import Direction
from lightning_mimic.reference.match import fingerprint
from lightning_mimic.reference.pair_calibration import PairCalibration
from lightning_mimic.reference.read import ReferenceSource
from lightning_mimic.reference.ridge import RIDGE
from lightning_mimic.reference.running_statistics import DECAY, RunningStatistics


class Aligned:
    """A reference of which only the outputs are used, because its weights mean something else than the model's.

    The target layer is refitted by ridge regression, so that from the model's current features it gives the
    reference's outputs; the direction leads to that layer. Of a CLIP (a module with ``encode_image`` and
    ``encode_text``) both projections are refitted, after the reference's embeddings have been rotated into the model's
    frame. The reference runs without gradients in one of ``every`` steps, and in each of the first until four samples
    per feature have been seen; until then weights are uniform.

    Args:
        reference: A module of any architecture that gives what the target layer gives (the same classes in the
            same order; for a CLIP one that has ``encode_image`` and ``encode_text``, of any width), or weights for the
            trained module's own architecture: a path or a state dict. For a CLIP also
            ``"open_clip:ARCHITECTURE/TAG"``, of any architecture.
        inputs: From a batch to what the reference is called with; the first of a tuple or list, if left out, and the
            first two for a CLIP.
        every: Scored micro-batches between two refits.
        cache: Keep the reference's outputs by sample id instead of asking for them again. Where a sample is
            the same in every epoch: not with random augmentation.
        rotate: Rotate the embeddings of a reference CLIP into the model's frame. ``False`` is right only for a
            reference that shares this frame, because it started from the same weights.

    Raises:
        MimicError: ``every`` is not a positive whole number.

    Example:
        >>> reference = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> Aligned(reference, inputs=lambda batch: batch["image"]).every
        10
    """

    #: Samples per feature without which the fit is not used; for a subclass to change, as is the penalty.
    samples_per_feature: ClassVar[int] = 4
    #: Of the ridge regression, see :func:`~lightning_mimic.reference.ridge.ridge_fit`.
    penalty: ClassVar[float] = RIDGE

    def __init__(
        self,
        reference: ReferenceSource,
        inputs: Callable[[Any], Any] | None = None,
        every: int = 10,
        *,
        cache: bool = False,
        rotate: bool = True,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise MimicError(f"`every` counts micro-batches between two refits, 1 or more, not {every!r}.")
        self.reference = reference
        self.inputs = inputs
        self.every = every
        self.cache = cache
        self.rotate = rotate


class AlignedDirection(Direction):
    """From target parameters to those that would give the reference's outputs; zero until these are known.

    Args:
        aligned: The reference and how to ask it.
        model: The reference as a module that can be run.
        targets: The target parameters, by full name.
        features: As many as the widest of their layers takes.
        statistics: The running statistics of the fit, by name.
        asks_always: Ask the reference for its outputs of every micro-batch, not only of those that are fitted.
    """

    def __init__(
        self,
        aligned: Aligned,
        model: nn.Module,
        targets: Mapping[str, nn.Parameter],
        features: int,
        statistics: Mapping[str, RunningStatistics],
        *,
        asks_always: bool = False,
    ) -> None:
        super().__init__(targets, targets)
        some = next(iter(targets.values()))
        self._aligned = aligned
        # In the trained model's precision, which is that of its batches.
        self._model = model.to(some.dtype)
        self._needed = aligned.samples_per_feature * features
        self._statistics = dict(statistics)
        self._outputs: dict[int | str, Tensor] = {}
        self._asks_always = asks_always
        self._steps = 0
        self._enough = False
        self._fitted = torch.zeros((), dtype=torch.bool, device=some.device)
        #: Of the reference's weights.
        self.fingerprint = fingerprint(self._model.state_dict())
        #: Refits whose equations could not be solved; what was fitted before them stays.
        self.failed = torch.zeros((), dtype=torch.int64, device=some.device)

    @torch.no_grad()
    def observe(
        self,
        batch: Any,
        ids: Tensor | Sequence[int] | Sequence[str] | None,
        inputs: Callable[[], Mapping[str, Tensor]],
    ) -> Tensor | None:
        """Takes in a micro-batch where its turn has come; after its forward pass, on every rank.

        Args:
            batch: What training_step got.
            ids: Its samples', for the cache.
            inputs: Gives what each target parameter was multiplied with, by name, shape ``(B, ..., D)``; called if
                it is needed.

        Returns:
            The probability that each sample's label is right, shape ``(B,)``, where the reference's outputs alone give
            it; ``None`` elsewhere.

        Raises:
            MimicError: The reference does not give what the model gives.
        """
        due = not self._enough or self._steps % self._aligned.every == 0
        self._steps += 1
        if not (due or self._asks_always):
            return None
        features = inputs()
        outputs = self._ask(batch, ids, features)
        posteriors = self._judge(features, outputs)
        if due:
            self._align(features, outputs)
        return posteriors

    def vanishes(self, norm: Tensor) -> Tensor:
        """Whether there is no direction yet, or none any more (a boolean scalar, no host sync)."""
        return ~self._fitted | super().vanishes(norm)

    def failure_message(self) -> str | None:
        """Return why alignment failed, as a sentence (a host sync); ``None`` if it did not."""
        if not self._enough and self._steps:
            count = int(next(iter(self._statistics.values())).count)
            return (
                f"the reference was never aligned, so all weights were uniform: {count} samples of "
                f"the {self._needed} that it takes were seen. Train longer, or name a narrower layer."
            )
        if self.failed:
            return (
                f"{int(self.failed)} times the reference could not be aligned (constant or infinite features); the "
                "last alignment that worked was kept, and weights were uniform before the first."
            )
        return None

    @property
    def wrong_share(self) -> Tensor | None:
        """The estimated share of mismatched pairs, a scalar; ``None`` where the samples are no pairs."""
        return None

    def calibration(self) -> PairCalibration | None:
        """Return what is known of the reference's similarities (a host sync); ``None`` without any."""
        return None

    def objection(self) -> str | None:
        """Return why scores towards the alignment say less than the reference does, as a phrase (a host sync)."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to go on as if it had not stopped."""
        return {
            "of": self._key(),
            "steps": self._steps,
            "enough": self._enough,
            "fitted": self._fitted,
            "failed": self.failed,
            "statistics": {name: statistics.state_dict() for name, statistics in self._statistics.items()},
            "reference": dict(self._reference),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; begins anew, with a warning, if that was another alignment."""
        if state["of"] != self._key():
            warnings.warn(
                "the checkpoint's alignment is of another reference, another target layer or another `rotate`, so it "
                "begins anew.",
                stacklevel=2,
            )
            return
        device = self._fitted.device
        self._steps, self._enough = state["steps"], state["enough"]
        self._fitted, self.failed = state["fitted"].to(device), state["failed"].to(device)
        for name, statistics in self._statistics.items():
            statistics.load_state_dict({key: tensor.to(device) for key, tensor in state["statistics"][name].items()})
        self.set_reference({name: tensor.to(device) for name, tensor in state["reference"].items()})

    @abstractmethod
    def _run(self, batch: Any, features: Mapping[str, Tensor]) -> Tensor:
        """What the reference says of a batch, a row per sample; ``MimicError`` unless it fits the features."""

    @abstractmethod
    def _add(self, features: Mapping[str, Tensor], outputs: Tensor, decay: float) -> Tensor:
        """Sums up what was seen; whether the sums could hold it, a boolean scalar."""

    @abstractmethod
    def _fit(self) -> tuple[dict[str, Tensor], Tensor]:
        """The parameters that would give the reference's outputs, and whether that worked, a boolean scalar."""

    def _align(self, features: Mapping[str, Tensor], outputs: Tensor) -> None:
        decay = DECAY if self._enough else 1.0
        held = self._add(features, outputs, decay)
        # A host sync, in the first steps only; of all ranks' samples, so that they agree.
        count = next(iter(self._statistics.values())).count
        self._enough = self._enough or bool(count >= self._needed)
        if self._enough:
            fitted, sound = self._fit()
            sound = sound & held
            self.set_reference({name: torch.where(sound, t, self._reference[name]) for name, t in fitted.items()})
            self._fitted = self._fitted | sound
            self.failed = self.failed + ~sound

    def _judge(self, features: Mapping[str, Tensor], outputs: Tensor) -> Tensor | None:
        """The probability that each sample's label is right, shape ``(B,)``, where the outputs alone give it.

        Called before the samples enter the fit.
        """
        return None

    def _key(self) -> str:
        shapes = " ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(self._reference.items()))
        # Nothing is added by default, so that older checkpoints go on.
        return f"{self.fingerprint} {shapes}{'' if self._aligned.rotate else ' not rotated'}"

    def _ask(
        self,
        batch: Any,
        ids: Tensor | Sequence[int] | Sequence[str] | None,
        features: Mapping[str, Tensor],
    ) -> Tensor:
        if not self._aligned.cache:
            return self._run(batch, features)
        if ids is None:
            raise MimicError(
                "`Aligned(cache=True)` keeps outputs by sample id, and the batch carries none. Use "
                "DataLoader(WithIds(dataset), collate_fn=collate_with_ids), or leave the cache off."
            )
        keys: list[int | str] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if not all(key in self._outputs for key in keys):
            self._outputs.update(zip(keys, self._run(batch, features).cpu(), strict=True))
        return torch.stack([self._outputs[key] for key in keys]).to(self._fitted.device)
