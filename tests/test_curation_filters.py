"""Filters: SQL says of each sample what NumPy and scikit-learn say directly."""

import re
from collections import Counter

import numpy as np
import pytest
from sklearn.cluster import KMeans as Clusters
from sklearn.mixture import GaussianMixture

from lightning_mimic.curation import CurationError, KMeans, Mixture, Sign, Threshold, TopK
from lightning_mimic.curation.filters import by_epoch
from lightning_mimic.curation.scores import Scores
from lightning_mimic.database import Database
from lightning_mimic.random_streams import stream_seed
from support.cases import case, for_each
from support.ledgers import write_ledger, write_scores


@pytest.fixture
def database():
    with Database() as made:
        yield made


def kept(folder, one):
    """The decision on each sample's means, by id; and the reason."""
    with Database() as database:
        decision = one.decide(Scores(folder, database))
        assert decision.facts == {}
        rows = database.connection.execute(f"SELECT id, keep, votes_keep, votes FROM ({decision.query})").fetchall()
    assert {row[2:] for row in rows} <= {(None, None)}
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: row[1] for row in rows}, decision.reason


def on(tmp_path, scores, one, **columns):
    """What stays of samples 0, 1, 2, ..., as an array of bool; and the reason."""
    folder = tmp_path / f"ledger{len(list(tmp_path.iterdir()))}"
    write_scores(folder, scores, **columns)
    found, reason = kept(folder, one)
    return np.array([found[k] for k in range(len(found))]), reason


def voted(folder, one):
    """The vote on every scoring, by epoch and id."""
    with Database() as database:
        rows = Scores(folder, database).scorings()
        query = f"SELECT epoch, id, {one.vote(rows).keep} FROM {rows.name}"
        return {row[:2]: row[2] for row in database.connection.execute(query).fetchall()}


def skewed(seed, n=2000):
    return np.random.default_rng(seed).gamma(2.0, 1.0, n).astype(np.float32) + np.float32(0.1)


def two(seed, n=4000, share=0.7, low=(-2.0, 0.5), high=(2.0, 1.0)):
    random = np.random.default_rng(seed)
    upper = random.random(n) < share
    return np.where(upper, random.normal(*high, n), random.normal(*low, n)).astype(np.float32)


def test_sign_keeps_a_mean_of_0_or_more(tmp_path):
    scores = [[1, -1, 0.5, 0, -0.0, -1e-30], [-1, 0.5, -0.25, 0, 0, -1e-30]]
    found, reason = on(tmp_path, scores, Sign())
    assert found.tolist() == [True, False, True, True, True, False]
    assert reason == "mean score below 0"


def test_uniform_weights_pass_the_threshold_for_all_batch_sizes(tmp_path):
    sizes = np.arange(2, 6000)
    weights = np.float32(1) / sizes.astype(np.float32)
    assert (weights.astype(np.float64) * sizes < 1).any(), "no case in which the rounding matters"
    write_ledger(tmp_path, {"id": sizes, "score": -1.0, "weight": weights, "batch_size": sizes})
    found, reason = kept(tmp_path, Threshold())
    assert set(found.values()) == {True}
    assert reason == "mean weight below 1/B"


def test_the_threshold_is_on_the_mean_of_weight_times_batch_size(tmp_path):
    rows = [("a", 0, 0.25, 4), ("a", 1, 0.249, 4), ("b", 0, 0.2, 4), ("b", 1, 0.4, 4), ("c", 0, 0.11, 10)]
    rows += [("c", 1, 0.24, 4), ("d", 0, 0.1249, 8), ("e", 0, 1.0, 1)]
    columns = zip(*rows, strict=True)
    table = dict(zip(["id", "epoch", "weight", "batch_size"], columns, strict=True))
    write_ledger(tmp_path, table | {"score": 1.0, "flag": ["ok"] * 7 + ["alone"]})
    found, _ = kept(tmp_path, Threshold())
    assert found == {"a": False, "b": True, "c": True, "d": False, "e": None}
    expected = {("a", 0), ("b", 1), ("c", 0)}
    votes = {(i, e): v for (e, i), v in voted(tmp_path, Threshold()).items()}
    assert {place for place, vote in votes.items() if vote} == expected
    assert votes["e", 0] is None


