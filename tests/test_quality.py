"""Calibrated quality against its formula and simulated truth, from ledgers and as a metric; detection's metrics."""

import contextlib
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from lightning_mimic.curation import (
    CurationError,
    DataQuality,
    MislabelAUROC,
    MislabelAveragePrecision,
    Threshold,
    TopK,
    curate,
    estimate_quality,
)
from support.cases import for_each
from support.ledgers import note, write_ledger

NONE, ALL = [False] * 20, [True] * 20


def test_the_estimate_is_what_the_formula_gives():
    right, wrong = [True] * 18 + [False] * 2, [True] * 3 + [False] * 17
    found = estimate_quality(600, 1000, right, wrong)
    assert found.estimate == pytest.approx((0.6 - 0.15) / (0.9 - 0.15), abs=1e-12)
    assert (found.share_kept, found.kept_if_right, found.kept_if_wrong) == (0.6, 0.9, 0.15)
    assert (found.samples, found.trusted) == (1000, 20)
    assert 0 < found.low < found.estimate < found.high < 1
    assert str(found) == f"60.0% (95 % interval {found.low:.1%} to {found.high:.1%}, 20 trusted samples)"


def test_several_wrong_labels_of_a_sample_count_by_their_mean():
    wrong = np.zeros((20, 4), bool)
    wrong[:5] = [True, False, False, False]
    wrong[5] = True
    found = estimate_quality(600, 1000, ALL, wrong)
    assert found.kept_if_wrong == (5 * 0.25 + 1) / 20
    assert found.estimate == pytest.approx((0.6 - 0.1125) / (1 - 0.1125), abs=1e-12)
    # Drawn by samples: labels of one sample are not as many samples.
    again = estimate_quality(600, 1000, ALL, np.repeat(wrong[:, :1], 4, axis=1))
    assert (again.low, again.high) == (
        estimate_quality(600, 1000, ALL, wrong[:, 0]).low,
        estimate_quality(600, 1000, ALL, wrong[:, 0]).high,
    )


def test_the_estimate_stays_a_share():
    low = estimate_quality(0, 50, ALL, [True] * 10 + [False] * 10)
    high = estimate_quality(50, 50, [True] * 15 + [False] * 5, NONE)
    assert (low.estimate, low.low) == (0.0, 0.0)
    assert (high.estimate, high.high) == (1.0, 1.0)
    for each in (low, high):
        assert 0 <= each.low <= each.estimate <= each.high <= 1


def test_the_interval_is_the_same_for_a_seed_and_leaves_other_generators_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, again, other = (estimate_quality(37, 90, ALL, [*NONE[:-3], *ALL[:3]], seed=s) for s in (1, 1, 2))
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert first == again != other
    assert first.estimate == other.estimate


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "trusted", "labels"), [(3000, 60, 1), (200, 300, 1), (2000, 50, 5)])
def test_the_interval_covers_the_truth_as_often_as_it_says(samples, trusted, labels):
    generator = np.random.default_rng(samples)
    covered, widths = [], []
    for _ in range(250):
        q, t, f = generator.uniform(0.3, 0.9), generator.uniform(0.75, 0.95), generator.uniform(0.1, 0.35)
        good = generator.random(samples) < q
        kept = generator.random(samples) < np.where(good, t, f)
        # How easily a sample is kept with wrong labels differs from sample to sample, with the mean f.
        easy = generator.beta(4 * f, 4 * (1 - f), trusted)
        wrong = generator.random((trusted, labels)) < easy[:, None]
        found = estimate_quality(int(kept.sum()), samples, generator.random(trusted) < t, wrong)
        covered.append(found.low <= q <= found.high)
        widths.append(found.high - found.low)
    assert 0.88 <= np.mean(covered) <= 0.99
    assert np.mean(widths) < 0.45


def test_more_trusted_samples_make_the_interval_narrower():
    widths = []
    for many in (20, 80, 320):
        found = estimate_quality(6000, 10_000, [k % 10 > 0 for k in range(many)], [k % 10 > 8 for k in range(many)])
        widths.append(found.high - found.low)
    assert widths[0] > 1.7 * widths[1] > 2.5 * widths[2] > 0


