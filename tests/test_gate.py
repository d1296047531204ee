"""The gate scales rows and nothing else, and a row that cannot be trusted is flagged, masked or let through."""

import pytest
import torch

import lightning_mimic.scorers.weighting as weighting_module
from lightning_mimic.gradients import gate_rows
from lightning_mimic.ledger import Flag
from lightning_mimic.reweighting.weigh import weigh_batch
from lightning_mimic.scorers import SoftmaxWeighting
from support.cases import case, for_each

NAN, INF = float("nan"), float("inf")
OK, ALONE, ZERO, OVERFLOW, BROKEN = Flag.OK, Flag.ALONE, Flag.ZERO_DIRECTION, Flag.OVERFLOW, Flag.NONFINITE_LOSS
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NO = torch.zeros(3, dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_is_scaled_by_its_own_factor_and_keeps_shape_and_dtype(dtype):
    for shape in ((3,), (3, 2), (3, 4, 2), (3, 2, 4, 5)):
        torch.manual_seed(0)
        gradients, scale = torch.randn(shape).to(dtype), torch.tensor([0.3, 2.7, 0.0])
        before, gated = gradients.clone(), gate_rows(gradients, scale, NO)
        rows = [(row.double() * float(s)).to(dtype) for row, s in zip(gradients, scale, strict=True)]
        with case(shape):
            assert gated.dtype == dtype
            torch.testing.assert_close(gated, torch.stack(rows), rtol=torch.finfo(dtype).eps, atol=0)
            torch.testing.assert_close(gradients, before, **EXACT)


def test_memory_layout_is_no_matter():
    gradients = torch.randn(3, 2, 4, 5).to(memory_format=torch.channels_last)
    scale = torch.tensor([0.5, 1.0, 2.0])
    expected = gate_rows(gradients.contiguous(), scale, NO)
    torch.testing.assert_close(gate_rows(gradients, scale, NO), expected, **EXACT)


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 3.0])
def test_a_masked_row_is_zero_whatever_it_held_and_its_neighbours_are_not_touched(junk):
    gradients = torch.tensor([[1.0, 2.0], [junk, 1.0], [3.0, 4.0]])
    for scale in (0.0, 0.5, 1.0, INF, NAN):
        gated = gate_rows(gradients, torch.tensor([2.0, scale, 0.5]), torch.tensor([False, True, False]))
        with case(scale):
            torch.testing.assert_close(gated, torch.tensor([[2.0, 4.0], [0.0, 0.0], [1.5, 2.0]]), **EXACT)


@for_each("scale_dtype", [torch.float32, torch.float64])
def test_a_factor_outside_half_precision_does_not_overflow_on_the_way(scale_dtype):
    gradients = torch.tensor([[0.1], [1e-4], [6e4]], dtype=torch.float16)
    gated = gate_rows(gradients, torch.tensor([1e5, 1e8, 1e-6], dtype=scale_dtype), NO)
    expected = (gradients.double() * torch.tensor([[1e5], [1e8], [1e-6]])).half()
    assert bool(torch.isfinite(gated).all())
    torch.testing.assert_close(gated, expected, rtol=1e-3, atol=1e-7)


@for_each("dtype", DTYPES)
def test_a_row_of_scale_one_goes_through_bit_for_bit(dtype):
    finfo = torch.finfo(dtype)
    row = torch.tensor([INF, -INF, -0.0, finfo.max, finfo.tiny, 1 / 3, NAN], dtype=dtype)
    gated = gate_rows(torch.stack([row, row, row]), torch.tensor([1.0, 0.5, 1.0]), NO)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for same in (0, 2):
        assert torch.equal(gated[same, :-1].view(bits), row[:-1].view(bits))
        assert gated[same].isnan().tolist() == row.isnan().tolist()  # a NaN has many spellings


def weighed(scores, clean=None, *, vanishes=False, scaled=False):
    clean = None if clean is None else torch.tensor(clean)
    return weigh_batch(torch.tensor(scores), clean, torch.tensor(vanishes), SoftmaxWeighting(0.5, 0), scaled=scaled)


@for_each("scaled", [False, True])
def test_trusted_rows_are_weighed_and_ok(scaled):
    scores = torch.tensor([1.0, -2.0, 0.5])
    result = weighed(scores.tolist(), scaled=scaled)
    torch.testing.assert_close(result.scores, scores, **EXACT)
    torch.testing.assert_close(result.weights.weights, torch.softmax(scores / 0.5, 0))
    assert result.flags.tolist() == [OK] * 3
    assert result.flags.dtype == torch.int8
    assert not result.masked.any()