@pytest.mark.parametrize(
    ("scores", "seed"),
    [(skewed(1), 0), (two(2), 0), (two(2), 3), (-skewed(3), 3), (two(4) * 1e-6, 0), ([1.0, 2.0], 3), ([-1, -1, 5], 0)],
)
def test_k_means_keeps_the_upper_of_scikit_learns_clusters(scores, seed, tmp_path):
    scores = np.asarray(scores, np.float32).astype(np.float64)
    clusters = Clusters(2, n_init=1, random_state=stream_seed(seed, "k-means")).fit(np.sort(scores)[:, None])
    found, reason = on(tmp_path, scores, KMeans(seed))
    upper = clusters.predict(scores[:, None]) == clusters.cluster_centers_.argmax()
    middle = float(clusters.cluster_centers_.mean())
    assert 0 < found.sum() < len(found)
    np.testing.assert_array_equal(found, upper)
    assert reason == f"mean score in the lower of two clusters (below {middle:.4g})"


@pytest.mark.parametrize("one", [KMeans(), Mixture()])
def test_constant_scores_are_all_kept(one, tmp_path):
    for scores in ([-1.0], [0.0], [-2.5] * 2, [-0.1] * 7, [[-0.1] * 12, [0.3] * 12, [0.2] * 12]):
        with case(scores):
            assert on(tmp_path, scores, one)[0].all()


@for_each("scores", [[-1, 1], [-5, -5.1, 5], [-1.0]])
def test_the_mixture_keeps_all_of_less_than_four(scores, tmp_path):
    assert on(tmp_path, scores, Mixture())[0].all()


@for_each(("mean", "scale"), [(0.0, 1.0), (-3.0, 1.0), (0.01, 1e-7), (-0.5, 1e4)])
def test_the_mixture_keeps_all_of_one_normal_cloud(mean, scale, tmp_path):
    scores = scale * np.random.default_rng(5).normal(mean, 1, 3000)
    found, reason = on(tmp_path, scores, Mixture())
    assert found.all()
    assert reason == "mean score in the lower of two components (below -inf)"


@for_each("sign", [1, -1])
def test_the_mixture_keeps_all_of_a_skewed_cloud_on_one_side_of_0(sign, tmp_path):
    scores = sign * skewed(6)
    values = ((scores - scores.mean()) / scores.std())[:, None]
    by_components = [GaussianMixture(k, random_state=0).fit(values).bic(values) for k in (1, 2)]
    assert by_components[1] < by_components[0], "the criterion alone would keep them: nothing is tested"
    assert on(tmp_path, scores, Mixture())[0].all()


def equal_posterior(share, low, high):
    """Where two weighted normal densities are the same, between their means."""
    at = np.linspace(low[0], high[0], 100_001)
    odds = np.log(share / high[1]) - ((at - high[0]) / high[1]) ** 2 / 2
    odds -= np.log((1 - share) / low[1]) - ((at - low[0]) / low[1]) ** 2 / 2
    return at[np.argmax(odds >= 0)]


SEPARATED = [(0.7, (-2.0, 0.5), (2.0, 1.0)), (0.2, (-1.0, 0.3), (3.0, 0.8)), (0.5, (-2.0, 0.5), (2.0, 0.5))]


@pytest.mark.parametrize(
    ("share", "low", "high", "scale"),
    [*((*each, 1.0) for each in SEPARATED), *((*SEPARATED[0], s) for s in (1e-6, 1e3))],
)
def test_the_mixture_cuts_where_both_components_are_equally_likely(share, low, high, scale, tmp_path):
    scores = two(7, 6000, share, low, high) * np.float32(scale)
    found, reason = on(tmp_path, scores, Mixture())
    cut = float(re.search(r"below (.*)\)$", reason)[1])
    assert cut / scale == pytest.approx(equal_posterior(share, low, high), abs=0.08)
    np.testing.assert_array_equal(np.delete(found, near := np.isclose(scores, cut, rtol=1e-3)), (scores >= cut)[~near])
    assert near.sum() < 20


