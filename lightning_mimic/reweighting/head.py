"""Last linear layer under cross-entropy: labels, outputs of the reference, and calibration of the reference."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_mimic import distributed
from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.gradients.direction import norm_of
from lightning_mimic.ledger import NO_CLASS
from lightning_mimic.reference.calibration import Calibration, RunningCalibration
from lightning_mimic.reference.margins import RunningMargins
from lightning_mimic.reweighting.products import GradientProducts
from lightning_mimic.scorers import HEAD_NEEDS, Need

#: Least target probability of the given class; below it, label smoothing leaves no unique label.
_LEAST_TARGET = 0.5
# Tolerance for gradients rounded to half precision; losses other than a cross-entropy differ by far more.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class HeadProducts:
    """Products of the last layer in one micro-batch.

    Attributes:
        products: Fields of :class:`~lightning_mimic.scorers.Products`.
        columns: Ledger columns of shape ``(B,)`` by name.
        unknown: Boolean scalar; true while scores that depend on the calibrated reference are not meaningful yet.
        distrusted: Boolean scalar; true if the weights would depend on a reference that is unsure, or that knows less
            than the model.
        unrecognised: Boolean scalar; true if labels are needed and some rows do not come from a cross-entropy.
    """

    products: Mapping[str, Tensor]
    columns: dict[str, Tensor]
    unknown: Tensor
    distrusted: Tensor
    unrecognised: Tensor


@dataclass
class Head:
    """Compute products and ledger columns of a last layer whose outputs are the logits of a cross-entropy.

    Such a layer is recognised numerically: the gradient of a cross-entropy is ``softmax(z) − y``, so ``softmax(z)``
    minus the gradient is a single label, smoothed or not.

    Args:
        needs: Products that the scorer and the weighting need.
        rests_on_margins: Whether the weights depend on a score that compares the model's outputs with those of the
            uncalibrated reference.
    """

    needs: frozenset[Need]
    rests_on_margins: bool
    #: Whether the loss is a cross-entropy of the layer's outputs; ``None`` before the first step.
    recognised: bool | None = None
    _calibration: RunningCalibration | None = None
    _margins: RunningMargins | None = None
    _state: Mapping[str, Any] = field(default_factory=dict)
    # Target probability of the given class, a scalar: 1 without label smoothing, and equal for all samples.
    _target: Tensor | None = None

    @property
    def required(self) -> bool:
        """Whether a product is needed that only such a layer offers."""
        return bool(self.needs & HEAD_NEEDS)

    @torch.no_grad()
    def products(
        self,
        found: GradientProducts,
        reference: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        clean: Tensor | None,
        vanishes: Tensor,
        *,
        epoch: int | None,
        check: bool,
    ) -> HeadProducts | None:
        """Return the products of a micro-batch. Must be called on every rank.

        Args:
            found: Gradient products of the layer.
            reference: Parameters of the layer in the reference, by name.
            direction: Differences from the model's parameters to those of the reference, by name.
            clean: Mask of the finite rows, shape ``(B,)``; ``None`` if all are finite.
            vanishes: Boolean scalar; true if there is no reference, or not yet.
            epoch: Epoch in which the model trains on these samples, which are new to it in epoch 0; ``None`` if it does
                not train on them.
            check: Whether to check that the loss is a cross-entropy (a host sync).

        Returns:
            The products, or ``None`` if the loss is not a cross-entropy and no product of this layer is needed.

        Raises:
            MimicError: A product of this layer is needed, and the loss is not a cross-entropy; or the calibration's
                state in the checkpoint is damaged.
        """
        if check or self.recognised is None:
            self._target = None  # the loss may change between epochs
            self.recognised = self._recognise(found, clean)
        if not self.recognised:
            return None
        outputs, reference_outputs = found["outputs"].float(), found["reference_outputs"].float()
        labels, absent = self._labels(found, clean)
        if self._calibration is None or self._margins is None:
            self._calibration = RunningCalibration(outputs.shape[1], outputs.device)
            self._margins = RunningMargins(outputs.device)
            if self._state:
                try:
                    self._calibration.load_state_dict(self._state)
                    self._margins.load_state_dict(self._state["margins"])
                except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
                    raise MimicError(
                        f"the checkpoint's state of the calibration is damaged ({error!r}). Use another checkpoint."
                    ) from error
        calibration, margins = self._calibration, self._margins
        counted = torch.where(vanishes, -1, labels)
        calibration.update(reference_outputs, counted, outputs if epoch == 0 else None)
        margins.update(outputs, reference_outputs, counted)
        known = labels >= 0
        shown = known & ~vanishes
        posteriors = _or_nan(calibration.posteriors(reference_outputs, labels), ~vanishes)
        products = {
            "outputs": outputs,
            "output_gradients": found["output_gradients"],
            "reference_outputs": reference_outputs,
            "labels": labels,
            "posteriors": posteriors,
        }
        columns = {
            "label": torch.where(known, labels, NO_CLASS),
            "predicted": torch.where(known, outputs.argmax(1), NO_CLASS),
            "reference_predicted": torch.where(shown, reference_outputs.argmax(1), NO_CLASS),
        }
        unknown = torch.ones_like(vanishes)
        if calibration.ready:
            unknown = ~calibration.informative
            calibrated = calibration.calibrated(reference_outputs)
            products |= {"calibrated_outputs": calibrated, **_norms(calibration, reference, direction)}
            log_q = calibrated.log_softmax(1)
            columns |= {
                "posterior": posteriors,
                "reference_predicted": torch.where(shown, log_q.argmax(1), NO_CLASS),
                "reference_confidence": _or_nan(log_q.amax(1).exp(), shown),
                "reference_loss": _or_nan(-log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0], shown),
            }
        else:
            # Placeholders: the scores are discarded, but must have the right shape.
            one = torch.ones((), device=outputs.device)
            products |= {
                "calibrated_outputs": reference_outputs,
                "calibrated_norm": one,
                "calibrated_direction_norm": one,
            }
        unrecognised = absent.any() if self.required else torch.zeros_like(vanishes)
        needs_calibrated = "calibrated_outputs" in self.needs
        unknown = unknown if needs_calibrated else torch.zeros_like(unknown)
        distrusted = calibration.knows_less if calibration.ready else torch.zeros_like(vanishes)
        if self.rests_on_margins:
            distrusted = distrusted | margins.unsure
        return HeadProducts(products, columns, unknown, distrusted, unrecognised)

    def calibration(self) -> Calibration | None:
        """Return the latest calibration (a host sync); ``None`` if there is none."""
        return None if self._calibration is None else self._calibration.calibration()

    def facts(self) -> dict[str, Any]:
        """Return the fields of the diagnosis that are measured on the reference's outputs (a host sync)."""
        facts: dict[str, Any] = {} if self._margins is None else self._margins.facts()
        found = self.calibration()
        if found is None:
            return facts
        names = ("agreement", "model_agreement", "knows_less")
        return facts | {name: getattr(found, name) for name in names}

    @property
    def wrong_share(self) -> Tensor | None:
        """Estimated share of wrong labels, a scalar on the device; ``None`` without a calibration."""
        return None if self._calibration is None else self._calibration.wrong_share

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state that a resumed run needs."""
        if self._calibration is None or self._margins is None:
            return self._state
        return self._calibration.state_dict() | {"margins": self._margins.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._state = state

    def _recognise(self, found: GradientProducts, clean: Tensor | None) -> bool:
        reason = ""
        if "reference_outputs" not in found:
            reason = (
                "`parameters` must name one whole nn.Linear (weight and bias) with one row of outputs per sample, and "
                "the reference must be given as weights or Aligned"
            )
        else:
            _, absent = self._labels(found, clean)
            if bool(absent.any()):
                reason = (
                    "softmax of the layer's outputs minus their gradient is not one label per sample: the loss is not "
                    "a cross-entropy, has class weights or soft targets, or the outputs are changed before the loss"
                )
        # All ranks must agree, because they calibrate together.
        device = found["dot"].device if "dot" in found else torch.device("cpu")
        if not distributed.any_rank(bool(reason), device):
            return True
        if self.required:
            raise MimicError(
                f"{join_names(sorted(self.needs & HEAD_NEEDS))} can be computed only for the last linear layer under a "
                "cross-entropy with one class per sample, and this is not such a case: "
                f"{reason or 'on another rank'}. Use a scorer and a weighting that do not need them."
            )
        return False

    def _labels(self, found: GradientProducts, clean: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the labels, −1 where there is none, and a mask of the rows that lack a label but should have one."""
        outputs, gradients = found["outputs"].float(), found["output_gradients"]
        labels, targets = labels_of(outputs, gradients, clean)
        # With two classes, any pair of targets could be a smoothed label, but a loss smooths all labels equally.
        usual = torch.where(labels >= 0, targets, torch.nan).nanmedian()
        self._target = usual if self._target is None else torch.where(self._target.isnan(), usual, self._target)
        labels = torch.where((targets - self._target).abs() <= _ROUNDING, labels, -1)
        # A row without gradient is ignored by the loss, or predicted so well that its gradient underflows.
        expected = torch.isfinite(gradients).all(1) & (gradients != 0).any(1)
        return labels, (labels < 0) & (expected if clean is None else expected & clean)


