"""A reference's embeddings come into the model's frame: the known rotation is found, whatever the gap of each."""

import math
import re
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mimic.reference.procrustes import Rotation, procrustes
from lightning_mimic.reference.ridge import ridge_fit
from lightning_mimic.reference.running_statistics import RunningStatistics
from support.cases import case, for_each

IMAGE, TEXT = 0, 1
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # for float64


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def isometry(rows, columns, seed=0):
    """Orthonormal rows or columns, whichever are shorter."""
    left, _, right = torch.linalg.svd(normal(rows, columns, seed=seed), full_matrices=False)
    return left @ right


class Towers(NamedTuple):
    """Per modality: what a sample means, and the normalised embeddings of two CLIPs."""

    concepts: list[Tensor]  # (n, d), as the model lays them out
    model: list[Tensor]
    reference: list[Tensor]
    truth: Tensor  # (d, d): concepts @ truth.T are laid out as the reference does


def towers(pairs=400, width=16, gap=2.0, noise=0.1, seed=0):
    """Image and caption of a pair share a concept; each tower adds its own gap and noise, and normalises."""
    shared, truth = normal(pairs, width, seed=seed) / math.sqrt(width), isometry(width, width, seed + 1)
    concepts, model, reference = [], [], []
    for modality in (IMAGE, TEXT):
        seeds = iter(range(seed + 100 * modality + 10, seed + 100 * modality + 20))
        concept = shared + noise * normal(pairs, width, seed=next(seeds)) / math.sqrt(width)
        spread, offset = noise / math.sqrt(width), gap / math.sqrt(width)
        concepts.append(concept)
        for into, frame in ((model, torch.eye(width, dtype=concept.dtype)), (reference, truth.T)):
            tower = concept @ frame + spread * normal(pairs, width, seed=next(seeds))
            into.append(F.normalize(tower + offset * normal(width, seed=next(seeds)), dim=1))
    return Towers(concepts, model, reference, truth)


def statistics_of(reference, model):
    statistics = [RunningStatistics() for _ in reference]
    for one, x, y in zip(statistics, reference, model, strict=True):
        one.add(x, y)
    return statistics


def rotation_of(reference, model):
    return procrustes(statistics_of(reference, model))


def distance(matrix, truth):
    """0 for the same rotation, about 1.41 for an unrelated one."""
    return float(torch.linalg.matrix_norm(matrix - truth) / math.sqrt(min(truth.shape)))


def polar(cross):
    """The orthogonal factor by its definition: C (CᵀC)^(-½)."""
    values, vectors = torch.linalg.eigh(cross.T @ cross)
    return cross @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


def weighted_rows(batches, weights):
    """All rows about their weighted mean, each times the root of its weight."""
    rows = torch.cat(batches)
    each = torch.cat(
        [torch.full((len(batch), 1), w, dtype=rows.dtype) for batch, w in zip(batches, weights, strict=True)]
    )
    return (rows - (each * rows).sum(0) / each.sum()) * each.sqrt()


def identity(width):
    return Rotation(torch.eye(width, dtype=torch.float64), torch.tensor(1.0), torch.tensor(True))


@for_each("gap", [0.0, 5.0])
def test_a_reference_that_is_a_rotated_copy_is_turned_back_exactly(gap):
    truth = isometry(6, 6)
    concepts = [normal(30, 6, seed=1), normal(30, 6, seed=2)]
    reference = [c @ truth.T + gap * normal(6, seed=3 + i) for i, c in enumerate(concepts)]
    rotation = rotation_of(reference, [c + gap * normal(6, seed=5 + i) for i, c in enumerate(concepts)])
    torch.testing.assert_close(rotation.matrix, truth, **EXACT)
    assert (rotation.kept.shape, float(rotation.kept), bool(rotation.determined)) == (torch.Size(), 1, True)


def test_a_reflection_is_found_too():
    flip = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    concepts = normal(30, 3, seed=1)
    torch.testing.assert_close(rotation_of([concepts @ flip], [concepts]).matrix, flip, **EXACT)


@for_each("seed", [0, 1000, 2000])
def test_noisy_normalised_towers_need_each_modality_centred_by_itself(seed):
    # Measured over eight seeds: at most 0.08; about zero at least 0.60; about one mean at least 0.43.
    both = towers(seed=seed)
    assert distance(rotation_of(both.reference, both.model).matrix, both.truth) < 0.15
    x, y = torch.cat(both.reference), torch.cat(both.model)
    assert distance(polar(x.T @ y), both.truth) > 0.5
    assert distance(polar((x - x.mean(0)).T @ (y - y.mean(0))), both.truth) > 0.35