def test_the_mixture_does_not_depend_on_the_order_or_the_names_of_samples(tmp_path):
    scores, order = two(8), np.random.default_rng(0).permutation(4000)
    found, reason = on(tmp_path, scores, Mixture())
    again, the_same = on(tmp_path, scores[order], Mixture())
    np.testing.assert_array_equal(found[order], again)
    assert (reason, 0 < found.sum() < 4000) == (the_same, True)


def best(scores, ids, k):
    return set(sorted(ids, key=lambda i: (-scores[i], i))[:k])


@pytest.mark.parametrize(
    ("how", "k"), [({"count": 4}, 4), ({"count": 99}, 9), ({"fraction": 0.5}, 5), ({"count": 1}, 1)]
)
def test_top_k_keeps_the_highest_and_of_equals_the_smallest_ids(how, k, tmp_path):
    for n, names in enumerate([range(9), [*"ihgfedcba"], [-5, 10**15, 3, 2, 1, 0, -1, -2, 7]]):
        scores = dict(zip(names, [1.0, 3.0, 1.0, 1.0, -2.0, 3.0, 1.0, 0.0, 1.0], strict=True))
        write_scores(tmp_path / str(n), list(scores.values()), ids=scores)
        found, reason = kept(tmp_path / str(n), TopK(**how))
        with case(names):
            assert {i for i, keep in found.items() if keep} == best(scores, names, k)
            assert set(found.values()) <= {True, False}
            assert reason == f"not in the top {next(iter(how.values()))}"


@pytest.mark.parametrize("fraction", [1, 1.0, 0.1 + 0.2, 1 / 3, 1 / 810, 0.0012345678901234567, 1e-5, 0.9999])
def test_a_fraction_is_of_the_samples_that_have_a_score(fraction, tmp_path):
    scores = np.random.default_rng(1).normal(size=2003)
    scores[:3] = np.nan
    found, reason = kept(write_and_name(tmp_path, scores), TopK(fraction=fraction))
    assert (sum(found.values()), len(found)) == (round(fraction * 2000), 2000)
    assert reason == f"not in the top {fraction:.4g}"


def write_and_name(folder, scores, **columns):
    write_scores(folder, scores, **columns)
    return folder


@pytest.mark.parametrize("how", [{"count": 7}, {"fraction": 0.25}])
def test_top_k_per_class_takes_so_many_of_each(how, tmp_path):
    random = np.random.default_rng(2)
    scores, labels = random.normal(size=120).astype(np.float32), random.choice([0, 4, 9], size=120, p=[0.7, 0.25, 0.05])
    found, reason = on(tmp_path, scores, TopK(per_class=True, **how), label=labels)
    for label, size in Counter(labels.tolist()).items():
        k = how.get("count") or int(0.25 * size + 0.5)
        own = np.flatnonzero(labels == label).tolist()
        assert set(np.flatnonzero(found & (labels == label)).tolist()) == best(scores, own, k)
    assert reason == f"not in the top {next(iter(how.values()))} of its class"


def test_top_k_per_class_needs_all_labels(tmp_path):
    write_ledger(tmp_path / "a", {"id": [1, 2, 3], "score": [1.0, 2.0, None], "label": [0, None, 1]})
    with pytest.raises(CurationError, match=r"^`per_class`: some samples have no label\. .*'label' beside 'loss'"):
        kept(tmp_path / "a", TopK(count=1, per_class=True))
    write_ledger(tmp_path / "b", {"id": [1, 2, 3], "score": [1.0, 2.0, None], "label": [0, 0, None]})
    assert kept(tmp_path / "b", TopK(count=1, per_class=True))[0] == {1: False, 2: True}


WRONG = [(how, "TopK needs exactly one of `fraction` and `count`.") for how in ({}, {"fraction": 0.5, "count": 1})]
FRACTIONS, COUNTS = [0, 0.0, -0.1, 1.0001, float("nan"), float("inf")], [0, -3, 2.0, 0.5, "7", float("nan")]
WRONG += [({"fraction": f}, f"`fraction` is {f!r}; expected above 0 and at most 1.") for f in FRACTIONS]
WRONG += [({"count": c}, f"`count` is {c!r}; expected a whole number above 0.") for c in COUNTS]


@for_each(("how", "message"), WRONG)
def test_top_k_refuses_what_is_no_k(how, message):
    with pytest.raises(CurationError, match=f"^{re.escape(message)}$"):
        TopK(**how)


