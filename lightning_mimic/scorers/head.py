"""Scores from a last linear layer and the reference's on the same features, under cross-entropy."""

import torch.nn.functional as F
from torch import Tensor

from lightning_mimic.scorers.products import Need, Products


class ReferencePart:
    """``−⟨gᵢ, θ*⟩ / ‖θ*‖``: the reference's part of the mimic score, for the calibrated reference ``θ*``.

    Where the mimic score is ``(y − p)·(z* − z)`` in units of loss, this is ``(y − p)·z*`` per unit of weight length: an
    unsure reference has a say with its direction, and the model's own outputs have none. Without calibration it makes
    training worse, so that there is no such form. Positive: towards the reference.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[-0.5, 0.5], [0.5, -0.5]])
        >>> products = Products(
        ...     torch.zeros(2),
        ...     outputs=torch.zeros(2, 2),
        ...     output_gradients=gradients,
        ...     calibrated_outputs=torch.tensor([[4.0, 0.0], [4.0, 0.0]]),
        ...     calibrated_norm=torch.tensor(2.0),
        ... )
        >>> ReferencePart()(products)
        tensor([ 1., -1.])
    """

    needs: frozenset[Need] = frozenset({"outputs", "calibrated_outputs"})

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``."""
        return -(products.output_gradients * products.calibrated_outputs).sum(1) / products.calibrated_norm


class _OfReference:
    """A scorer of the reference's logits, as they are or calibrated.

    Args:
        calibrated: Take those of the calibrated reference; there are no scores before it is calibrated.
    """

    def __init__(self, *, calibrated: bool = False) -> None:
        self.calibrated = calibrated

    @property
    def needs(self) -> frozenset[Need]:
        """The labels, and the reference's logits beside the model's."""
        return frozenset({"labels", "outputs", "calibrated_outputs" if self.calibrated else "reference_outputs"})

    def _reference(self, products: Products) -> Tensor:
        return products.calibrated_outputs if self.calibrated else products.reference_outputs


class HeadReferenceLoss(_OfReference):
    """``−ℓᵢ(reference)`` at the last layer: :class:`ReferenceLoss` of the reference's layer on the model's features.

    Unit: that of the loss, never positive. It needs no second network and no ``sample_losses``.

    Args:
        calibrated: Take the calibrated reference's logits.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> products = Products(torch.zeros(2), reference_outputs=logits, labels=torch.tensor([0, 1]))
        >>> HeadReferenceLoss()(products)
        tensor([-0.1269, -2.1269])
    """

    #: A positive score does not mean a good sample.
    signed = False

    @property
    def needs(self) -> frozenset[Need]:
        """The labels and the reference's logits."""
        return super().needs - {"outputs"}

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``; NaN where a label is unknown."""
        return -_losses(self._reference(products), products.labels)


class HeadRhoLoss(_OfReference):
    """``ℓᵢ − ℓᵢ(reference)`` at the last layer: :class:`RhoLoss` of the reference's layer on the model's features.

    Unit: that of the loss. The mimic score in units of loss exceeds it by ``KL(p ‖ q)``, which no label enters.

    Args:
        calibrated: Take the calibrated reference's logits.

    Example:
        >>> import torch
        >>> theirs = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> labels = torch.tensor([0, 1])
        >>> products = Products(labels, outputs=torch.zeros(2, 2), reference_outputs=theirs, labels=labels)
        >>> HeadRhoLoss()(products)
        tensor([ 0.5662, -1.4338])
    """

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``; NaN where a label is unknown."""
        return _losses(products.outputs, products.labels) - _losses(self._reference(products), products.labels)


class EndpointScore(_OfReference):
    """``(yᵢ − qᵢ)·(z' − z)``: the mimic score at the reference's end of the way, in units of loss.

    q is the reference's softmax. The loss falls by no more than the mimic score and by no less than this one.

    Args:
        calibrated: Take the calibrated reference's logits.

    Example:
        >>> import torch
        >>> theirs = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> labels = torch.tensor([0, 1])
        >>> products = Products(labels, outputs=torch.zeros(2, 2), reference_outputs=theirs, labels=labels)
        >>> EndpointScore()(products)
        tensor([ 0.2384, -1.7616])
    """

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``; NaN where a label is unknown."""
        theirs, labels = self._reference(products), products.labels
        change = theirs - products.outputs
        at_label = change.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        scores = at_label - (theirs.softmax(1) * change).sum(1)
        return scores.masked_fill(labels < 0, float("nan"))


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    return losses.masked_fill(labels < 0, float("nan"))
