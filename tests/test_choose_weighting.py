"""A run's weighting: the given one, the scorer's own, or a softmax; and what a weighting returns is checked."""

import dataclasses
import re

import pytest
import torch

from lightning_mimic.errors import MimicError
from lightning_mimic.scorers import (
    GradMatch,
    MimicScore,
    Products,
    ShareWeighting,
    SoftmaxWeighting,
    choose_weighting,
    normalised_weights,
    validate_weights,
)
from support.cases import for_each
from support.weightings import FIGURES, over_ranks

NAN = float("nan")


class Posterior:
    """The reference's probability of the label."""

    needs = frozenset({"reference_losses"})

    def __call__(self, scores, products=None, *, valid=None, uniform=None):
        raw = torch.exp(-products.reference_losses)
        return normalised_weights(raw, scores, valid=valid, uniform=uniform)


class Positional(Posterior):
    def __call__(self, scores):
        return super().__call__(scores)


class NotCallable:
    needs = frozenset()


class Undeclared:
    def __call__(self, scores, products=None, *, valid=None, uniform=None):
        return SoftmaxWeighting()(scores)


class Typo(Posterior):
    needs = frozenset({"reference_loss"})


def raises(message):
    return pytest.raises(MimicError, match=f"^{re.escape(message)}$")


def test_without_a_weighting_the_scorer_weighs_or_a_softmax_does():
    weighting = choose_weighting(MimicScore())
    assert (type(weighting), weighting.temperature, weighting.min_ess) == (SoftmaxWeighting, 1.0, 0.25)
    assert choose_weighting(MimicScore(), temperature=0.3).temperature == 0.3
    assert choose_weighting(MimicScore(), min_ess=0).min_ess == 0
    assert type(choose_weighting(GradMatch())) is ShareWeighting
    assert SoftmaxWeighting().needs == ShareWeighting(torch.relu).needs == frozenset()
    assert not hasattr(ShareWeighting(torch.relu), "temperature")


@pytest.mark.parametrize("weighting", [Posterior(), SoftmaxWeighting(0.2, 0), ShareWeighting(torch.relu)])
def test_a_given_weighting_is_taken_as_it_is(weighting):
    assert choose_weighting(MimicScore(), weighting) is weighting


