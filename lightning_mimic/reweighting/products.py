"""The products with one layer's per-sample gradients, over the samples of all ranks where they need them."""

from collections.abc import Collection, Mapping
from typing import TypedDict

import torch
from torch import Tensor

from lightning_mimic import distributed
from lightning_mimic.gradients import LayerGradients
from lightning_mimic.gradients.layer_hooks import LayerCall
from lightning_mimic.scorers import Need


class GradientProducts(TypedDict, total=False):
    """The fields of :class:`~lightning_mimic.scorers.Products` that come from gradients."""

    dot: Tensor
    norms: Tensor
    gram: Tensor
    own: slice
    outputs: Tensor
    output_gradients: Tensor
    reference_outputs: Tensor


def layer_products(
    call: LayerCall,
    rows: LayerGradients,
    needs: Collection[Need],
    vectors: Mapping[str, Tensor],
    clean: Tensor | None,
) -> GradientProducts:
    """Compute what is needed of one layer's gradients.

    Args:
        call: The layer's.
        rows: This rank's gradients, of the unreduced losses.
        needs: Names of products.
        vectors: v by parameter name; empty without a direction.
        clean: Samples of this rank that are finite, shape ``(B,)``; all, if ``None``.
    """
    found: GradientProducts = {}
    output = call.output
    if output is not None and output.ndim == 2:
        found["outputs"], found["output_gradients"] = output, rows.output_gradients
    if vectors:
        change = rows.output_change(call.local(vectors))
        found["dot"] = rows.along(change)
        if (
            output is not None
            and "outputs" in found
            and len(vectors) == len(list(call.layer.parameters(recurse=False)))
        ):
            found["reference_outputs"] = output + change
    if "norms" in needs:
        found["norms"] = rows.norms()
    if "gram" in needs:
        found["gram"], found["own"] = _gram(rows, clean)
    return found


def _gram(rows: LayerGradients, clean: Tensor | None) -> tuple[Tensor, slice]:
    """Between the samples of all ranks, NaN for those that are not clean, and which of them are this rank's."""
    if distributed.world_size() == 1:
        gram = rows.gram()
        return _without(gram, clean), slice(0, len(gram))
    sizes: list[int] = []

    def gathered(tensor: Tensor) -> Tensor:
        parts = distributed.gather_rows(tensor)
        sizes[:] = [len(part) for part in parts]
        return torch.cat(parts)

    gram = rows.changed(gathered).gram()
    rank = distributed.rank()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return _without(gram, None if clean is None else gathered(clean)), own


def _without(gram: Tensor, clean: Tensor | None) -> Tensor:
    return gram if clean is None else torch.where(clean[:, None] & clean, gram, torch.nan)