def test_right_and_wrong_answers_of_a_sample_are_drawn_together():
    right, wrong = np.arange(400) < 200, np.arange(400) < 100
    nested = estimate_quality(800, 2000, right, wrong)  # whom a wrong label does not send away
    apart = estimate_quality(800, 2000, right, wrong[::-1])
    assert nested.estimate == apart.estimate
    assert nested.high - nested.low > 1.2 * (apart.high - apart.low)


@for_each(("right", "wrong", "said"), [
    (ALL, ALL, "100%) as with true labels (100%"), (NONE, ALL, "100%) as with true labels (0%"),
    (ALL[:3] + NONE[3:], NONE, "0%) as with true labels (15%")])  # fmt: skip
def test_scores_that_do_not_tell_wrong_labels_are_refused(right, wrong, said):
    message = (
        f"trusted samples are kept as often with wrong labels ({said}): these scores cannot separate them. The ref"
    )
    with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
        estimate_quality(5, 10, right, wrong)


@for_each(("kept", "samples", "right", "wrong", "message"), [
    (5, 10, [], [], "got 0 trusted samples with true labels and 0 with wrong labels"),
    (5, 10, ALL, NONE[1:], "got 20 trusted samples with true labels and 19 with wrong labels"),
    (0, 0, ALL, NONE, "`kept` is 0 and `samples` is 0; expected integers"),
    (11, 10, ALL, NONE, "`kept` is 11 and `samples` is 10; expected integers"),
    (-1, 10, ALL, NONE, "`kept` is -1 and `samples` is 10; expected integers"),
])  # fmt: skip
def test_nothing_to_count_is_refused(kept, samples, right, wrong, message):
    with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
        estimate_quality(kept, samples, right, wrong)


CONFIG = {"scorer": "mimic", "reference": "abc", "parameters": ["head"], "temperature": 1.0}
AT = [{"sha256": "1234567890", "path": "a.ckpt"}, {"sha256": "abcdefghij", "path": "b.ckpt"}]


def scored(folder, scores, *, config=CONFIG, checkpoints=AT, ids=None):
    """A ledger of samples 0, 1, 2, ..., as scored at checkpoints; ``epochs`` are these."""
    scores = np.atleast_2d(scores)
    many, n = scores.shape
    ids = list(range(n) if ids is None else ids) * many
    rows = {"id": ids, "epoch": np.repeat(range(many), n), "score": scores.ravel()}
    write_ledger(folder, rows, configs=config, notes={} if checkpoints is None else {"checkpoints": checkpoints})
    return folder


@pytest.fixture
def calibrating(tmp_path):
    """Ledgers of data of which 3 of 5 scored samples are kept, and of 10 trusted samples: t = 0.9, f = 0.1."""
    data = scored(tmp_path / "data", [[1.0, 0.0, 2.0, -1.0, -1.0, np.nan], [1.0, 0.0, -1.0, -1.0, 0.5, np.nan]])
    right = scored(tmp_path / "right", [1.0] * 9 + [-1.0])
    wrong = scored(tmp_path / "wrong", [0.0] + [-1.0] * 9, ids=[*range(10)])
    return data, right, wrong


def test_trusted_ledgers_calibrate_the_quality_of_the_data(calibrating, tmp_path):
    data, right, wrong = calibrating
    done = curate(data, Threshold(), tmp_path / "out", unscored="drop", trusted=right, mislabelled=wrong)
    assert done.quality == estimate_quality(3, 5, [True] * 9 + [False], [True] + [False] * 9)
    assert done.quality.estimate == pytest.approx(0.5 / 0.8)
    assert done.share_kept == 0.6
    assert done.manifest.provenance["quality"] == done.quality.__dict__
    assert done.manifest.provenance["ledger"]["checkpoints"] == AT