def test_every_epoch_has_its_own_cut(tmp_path):
    epochs = [3, 5, 9]
    scores = np.stack([two(1, 600), 100 + 10 * two(2, 600), two(3, 600) / 100]).astype(np.float32).astype(np.float64)
    scores[1, :50] = np.nan
    (tmp_path / "alone").mkdir()
    labels = np.arange(600) % 3
    write_scores(tmp_path, scores, epochs=epochs, label=labels)
    for one in (KMeans(), Mixture(), TopK(fraction=0.1), TopK(count=9, per_class=True), Sign()):
        together = voted(tmp_path, one)
        assert len(together) == 3 * 600 - 50
        for k, epoch in enumerate(epochs):
            there = np.flatnonzero(np.isfinite(scores[k]))
            alone, _ = on(tmp_path / "alone", scores[k, there], one, label=labels[there])
            assert [together[epoch, i] for i in there.tolist()] == alone.tolist(), (one, epoch)
    with Database() as database:
        reason = KMeans().vote(Scores(tmp_path, database).scorings()).reason
    assert reason == "mean score in the lower of two clusters (below the cut of its epoch)"


def test_a_sample_without_a_score_gets_no_vote(tmp_path):
    scores = [[np.nan, 1.0, -1.0, 2.0, -2.0]]
    for one in (Sign(), Threshold(), KMeans(), Mixture(), TopK(count=1)):
        write_scores(tmp_path / type(one).__name__, scores)
        assert kept(tmp_path / type(one).__name__, one)[0].keys() == {1, 2, 3, 4}


def test_one_sample(tmp_path):
    ones = [Threshold(), KMeans(), Mixture(), TopK(count=1), Sign()]
    assert [on(tmp_path, [-3.0], one)[0].tolist() for one in ones] == [[True]] * 4 + [[False]]


def sampled(rows):
    query = f"SELECT epoch, id, score FROM {rows.name} WHERE {rows.sampled} ORDER BY ALL"
    return rows.database.connection.execute(query).fetchall()


NUMBERS, NAMES = range(5000), [f"s{k}" for k in range(5000)]


@pytest.mark.parametrize(("most", "names"), [(1000, NUMBERS), (1000, NAMES), (700, NAMES), (4999, NUMBERS), (3, NAMES)])
def test_the_same_are_sampled_in_every_epoch_about_as_many_as_asked(most, names, tmp_path, database):
    scores = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)
    write_scores(tmp_path, scores, ids=names, epochs=[2, 4, 5])
    rows = Scores(tmp_path, database, sample_size=most).scorings()
    found = sampled(rows)
    epochs = [{row[1] for row in found if row[0] == e} for e in (2, 4, 5)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == pytest.approx(5000 / -(-5000 // most), rel=0.15, abs=5)
    again = Scores(tmp_path, database, "b", sample_size=most).scorings()
    assert found == sampled(rows) == sampled(again)
    for k, epoch in enumerate([2, 4, 5]):
        own = [scores[k, n] for n, name in enumerate(names) if name in epochs[0]]
        np.testing.assert_array_equal(rows.sampled_scores[epoch], np.sort(own))
    assert rows.sampled_scores.keys() == {2, 4, 5}


def test_all_are_sampled_where_there_are_no_more_than_asked(tmp_path, database):
    write_scores(tmp_path, [[1.0, 2.0, np.nan], [3.0, np.nan, np.nan]])
    scores = Scores(tmp_path, database, sample_size=3)
    assert sampled(scores.scorings()) == [(0, 0, 1.0), (0, 1, 2.0), (1, 0, 3.0)]
    assert sampled(scores.means()) == [(0, 0, 2.0), (0, 1, 2.0)]


def test_an_epochs_value_is_exact_and_null_where_there_is_none(database):
    values = {3: 0.1 + 0.2, 5: -float("inf"), 6: 5e-324, 8: -1e300}
    said = by_epoch((3, 5, 6, 8), values)
    query = f"SELECT epoch, {said} FROM (SELECT unnest(range(2, 10)) AS epoch)"
    found = dict(database.connection.execute(query).fetchall())
    assert found == {2: None, 4: None, 7: None, 9: None} | values