def test_captions_at_the_wrong_images_change_nothing_where_both_models_embed_the_same_caption():
    both, order = towers(pairs=92), torch.cat([torch.arange(37).roll(1), torch.arange(37, 92)])
    swapped = [[images, captions[order]] for images, captions in (both.reference, both.model)]
    straight = rotation_of(both.reference, both.model).matrix
    torch.testing.assert_close(rotation_of(*swapped).matrix, straight, **EXACT)


@for_each("seed", [0, 1000, 2000])
def test_a_model_that_has_learned_wrong_captions_by_heart_is_still_met(seed):
    # 37 of 92 captions lie where another belongs. Measured over ten seeds: at most 0.18; 0.10 without the wrong ones.
    both, order = towers(pairs=92, seed=seed), torch.cat([torch.arange(37).roll(1), torch.arange(37, 92)])
    rotation = rotation_of(both.reference, [both.model[IMAGE], both.model[TEXT][order]])
    assert distance(rotation.matrix, both.truth) < 0.3
    assert distance(rotation.matrix, isometry(16, 16, seed=9)) > 1.2  # what an unrelated one would give


@for_each("gap", [0.0, 3.0])
def test_of_a_wider_reference_the_leading_directions_are_kept_and_their_share_is_told(gap):
    basis = torch.linalg.qr(normal(60, 7, seed=0) - normal(60, 7, seed=0).mean(0)).Q  # centred, orthonormal columns
    spectrum = torch.tensor([9.0, 8.0, 6.0, 4.0, 1.5, 1.0, 0.5], dtype=torch.float64)
    concepts, frame = basis * spectrum.sqrt(), isometry(7, 7)
    # The model's axes also follow three small directions of the reference; those must not tilt the rotation.
    model = concepts[:, :4] + 0.9 * F.pad(concepts[:, 4:], (0, 1))
    rotation = rotation_of(
        [concepts @ frame + gap * normal(7, seed=1), concepts @ frame + gap * normal(7, seed=2)],
        [model + gap * normal(4, seed=3), model + gap * normal(4, seed=4)],
    )
    torch.testing.assert_close(rotation.matrix, frame.T[:, :4], **EXACT)
    torch.testing.assert_close(rotation.kept, spectrum.new_tensor(27 / 30), **EXACT)
    assert bool(rotation.determined)


def test_a_narrower_reference_is_embedded_without_changing_its_shape():
    frame, concepts = isometry(4, 7), normal(50, 4, seed=1)
    model = concepts @ frame + 3 * normal(7, seed=2) + 0.01 * normal(50, 7, seed=3)
    rotation = rotation_of([concepts + 3 * normal(4, seed=4)], [model])
    torch.testing.assert_close(rotation.matrix, frame, rtol=0, atol=0.01)
    torch.testing.assert_close(rotation.matrix @ rotation.matrix.T, torch.eye(4, dtype=torch.float64), **EXACT)
    assert (float(rotation.kept), bool(rotation.determined)) == (1, True)


@for_each("widths", [(5, 5), (8, 5), (4, 6)])
def test_running_sums_that_forget_give_what_all_weighted_samples_together_would(widths):
    sizes, decay = [9, 4, 1, 12, 7, 20], 0.7
    weights = [decay**age for age in reversed(range(len(sizes)))]
    statistics, xs, ys = [RunningStatistics(), RunningStatistics()], [], []
    for modality in (IMAGE, TEXT):
        x = normal(sum(sizes), widths[0], seed=modality) + 4 * modality
        y = x @ normal(*widths, seed=7) + normal(sum(sizes), widths[1], seed=10 + modality)
        for part in zip(x.split(sizes), y.split(sizes), strict=True):
            statistics[modality].add(*part, decay)
        xs.append(weighted_rows(x.split(sizes), weights))
        ys.append(weighted_rows(y.split(sizes), weights))
    rows, cross = torch.cat(xs), sum(x.T @ y for x, y in zip(xs, ys, strict=True))
    _, spread, directions = torch.linalg.svd(rows, full_matrices=False)
    lead = directions[: widths[1]].T if widths[0] > widths[1] else torch.eye(widths[0], dtype=rows.dtype)
    rotation = procrustes(statistics)
    torch.testing.assert_close(rotation.matrix, lead @ polar((lead.T @ cross).T).T, **EXACT)
    torch.testing.assert_close(rotation.kept, spread[: widths[1]].square().sum() / spread.square().sum(), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("widths", "fewest"), [((8, 8), 5), ((12, 8), 5), ((5, 8), 4)])
