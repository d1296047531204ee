"""Orthogonal Procrustes: rotate the embeddings of a reference CLIP into the frame of another model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mimic.errors import MimicError
from lightning_mimic.reference.running_statistics import RunningStatistics


@dataclass(frozen=True)
class Rotation:
    """The rotation from a reference's frame to a model's.

    Attributes:
        matrix: Shape ``(d_ref, d_model)``; ``embeddings @ matrix`` lie in the model's frame. Its rows are orthonormal
            if the reference is no wider, its columns if it is no narrower. May reflect: CLIP's loss does not mind.
        kept: Share of the reference's variance that the matrix keeps, a scalar from 0 to 1; 1 if it is no wider.
        determined: Boolean scalar: the pairs agree on one matrix. False for too few of them: some directions are then
            turned at will. True says nothing about noise.
    """

    matrix: Tensor
    kept: Tensor
    determined: Tensor


@torch.no_grad()
def procrustes(statistics: Sequence[RunningStatistics]) -> Rotation:
    """Minimise ``Σ ‖Qᵀ x − y‖²`` over orthogonal Q, x and y centred by modality.

    CLIP's loss stays the same when image and text embeddings are rotated together, so embeddings of two CLIPs can be
    compared only after this rotation. It is the polar factor of the cross-scatter: Schönemann, *A generalized solution
    of the orthogonal Procrustes problem* (1966). Modalities are stacked, each about its own mean: the gap between them
    is larger than what tells pairs apart, and differs between models.

    A wider reference is first projected to its leading principal directions, as many as the model is wide. A narrower
    one is embedded isometrically. The decompositions make the host wait for the device.

    Args:
        statistics: One per modality, centred, of pairs: x the reference's normalised embeddings, shape ``d_ref``, y the
            model's of the same samples, shape ``d_model``.

    Raises:
        MimicError: No statistics, statistics without samples or not centred, or widths that differ between modalities.

    Example:
        >>> statistics, x = RunningStatistics(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        >>> _ = statistics.add(x, x.flip(1) + 5)  # the model has the same axes in another order, and another mean
        >>> procrustes([statistics]).matrix.abs().round()
        tensor([[0., 1.],
                [1., 0.]])
    """
    _check(statistics)
    cross = torch.stack([m.xy for m in statistics]).sum(0)  # (d_ref, d_model)
    wide, narrow = cross.shape
    kept, basis = cross.new_ones(()), None
    with torch.autocast(cross.device.type, enabled=False):
        if wide > narrow:
            variances, directions = torch.linalg.eigh(torch.stack([m.xx for m in statistics]).sum(0))  # ascending
            basis, tiny = directions[:, -narrow:], torch.finfo(cross.dtype).tiny
            kept = variances[-narrow:].sum() / variances.sum().clamp(min=tiny)
            cross = basis.T @ cross
        left, sizes, right = torch.linalg.svd(cross, full_matrices=False)
        matrix = left @ right
        matrix = matrix if basis is None else basis @ matrix
    rounding = max(cross.shape) * torch.finfo(cross.dtype).eps
    return Rotation(matrix, kept.clamp(0, 1), sizes[-1] > rounding * sizes[0])


def _check(statistics: Sequence[RunningStatistics]) -> None:
    if not statistics:
        raise MimicError(
            "`statistics` is empty; expected one RunningStatistics for each modality, such as images and captions."
        )
    for index, one in enumerate(statistics):
        if not one.centred:
            raise MimicError(
                f"`statistics[{index}]` keeps its scatter about zero, where the gap between modalities drowns the "
                "differences between pairs. Make it with `RunningStatistics(centred=True)`."
            )
        if not one.state_dict():
            raise MimicError(f"`statistics[{index}]` holds no samples; call its `add` with pairs first.")
    shapes = [tuple(one.xy.shape) for one in statistics]
    if len(set(shapes)) > 1:
        given = ", ".join(f"{reference} and {model}" for reference, model in shapes)
        raise MimicError(
            f"`statistics` differ in width (reference and model): {given}. Both modalities must be embedded in one "
            "space; give the embeddings after the projection."
        )
