"""The calibration of a reference finds what was put into simulated labels, and claims no more than the data show."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

import oracles
from lightning_mimic.errors import MimicError
from lightning_mimic.reference.calibration import (
    Calibration,
    RunningCalibration,
    calibrate,
    label_posteriors,
    noise_matrix,
)
from support.cases import for_each
from support.ranks import on_two_ranks

EXACT = {"rtol": 0, "atol": 0}


def simulated(samples, classes, wrong, *, scale=1.0, biases=None, next_class=False, spread=4.0, seed=0):
    """Logits of a reference that is off by scale and biases, given labels, and which of them are wrong."""
    draw = torch.Generator().manual_seed(seed)
    true_logits = spread * torch.randn(samples, classes, generator=draw)
    right = true_logits.softmax(1).multinomial(1, generator=draw)[:, 0]
    changed = torch.rand(samples, generator=draw) < wrong
    shift = torch.ones_like(right) if next_class else torch.randint(1, classes, (samples,), generator=draw)
    given = torch.where(changed, (right + shift) % classes, right)
    logits = (true_logits - (0 if biases is None else biases)) / scale
    return logits, given, changed


@for_each(
    ("classes", "wrong", "scale"),
    [(10, 0.0, 1.0), (10, 0.2, 8.0), (10, 0.4, 0.25), (3, 0.3, 1.0), (2, 0.2, 2.0), (50, 0.6, 1.0)],
)
def test_scale_and_wrong_share_are_recovered(classes, wrong, scale):
    # One seed in thirty has biases by Akaike's criterion where there are none, small ones.
    logits, given, changed = simulated(4000, classes, wrong, scale=scale, spread=6.0, seed=1)
    found = calibrate(logits, given)
    share = float(changed.double().mean())
    assert found.biases is None
    assert found.informative
    assert found.samples == 4000
    assert found.classes == classes
    assert abs(math.log2(found.scale / scale)) < 0.51, found  # a step of the grid
    assert found.low - 0.01 <= share <= found.high + 0.01, found
    assert abs(found.wrong_share - share) < 0.03, found
    assert found.high - found.low < 0.1, found


@for_each("wrong", [0.0, 0.4])
def test_class_biases_are_recovered_and_used_only_where_they_are_needed(wrong):
    biases = torch.tensor([6.0, -6.0, 3.0, 0.0, -3.0])
    logits, given, changed = simulated(4000, 5, wrong, scale=4.0, biases=biases, spread=5.0)
    found = calibrate(logits, given)
    assert found.biases is not None
    fitted = torch.tensor(found.biases)
    # Up to a common shift, which no probability sees, and the grid of the scale.
    torch.testing.assert_close(fitted - fitted.mean(), biases - biases.mean(), rtol=0.2, atol=0.8)
    assert abs(found.wrong_share - float(changed.double().mean())) < 0.04, found
    assert calibrate(*simulated(4000, 5, wrong, scale=4.0, spread=5.0)[:2]).biases is None


def test_flips_to_the_next_class_are_not_taken_for_biases():
    logits, given, changed = simulated(4000, 10, 0.4, next_class=True, spread=8.0)
    found = calibrate(logits, given)
    assert found.biases is None
    assert abs(found.wrong_share - float(changed.double().mean())) < 0.05, found


def test_the_noise_matrix_is_recovered():
    logits, given, _ = simulated(9000, 4, 0.3, next_class=True, spread=8.0)
    matrix = noise_matrix(logits, given, calibrate(logits, given))
    expected = 0.7 * torch.eye(4) + 0.3 * torch.eye(4).roll(1, 1)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=0.03)


@for_each("seed", range(5))
def test_clean_labels_are_all_kept(seed):
    logits, given, _ = simulated(2000, 10, 0.0, spread=3.0, seed=seed)
    running = RunningCalibration(10, logits.device)
    for rows in torch.arange(2000).split(50):
        running.update(logits[rows], given[rows])
    assert float((running.posteriors(logits, given) >= 0.5).double().mean()) >= 0.99


@for_each("wrong", [0.0, 0.5])
def test_a_reference_that_says_nothing_holds_no_label_to_be_wrong(wrong):
    _, given, _ = simulated(2000, 10, wrong)
    logits = 5 * torch.randn(2000, 10, generator=torch.Generator().manual_seed(1))
    found = calibrate(logits, given)
    assert not found.informative
    assert (found.wrong_share, found.low, found.high) == (0.0, 0.0, 1.0)
    running = RunningCalibration(10, logits.device)
    running.update(logits, given)
    torch.testing.assert_close(running.posteriors(logits, given), torch.ones(2000), **EXACT)


@for_each(("classes", "imbalance"), [(4, 0.0), (4, 1.0), (6, 0.0), (10, 2.0), (100, 0.0)])
def test_logits_drawn_apart_from_the_labels_are_never_informative(classes, imbalance):
    draw = torch.Generator().manual_seed(0)
    given = (imbalance * torch.randn(classes, generator=draw)).softmax(0).multinomial(600, True, generator=draw)
    for spread in (0.0, 2.0):
        assert not calibrate(spread * torch.randn(600, classes, generator=draw), given).informative


def test_neither_a_shift_of_each_row_nor_huge_logits_harm_a_fit():
    logits, given, _ = simulated(600, 4, 0.2, biases=torch.tensor([4.0, 0.0, -4.0, 0.0]))
    shift = torch.linspace(-9, 9, 600)[:, None]
    plain, shifted = calibrate(logits, given), calibrate(logits + shift, given)
    assert (plain.scale, plain.wrong_share, plain.informative) == (shifted.scale, shifted.wrong_share, True)
    torch.testing.assert_close(torch.tensor(plain.biases), torch.tensor(shifted.biases), rtol=1e-3, atol=1e-3)
    sure = 1e38 * (2.0 * one_hot(given, 4) - 1)
    running = RunningCalibration(4, logits.device)
    running.update(sure, given)
    assert calibrate(sure, given).wrong_share == running.calibration().wrong_share == 0.0
    assert calibrate(sure, given).informative


@for_each("kind", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_integers_of_any_kind(kind):
    logits, given, _ = simulated(300, 4, 0.2)
    assert calibrate(logits, given.to(kind)) == calibrate(logits, given)
    found = calibrate(logits, given)
    torch.testing.assert_close(noise_matrix(logits, given.to(kind), found), noise_matrix(logits, given, found))


def test_a_noise_matrix_needs_the_calibration_of_the_same_reference():
    logits, given, _ = simulated(300, 4, 0.2)
    with pytest.raises(MimicError, match="`calibration` is of 4 classes, and `reference_outputs` has 5"):
        noise_matrix(torch.zeros(300, 5), given, calibrate(logits, given))


def test_a_posterior_is_its_formula_and_a_shift_of_the_logits_changes_nothing():
    logits, given, _ = simulated(50, 7, 0.3)
    logits = logits.double()
    found = label_posteriors(logits, given, 0.3)
    torch.testing.assert_close(found, oracles.label_posteriors(logits, given, 0.3), rtol=1e-12, atol=1e-12)
    shift = torch.linspace(-40, 40, 50, dtype=torch.float64)[:, None]
    torch.testing.assert_close(label_posteriors(logits + shift, given, 0.3), found, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(label_posteriors(logits, given, 0.0), torch.ones_like(found), **EXACT)


def test_unknown_labels_and_rows_that_are_not_finite_have_no_posterior_and_harm_no_other():
    logits, given, _ = simulated(600, 4, 0.2)
    broken, labels = logits.clone(), given.clone()
    broken[3, 1], labels[5] = math.inf, -1
    first, second = RunningCalibration(4, logits.device), RunningCalibration(4, logits.device)
    first.update(broken, labels)
    known = torch.ones(600, dtype=torch.bool)
    known[[3, 5]] = False
    second.update(logits[known], given[known])
    assert first.calibration() == second.calibration()
    found = first.posteriors(broken, labels)
    assert found.isnan().nonzero().flatten().tolist() == [3, 5]


def test_wrong_labels_have_the_lower_posteriors():
    logits, given, changed = simulated(3000, 10, 0.4, scale=0.25)
    running = RunningCalibration(10, logits.device)
    running.update(logits, given)
    posteriors = running.posteriors(logits, given)
    assert float((posteriors[changed] < 0.5).double().mean()) > 0.85
    assert float((posteriors[~changed] >= 0.5).double().mean()) > 0.9


def test_no_more_labels_are_wrong_than_the_model_did_not_predict_before_it_trained_on_them():
    draw = torch.Generator().manual_seed(0)
    given = torch.randint(10, (2000,), generator=draw)

    def running(right):
        """A sharp reference that predicts a share of the labels, alone and beside a model that predicts 80 %."""
        said = torch.where(torch.rand(2000, generator=draw) < right, given, torch.randint(10, (2000,), generator=draw))
        logits = 12.0 * one_hot(said, 10) + torch.randn(2000, 10, generator=draw)
        own = torch.where(torch.rand(2000, generator=draw) < 0.8, given, (given + 1) % 10)
        alone, bounded = RunningCalibration(10, logits.device), RunningCalibration(10, logits.device)
        alone.update(logits, given)
        bounded.update(logits, given, 5.0 * one_hot(own, 10))
        return alone.calibration(), bounded.calibration()

    # By its own likelihood the labels are wrong that it does not predict.
    alone, bounded = running(0.6)
    assert alone.wrong_share > 0.3
    assert bounded.informative
    assert 0.1 < bounded.wrong_share <= 1 - bounded.model_agreement + 2 * (0.8 * 0.2 / 256) ** 0.5
    # One that knows far less than the model judges none of them.
    alone, bounded = running(0.25)
    assert alone.wrong_share > 0.6
    assert bounded.knows_less
    assert bounded.wrong_share == 0.0


@for_each(("classes", "rows"), [(10, 2048), (1000, 4194), (50_000, 256)])
def test_what_is_kept_of_many_classes_is_bounded(classes, rows):
    assert RunningCalibration(classes, torch.device("cpu"))._window == rows


def test_there_is_nothing_before_there_are_enough_samples():
    logits, given, _ = simulated(255, 4, 0.2)
    running = RunningCalibration(4, logits.device)
    running.update(logits, given)
    assert not running.ready
    assert running.calibration() is None
    assert running.wrong_share is None
    assert running.posteriors(logits, given).isnan().all()
    with pytest.raises(RuntimeError, match="no calibration before 256 samples"):
        running.calibrated(logits)


def test_what_is_continued_from_a_state_goes_on_as_if_it_had_not_stopped():
    logits, given, _ = simulated(3000, 6, 0.3, biases=torch.linspace(-6, 6, 6), spread=5.0)
    batches = torch.arange(3000).split(60)
    whole, first, second = (RunningCalibration(6, logits.device) for _ in range(3))
    for number, rows in enumerate(batches):
        whole.update(logits[rows], given[rows])
        (first if number < 21 else second).update(logits[rows], given[rows])
        if number == 20:
            second.load_state_dict(first.state_dict())
    assert whole.calibration() == second.calibration()
    with pytest.raises(MimicError, match="state of the calibration is of 6 classes; expected 5"):
        RunningCalibration(5, logits.device).load_state_dict(first.state_dict())


def test_two_ranks_find_what_one_finds(tmp_path):
    on_two_ranks(_halves, tmp_path)
    logits, given, _ = simulated(2000, 6, 0.3)
    whole = RunningCalibration(6, logits.device)
    for rows in torch.arange(2000).split(50):
        whole.update(logits[rows], given[rows])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert Calibration(**found["calibration"]) == whole.calibration()
        torch.testing.assert_close(found["posteriors"], whole.posteriors(logits, given), **EXACT)


def _halves(rank, folder):
    logits, given, _ = simulated(2000, 6, 0.3)
    running = RunningCalibration(6, logits.device)
    for rows in torch.arange(2000).split(50):
        own = rows[:20] if rank == 0 else rows[20:]  # uneven
        running.update(logits[own], given[own])
    torch.save(
        {"calibration": running.calibration().facts(), "posteriors": running.posteriors(logits, given)},
        folder / f"{rank}.pt",
    )


@for_each(
    ("logits", "labels", "message"),
    [
        (torch.zeros(300), torch.zeros(300, dtype=torch.int64), "expected logits that are finite"),
        (torch.full((300, 3), math.nan), torch.zeros(300, dtype=torch.int64), "expected logits that are finite"),
        (torch.full((300, 3), 1e300, dtype=torch.float64), torch.zeros(300, dtype=torch.int64), "finite in float32"),
        ([[0.0, 1.0]] * 300, torch.zeros(300, dtype=torch.int64), "`reference_outputs` is of type list"),
        (torch.zeros(300, 3), [0] * 300, "`labels` is of type list"),
        (torch.zeros(300, 3), torch.zeros(300), "expected class indices"),
        (torch.zeros(300, 3), torch.zeros(200, dtype=torch.int64), "expected class indices"),
        (torch.zeros(300, 3), torch.full((300,), 3), "reach from 3 to 3; expected classes from 0 to 2"),
        (torch.zeros(300, 3), torch.full((300,), -1), "reach from -1 to -1; expected classes from 0 to 2"),
        (torch.zeros(200, 3), torch.zeros(200, dtype=torch.int64), "200 samples are too few"),
        (torch.zeros(300, 1), torch.zeros(300, dtype=torch.int64), "2 classes or more, not 1"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(logits, labels, message):
    with pytest.raises(MimicError, match=message):
        calibrate(logits, labels)