# (score, clean) of the middle one of three rows, direction vanishes, scaler at work -> its flag, masked
CASES = [
    (0.5, True, False, False, OK, False),
    (0.5, False, False, False, BROKEN, True),
    (0.5, False, False, True, BROKEN, True),
    (NAN, False, False, False, BROKEN, True),
    (NAN, False, False, True, BROKEN, True),
    (NAN, True, False, False, BROKEN, True),
    (INF, True, False, False, BROKEN, True),
    (-INF, None, False, False, BROKEN, True),
    (NAN, True, False, True, OVERFLOW, False),
    (INF, None, False, True, OVERFLOW, False),
    (0.5, None, True, False, ZERO, False),
    (0.5, True, True, True, ZERO, False),
    (0.5, False, True, False, BROKEN, True),
    (0.5, False, True, True, BROKEN, True),
    (NAN, True, True, False, BROKEN, True),
    (NAN, None, True, True, OVERFLOW, False),
]


@for_each(("score", "clean", "vanishes", "scaled", "flag", "masked"), CASES)
def test_what_is_wrong_with_a_row_is_flagged_by_precedence(score, clean, vanishes, scaled, flag, masked):
    known = None if clean is None else [True, clean, True]
    result = weighed([1.0, score, -1.0], known, vanishes=vanishes, scaled=scaled)
    others = ZERO if vanishes else OK
    assert result.flags.tolist() == [others, flag, others]
    assert result.masked.tolist() == [False, masked, False]
    counts = torch.tensor([True, flag in (OK, ZERO), True])
    expected = torch.tensor([0.0 if vanishes else s for s in (1.0, score, -1.0)])
    weights = torch.softmax(torch.where(counts, expected, -torch.inf) / 0.5, 0)
    torch.testing.assert_close(result.weights.weights, weights)
    torch.testing.assert_close(result.weights.scale, torch.where(counts, 3 * weights, 1.0))
    scored = counts & (not vanishes)
    torch.testing.assert_close(result.scores, torch.where(scored, torch.tensor([1.0, score, -1.0]), NAN), **EXACT)


def test_at_the_reference_all_rows_weigh_the_same_and_none_has_a_score():
    result = weighed([5.0, -5.0, 0.0, 1e9], vanishes=True)
    torch.testing.assert_close(result.weights.weights, torch.full((4,), 0.25))
    torch.testing.assert_close(result.weights.scale, torch.ones(4))
    assert result.scores.isnan().all()


def test_under_a_scaler_a_row_that_overflowed_reaches_the_scaler():
    result = weighed([0.5, NAN], scaled=True)
    gated = gate_rows(torch.tensor([[1.0], [INF]]), result.weights.scale, result.masked)
    torch.testing.assert_close(gated, torch.tensor([[2.0], [INF]]), **EXACT)


@pytest.mark.parametrize(
    ("scores", "clean", "scaled", "flag"),
    [
        ([NAN, INF], None, False, BROKEN),
        ([1.0, 2.0], [False, False], True, BROKEN),
        ([NAN, INF], [True, True], True, OVERFLOW),
        ([NAN], None, False, BROKEN),
    ],
)
def test_where_all_rows_are_broken_none_is_masked_and_the_loss_goes_through(scores, clean, scaled, flag):
    for vanishes in (False, True):
        with case("vanishes", vanishes):
            result = weighed(scores, clean, scaled=scaled, vanishes=vanishes)
            assert not result.masked.any()
            assert result.flags.tolist() == [flag] * len(scores)
            assert result.weights.scale.tolist() == [1.0] * len(scores)
            assert result.weights.weights.tolist() == [0.0] * len(scores)
            assert result.scores.isnan().all()


def test_a_single_row_is_alone_and_keeps_its_score():
    result = weighed([-3.0])
    assert result.flags.tolist() == [ALONE]
    assert (result.scores.tolist(), result.weights.weights.tolist(), result.masked.tolist()) == ([-3.0], [1.0], [False])
    assert weighed([-3.0], vanishes=True).flags.tolist() == [ZERO]
    assert weighed([NAN], scaled=True).flags.tolist() == [OVERFLOW]


def test_the_last_row_that_counts_is_not_alone():
    assert weighed([1.0, NAN]).flags.tolist() == [OK, BROKEN]


def test_what_other_ranks_hold_decides_about_alone_and_masked(monkeypatch):
    sent = []
    monkeypatch.setattr(weighting_module, "stack_over_ranks", lambda row: sent.append(row) or row[None])
    parts = ([0.0], [NAN])
    for part in parts:
        weighed(part)
    monkeypatch.setattr(weighting_module, "stack_over_ranks", lambda row: torch.stack(sent))
    good, bad = (weighed(part) for part in parts)
    assert (good.flags.tolist(), good.masked.tolist(), good.weights.scale.tolist()) == ([OK], [False], [2.0])
    assert (bad.flags.tolist(), bad.masked.tolist()) == ([BROKEN], [True])
