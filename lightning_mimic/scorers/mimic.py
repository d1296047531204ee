"""The mimic score (Huang et al., arXiv 2501.06708, section 3)."""

from torch import Tensor

from lightning_mimic.scorers.products import Need, Products


class MimicScore:
    """``mᵢ = −⟨gᵢ, v⟩ / ‖v‖``: how much a descent step on sample *i* moves the weights to the reference.

    It is the directional derivative ``−d/dε ℓᵢ(θ + ε v/‖v‖)`` at 0. Unit: loss per unit of weight distance;
    positive: towards the reference.

    Args:
        calibrated: Take the direction to the calibrated reference, whose logits are ``β z' + c``: of a last linear
            layer under cross-entropy. There are no scores before it is calibrated.

    Example:
        >>> import torch
        >>> dot = torch.tensor([-8.0, 8.0])
        >>> MimicScore()(Products(dot, dot=dot, direction_norm=torch.tensor(4.0)))
        tensor([ 2., -2.])
    """

    def __init__(self, *, calibrated: bool = False) -> None:
        self.calibrated = calibrated

    @property
    def needs(self) -> frozenset[Need]:
        """The dot, or what the calibrated reference's dot follows from."""
        return frozenset({"outputs", "calibrated_outputs"} if self.calibrated else {"dot"})

    def __call__(self, products: Products) -> Tensor:
        """Return the scores, shape ``(B,)``; not finite where ``‖v‖`` is 0."""
        if not self.calibrated:
            return -products.dot / products.direction_norm
        change = products.calibrated_outputs - products.outputs
        return -(products.output_gradients * change).sum(1) / products.calibrated_direction_norm