def test_too_few_pairs_determine_no_rotation(widths, fewest, dtype):
    # n pairs in each of two modalities, each about its own mean, span 2n - 2 directions.
    for seed, pairs in product(range(3), (2, fewest - 1, fewest, 50)):
        reference = [normal(pairs, widths[0], seed=seed + i, dtype=dtype) for i in (10, 20)]
        model = [normal(pairs, widths[1], seed=seed + i, dtype=dtype) for i in (30, 40)]
        rotation = rotation_of(reference, model)
        with case(f"seed {seed}, {pairs} pairs"):
            assert bool(rotation.determined) == (pairs >= fewest)
        short, dim = min(widths), 0 if widths[0] < widths[1] else 1
        gram = rotation.matrix @ rotation.matrix.T if dim == 0 else rotation.matrix.T @ rotation.matrix
        torch.testing.assert_close(gram, torch.eye(short, dtype=dtype), rtol=0, atol=1e-5)


@for_each("width", [3, 5])
def test_where_nothing_finite_was_seen_nothing_is_determined_and_nothing_is_nan(width):
    rotation = rotation_of([torch.full((4, width), math.nan)], [torch.zeros(4, 3)])
    assert not bool(rotation.determined)
    assert bool(torch.isfinite(rotation.matrix).all() & torch.isfinite(rotation.kept))


def test_autocast_takes_no_digits():
    reference, model = normal(40, 8, seed=1, dtype=torch.float32), normal(40, 5, seed=2, dtype=torch.float32)
    statistics = statistics_of([reference], [model])
    plain = procrustes(statistics)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = procrustes(statistics)
    torch.testing.assert_close(cast.matrix, plain.matrix, rtol=0, atol=0)


@pytest.mark.parametrize("modality", [IMAGE, TEXT])
@for_each("seed", [0, 1, 2])
def test_the_projection_fitted_to_rotated_targets_is_that_of_the_models_own_frame(seed, modality):
    # Measured over six seeds: with the rotation at least 0.94, without it at most 0.13 away from 0.
    both, layouts, features, outputs = towers(pairs=600, seed=1000 * seed), [], [], []
    for i, concepts in enumerate(both.concepts):
        layout = isometry(16, 24, seed=seed + 50 + i)  # the features lay the concepts out each tower in its own way
        layouts.append(layout)
        features.append(concepts @ layout + 0.05 * normal(600, 24, seed=seed + 60 + i))
        projection = 3 * (layout + 0.1 * normal(16, 24, seed=seed + 70 + i))  # the model is half trained
        outputs.append(features[i] @ projection.T + 1.5 * normal(16, seed=seed + 80 + i))
    found = rotation_of(both.reference, [F.normalize(o, dim=1) for o in outputs])
    expected = both.reference[modality] @ both.truth
    for rotation, near in ((found, True), (identity(16), False)):
        statistics, norm = RunningStatistics(), outputs[modality].norm(dim=1).mean()
        statistics.add(features[modality], norm * both.reference[modality] @ rotation.matrix)
        fit = ridge_fit(statistics)
        predicted = features[modality] @ fit.weight.T
        angles = [
            F.cosine_similarity(predicted - predicted.mean(0), expected - expected.mean(0)).mean(),
            F.cosine_similarity(fit.weight.flatten(), layouts[modality].flatten(), dim=0),
        ]
        assert all(angle > 0.9 if near else abs(angle) < 0.3 for angle in angles), angles
        if near:  # with its bias, the fit has the reference's own gap and the model's own length
            given = norm * both.reference[modality] @ rotation.matrix
            torch.testing.assert_close((predicted + fit.bias).mean(0), given.mean(0), **EXACT)
            torch.testing.assert_close(given.norm(dim=1), norm.expand(600), **EXACT)


def made(x, y, **options):
    statistics = RunningStatistics(**options)
    statistics.add(torch.ones(2, x), torch.ones(2, y))
    return statistics


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ([], "`statistics` is empty; expected one RunningStatistics for each modality"),
        ([made(3, 3), RunningStatistics()], "`statistics[1]` holds no samples; call its `add` with pairs first."),
        ([made(3, 3, centred=False)], "`statistics[0]` keeps its scatter about zero"),
        ([made(3, 3), made(4, 3)], "`statistics` differ in width (reference and model): 3 and 3, 4 and 3. Both"),
        ([made(3, 3), made(3, 4)], "`statistics` differ in width (reference and model): 3 and 3, 3 and 4. Both"),
    ],
)
def test_statistics_that_cannot_be_compared_are_refused(statistics, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        procrustes(statistics)
