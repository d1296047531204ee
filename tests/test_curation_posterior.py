"""The filter by posterior, and filters that mean nothing for what a ledger's scorer computes."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lightning_mimic import Reweighter
from lightning_mimic import scorers as weights
from lightning_mimic.curation import (
    CurationError,
    Ensemble,
    KMeans,
    Manifest,
    Mixture,
    Posterior,
    Sign,
    Threshold,
    TopK,
    compare,
    curate,
)
from lightning_mimic.curation.plots import plot_quality
from support.cases import case, for_each
from support.ledgers import note, write_ledger, write_scores
from support.toys import parameters_of, toy, toy_data

NONE, INVERTED = np.nan, -1.0


def kept(done):
    return {row["id"]: row["keep"] for row in done.manifest.table().to_pylist()}


def test_a_mean_posterior_of_a_half_or_more_is_kept_whatever_the_score(tmp_path):
    posteriors = [[0.5, 1.0, 0.4, 0.0, 0.9], [0.5, 0.25, 0.5, 0.875, NONE]]
    write_scores(tmp_path / "scores", [[INVERTED] * 5] * 2, posterior=posteriors)
    done = curate(tmp_path / "scores", Posterior())
    assert kept(done) == {0: True, 1: True, 2: False, 3: False, 4: True}
    rows = {row["id"]: row for row in done.manifest.table().to_pylist()}
    assert [rows[k]["posterior"] for k in range(5)] == pytest.approx([0.5, 0.625, 0.45, 0.4375, 0.9])
    assert {row["reason"] for row in rows.values() if not row["keep"]} == {"mean posterior below 0.5"}
    assert done.manifest.provenance["filter"] == "Posterior()"


def test_a_sample_without_a_posterior_does_not_vanish(tmp_path):
    write_scores(tmp_path / "scores", [1.0, 1.0, 1.0, NONE], posterior=[0.9, 0.1, NONE, NONE])
    message = "no decision on 2 of 4 samples, such as 2 (no posterior). `unscored='keep'` keeps them"
    with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
        curate(tmp_path / "scores", Posterior())
    for unscored in ("keep", "drop"):
        done = curate(tmp_path / "scores", Posterior(), unscored=unscored)
        stays = unscored == "keep"
        assert kept(done) == {0: True, 1: False, 2: stays, 3: stays}
        assert (done.samples, done.unscored) == (4, 2)


def test_a_sample_without_a_score_is_judged_by_its_posterior(tmp_path):
    rows = {"id": [1, 2, 3], "score": [1.0, None, None], "flag": ["ok", "zero_direction", "zero_direction"]}
    write_ledger(tmp_path / "some", rows | {"posterior": [0.9, 0.8, 0.2]})
    assert kept(curate(tmp_path / "some", Posterior())) == {1: True, 2: True, 3: False}
    write_ledger(tmp_path / "none", rows | {"score": None, "posterior": [0.9, 0.8, 0.2]})
    done = curate(tmp_path / "none", Posterior())
    assert kept(done) == {1: True, 2: True, 3: False}
    assert (done.share_kept, done.mean_score, done.mean_score_kept, done.unscored) == (None, None, None, 0)
    with pytest.raises(CurationError, match=r"none: none of its samples has a score\.$"):
        curate(tmp_path / "none", Sign())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {},
            "`filter`: Posterior() needs posteriors, but none were recorded. They are recorded if the scored layer",
        ),
        ({"posterior": [0.9, NONE, NONE, NONE]}, "`filter`: Posterior() needs posteriors, but 3 of 4 rows have none."),
        ({"posterior": [0.9, 1.5, 0.5, 0.5]}, "`filter`: the posteriors lie between 0.5 and 1.5; expected 0 to 1."),
    ],
)
@pytest.mark.parametrize("many", [False, True])
def test_posteriors_that_are_not_there_or_none_are_refused(columns, message, many, tmp_path):
    write_scores(tmp_path / "scores", [1.0, 2.0, -1.0, -2.0], **columns)
    one = Ensemble([Posterior()], by="majority") if many else Posterior()
    with pytest.raises(CurationError, match=f"^{re.escape(message)}"):
        curate(tmp_path / "scores", one, unscored="keep")


def test_an_infinite_posterior_counts_as_missing(tmp_path):
    write_scores(tmp_path / "scores", [[1.0, 1.0]] * 2, posterior=[[np.inf, 0.1], [0.2, -np.inf]])
    assert kept(curate(tmp_path / "scores", Posterior())) == {0: False, 1: False}


@pytest.mark.parametrize("one", [Posterior(), Ensemble([Posterior(), Sign(), KMeans()], by="majority")])
def test_a_reference_that_does_not_explain_the_labels_decides_nothing(one, tmp_path):
    write_scores(tmp_path / "scores", [1.0, -1.0], posterior=1.0)
    note(tmp_path / "scores", 0, {"calibration": {"informative": False, "wrong_share": 0.0}})
    with pytest.raises(CurationError, match=r"^`filter`: Posterior\(\) cannot decide on .*: the reference does not"):
        curate(tmp_path / "scores", one)
    assert curate(tmp_path / "scores", Sign()).wrong_share is None


@pytest.mark.filterwarnings("error")
def test_a_sign_that_drops_right_labels_is_warned_of(tmp_path):
    calibration = {"wrong_share": 0.2, "low": 0.1, "high": 0.3, "samples": 100, "informative": True}
    wrong = np.arange(100) < 20
    for name, scores in (("overtaken", np.where(wrong, 1.0, -1.0)), ("ahead", np.where(wrong, -1.0, 1.0))):
        write_scores(tmp_path / name, scores, posterior=np.where(wrong, 0.1, 0.9))
        note(tmp_path / name, 0, {"calibration": calibration})
    with pytest.warns(
        UserWarning, match=r"drops 80 of 100 samples, but .* 80 of these have a right .*filter=posterior"
    ):
        curate(tmp_path / "overtaken")
    assert curate(tmp_path / "ahead").kept == 80
    assert curate(tmp_path / "overtaken", Posterior()).kept == 80


def test_the_posterior_votes_in_every_epoch(tmp_path):
    posteriors = [[0.9, 0.6, 0.1], [0.9, 0.4, 0.1], [0.9, 0.4, NONE]]
    write_scores(tmp_path / "scores", [[INVERTED, INVERTED, 1.0]] * 3, posterior=posteriors)
    done = curate(tmp_path / "scores", Ensemble([Posterior()], by="majority"))
    assert kept(done) == {0: True, 1: False, 2: False}
    votes = {row["id"]: (row["votes_keep"], row["votes"]) for row in done.manifest.table().to_pylist()}
    assert votes == {0: (3, 3), 1: (1, 3), 2: (0, 2)}


@pytest.mark.slow
def test_a_label_model_with_posteriors_starts_from_them_and_not_from_the_sign(tmp_path):
    generator = np.random.default_rng(0)
    right = np.arange(400) < 300
    scores = np.where(right, -1.0, -3.0) + 0.3 * generator.standard_normal((3, 400))  # all below 0
    posterior = np.clip(np.where(right, 0.9, 0.1) + 0.1 * generator.standard_normal((3, 400)), 0, 1)
    write_scores(tmp_path / "scores", scores, posterior=posterior)
    done = curate(tmp_path / "scores", Ensemble([Posterior(), KMeans()]))
    assert done.manifest.provenance["facts"]["class_balance"] == 0.75
    assert kept(done) == dict(enumerate(right.tolist()))


def test_the_reference_s_class_is_suggested_in_the_manifest_and_its_exports(tmp_path):
    columns = {"label": [0, 1], "predicted": [0, 1], "reference_predicted": [0, 0], "reference_loss": [0.25, 2.0]}
    columns = {"id": [1, 2], "score": [1.0, -1.0], "posterior": [1.0, 0.25], **columns}
    write_ledger(tmp_path / "scores", columns, notes={"class_names": ["cat", "dog"]})
    done = curate(tmp_path / "scores", Posterior(), tmp_path / "out", exports=["csv", "cleanlab"])
    names = ("posterior", "reference_predicted", "reference_predicted_name", "reference_loss")
    rows = [tuple(row[name] for name in names) for row in done.manifest.table().to_pylist()]
    assert rows == [(0.25, 0, "cat", 2.0), (1.0, 0, "cat", 0.25)]
    assert (tmp_path / "out" / "label_issues.csv").read_text().splitlines() == [
        "id,is_label_issue,label_quality,given_label,predicted_label,reference_label",
        "1,false,1.0,cat,cat,cat",
        "2,true,0.0,dog,dog,cat",
    ]
    assert "posterior" in (tmp_path / "out" / "manifest.csv").read_text().splitlines()[0]


LOSS, NORM = "scores of ReferenceLoss (minus a loss, never above 0)", "scores of GradNorm (gradient norms"
#: Scorer and other settings, filters that mean nothing, what is said of the scores, and filters that mean something.
MEANINGLESS = {
    "a reference's loss": ({"scorer": "ReferenceLoss"}, [Sign(), Mixture()], LOSS, [KMeans(), TopK(count=1)]),
    "the head's": ({"scorer": "HeadReferenceLoss"}, [Sign(), Mixture()], "scores of HeadReferenceLoss", [Threshold()]),
    "lengths": ({"scorer": "GradNorm"}, [Sign(), KMeans(), Threshold(), Mixture()], NORM, [TopK(count=1)]),
    "weights": ({"scorer": "GradMatch"}, [Sign()], "scores of GradMatch (weights, never", [Threshold(), TopK(count=1)]),
    "nothing": ({"scorer": "Uniform"}, [Sign(), TopK(count=1), KMeans(), Threshold()], "scores of Uniform (0 for", []),
    "uniform weights": ({"min_ess": 1.0}, [Threshold()], "weights with `min_ess=1`, which are 1/B", [Sign()]),
    "declared": (
        {"scorer": "Mine", "scorer_settings": {"signed": False}}, [Sign()], "scores of Mine, whose sign", [KMeans()]
    ),
    "its own weights": ({"scorer": "Uniform", "weighting": "Posterior"}, [Sign()], "scores of Uniform", [Threshold()]),
    "their own": ({"scorer": "Mine", "scorer_settings": {"signed": True}}, [], "", [Sign(), Mixture(), Threshold()]),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANINGLESS)
def test_a_filter_that_means_nothing_for_the_scores_is_refused(name, tmp_path):
    config, refused, said, allowed = MEANINGLESS[name]
    rows = {"id": range(4), "score": [-1.0, -2.0, -3.0, -0.5], "weight": [0.2, 0.3, 0.4, 0.1]}
    write_ledger(tmp_path / "scores", rows, configs=config)
    for one in refused:
        for rule in (one, Ensemble([one, TopK(count=2)], by="majority")):
            with case(name, rule), pytest.raises(CurationError, match="decisions would be meaningless") as info:
                curate(tmp_path / "scores", rule)
            assert f"{tmp_path}/scores holds {'weights from ' * ('weights from' in str(info.value))}{said}" in str(
                info.value
            )
    for one in allowed:
        with case(name, one):
            assert curate(tmp_path / "scores", one).samples == 4


def test_the_refusal_names_what_can_be_taken(tmp_path):
    write_ledger(tmp_path / "a", {"id": [1], "score": [-1.0]}, configs={"scorer": "ReferenceLoss"})
    with pytest.raises(CurationError) as info:
        curate(tmp_path / "a")
    assert str(info.value) == (
        f"`filter`: Sign() decides by the sign of scores, but {tmp_path}/a holds {LOSS}, so that its decisions would "
        "be meaningless. Use TopK(fraction=...) (filter=top_k)."
    )
    write_ledger(tmp_path / "b", {"id": [1], "score": [0.0], "posterior": [1.0]}, configs={"scorer": "Uniform"})
    with pytest.raises(CurationError, match=r"would be meaningless\. Use Posterior\(\) \(filter=posterior\)\.$"):
        curate(tmp_path / "b")
    assert kept(curate(tmp_path / "b", Posterior())) == {1: True}


@for_each("scorer", ["ReferenceLoss", "GradNorm"])
def test_a_label_model_does_not_start_from_a_sign_that_means_nothing(scorer, tmp_path):
    write_ledger(tmp_path / "scores", {"id": [1], "score": [-1.0]}, configs={"scorer": scorer})
    with pytest.raises(CurationError, match=r"^`filter`: the label model needs the share of scores of 0 or more"):
        curate(tmp_path / "scores", Ensemble([TopK(count=1)] * 3))


def test_the_share_by_sign_is_unknown_where_there_is_no_sign(tmp_path):
    scores = [-1.0, -2.0, -3.0, -4.0]
    write_ledger(tmp_path / "loss", {"id": range(4), "score": scores}, configs={"scorer": "ReferenceLoss"})
    write_scores(tmp_path / "mimic", [1.0, 1.0, 1.0, -1.0])
    done = curate(tmp_path / "loss", TopK(count=1), tmp_path / "a")
    assert done.share_kept is None
    other = curate(tmp_path / "mimic", None, tmp_path / "b")
    found = compare({"loss": done.manifest, "mimic": other.manifest})
    assert [(each.name, each.share_kept, each.kept) for each in found.datasets] == [
        ("mimic", 0.75, 0.75),
        ("loss", None, 0.25),
    ]
    plot_quality(tmp_path / "q.png", found)
    assert Manifest(tmp_path / "a" / "manifest.parquet").provenance["share_kept"] is None
    assert pq.read_table(tmp_path / "a" / "manifest.parquet").num_rows == 4


@pytest.mark.parametrize("given", ["posterior", Posterior, weights.Posterior(), weights.Posterior, 3, [Posterior()]])
def test_what_is_no_filter_is_refused(given, tmp_path):
    write_scores(tmp_path / "scores", [1.0, -1.0], posterior=0.9)
    message = f"`filter` is {given!r} ("
    with pytest.raises(CurationError, match=f"^{re.escape(message)}.*expected a filter of lightning_mimic.curation"):
        curate(tmp_path / "scores", given)


@for_each("wrong", [1.75, -0.5])
def test_a_posterior_out_of_range_does_not_hide_in_a_mean(wrong, tmp_path):
    write_scores(tmp_path / "scores", [[1.0, 1.0]] * 2, posterior=[[wrong, 0.9], [0.5, 0.9]])
    with pytest.raises(CurationError, match=r"^`filter`: the posteriors lie between .*; expected 0 to 1\.$"):
        curate(tmp_path / "scores", Posterior())


def test_a_scorer_s_class_may_say_that_its_scores_have_no_sign(tmp_path):
    class Mine:
        needs = frozenset({"dot"})
        signed = False

        def __call__(self, products):
            return -products.dot.abs()

    net = toy()
    inputs, labels = toy_data(8).tensors
    given = {"scorer": Mine(), "ledger": tmp_path / "scores"}
    with (
        Reweighter(net, parameters_of(toy(seed=1)), "head", **given) as reweighter,
        reweighter.step((inputs, labels), torch.arange(8)) as step,
    ):
        step.backward(torch.nn.functional.cross_entropy(net(inputs), labels))
    with pytest.raises(CurationError, match="scores of Mine, whose sign has no meaning"):
        curate(tmp_path / "scores", Sign())
    assert curate(tmp_path / "scores", TopK(count=4)).kept == 4
