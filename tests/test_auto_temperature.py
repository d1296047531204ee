"""With an automatic temperature, a batch's effective sample size is the running share of positive scores."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mimic import Ledger, Reweighter
from lightning_mimic.errors import MimicError
from lightning_mimic.scorers import GradNorm, MimicScore, Products, ReferenceLoss, SoftmaxWeighting, choose_weighting
from oracles import softmax_weights
from support.cases import case, for_each
from support.examples import examples
from support.toys import losses_of, parameters_of, toy, toy_data
from support.weightings import FIGURES, over_ranks

NAN = float("nan")


def drawn(rows, share, seed=0, dtype=torch.float64):
    """Scores of two kinds of samples, so many of which are positive."""
    torch.manual_seed(seed)
    scores = torch.rand(rows, dtype=dtype) + 0.1
    return torch.where(torch.arange(rows) < round(share * rows), scores, -scores)


def effective(weights):
    return float(1 / weights.double().square().sum())


@for_each("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [16, 128, 2000])
@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0.25), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 0.95)])
def test_the_effective_sample_size_is_the_share_of_positive_scores(rows, share, wanted, dtype):
    scores = drawn(rows, share, dtype=dtype)
    result = SoftmaxWeighting("auto")(scores)
    assert wanted * rows * (1 - 1e-5) <= effective(result.weights) <= wanted * rows * 1.02
    torch.testing.assert_close(float(result.ess), effective(result.weights), rtol=1e-4, atol=0)
    expected = softmax_weights(scores.double(), float(result.temperature))
    torch.testing.assert_close(result.weights.double(), expected, rtol=1e-4, atol=1e-7)
    assert result.weights.dtype == result.temperature.dtype == dtype


def test_the_floor_holds_and_without_one_a_tenth_of_the_batch_is_left():
    scores = drawn(200, 0.02)
    for floor, wanted in ((0, 0.1), (0.05, 0.1), (0.4, 0.4), (0.99, 0.99), (1, 1.0)):
        weights = SoftmaxWeighting("auto", floor)(scores).weights
        with case(floor):
            assert wanted * 200 * (1 - 1e-5) <= effective(weights) <= wanted * 200 * 1.01 + 1e-9
    torch.testing.assert_close(SoftmaxWeighting("auto", 1)(scores).weights, torch.full((200,), 1 / 200).double())


@for_each("factor", [1e-20, 1e-3, 1000.0, 1e20])
def test_the_unit_of_the_score_has_no_effect(factor):
    scores = drawn(64, 0.6, dtype=torch.float32)
    once, scaled = (SoftmaxWeighting("auto")(each) for each in (scores, scores * factor))
    torch.testing.assert_close(scaled.weights, once.weights, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(scaled.temperature, once.temperature * factor, rtol=1e-4, atol=0)


@examples(25)
@given(scores=st.lists(st.floats(-50, 50), min_size=1, max_size=12), floor=st.sampled_from([0, 0.25, 0.8]))
def test_weights_sum_to_one_rise_with_the_score_and_fall_below_no_share(scores, floor):
    scores = torch.tensor(scores, dtype=torch.float64)
    result = SoftmaxWeighting("auto", floor)(scores)
    torch.testing.assert_close(result.weights.sum(), torch.ones((), dtype=torch.float64), rtol=1e-9, atol=0)
    assert bool((result.weights[scores.argsort()].diff() >= 0).all())
    share = max(min(max(float((scores > 0).double().mean()), 0.1), 0.95), floor)
    assert effective(result.weights) >= share * len(scores) * (1 - 1e-5)


def test_equal_scores_one_row_and_no_row_are_no_special_cases():
    for scores in (torch.zeros(8), torch.full((8,), -3.0), torch.full((8,), 1e30), torch.tensor([7.0])):
        torch.testing.assert_close(SoftmaxWeighting("auto")(scores).weights, torch.full_like(scores, 1 / len(scores)))
    tied = SoftmaxWeighting("auto", 0)(torch.tensor([-1.0] * 6 + [-2.0] * 4))  # wanted is 1, and 6 rows are the best
    torch.testing.assert_close(tied.weights, torch.tensor([1 / 6] * 6 + [0.0] * 4))
    nothing = SoftmaxWeighting("auto")(torch.tensor([NAN, 1.0]), valid=torch.zeros(2, dtype=torch.bool))
    assert (nothing.weights.tolist(), nothing.scale.tolist(), int(nothing.counted)) == ([0, 0], [1, 1], 0)
    empty = SoftmaxWeighting("auto")(torch.zeros(0))
    assert (len(empty.weights), int(empty.batch_size)) == (0, 0)


def test_one_far_score_on_either_side_leaves_the_effective_sample_size_to_the_others():
    scores = drawn(128, 0.5)
    for far in (1e6, -1e6):
        with case(far):
            ess = effective(SoftmaxWeighting("auto")(torch.cat([scores, torch.tensor([far]).double()])).weights)
            assert 64 <= ess <= 66.5


def test_where_posteriors_are_known_their_mean_is_the_share():
    scores = drawn(100, 0.3)
    posteriors = torch.full((100,), 0.8)
    for known, expected in ((100, 80.0), (50, 40.0)):  # where they are not known the signs count, here negative ones
        posteriors[known:] = NAN
        products = Products(scores, posteriors=posteriors).for_reader(SoftmaxWeighting())
        ess = effective(SoftmaxWeighting("auto", 0)(scores, products).weights)
        torch.testing.assert_close(ess, expected, rtol=0.02, atol=0)


def test_rows_left_out_get_nothing_and_change_nothing():
    valid = torch.tensor([True, False, True, True, False, True])
    for junk in (NAN, 1e30, 0.0):
        scores = torch.tensor([0.3, junk, -1.2, 2.0, junk, 0.1])
        result, alone = SoftmaxWeighting("auto")(scores, valid=valid), SoftmaxWeighting("auto")(scores[valid])
        with case(junk):
            torch.testing.assert_close(result.weights[valid], alone.weights)
            assert result.weights[~valid].tolist() == [0, 0]
            torch.testing.assert_close(result.temperature, alone.temperature)


def test_the_share_runs_over_about_the_last_two_thousand_samples():
    weighting = SoftmaxWeighting("auto")
    sizes = {}
    for step in range(80):
        sizes[step] = effective(weighting(drawn(100, 0.8 if step < 40 else 0.4, step)).weights)
    for step, expected in ((0, 80.0), (39, 80.0), (59, 53.4), (79, 44.8)):  # a share of 1/e stays after 2,000 samples
        torch.testing.assert_close(sizes[step], expected, rtol=0.02, atol=0)


def test_scores_without_information_are_no_evidence():
    weighting, scores = SoftmaxWeighting("auto"), drawn(100, 0.6)
    weighting(scores)
    before = weighting.state_dict()
    uniform = weighting(-scores.abs(), uniform=torch.tensor(True))
    torch.testing.assert_close(uniform.weights, torch.full((100,), 0.01).double())
    torch.testing.assert_close(weighting.state_dict(), before, rtol=0, atol=0)


@for_each("sizes", [(30, 70), (99, 1), (40, 0, 60)])
def test_uneven_ranks_get_what_one_process_would_give(sizes, monkeypatch):
    one, several = SoftmaxWeighting("auto"), SoftmaxWeighting("auto")
    for step in range(3):
        scores, valid = drawn(100, 0.6, step)[torch.randperm(100)], torch.rand(100) > 0.1
        if step == 2:
            valid[: sizes[0]] = False  # all rows of the first rank
        scores[~valid] = NAN
        with monkeypatch.context() as alone:
            whole = one(scores, valid=valid)
            ranks = over_ranks(alone, several, scores.split(sizes), valid.split(sizes))
        torch.testing.assert_close(torch.cat([rank.weights for rank in ranks]), whole.weights)
        for name in FIGURES:
            for rank in ranks:
                torch.testing.assert_close(getattr(rank, name), getattr(whole, name))
    torch.testing.assert_close(several.state_dict(), one.state_dict())


def run(weighting, batches, state=None):
    """Train on the batches; returns the weights, the model, and the state at the end."""
    model = toy()
    if state is not None:
        model.load_state_dict(state["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = []
    reference = parameters_of(toy(seed=1))
    with Reweighter(model, reference, "head", weighting=weighting, diagnose_reference=False) as reweighter:
        if state is not None:
            reweighter.load_state_dict(state["reweighter"])
        for batch in batches:
            with reweighter.step(batch) as step:
                weights.append(step.backward(losses_of(model, step.batch).mean()).weights.weights)
            optimizer.step()
            optimizer.zero_grad()
        kept = reweighter.state_dict()
    return torch.cat(weights), {"model": copy.deepcopy(model.state_dict()), "reweighter": kept}


BATCHES = list(zip(*(part.split(16) for part in toy_data(96).tensors), strict=True))


def test_the_running_share_belongs_to_the_run_and_survives_a_resume(tmp_path):
    weighting = SoftmaxWeighting("auto", 0)
    whole, _ = run(weighting, BATCHES)
    again, _ = run(weighting, BATCHES)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert weighting.state_dict() == {}
    first, state = run(weighting, BATCHES[:3])
    torch.save(state, tmp_path / "state.pt")
    rest, _ = run(weighting, BATCHES[3:], torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=0, atol=0)
    # A state of a release, or of a run, without it: the share begins anew.
    del state["reweighter"]["weighting"]
    anew, _ = run(weighting, BATCHES[3:], state)
    assert not torch.equal(anew, rest)


def test_a_fixed_temperature_adds_nothing_to_the_state():
    _, state = run(SoftmaxWeighting(0.5), BATCHES[:1])
    assert "weighting" not in state["reweighter"]


@for_each("damaged", [{"seen": torch.ones(3)}, {"seen": torch.tensor([1.0, NAN])}, {"seen": "many"}, [1, 2]])
def test_a_damaged_state_is_refused(damaged):
    with pytest.raises(MimicError, match=r"^the state of the weighting is damaged: .*Take another checkpoint.$"):
        SoftmaxWeighting("auto").load_state_dict(damaged)


def test_it_is_one_setting_of_all_that_take_a_temperature(tmp_path):
    assert choose_weighting(MimicScore(), temperature="auto").temperature == "auto"
    batches = [(x, y, torch.arange(16) + 16 * n) for n, (x, y) in enumerate(BATCHES)]
    by_weighting, _ = run(SoftmaxWeighting("auto"), BATCHES)
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"temperature": "auto", "diagnose_reference": False, "ledger": tmp_path}
    with Reweighter(model, parameters_of(toy(seed=1)), "head", **options) as reweighter:
        for x, y, ids in batches:
            with reweighter.step((x, y), ids) as step:
                step.backward(losses_of(model, step.batch).mean())
            optimizer.step()
            optimizer.zero_grad()
    ledger = Ledger(tmp_path)
    assert ledger.meta["attempts"][0]["config"]["temperature"] == "auto"
    recorded = torch.tensor(ledger.table().sort_by("id")["weight"].to_pylist())
    torch.testing.assert_close(recorded, by_weighting.float())


@for_each("scorer", [ReferenceLoss(), GradNorm()])
@for_each("options", [{"temperature": "auto"}, {"weighting": SoftmaxWeighting("auto")}])
def test_a_scorer_whose_sign_means_nothing_is_refused(scorer, options):
    message = f"the sign of {type(scorer).__name__}'s scores does not tell good from bad samples; give a number.$"
    with pytest.raises(MimicError, match=message):
        choose_weighting(scorer, **options)