def test_several_wrong_ledgers_are_several_labels_of_each_sample(calibrating, tmp_path):
    data, right, wrong = calibrating
    other = scored(tmp_path / "other", [1.0] * 2 + [-1.0] * 8, ids=[*range(9, -1, -1)])
    done = curate(data, unscored="drop", trusted=str(right), mislabelled=[str(wrong), other])
    both = [[k == 0, k > 7] for k in range(10)]
    assert done.quality == estimate_quality(3, 5, [True] * 9 + [False], both)


def test_trusted_samples_without_a_score_both_ways_do_not_calibrate(calibrating, tmp_path):
    data, right, _ = calibrating
    wrong = scored(tmp_path / "gaps", [np.nan] * 2 + [-1.0] * 8)
    done = curate(data, unscored="drop", trusted=right, mislabelled=[wrong])
    assert done.quality == estimate_quality(3, 5, [True] * 7 + [False], [False] * 8)


@pytest.mark.parametrize("ids", [range(11), range(1, 11), range(9), [f"{k}" for k in range(10)]])
def test_trusted_ledgers_of_other_samples_are_refused(ids, calibrating, tmp_path):
    data, right, wrong = calibrating
    other = scored(tmp_path / "other", [-1.0] * len(ids), ids=ids)
    for trusted, mislabelled in ((right, [wrong, other]), (other, [right, wrong])):
        message = (
            f"{(other if trusted is right else right)} and {trusted} have different ids; expected the same samples"
        )
        with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
            curate(data, unscored="drop", trusted=trusted, mislabelled=mislabelled)


@pytest.mark.parametrize(("name", "value"), [("scorer", "cosine"), ("reference", "abd"), ("parameters", ["head", "b"]),
                                             ("aligned_every", 10), ("aligned_rotate", False), ("direction", "start"),
                                             ("scorer_settings", {"calibrated": True})])  # fmt: skip
def test_trusted_ledgers_of_other_scores_are_refused(name, value, calibrating, tmp_path):
    data, right, wrong = calibrating
    other = scored(tmp_path / "other", [-1.0] * 10, config=CONFIG | {name: value})
    message = f"{other} was scored with another {name} than {data} ({value} instead of {CONFIG.get(name)}), so that"
    for trusted, mislabelled in ((right, other), (other, wrong)):
        with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
            curate(data, unscored="drop", trusted=trusted, mislabelled=mislabelled)


def test_another_temperature_leaves_scores_comparable(calibrating, tmp_path):
    data, right, _ = calibrating
    other = scored(tmp_path / "other", [-1.0] * 10, config=CONFIG | {"temperature": 0.5})
    assert curate(data, unscored="drop", trusted=right, mislabelled=other).quality.trusted == 10


def test_an_earlier_release_s_ledger_is_not_calibrated_either(calibrating, tmp_path):
    data, right, _ = calibrating
    other = scored(tmp_path / "other", [-1.0] * 10, config=CONFIG | {"scorer_settings": {"calibrated": False}})
    assert curate(data, unscored="drop", trusted=right, mislabelled=other).quality.trusted == 10


@pytest.mark.parametrize("at", [None, AT[:1], AT[::-1], [AT[0], {"sha256": "abcdefgX"}]])
def test_trusted_ledgers_of_other_moments_are_refused(at, calibrating, tmp_path):
    data, right, _ = calibrating
    other = scored(tmp_path / "other", [-1.0] * 10, checkpoints=at)
    when = (
        "while a model was trained on it" if at is None else f"at checkpoints {', '.join(c['sha256'][:8] for c in at)}"
    )
    message = f"{other} was scored {when}, but {data} at checkpoints 12345678, abcdefgh. Scores change"
    with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
        curate(data, unscored="drop", trusted=right, mislabelled=other)