def labels_of(outputs: Tensor, output_gradients: Tensor, clean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Recover the labels of a cross-entropy from its logits and their gradient.

    Args:
        outputs: Logits, shape ``(B, C)``.
        output_gradients: Gradients ``∂ℓᵢ/∂outputs``, shape ``(B, C)``.
        clean: Mask of the finite rows, shape ``(B,)``; ``None`` if all are finite.

    Returns:
        The labels, shape ``(B,)``, −1 where the row does not come from a cross-entropy with one label, smoothed or not,
        or has no gradient; and the target probabilities of these classes, shape ``(B,)``, below 1 where labels are
        smoothed.

    Example:
        >>> logits = torch.zeros(3, 2)
        >>> labels_of(logits, torch.tensor([[0.5, -0.5], [0.9, -0.1], [0.0, 0.0]]))[0]
        tensor([ 1, -1, -1])
    """
    classes = outputs.shape[1]
    if classes < 2:
        none = torch.full((len(outputs),), -1, device=outputs.device)
        return none, torch.full_like(none, torch.nan, dtype=torch.float32)
    targets = outputs.softmax(1) - output_gradients
    highest, labels = targets.max(1)
    expected = ((1 - highest) / (classes - 1))[:, None].expand_as(targets).scatter(1, labels[:, None], highest[:, None])
    close = (targets - expected).abs().amax(1) <= _ROUNDING
    known = close & (highest > _LEAST_TARGET) & (highest < 1 + _ROUNDING) & (output_gradients != 0).any(1)
    if clean is not None:
        known = known & clean
    return torch.where(known, labels, -1), highest


def _norms(
    calibration: RunningCalibration, reference: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the norm of the calibrated reference's parameters and that of the direction to them."""
    scale, biases = calibration.parameters
    weights = {name: scale * tensor.float() for name, tensor in reference.items()}
    # If the layer has no bias, the calibrated reference still has one: its class biases c.
    bias = next((name for name, tensor in weights.items() if tensor.ndim == 1), "")
    weights[bias] = weights.get(bias, torch.zeros_like(biases)) + biases
    steps = {n: t - (reference[n] - direction[n]).float() if n in reference else t for n, t in weights.items()}
    return {"calibrated_norm": norm_of(weights), "calibrated_direction_norm": norm_of(steps)}


def _or_nan(values: Tensor, known: Tensor) -> Tensor:
    return torch.where(known, values, torch.full_like(values, torch.nan))
