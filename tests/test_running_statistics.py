"""Running statistics against lists of all samples; the ridge fit against equations built by hand."""

import math
import re

import pytest
import torch

from lightning_mimic.reference.ridge import ridge_fit
from lightning_mimic.reference.running_statistics import DECAY, RunningStatistics
from support.cases import case, for_each, pairwise

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # for float64
WIDTH, CLASSES = 5, 3
PENALTY = 0.01  # relative to the features' mean variance


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pairs(*sizes, dtype=torch.float64, centre=0.0, spread=1.0):
    """Batches of (x, y) in which y follows x, about centres that move from batch to batch."""
    found = []
    for k, size in enumerate(sizes):
        x = centre + spread * (normal(size, WIDTH, seed=10 * k) @ normal(WIDTH, WIDTH, seed=1) + 0.3 * k)
        y = (x - centre) @ normal(WIDTH, CLASSES, seed=2) + 0.1 * normal(size, CLASSES, seed=10 * k + 1) + 2
        found.append((x.to(dtype), y.to(dtype)))
    return found


def added(batches, decay=None, **options):
    statistics = RunningStatistics(**options)
    for x, y in batches:
        statistics.add(x, y) if decay is None else statistics.add(x, y, decay)
    return statistics


def listed(batches, decay=DECAY, centred=True, weights=None):
    """The same from one list of all samples with their weights, one sample at a time, in float64."""
    weights = [decay**age for age in reversed(range(len(batches)))] if weights is None else weights
    samples = []
    for weight, (xs, ys) in zip(weights, batches, strict=True):
        for x, y in zip(xs.double(), ys.double(), strict=True):
            if all(math.isfinite(v) for v in [*x.tolist(), *y.tolist()]):
                samples.append((weight, x, y))
    count = sum(w for w, _, _ in samples)
    mean_x = sum(w * x for w, x, _ in samples) / count * centred
    mean_y = sum(w * y for w, _, y in samples) / count * centred
    return {
        "count": torch.tensor(count, dtype=torch.float64),
        "mean_x": mean_x,
        "mean_y": mean_y,
        "xx": sum(w * torch.outer(x - mean_x, x - mean_x) for w, x, _ in samples),
        "xy": sum(w * torch.outer(x - mean_x, y - mean_y) for w, x, y in samples),
    }


def sums_of(statistics):
    return {name: getattr(statistics, name) for name in ("count", "mean_x", "mean_y", "xx", "xy")}


def in_float64(statistics):
    return {name: tensor.double() for name, tensor in sums_of(statistics).items()}


@pytest.mark.parametrize(
    *pairwise(sizes=[(7,), (4, 4, 4), (9, 1, 2, 30, 1), (1,) * 12], decay=[None, 1.0, 0.5, 0.0], centred=[True, False])
)
def test_the_sums_are_those_of_a_weighted_list(sizes, decay, centred):
    batches = pairs(*sizes)
    statistics = added(batches, decay, centred=centred)
    # What is not said is forgotten by 0.9.
    expected = listed(batches, 0.9 if decay is None else decay, centred)
    torch.testing.assert_close(sums_of(statistics), expected, **EXACT)


def test_the_decay_may_change_from_batch_to_batch():
    batches, statistics = pairs(6, 5, 4, 3), RunningStatistics()
    for (x, y), decay in zip(batches, (0.1, 1.0, 0.5, 0.9), strict=True):
        statistics.add(x, y, decay)
    torch.testing.assert_close(sums_of(statistics), listed(batches, weights=(0.45, 0.45, 0.9, 1.0)), **EXACT)


@pytest.mark.parametrize(
    *pairwise(where=[(0, 1, "x"), (1, 0, "y"), (2, 3, "x")], bad=[math.nan, math.inf, -math.inf], centred=[True, False])
)
def test_a_row_that_is_not_finite_is_left_out_and_the_others_stay(where, bad, centred):
    batches = pairs(4, 5, 6)
    batch, row, part = where
    batches[batch]["xy".index(part)][row, 2] = bad
    torch.testing.assert_close(sums_of(added(batches, centred=centred)), listed(batches, centred=centred), **EXACT)