@for_each(("at_first", "said"), [
    (True, "Their first scores did: the model has since reached or overtaken its reference. Score earlier"),
    (False, "The reference does not know these labels, or is less certain of them than the model"),
])  # fmt: skip
def test_the_message_says_whether_the_model_has_overtaken_its_reference(at_first, said, tmp_path):
    # By their means both are kept alike; by the first checkpoint alone only true labels are, or neither.
    data = scored(tmp_path / "data", [[1.0] * 4] * 2)
    right = scored(tmp_path / "right", [[1.0 if at_first else -1.0] * 10, [-3.0] * 10])
    wrong = scored(tmp_path / "wrong", [[-1.0] * 10, [-3.0] * 10])
    message = (
        "trusted samples are kept as often with wrong labels (0%) as with true labels (0%): these scores cannot "
        f"separate them. {said}"
    )
    with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
        curate(data, trusted=right, mislabelled=wrong)


def of_reference(folder, labels, predicted, *, score=-1.0, calibration=None, config=CONFIG):
    """A ledger whose reference predicts so; the model has overtaken it, so that all scores lie below 0."""
    n = len(labels)
    rows = {"id": range(n), "score": score, "label": labels, "reference_predicted": predicted}
    notes = {"checkpoints": AT} | ({} if calibration is None else {"calibration": calibration})
    write_ledger(folder, rows, configs=config, notes=notes)
    return folder


RIGHT, OTHER, PREDICTED = [0] * 20, [1] * 20, [0] * 16 + [1] + [2] * 3


@for_each("config", [CONFIG, CONFIG | {"scorer": "ReferenceLoss"}])
def test_quality_rests_on_the_references_predictions_where_all_ledgers_have_them(config, tmp_path):
    # t = 16 of 20, f = 1 of 20; of the data 6 of 10 agree.
    data = of_reference(tmp_path / "data", [3] * 10, [3] * 6 + [4] * 4, config=config)
    right = of_reference(tmp_path / "right", RIGHT, PREDICTED, config=config)
    # With wrong labels alone it is not calibrated: what it predicts there does not count.
    wrong = of_reference(tmp_path / "wrong", OTHER, [None] * 10 + [1] * 10, config=config)
    done = curate(data, TopK(count=1), trusted=right, mislabelled=wrong)
    agrees = [label == 0 for label in PREDICTED]
    expected = estimate_quality(6, 10, agrees, [label == 1 for label in PREDICTED], basis="agreement")
    assert done.quality == expected
    assert (done.quality.estimate, done.quality.basis) == (pytest.approx((0.6 - 0.05) / (0.8 - 0.05)), "agreement")
    assert done.manifest.provenance["quality"]["basis"] == "agreement"


def test_on_clean_data_all_is_good_however_far_the_model_has_come(tmp_path):
    data = of_reference(tmp_path / "data", [0] * 50, [0] * 40 + [2] * 10)
    right, wrong = of_reference(tmp_path / "right", RIGHT, PREDICTED), of_reference(tmp_path / "w", OTHER, PREDICTED)
    found = curate(data, trusted=right, mislabelled=wrong).quality
    assert (found.estimate, found.high) == (1.0, 1.0)


@for_each("lacking", ["data", "right", "wrong"])
def test_without_predictions_and_labels_the_sign_decides(lacking, tmp_path):
    scores = {"data": [1.0, 1.0, -1.0, -1.0] * 5, "right": 1.0, "wrong": -1.0}
    labels = {"data": RIGHT, "right": RIGHT, "wrong": OTHER}
    made = {}
    for name in scores:
        gap = [None] * 15
        predicted = gap + PREDICTED[15:] if name == lacking else PREDICTED
        given = gap + OTHER[15:] if name == lacking == "wrong" else labels[name]
        made[name] = of_reference(tmp_path / name, given, predicted, score=scores[name])
    found = curate(made["data"], trusted=made["right"], mislabelled=made["wrong"]).quality
    assert (found.basis, found.estimate) == ("sign", 0.5)


def test_predictions_with_class_biases_and_without_do_not_compare(tmp_path):
    biased, plain = {"biases": [0.5, -0.5]}, {"biases": None}
    facts = {"scale": 1.0, "wrong_share": 0.0, "low": 0.0, "high": 0.75, "samples": 300}
    right = of_reference(tmp_path / "right", RIGHT, PREDICTED, score=1.0, calibration=facts | plain)
    wrong = of_reference(tmp_path / "wrong", OTHER, PREDICTED, calibration=facts | plain)
    for name, biases, basis in (("a", biased, "sign"), ("b", plain, "agreement")):
        data = of_reference(tmp_path / name, RIGHT, PREDICTED, score=1.0, calibration=facts | biases)
        assert curate(data, trusted=right, mislabelled=wrong).quality.basis == basis


