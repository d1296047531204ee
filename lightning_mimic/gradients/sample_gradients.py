"""The protocol of the classes that represent per-sample gradients."""

from collections.abc import Mapping
from typing import NoReturn, Protocol, runtime_checkable

from torch import Tensor

from lightning_mimic.errors import MimicError


@runtime_checkable
class SampleGradients(Protocol):
    """The matrix G of per-sample gradients, shape ``(B, P)``, known only by its products.

    A class lists the products it offers in :attr:`products`; any other raises
    :class:`~lightning_mimic.errors.MimicError`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_mimic.gradients import LayerGradients
        >>> rows: SampleGradients = LayerGradients(nn.Linear(2, 1), torch.ones(3, 2), torch.ones(3, 1))
        >>> sorted(rows.products)
        ['dot', 'gram', 'norms']
    """

    @property
    def products(self) -> frozenset[str]:
        """Names of the methods that are offered, of ``"dot"``, ``"norms"`` and ``"gram"``."""

    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return ``⟨gᵢ, v⟩`` for every sample.

        Args:
            vectors: Parameter name to a tensor of its shape.

        Returns:
            Shape ``(B,)``, in the dtype of ``vectors`` or higher.
        """

    def norms(self) -> Tensor:
        """Return ``‖gᵢ‖`` for every sample, shape ``(B,)``."""

    def gram(self) -> Tensor:
        """Return ``⟨gᵢ, gⱼ⟩`` for all pairs of samples, shape ``(B, B)``."""


class DotOnly:
    """Base of representations that offer the dot alone."""

    #: The products that this class offers.
    products: frozenset[str] = frozenset({"dot"})

    def norms(self) -> Tensor:
        """Raise :class:`~lightning_mimic.errors.MimicError`; only the dot is offered."""
        refuse_product("norms", type(self).__name__, self.products)

    def gram(self) -> Tensor:
        """Raise :class:`~lightning_mimic.errors.MimicError`; only the dot is offered."""
        refuse_product("gram", type(self).__name__, self.products)


def refuse_product(product: str, owner: str, offered: frozenset[str]) -> NoReturn:
    """Raise the error for a product that a class does not offer.

    Args:
        product: Name of the product.
        owner: The class, as it is called in the message.
        offered: Names of the products it offers.

    Example:
        >>> refuse_product("gram", "LossGradients", frozenset({"dot"}))
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: LossGradients does not offer `gram`; it offers `dot`. `norms` and `gram` are
        offered by LayerGradients of one nn.Linear.
    """
    names = ", ".join(f"`{name}`" for name in sorted(offered))
    raise MimicError(
        f"{owner} does not offer `{product}`; it offers {names}. `norms` and `gram` are offered by LayerGradients of "
        "one nn.Linear."
    )