def test_what_was_given_is_left_as_it_is():
    ((x, y),) = pairs(4)
    x[1, 1] = math.nan
    before = x.clone(), y.clone()
    statistics = added([(x, y)])
    held = statistics.xx
    copied = held.clone()
    statistics.add(x, y)
    torch.testing.assert_close((x, y), before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(held, copied, rtol=0, atol=0)


@for_each("first", [True, False])
def test_a_batch_without_a_finite_row_only_ages_the_others(first):
    batches = pairs(4, 5, 6)
    batches[0 if first else 1][0][:] = math.nan
    torch.testing.assert_close(sums_of(added(batches)), listed(batches), **EXACT)


def test_scatter_beside_a_large_mean_survives_float32():
    batches = pairs(40, 50, 3, 60, dtype=torch.float32, centre=1e4, spread=0.1)
    statistics, expected = added(batches), listed(batches)
    for name in ("mean_x", "mean_y"):
        torch.testing.assert_close(getattr(statistics, name).double(), expected[name], rtol=1e-6, atol=1e-3)
    # Raw second moments would have lost it.
    weights = torch.cat([torch.full((len(x), 1), 0.9**age) for age, (x, _) in enumerate(reversed(batches))][::-1])
    x = torch.cat([x for x, _ in batches])
    mean = (weights * x).sum(0) / weights.sum()
    naive = (weights * x).T @ x - weights.sum() * torch.outer(mean, mean)
    size = expected["xx"].diagonal().mean()
    assert float((naive.double() - expected["xx"]).abs().max() / size) > 1
    # The means' own rounding is 1e-3 here, a hundredth of the spread.
    assert float((statistics.xx.double() - expected["xx"]).abs().max() / size) < 3e-3
    assert float((statistics.xy.double() - expected["xy"]).abs().max() / expected["xy"].abs().max()) < 3e-3


@for_each("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    batches = pairs(300, 300, dtype=dtype, centre=200)
    statistics = added(batches)
    assert statistics.xx.dtype == torch.float32
    # The samples are given in half precision; nothing more is lost (300 * 200 is no half-precision number).
    torch.testing.assert_close(in_float64(statistics), listed(batches), rtol=1e-4, atol=1e-2)


def test_autocast_changes_neither_sums_nor_fit():
    batches = pairs(40, 50, dtype=torch.float32, centre=100)
    plain = added(batches)
    expected = ridge_fit(plain)
    with torch.autocast("cpu", torch.bfloat16):
        statistics = added(batches)
        fit = ridge_fit(statistics)
    torch.testing.assert_close(sums_of(statistics), sums_of(plain), rtol=0, atol=0)
    torch.testing.assert_close(fit.weight, expected.weight, rtol=0, atol=0)
    torch.testing.assert_close(fit.bias, expected.bias, rtol=0, atol=0)


def test_no_graph_is_kept():
    ((x, y),) = pairs(6)
    statistics = added([(x.requires_grad_(), y)])
    assert not any(tensor.requires_grad for tensor in statistics.state_dict().values())
    assert not ridge_fit(statistics).weight.requires_grad


def test_empty_sums_say_so():
    statistics = RunningStatistics()
    assert statistics.state_dict() == {}
    for name in ("count", "mean_x", "mean_y", "xx", "xy"):
        with pytest.raises(ValueError, match=f"^{re.escape('the sums are empty; add samples first.')}$"):
            getattr(statistics, name)


def test_a_state_goes_on_where_it_was_saved(tmp_path):
    batches = pairs(4, 5, 6)
    whole, first, again = added(batches), added(batches[:2]), RunningStatistics()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.add(*batches[2])
    torch.testing.assert_close(sums_of(again), sums_of(whole), rtol=0, atol=0)
    torch.testing.assert_close(sums_of(first), listed(batches[:2]), **EXACT)  # not moved along
    empty = RunningStatistics()
    empty.load_state_dict(RunningStatistics().state_dict())
    empty.add(*batches[0])
    torch.testing.assert_close(sums_of(empty), listed(batches[:1]), **EXACT)


def by_least_squares(batches, decay=DECAY, centred=True):
    """W and c as the least squares of a list of equations, the penalty as D more of them, the intercept a column."""
    sums = listed(batches, decay, centred)
    width = len(sums["xx"])
    root = math.sqrt(PENALTY * float(sums["xx"].trace()) / width)
    rows, targets = [], []
    for age, (x, y) in enumerate(reversed(batches)):
        scale = math.sqrt(decay**age)
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        rows.append(scale * (torch.cat([x.double(), ones], 1) if centred else x.double()))
        targets.append(scale * y.double())
    penalty = root * torch.eye(width, dtype=torch.float64)
    rows.append(torch.cat([penalty, torch.zeros(width, 1, dtype=torch.float64)], 1) if centred else penalty)
    targets.append(torch.zeros(width, CLASSES, dtype=torch.float64))
    found = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets), driver="gelsd").solution
    bias = found[width] if centred else torch.zeros(CLASSES, dtype=torch.float64)
    return found[:width].T, bias


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("sizes", [(50,), (9, 1, 30), (3,), (2, 1)])  # the last two: fewer samples than features
def test_the_fit_solves_the_penalised_least_squares(sizes, centred):
    batches = pairs(*sizes, centre=3.0)
    fit = ridge_fit(added(batches, centred=centred))
    weight, bias = by_least_squares(batches, centred=centred)
    torch.testing.assert_close(fit.weight, weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(fit.bias, bias, rtol=1e-7, atol=1e-7)
    assert bool(fit.sound)


def test_the_intercept_is_not_penalised():
    x, y = pairs(60)[0]
    moved = ridge_fit(added([(x + 50, y + 1000)]))
    fit = ridge_fit(added([(x, y)]))
    torch.testing.assert_close(moved.weight, fit.weight, **EXACT)
    torch.testing.assert_close(x @ fit.weight.T + fit.bias + 1000, (x + 50) @ moved.weight.T + moved.bias)


@pytest.mark.parametrize(*pairwise(factor=[1e-6, 1e6], dtype=[torch.float32, torch.float64], centred=[True, False]))
def test_predictions_do_not_follow_the_features_unit(factor, dtype, centred):
    x, y = pairs(60, dtype=dtype)[0]
    fit, scaled = (ridge_fit(added([(f * x, y)], centred=centred)) for f in (1, factor))
    expected = x @ fit.weight.T + fit.bias
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else EXACT
    torch.testing.assert_close(factor * x @ scaled.weight.T + scaled.bias, expected, **tolerance)
    assert bool(scaled.sound)


def test_without_a_penalty_a_linear_map_is_found_again():
    x, _ = pairs(60)[0]
    weight, bias = normal(CLASSES, WIDTH, seed=5), normal(CLASSES, seed=6)
    statistics = added([(x, x @ weight.T + bias)])
    shrunk = ridge_fit(statistics)
    assert float((shrunk.weight - weight).abs().max()) > 1e-3
    fit = ridge_fit(statistics, penalty=1e-12)
    torch.testing.assert_close((fit.weight, fit.bias), (weight, bias), **EXACT)


@for_each("value", [0.0, 0.1, 1 / 3, 0.7615942, 123.4, 1e4])
def test_constant_features_are_not_sound(value):
    for sizes in ((37,), (32, 5, 8)):
        for dtype in (torch.float32, torch.float64):
            batches = [(torch.full_like(x, value), y) for x, y in pairs(*sizes, dtype=dtype)]
            with case(sizes, dtype):
                assert not bool(ridge_fit(added(batches)).sound)


def test_one_constant_feature_among_others_is_given_no_weight():
    x, y = pairs(60)[0]
    x[:, 2] = 0.1
    fit = ridge_fit(added([(x, y)]))
    assert bool(fit.sound)
    torch.testing.assert_close(fit.weight[:, 2], torch.zeros(CLASSES, dtype=x.dtype), rtol=0, atol=1e-12)
    others = [0, 1, 3, 4]
    assert float(fit.weight[:, others].abs().min()) > 1e-2


@for_each("bad", [math.inf, math.nan])
def test_sums_that_are_broken_are_not_sound(bad):
    statistics = added(pairs(60))
    state = statistics.state_dict()
    for name in ("xx", "xy"):
        statistics.load_state_dict(state | {name: torch.full_like(state[name], bad)})
        assert not bool(ridge_fit(statistics).sound), name
    statistics.load_state_dict(state | {"xx": torch.diag(torch.tensor([1, 1, 1, 1, -0.5], dtype=torch.float64))})
    assert not bool(ridge_fit(statistics).sound)
    statistics.load_state_dict(state)
    assert bool(ridge_fit(statistics).sound)


def solved_for_identity(spectrum, dtype):
    """The inverse of the equations' matrix for features of this spectrum in a random basis, as the fit sees it."""
    width = len(spectrum)
    basis, _ = torch.linalg.qr(normal(width, width, seed=3))
    zeros = torch.zeros(width, dtype=dtype)
    xx = basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
    statistics = RunningStatistics()
    count = torch.tensor(4.0 * width, dtype=dtype)
    identity = torch.eye(width, dtype=dtype)
    statistics.load_state_dict({"count": count, "mean_x": zeros, "mean_y": zeros, "xx": xx.to(dtype), "xy": identity})
    return xx, ridge_fit(statistics)


SPECTRA = {
    "one direction": [1.0] + [0.0] * 63,
    "as good as one": [1.0] + [1e-9] * 63,
    "falling": [10.0**-k for k in range(64)],
    "flat": [1.0] * 64,
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_condition_number_stays_below_its_bound(name):
    width = len(SPECTRA[name])
    xx, fit = solved_for_identity(SPECTRA[name], torch.float64)
    condition = float(torch.linalg.cond(fit.weight))
    assert condition < (1 + width / PENALTY) * (1 + 1e-6)
    if name == "one direction":  # which is the worst there is
        assert condition > 0.999 * width / PENALTY
    # And so float32 bears it.
    _, single = solved_for_identity(SPECTRA[name], torch.float32)
    assert bool(fit.sound)
    assert bool(single.sound)
    expected = torch.linalg.inv(xx + PENALTY * xx.trace() / width * torch.eye(width, dtype=xx.dtype))
    torch.testing.assert_close(fit.weight, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    error = torch.linalg.matrix_norm(single.weight.double() - expected) / torch.linalg.matrix_norm(expected)
    assert float(error) < condition * 1e-6
