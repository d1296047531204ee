"""Every scorer is its formula, reads what it declares and nothing else, and puts wrong labels last."""

import inspect
import math
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import Direction, LayerGradients
from lightning_mimic.scorers import (
    NEEDS,
    CosineSimilarity,
    EndpointScore,
    GradMatch,
    GradNorm,
    HeadReferenceLoss,
    HeadRhoLoss,
    MimicScore,
    Need,
    Posterior,
    Products,
    ReferenceLoss,
    ReferencePart,
    RhoLoss,
    Uniform,
)
from support.cases import for_each
from support.examples import examples

FORMULAS = {
    MimicScore: lambda p: [-d / p["direction_norm"] for d in p["dot"]],
    CosineSimilarity: lambda p: [-d / (n * p["direction_norm"]) for d, n in zip(p["dot"], p["norms"], strict=True)],
    GradNorm: lambda p: p["norms"],
    ReferenceLoss: lambda p: [-x for x in p["reference_losses"]],
    RhoLoss: lambda p: [x - r for x, r in zip(p["losses"], p["reference_losses"], strict=True)],
    Uniform: lambda p: [0.0 for _ in p["samples"]],
}
NUMBERS = {
    "samples": [7.0, float("nan"), -7.0],
    "dot": [-8.0, 3.0, 0.0],
    "direction_norm": 4.0,
    "norms": [2.5, 1.5, 5.0],
    "losses": [0.25, 3.0, 9.0],
    "reference_losses": [2.0, 0.5, 9.0],
    "outputs": [[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]],
    "output_gradients": [[-0.25, 0.25], [0.125, -0.125], [0.5, -0.5]],
    "reference_outputs": [[2.0, -1.0], [1.0, 0.0], [0.0, 3.0]],
    "labels": [0, 1, 1],
    "calibrated_outputs": [[4.0, -2.0], [2.0, 0.0], [0.0, 6.0]],
    "calibrated_norm": 2.0,
    "calibrated_direction_norm": 4.0,
    "posteriors": [0.9, 0.5, 0.1],
}


def softmax(row):
    return [math.exp(each) / sum(map(math.exp, row)) for each in row]


def cross_entropies(rows, labels):
    return [-math.log(softmax(row)[label]) for row, label in zip(rows, labels, strict=True)]


def end(p, rows):
    """``(y − q)·(z' − z)``, class by class."""
    return [
        sum(((label == k) - q) * (theirs[k] - own[k]) for k, q in enumerate(softmax(theirs)))
        for theirs, own, label in zip(rows, p["outputs"], p["labels"], strict=True)
    ]


def along(p, rows, norm):
    return [
        -sum(g * each for g, each in zip(gradient, row, strict=True)) / norm
        for gradient, row in zip(p["output_gradients"], rows, strict=True)
    ]


def changes(p):
    return [
        [c - z for c, z in zip(*rows, strict=True)] for rows in zip(p["calibrated_outputs"], p["outputs"], strict=True)
    ]


def of(kind, rows):
    """The formula of a scorer of the reference's logits."""

    def formula(p):
        losses = cross_entropies(p[rows], p["labels"])
        if kind is HeadReferenceLoss:
            return [-each for each in losses]
        if kind is EndpointScore:
            return end(p, p[rows])
        own = cross_entropies(p["outputs"], p["labels"])
        return [a - b for a, b in zip(own, losses, strict=True)]

    return formula


FORMULAS |= {ReferencePart: lambda p: along(p, p["calibrated_outputs"], p["calibrated_norm"])}
FORMULAS |= {partial(MimicScore, calibrated=True): lambda p: along(p, changes(p), p["calibrated_direction_norm"])}
FORMULAS |= {kind: of(kind, "reference_outputs") for kind in (HeadReferenceLoss, HeadRhoLoss, EndpointScore)}
FORMULAS |= {
    partial(kind, calibrated=True): of(kind, "calibrated_outputs")
    for kind in (HeadReferenceLoss, HeadRhoLoss, EndpointScore)
}