@for_each(
    ("options", "message"),
    [
        (
            {"scorer": GradMatch(), "temperature": 0.5},
            "`temperature` is 0.5, but GradMatch makes weights itself, without a softmax; leave it out (in a "
            "configuration: null).",
        ),
        (
            {"scorer": GradMatch(), "weighting": Posterior()},
            "`weighting` is given, but GradMatch makes weights itself by its method `weigh`; leave `weighting` out, or "
            "take another scorer.",
        ),
        (
            {"weighting": Posterior(), "temperature": 0.5},
            "`temperature` is 0.5, but `weighting` is given; leave it out, or give "
            "`weighting=SoftmaxWeighting(temperature=0.5)` alone.",
        ),
        (
            {"weighting": SoftmaxWeighting(), "min_ess": 0},
            "`min_ess` is 0, but `weighting` is given; leave it out, or give `weighting=SoftmaxWeighting(min_ess=0)` "
            "alone.",
        ),
        ({"weighting": Posterior}, "`weighting` is the class Posterior; expected an object: Posterior(...)."),
        (
            {"weighting": "softmax"},
            "`weighting` is 'softmax', which cannot be called; expected an object with `__call__`.",
        ),
        (
            {"weighting": Undeclared()},
            "`weighting`: Undeclared has no `needs`; expected a frozenset of the products it reads, of 'dot', 'norms', "
            "'gram', 'losses', 'reference_losses', 'outputs', 'reference_outputs', 'labels', 'calibrated_outputs', "
            "'posteriors', such as frozenset({'dot'}).",
        ),
        (
            {"weighting": Typo()},
            "`weighting`: Typo declares 'reference_loss' in its `needs`, which is no product; nearest: "
            "'reference_losses', 'reference_outputs', 'losses'.",
        ),
        (
            {"weighting": Positional()},
            "`weighting`: Positional cannot be called as weighting(scores, products, valid=..., uniform=...): too many "
            "positional arguments.",
        ),
        ({"temperature": 0}, "`temperature` must be a positive finite number or 'auto', not 0."),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_fix(options, message):
    with raises(message):
        choose_weighting(**{"scorer": MimicScore()} | options)


def test_what_cannot_be_called_is_refused_with_what_it_is():
    with pytest.raises(MimicError, match=r"`weighting` is <.*NotCallable.*>, which cannot be called; expected an obje"):
        choose_weighting(MimicScore(), NotCallable())


def products_of(probabilities):
    losses = -torch.log(torch.tensor(probabilities))
    return Products(losses, reference_losses=losses)


def test_a_posterior_weights_by_what_it_declares_on_one_rank_or_two(monkeypatch):
    products = products_of([0.9, 0.5, 0.2, 0.1, 0.4]).for_reader(Posterior())
    scores, valid = torch.tensor([1.0, -1.0, NAN, 2.0, -2.0]), torch.tensor([True, True, False, True, True])
    whole = Posterior()(scores, products, valid=valid)
    torch.testing.assert_close(whole.weights, torch.tensor([9.0, 5, 0, 1, 4]) / 19)
    torch.testing.assert_close(whole.scale, torch.tensor([45.0, 25, 19, 5, 20]) / 19)
    torch.testing.assert_close(whole.ess, torch.tensor(19**2 / 123.0))
    assert (int(whole.batch_size), int(whole.counted), whole.temperature) == (5, 4, None)
    assert (float(whole.score_mean), float(whole.negative_share)) == (0.0, 0.5)
    assert validate_weights(Posterior(), whole, 5) is whole
    uniform = Posterior()(scores, products, valid=valid, uniform=torch.tensor(True))
    torch.testing.assert_close(uniform.weights, valid / 4)

    rows = products.reference_losses

    def of_rank(part, valid):  # which rows a rank has shows in its scores
        own = rows[:2] if len(part) == 2 else rows[2:]
        return Posterior()(part, Products(own, reference_losses=own), valid=valid)

    ranks = over_ranks(monkeypatch, of_rank, scores.split([2, 3]), valid.split([2, 3]))
    torch.testing.assert_close(torch.cat([rank.weights for rank in ranks]), whole.weights)
    for name in set(FIGURES) - {"temperature"}:
        assert all(torch.equal(getattr(rank, name), getattr(ranks[0], name)) for rank in ranks)
        torch.testing.assert_close(getattr(ranks[0], name), getattr(whole, name))


def test_a_negative_or_undefined_raw_weight_does_not_train_unnoticed_unless_its_row_is_invalid():
    scores, valid = torch.zeros(3), torch.tensor([True, True, False])
    for bad in (-1e-6, NAN):
        assert normalised_weights(torch.tensor([1.0, bad, 1.0]), scores).weights.isnan().all()
        weights = normalised_weights(torch.tensor([1.0, 3.0, bad]), scores, valid=valid).weights
        torch.testing.assert_close(weights, torch.tensor([0.25, 0.75, 0.0]))
    zero = normalised_weights(torch.tensor([-0.0, 0.0, 0.0]), scores)
    assert (zero.weights.tolist(), float(zero.ess)) == ([0, 0, 0], 0)


@for_each(
    ("raw", "described"),
    [
        (torch.ones(3, 1), "a torch.float32 tensor of shape (3, 1) on cpu"),
        (torch.ones(3, device="meta"), "a torch.float32 tensor of shape (3,) on meta"),
        ([1, 1, 1], "a list"),
    ],
)
def test_raw_weights_of_another_shape_are_refused(raw, described):
    with raises(f"`raw` is {described}; expected weights of 0 or more, a tensor of shape (3,) on cpu."):
        normalised_weights(raw, torch.zeros(3))


def test_raw_weights_that_are_counts_are_taken_in_the_scores_dtype_and_carry_no_gradient():
    found = normalised_weights(torch.tensor([1, 0, 3]), torch.zeros(3, dtype=torch.float64, requires_grad=True))
    torch.testing.assert_close(found.weights, torch.tensor([0.25, 0, 0.75], dtype=torch.float64))
    assert not found.weights.requires_grad


GOOD = SoftmaxWeighting()(torch.zeros(4))


@for_each(
    ("returned", "message"),
    [
        (
            GOOD.weights,
            "returned a torch.float32 tensor of shape (4,) on cpu; expected BatchWeights, as "
            "`normalised_weights(raw, scores, valid=valid, uniform=uniform)` returns them.",
        ),
        (None, "returned None; expected BatchWeights, as `normalised_weights(raw, scores, valid=valid, "),
        (
            dataclasses.replace(GOOD, weights=torch.ones(4, 1)),
            "returned BatchWeights whose `weights` is a torch.float32 tensor of shape (4, 1) on cpu; expected a tensor "
            "of shape (4,).",
        ),
        (
            dataclasses.replace(GOOD, scale=torch.ones(3)),
            "returned BatchWeights whose `scale` is a torch.float32 tensor of shape (3,) on cpu; expected a tensor of "
            "shape (4,).",
        ),
        (
            dataclasses.replace(GOOD, ess=4.0),
            "returned BatchWeights whose `ess` is a float; expected a tensor of shape ().",
        ),
        (
            dataclasses.replace(GOOD, temperature=torch.ones(1)),
            "returned BatchWeights whose `temperature` is a torch.float32 tensor of shape (1,) on cpu; expected a "
            "tensor of shape ().",
        ),
    ],
)
def test_what_is_no_weight_per_row_is_refused(returned, message):
    with pytest.raises(MimicError, match=f"^Posterior {re.escape(message)}"):
        validate_weights(Posterior(), returned, 4)


def test_a_softmax_and_shares_pass_their_check():
    for weighting in (SoftmaxWeighting(), ShareWeighting(torch.relu)):
        assert validate_weights(weighting, weighting(torch.ones(4)), 4).weights.shape == (4,)
