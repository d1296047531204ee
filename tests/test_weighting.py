"""Weights are the softmax over all ranks' rows that count, with a floor on their effective number."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightning_mimic.scorers.weighting as weighting_module
from lightning_mimic.scorers import ShareWeighting, SoftmaxWeighting
from oracles import smallest_temperature, softmax_weights, weighted_gradient
from support.cases import case, for_each, pairwise
from support.examples import examples
from support.weightings import FIGURES, over_ranks

few = examples(25)
NAN, INF = float("nan"), float("inf")
score_lists = st.lists(st.floats(-50, 50), min_size=1, max_size=12)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def effective(weights):
    return float(1 / weights.double().square().sum())


@pytest.mark.parametrize(*pairwise(rows=[1, 2, 33], tau=[0.05, 1, 3.7, 1e6], dtype=[torch.float32, torch.float64]))
def test_weights_are_the_softmax_of_scores_over_temperature(rows, tau, dtype):
    torch.manual_seed(rows)
    scores = torch.randn(rows, dtype=dtype)
    result = SoftmaxWeighting(tau, min_ess=0)(scores)
    assert {t.dtype for t in (result.weights, result.scale, result.ess, result.temperature)} == {dtype}
    expected = softmax_weights(scores, tau)
    tolerance = {"rtol": 2e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(result.weights.double(), expected, **tolerance)
    torch.testing.assert_close(result.scale.double(), rows * expected, **tolerance)
    torch.testing.assert_close(float(result.ess), effective(expected), rtol=2e-5, atol=0)
    torch.testing.assert_close(result.temperature, torch.tensor(tau, dtype=dtype))


def test_the_figures_describe_the_rows_that_count():
    scores = torch.tensor([1.0, -2.0, NAN, 0.0, -5.0])
    result = SoftmaxWeighting(1.0)(scores, valid=torch.tensor([True, True, False, True, False]))
    assert (int(result.batch_size), int(result.counted)) == (5, 3)
    assert result.batch_size.dtype == result.counted.dtype == torch.int64
    torch.testing.assert_close(result.score_mean, torch.tensor(-1 / 3))
    torch.testing.assert_close(result.negative_share, torch.tensor(1 / 3))
    assert {getattr(result, name).shape for name in FIGURES} == {torch.Size()}


@pytest.mark.parametrize("min_ess", [0, 0.6, 1])
def test_rows_left_out_get_nothing_and_change_nothing_whatever_stands_in_them(min_ess):
    weighting, valid = SoftmaxWeighting(0.4, min_ess), torch.tensor([True, False, True, True, False])
    for junk in (NAN, INF, -INF, 1e30, 0.0):
        scores = torch.tensor([0.3, junk, -1.2, 2.0, junk])
        result, alone = weighting(scores, valid=valid), weighting(scores[valid])
        with case(junk):
            torch.testing.assert_close(result.weights[valid], alone.weights)
            torch.testing.assert_close(result.scale[valid], alone.weights * 5)
            assert result.weights[~valid].tolist() == [0, 0]
            assert result.scale[~valid].tolist() == [1, 1]
            for name in set(FIGURES) - {"batch_size"}:
                torch.testing.assert_close(getattr(result, name), getattr(alone, name))


@pytest.mark.parametrize("min_ess", [0, 0.25, 1])
def test_where_no_row_counts_the_loss_goes_through_as_it_is(min_ess):
    for junk in (NAN, INF, 1.0):
        result = SoftmaxWeighting(1.0, min_ess)(torch.full((3,), junk), valid=torch.zeros(3, dtype=torch.bool))
        with case(junk):
            assert result.weights.tolist() == [0, 0, 0]
            assert result.scale.tolist() == [1, 1, 1]
            assert (int(result.batch_size), int(result.counted)) == (3, 0)


def assert_floor_holds(scores, tau, min_ess):
    result = SoftmaxWeighting(tau, min_ess)(scores)
    temperature, needed = float(result.temperature), smallest_temperature(scores, tau, min_ess)
    assert needed * (1 - 1e-6) <= temperature <= needed * 1.0906
    assert temperature == tau or temperature > tau
    assert effective(result.weights) >= min_ess * len(scores) * (1 - 2e-6)
    torch.testing.assert_close(float(result.ess), effective(result.weights), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.weights, softmax_weights(scores, temperature), rtol=1e-9, atol=1e-12)
    return temperature


@pytest.mark.parametrize(*pairwise(rows=[2, 8, 40], tau=[0.03, 1.0], min_ess=[0.1, 0.25, 0.5, 0.9]))
def test_the_floor_raises_the_temperature_as_far_as_needed_and_at_most_a_step_more(rows, tau, min_ess):
    torch.manual_seed(rows)
    assert_floor_holds(5 * torch.randn(rows, dtype=torch.float64), tau, min_ess)


@few
@given(scores=score_lists, tau=st.floats(0.01, 10), twentieths=st.integers(1, 19))
def test_the_floor_holds_for_any_scores(scores, tau, twentieths):
    assert_floor_holds(doubles(scores), tau, twentieths / 20)


def test_a_floor_that_holds_already_touches_nothing():
    scores = doubles([0.0, 0.1, -0.2, 0.3])
    assert assert_floor_holds(scores, 0.7, 0.9) == 0.7
    torch.testing.assert_close(SoftmaxWeighting(0.7, 0.9)(scores).weights, softmax_weights(scores, 0.7))


@pytest.mark.parametrize("min_ess", [0.5, 1])
def test_equal_scores_get_equal_weights_at_the_given_temperature(min_ess):
    for value in (0.0, -3.3, 1e4):
        result = SoftmaxWeighting(2.0, min_ess)(torch.full((8,), value))
        with case(value):
            torch.testing.assert_close(result.weights, torch.full((8,), 1 / 8), rtol=1e-6, atol=0)
            assert float(result.temperature) == (math.inf if min_ess == 1 else 2)


def test_a_full_floor_gives_uniform_weights_and_no_floor_gives_the_softmax():
    scores = torch.tensor([0.0, 50.0, -50.0, 7.0])
    torch.testing.assert_close(SoftmaxWeighting(0.1, 1)(scores).weights, torch.full((4,), 0.25), rtol=0, atol=0)
    unfloored = SoftmaxWeighting(0.1, 0)(scores)
    assert unfloored.weights.tolist() == [0, 1, 0, 0]
    assert float(unfloored.ess) == 1


def test_scores_beyond_every_finite_temperature_get_uniform_weights():
    result = SoftmaxWeighting(1e-6, 0.9)(torch.tensor([1e6, -1e6, 0.0]))
    assert math.isinf(result.temperature)
    torch.testing.assert_close(result.weights, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("min_ess", [0, 0.25, 1])
def test_a_single_row_has_all_the_weight(min_ess):
    for score in (0.0, 1e4, -1e-30):
        result = SoftmaxWeighting(0.5, min_ess)(torch.tensor([score]))
        with case(score):
            assert [float(t) for t in (result.weights, result.scale, result.ess)] == [1, 1, 1]
            assert float(result.temperature) == (math.inf if min_ess == 1 else 0.5)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-3), (torch.float64, 1e-10)])
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_scores_overflow_nothing(sign, dtype, rtol):
    scores = sign * torch.tensor([1e4, 9999.0, 0.0, -1e4], dtype=dtype)
    result = SoftmaxWeighting(1.0, 0)(scores)
    torch.testing.assert_close(result.weights.double(), softmax_weights(scores, 1.0), rtol=rtol, atol=0)
    floored = SoftmaxWeighting(1.0, 0.75)(scores)
    assert effective(floored.weights) >= 3 * (1 - 1e-4)
    torch.testing.assert_close(floored.weights.sum(), torch.ones((), dtype=dtype), rtol=1e-5, atol=0)


@few
@given(
    scores=score_lists, tau=st.floats(0.05, 20), min_ess=st.sampled_from([0, 0.25, 0.8, 1]), shift=st.floats(-99, 99)
)
def test_weights_sum_to_one_rise_with_the_score_and_ignore_a_shift(scores, tau, min_ess, shift):
    weighting, scores = SoftmaxWeighting(tau, min_ess), doubles(scores)
    weights = weighting(scores).weights
    torch.testing.assert_close(weights.sum(), doubles(1.0), rtol=1e-9, atol=0)
    assert bool((weights[scores.argsort()].diff() >= 0).all())
    if min_ess == 0:  # a floor exactly met may move by a step
        torch.testing.assert_close(weighting(scores + shift).weights, weights, rtol=1e-9, atol=1e-12)


@for_each("bad", [0, -1, NAN, INF, -INF, "1", "Auto", True, None])
def test_a_temperature_that_is_none_is_refused(bad):
    with pytest.raises(
        ValueError, match=f"^`temperature` must be a positive finite number or 'auto', not {re.escape(repr(bad))}.$"
    ):
        SoftmaxWeighting(temperature=bad)


@for_each("bad", [-0.1, 1.01, 25, NAN, INF, "0.5", None])
def test_a_floor_that_is_no_share_is_refused(bad):
    message = f"`min_ess` is a fraction of the batch between 0 and 1, not {bad!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SoftmaxWeighting(min_ess=bad)


# All rows of the first rank are left out in the last.
@pytest.mark.parametrize(
    *pairwise(sizes=[(3, 5), (3, 1, 4), (3, 0, 5)], left_out=[(), (1, 4), (0, 1, 2)], min_ess=[0, 0.5])
)
def test_uneven_ranks_get_what_one_process_would_give_and_their_average_is_the_weighted_sum(
    sizes, left_out, min_ess, monkeypatch
):
    torch.manual_seed(4)
    weighting, scores, gradients = SoftmaxWeighting(0.3, min_ess), torch.randn(8).double(), torch.randn(8, 3).double()
    valid = torch.ones(8, dtype=torch.bool).index_fill_(0, torch.tensor(left_out, dtype=torch.int64), False)
    scores[~valid] = NAN
    whole = weighting(scores, valid=valid)
    ranks = over_ranks(monkeypatch, weighting, scores.split(sizes), valid.split(sizes))
    torch.testing.assert_close(torch.cat([r.weights for r in ranks]), whole.weights)
    for name in FIGURES:
        for rank in ranks:
            torch.testing.assert_close(getattr(rank, name), getattr(whole, name))
    rows = (torch.cat([r.scale for r in ranks]) * valid)[:, None] * gradients
    averaged = sum(part.sum(0) / max(len(part), 1) for part in rows.split(sizes)) / len(sizes)
    torch.testing.assert_close(averaged, weighted_gradient({"w": gradients}, whole.weights)["w"])


def test_ranks_exchange_one_small_row_whatever_the_batch(monkeypatch):
    sent = []
    monkeypatch.setattr(weighting_module, "stack_over_ranks", lambda row: sent.append(tuple(row.shape)) or row[None])
    for rows in (1, 5000):
        SoftmaxWeighting(1.0, 0)(torch.randn(rows))
    assert sent == [(7,), (7,)]


def test_own_shares_are_those_of_all_ranks(monkeypatch):
    weighting = ShareWeighting(lambda scores: scores.clamp(min=0))
    scores, valid = torch.tensor([2.0, -1.0, NAN, 1.0, 5.0, 0.0]), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    whole = weighting(scores, valid=valid)
    torch.testing.assert_close(whole.weights, torch.tensor([2.0, 0, 0, 1, 5, 0]) / 8)
    torch.testing.assert_close(whole.scale, torch.tensor([12.0, 0, 8, 6, 30, 0]) / 8)
    torch.testing.assert_close(whole.ess, torch.tensor(64 / 30))
    assert (whole.batch_size, whole.counted, whole.temperature) == (6, 5, None)
    torch.testing.assert_close(torch.stack([whole.score_mean, whole.negative_share]), torch.tensor([7 / 5, 1 / 5]))
    ranks = over_ranks(monkeypatch, weighting, scores.split([2, 4]), valid.split([2, 4]))
    torch.testing.assert_close(torch.cat([rank.weights for rank in ranks]), whole.weights)
    torch.testing.assert_close(torch.cat([rank.scale for rank in ranks]), torch.tensor([8.0, 0, 8, 8, 40, 0]) / 8)
    for rank in ranks:
        assert rank.temperature is None
        for name in set(FIGURES) - {"temperature"}:
            torch.testing.assert_close(getattr(rank, name), getattr(whole, name))


def test_where_all_own_shares_are_zero_so_are_the_weights_unless_the_scores_say_nothing():
    weighting = ShareWeighting(lambda scores: scores.clamp(min=0))
    scores, valid = torch.tensor([-2.0, NAN, 0.0, -1.0]), torch.tensor([True, False, True, True])
    none, uniform = weighting(scores, valid=valid), weighting(scores, valid=valid, uniform=torch.tensor(True))
    assert (none.weights.tolist(), none.scale.tolist(), float(none.ess)) == ([0, 0, 0, 0], [0, 1, 0, 0], 0)
    torch.testing.assert_close(uniform.weights, torch.tensor([1.0, 0, 1, 1]) / 3)
    torch.testing.assert_close(torch.stack([uniform.ess, uniform.score_mean]), torch.tensor([3.0, 0.0]))
    empty = weighting(scores, valid=torch.zeros(4, dtype=torch.bool))
    assert (empty.weights.tolist(), empty.scale.tolist(), int(empty.counted)) == ([0] * 4, [1] * 4, 0)