def products_of(dtype=torch.float32, **numbers):
    kinds = {"labels": torch.int64}
    return Products(**{name: torch.tensor(number, dtype=kinds.get(name, dtype)) for name, number in numbers.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@for_each("kind", FORMULAS)
def test_a_scorer_is_its_formula(kind, dtype):
    scores = kind()(products_of(dtype, **NUMBERS))
    assert scores.shape == (3,)
    torch.testing.assert_close(scores, torch.tensor(FORMULAS[kind](NUMBERS), dtype=dtype))


def brought(need):
    """A need's fields: the direction's norm comes with the dot, and which rows are this rank's with the Gram matrix."""
    more = {
        "dot": {"direction_norm"},
        "gram": {"own"},
        "outputs": {"output_gradients"},
        "calibrated_outputs": {"calibrated_norm", "calibrated_direction_norm"},
    }
    return {need} | more.get(need, set())


def fields_read(kind, fields):
    """The fields that a scorer reads of products that hold these."""

    class Watched(Products):
        def __getattribute__(self, name):
            if not name.startswith("__"):
                read.add(name)
            return super().__getattribute__(name)

    read: set[str] = set()
    held = products_of(**{name: NUMBERS[name] for name in fields})
    kind()(Watched(**{name: getattr(held, name) for name in fields}))
    return read - {"samples"}


@for_each("kind", FORMULAS)
def test_what_is_declared_is_enough_and_a_scorer_reads_something_of_each_need_and_nothing_else(kind):
    needs = kind().needs
    fields = set().union({"samples"}, *map(brought, needs))
    read = fields_read(kind, fields)
    assert all(brought(need) & read for need in needs)
    held = products_of(**{name: NUMBERS[name] for name in fields})
    torch.testing.assert_close(kind()(held), kind()(products_of(**NUMBERS)))
    torch.testing.assert_close(kind()(products_of(**NUMBERS).for_reader(kind())), kind()(held), equal_nan=True)


@for_each("kind", FORMULAS)
def test_a_scorer_without_something_it_reads_fails_with_the_name_of_the_missing_field(kind):
    for field in fields_read(kind, NUMBERS):
        rest = products_of(**{name: number for name, number in NUMBERS.items() if name != field})
        with pytest.raises(MimicError, match=f"^`{field}` is not among these products; they hold `"):
            kind()(rest)


def test_needs_are_named_as_products_are():
    fields = set(inspect.signature(Products).parameters)
    assert set(NEEDS) == set(get_args(Need)) <= fields
    assert set().union(GradMatch.needs, Posterior.needs, *(kind().needs for kind in FORMULAS)) == set(get_args(Need))
    assert set().union(*map(brought, get_args(Need))) == fields - {"samples"}
    assert all(isinstance(kind().needs, frozenset) for kind in FORMULAS)


@for_each("kind", FORMULAS)
def test_a_scorer_keeps_its_samples_device_dtype_and_no_gradient(kind):
    meta = Products(**{name: torch.tensor(number, device="meta") for name, number in NUMBERS.items()})
    scores = kind()(meta)  # a comparison of values would fail here, and wait for the device on a GPU
    assert (scores.device.type, scores.dtype, scores.requires_grad) == ("meta", torch.float32, False)


@for_each("kind", FORMULAS)
def test_a_scorer_changes_none_of_its_products(kind):
    products, untouched = products_of(**NUMBERS), products_of(**NUMBERS)
    kind()(products)
    for name in NUMBERS:
        torch.testing.assert_close(getattr(products, name), getattr(untouched, name), rtol=0, atol=0, equal_nan=True)


@for_each("dot", [0.0, -0.0, 1e-30])
def test_a_sample_without_gradient_has_a_cosine_of_zero_and_harms_no_other(dot):
    scores = CosineSimilarity()(products_of(samples=[0, 0], dot=[dot, -6.0], norms=[0.0, 2.0], direction_norm=3.0))
    torch.testing.assert_close(scores, torch.tensor([0.0, 1.0]), rtol=0, atol=0)


@for_each("kind", [MimicScore, CosineSimilarity])
def test_without_a_direction_there_is_no_finite_score(kind):
    scores = kind()(products_of(samples=[0, 0], dot=[0.0, 0.0], norms=[1.0, 2.0], direction_norm=0.0))
    assert not scores.isfinite().any()


def test_a_nan_stays_with_its_sample_and_is_not_hidden():
    nan = float("nan")
    products = products_of(samples=[0, 0], dot=[nan, 1.0], norms=[nan, 1.0], direction_norm=1.0)
    assert CosineSimilarity()(products).isnan().tolist() == [True, False]
    assert MimicScore()(products).isnan().tolist() == [True, False]


def numbers(size):
    return st.lists(st.floats(-100, 100, width=32), min_size=size, max_size=size)


@examples(40)
@given(row=numbers(4), v=numbers(4), dtype=st.sampled_from([torch.float32, torch.float64]), aligned=st.booleans())
def test_a_cosine_is_never_beyond_one_and_has_the_mimic_scores_sign(row, v, dtype, aligned):
    v = torch.tensor(v, dtype=dtype)
    rows = torch.stack([v * row[0], -v] if aligned else [torch.tensor(row, dtype=dtype), v])
    if v.norm() < 1e-3:
        return
    products = Products(rows[:, 0], dot=rows @ v, norms=rows.norm(dim=1), direction_norm=v.norm())
    cosine, mimic = CosineSimilarity()(products), MimicScore()(products)
    assert (cosine.abs() <= 1).all()
    assert (cosine * mimic >= 0).all()
    torch.testing.assert_close(cosine * products.norms, mimic, rtol=1e-4, atol=1e-4)


def test_cosines_of_a_layers_rows_are_within_their_bounds_and_attain_them():
    layer = nn.Linear(1, 1, bias=False).double()
    inputs, b = torch.tensor([[1.0], [2.0], [3.0], [0.0]]).double(), torch.tensor([[-1.0], [5.0], [-2.0], [3.0]])
    direction = Direction({"weight": layer.weight + 2.0}, {"weight": layer.weight})
    rows = LayerGradients(layer, inputs, b.double())
    products = Products(b, dot=rows.dot(direction), norms=rows.norms(), direction_norm=direction.norm())
    torch.testing.assert_close(CosineSimilarity()(products), torch.tensor([1.0, -1.0, 1.0, 0.0]).double())


WRONG = torch.tensor([False, False, True, False, True, False])
X = torch.tensor([[2.0, 0.1], [1.5, -0.4], [1.8, 0.3], [-2.0, 0.2], [-1.7, -0.1], [-1.9, 0.5]])
LABELS = (X[:, 0] > 0) ^ WRONG


def products_at(weight):
    """What is known of two clusters, two labels of which are wrong, by a linear model with that weight."""
    model, reference = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-weight, 0.0], [weight, 0.0]]))
        reference.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    logits = model(X)
    losses = F.cross_entropy(logits, LABELS.long(), reduction="none")
    (b,) = torch.autograd.grad(losses.sum(), logits)
    rows, direction = (
        LayerGradients(model, X, b),
        Direction(dict(reference.named_parameters()), {"weight": model.weight}),
    )
    return Products(
        samples=losses,
        dot=rows.dot(direction),
        direction_norm=direction.norm(),
        norms=rows.norms(),
        losses=losses.detach(),
        reference_losses=F.cross_entropy(reference(X), LABELS.long(), reduction="none").detach(),
    )


