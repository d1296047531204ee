"""Products with one layer's per-sample gradients, computed over the samples of all ranks where necessary."""

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
    """Compute the needed products with one layer's per-sample gradients.

    Args:
        call: Call of the layer.
        rows: Per-sample gradients of the unreduced losses on this rank.
        needs: Names of the needed products.
        vectors: Direction v by parameter name; empty without a direction.
        clean: Mask of the finite samples of this rank, shape ``(B,)``; ``None`` if all are finite.
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
    """Return the Gram matrix of all ranks' samples, NaN where a sample is not clean, and the slice of this rank."""
    if distributed.world_size() == 1:
        gram = rows.gram()
        return _masked(gram, clean), slice(0, len(gram))
    sizes: list[int] = []

    def gathered(tensor: Tensor) -> Tensor:
        parts = distributed.gather_rows(tensor)
        sizes[:] = [len(part) for part in parts]
        return torch.cat(parts)

    gram = rows.changed(gathered).gram()
    rank = distributed.rank()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return _masked(gram, None if clean is None else gathered(clean)), own


def _masked(gram: Tensor, clean: Tensor | None) -> Tensor:
    return gram if clean is None else torch.where(clean[:, None] & clean, gram, torch.nan)