@for_each(("low", "high", "contradicts"), [(0.0, 0.1, True), (0.9, 1.0, True), (0.3, 0.5, False), (0.0, 0.95, False)])
def test_a_quality_by_the_sign_that_the_calibration_contradicts_is_warned_of(low, high, contradicts, tmp_path):
    data = scored(tmp_path / "data", [1.0] * 120 + [-1.0] * 80)
    right = scored(tmp_path / "right", [1.0] * 38 + [-1.0] * 2)
    wrong = scored(tmp_path / "wrong", [-1.0] * 38 + [1.0] * 2)
    note(data, 0, {"calibration": {"wrong_share": low, "low": low, "high": high, "samples": 300}})
    message = r"the sign of scores 61\.1% .* of the samples are good, but .* the calibrated reference .* are wrong"
    with pytest.warns(UserWarning, match=message) if contradicts else contextlib.nullcontext():
        assert curate(data, trusted=right, mislabelled=wrong).quality.basis == "sign"


def test_a_reference_that_does_not_know_the_classes_is_blamed(tmp_path):
    data, right, wrong = (
        of_reference(tmp_path / name, labels, [0] * 10 + [1] * 10)
        for name, labels in (("data", RIGHT), ("right", RIGHT), ("wrong", OTHER))
    )
    message = (
        "the reference predicts the wrong labels of trusted samples (50%) about as often as their true labels (50%)"
    )
    with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
        curate(data, trusted=right, mislabelled=wrong)


def test_scores_without_a_sign_give_no_quality(tmp_path):
    config = CONFIG | {"scorer": "ReferenceLoss"}
    data, right, wrong = (scored(tmp_path / name, [-1.0] * 4, config=config) for name in ("data", "right", "wrong"))
    message = r"^`trusted`: the reference's predictions are not in every ledger, .* scores of ReferenceLoss"
    with pytest.raises(CurationError, match=message):
        curate(data, TopK(count=1), trusted=right, mislabelled=wrong)


def test_a_basis_that_is_none_is_refused():
    with pytest.raises(CurationError, match=r"^`basis` is 'agrement'; nearest: 'agreement'\.$"):
        estimate_quality(1, 2, ALL, NONE, basis="agrement")


def test_calibration_takes_both_kinds_of_ledger(calibrating):
    data, right, _ = calibrating
    for given in ({"trusted": right}, {"mislabelled": right}):
        with pytest.raises(CurationError, match=r"^`trusted` and `mislabelled` need each other"):
            curate(data, unscored="drop", **given)
    with pytest.raises(CurationError, match=r"^`mislabelled` is empty; expected at least one ledger\.$"):
        curate(data, unscored="drop", trusted=right, mislabelled=[])
    with pytest.raises(CurationError, match=r"\(90%\) as with true labels \(90%\): these scores cannot separate"):
        curate(data, unscored="drop", trusted=right, mislabelled=right)


def drawn(seed, n=101):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator)
    scores[::10] = torch.nan
    return scores, torch.randn(n, generator=generator) + 1, torch.randn(n, 3, generator=generator) - 1


def whole(*parts):
    scores, right, wrong = (torch.cat(each) for each in zip(*parts, strict=True))
    kept, samples = int((scores >= 0).sum()), int((~scores.isnan()).sum())
    return torch.tensor(estimate_quality(kept, samples, (right >= 0).numpy(), (wrong >= 0).numpy()).estimate)


def given(*parts):
    metric = DataQuality()
    for scores, right, wrong in parts:
        metric.update(scores)
        metric.calibrate(right, wrong)
    return metric