@pytest.mark.parametrize("weight", [0.0, 0.1])
@for_each("kind", [MimicScore, CosineSimilarity, ReferenceLoss, RhoLoss])
def test_every_right_label_scores_higher_than_every_wrong_one(kind, weight):
    scores = kind()(products_at(weight))
    assert scores[~WRONG].min() > scores[WRONG].max() + 0.3


@for_each("kind", [MimicScore, CosineSimilarity])
def test_a_right_label_points_to_the_reference_and_a_wrong_one_away(kind):
    assert ((kind()(products_at(0.0)) < 0) == WRONG).all()


def test_of_a_model_that_has_learnt_the_wrong_labels_have_the_long_gradients():
    scores = GradNorm()(products_at(0.9))
    assert scores[WRONG].min() > scores[~WRONG].max()


def test_what_the_model_knows_already_has_no_reducible_loss():
    learnt, fresh = RhoLoss()(products_at(1.0)), RhoLoss()(products_at(0.0))
    torch.testing.assert_close(learnt, torch.zeros(6), rtol=0, atol=1e-6)
    assert fresh[0] == pytest.approx(math.log(2) - math.log1p(math.exp(-4.0)), rel=1e-5)


@for_each("kind", [HeadReferenceLoss, HeadRhoLoss, EndpointScore])
def test_a_shift_of_the_logits_changes_no_score_of_the_reference(kind):
    shifted = dict(NUMBERS)
    for name, shift in (("reference_outputs", 7.0), ("outputs", -3.0)):
        shifted[name] = [[each + shift for each in row] for row in NUMBERS[name]]
    torch.testing.assert_close(kind()(products_of(**shifted)), kind()(products_of(**NUMBERS)))


def test_posteriors_that_round_to_zero_are_shares_of_their_batch():
    for posteriors, expected in (([0.0], [1.0]), ([0.0, 0.0], [0.5, 0.5]), ([0.0, 0.5], [0.0, 1.0])):
        given = torch.tensor(posteriors)
        weights = Posterior()(torch.zeros_like(given), Products(given, posteriors=given)).weights
        torch.testing.assert_close(weights, torch.tensor(expected))