def test_the_metric_is_the_estimate_over_all_batches_and_starts_again_when_reset():
    metric = given(drawn(0), drawn(1), drawn(2))
    assert metric.compute() == whole(drawn(0), drawn(1), drawn(2))
    metric.reset()
    metric.update(drawn(3)[0])
    metric.calibrate(*drawn(3)[1:])
    assert metric.compute() == whole(drawn(3)) != whole(drawn(0), drawn(1), drawn(2))


def test_metrics_of_two_processes_are_merged():
    one, other = given(drawn(0), drawn(1)), given(drawn(2, n=50))
    one.merge_state(other)
    assert one.compute() == whole(drawn(0), drawn(1), drawn(2, n=50))


def test_what_calibrates_later_counts_too():
    metric = given(drawn(0))
    metric.compute()
    metric.calibrate(*drawn(1)[1:])
    assert metric.compute() == whole(drawn(0), (drawn(1)[0][:0], *drawn(1)[1:]))


def test_trusted_samples_without_a_score_do_not_calibrate_the_metric():
    metric = DataQuality()
    metric.update(torch.tensor([1.0, 1.0, 1.0, -1.0]))
    metric.calibrate(torch.tensor([1.0, 1.0, torch.nan]), torch.tensor([-1.0, -1.0, -1.0]))
    assert metric.compute() == 0.75


def test_called_on_a_batch_the_metric_keeps_what_calibrates_it():
    metric = DataQuality()
    metric.calibrate(torch.ones(20), -torch.ones(20))
    metric(torch.tensor([1.0, -1.0]))
    assert metric.compute() == 0.5


def test_two_processes_compute_what_one_would():
    # What torchmetrics gathers, state by state, as it does under DDP.
    other = given(drawn(2, n=50))
    theirs = iter([other.kept, other.samples, torch.cat(other.right), torch.cat(other.wrong)])
    metric = DataQuality(distributed_available_fn=lambda: True, dist_sync_fn=lambda own, group: [own, next(theirs)])
    for scores, right, wrong in (drawn(0), drawn(1)):
        metric.update(scores)
        metric.calibrate(right, wrong)
    assert metric.compute() == whole(drawn(0), drawn(1), drawn(2, n=50))


@for_each("size", [1e-8, 1e-3, 1.0, 1e3])
def test_detection_metrics_agree_with_scikit_learn_at_any_size_of_scores(size):
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(300, generator=generator) < 0.3
    scores = size * (torch.randn(300, generator=generator) - wrong.float())
    scores[100:200] = size * torch.rand(100, generator=generator)  # a batch within 0 to 1
    scores[250:270] = scores[250]
    for metric, truth in ((MislabelAUROC(), roc_auc_score), (MislabelAveragePrecision(), average_precision_score)):
        for start in range(0, 300, 100):
            metric.update(scores[start : start + 100], wrong[start : start + 100])
        assert float(metric.compute()) == pytest.approx(truth(wrong.numpy(), -scores.double().numpy()), abs=1e-6)
        metric.reset()
        metric.update(scores[:100], wrong[:100])
        assert float(metric.compute()) == pytest.approx(truth(wrong[:100], -scores[:100].double()), abs=1e-6)


@for_each(
    ("counts", "right", "wrong", "said"),
    [
        ((6, 10), [True, False], [[True], [True, False]], "`right` and `wrong` cannot be read as arrays"),
        ((6, 10), ["a"], [True], "`right` and `wrong` cannot be read as arrays"),
        ((6, 10), [[True]], [True], "`right` has shape (1, 1) and `wrong` has shape (1,);"),
        ((6, 10), [0.5] * 9, [0] * 9, "`right` or `wrong` holds other values than 0 and 1; expected booleans."),
        ((6.5, 10), [True] * 9, [False] * 9, "`kept` is 6.5 and `samples` is 10;"),
        ((11, 10), [True] * 9, [False] * 9, "`kept` is 11 and `samples` is 10;"),
    ],
)
def test_counts_and_answers_that_are_none_are_refused(counts, right, wrong, said):
    with pytest.raises(CurationError, match=f"^{re.escape(said)}"):
        estimate_quality(*counts, right, wrong)
