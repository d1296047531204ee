"""The verdict on the reference and the estimated share of wrong labels, from the ledger to what is decided by it."""

import re
from dataclasses import fields

import pytest

from lightning_mimic.curation import CurationError, Manifest, Posterior, Sign, compare, curate, select
from lightning_mimic.curation.reference_facts import WrongShare
from lightning_mimic.reference.calibration import Calibration
from lightning_mimic.reference.diagnosis import Diagnosis, Estimate
from support.cases import case, for_each
from support.ledgers import CONFIG, note, write_ledger, write_scores

DOUBTFUL = Diagnosis(samples=512, weight_cosine=0.3)
UNRELATED = Diagnosis(samples=512, label_gap=Estimate(0.0, 1.0, 512))
CALIBRATION = {"wrong_share": 0.375, "low": 0.25, "high": 0.5, "samples": 900, "biases": None, "informative": True}


def scored(folder, diagnosis=None, *, config=CONFIG, calibration=None):
    """A small ledger with a diagnosis, or a verdict alone."""
    notes = {} if calibration is None else {"calibration": calibration}
    if isinstance(diagnosis, Diagnosis):
        notes["diagnosis"] = diagnosis.facts()
    elif diagnosis is not None:
        notes["diagnosis"] = {"verdict": diagnosis, "findings": ["it looks so"]}
    write_ledger(folder, {"id": [1, 2], "score": [1.0, -1.0], "posterior": [0.9, 0.1]}, configs=config, notes=notes)
    return folder


def test_an_unrelated_reference_is_refused_accepted_or_not(tmp_path):
    scored(tmp_path / "scores", UNRELATED)
    message = (
        f"{tmp_path}/scores: the reference is unrelated: it does not know the samples' labels from each other's "
        "(exchanging them raises its loss by 0 ± 1). Its scores may rank wrong samples above right ones, so that no "
        "decision is made from them. Score the samples with the reference given as lightning_mimic.Aligned(...), or "
        "with another reference."
    )
    for accepted in (False, True):
        for one in (Sign(), Posterior()):
            with case(accepted, one), pytest.raises(CurationError, match=f"^{re.escape(message)}$"):
                curate(tmp_path / "scores", one, tmp_path / "out", accept_verdict=accepted)
    assert not (tmp_path / "out").exists()


@for_each("verdict", ["unsure", "doubtful"])
def test_calibrated_posteriors_decide_with_a_doubtful_or_unsure_reference(verdict, tmp_path):
    scored(tmp_path / verdict, verdict, calibration=CALIBRATION)
    with pytest.raises(CurationError, match=r"Posterior\(\), filter=posterior"):
        curate(tmp_path / verdict, Sign())
    done = curate(tmp_path / verdict, Posterior())
    assert (done.verdict, done.kept) == (verdict, 1)
    uninformative = CALIBRATION | {"informative": False}
    scored(tmp_path / f"{verdict} of nothing", verdict, calibration=uninformative)
    with pytest.raises(CurationError, match="`filter`: Posterior"):
        curate(tmp_path / f"{verdict} of nothing", Posterior())


@for_each("verdict", [DOUBTFUL, "doubtful", "unsure"])
def test_a_doubtful_or_unsure_reference_must_be_accepted(verdict, tmp_path):
    name = verdict if isinstance(verdict, str) else verdict.verdict
    scored(tmp_path / "scores", verdict)
    with pytest.raises(
        CurationError, match=rf"scores: the reference is {name}: it.*`accept_verdict=true` decides anyway"
    ):
        curate(tmp_path / "scores")
    done = curate(tmp_path / "scores", accept_verdict=True)
    assert (done.verdict, done.kept) == (name, 1)
    assert done.manifest.provenance["verdict"] == name
    assert done.manifest.provenance["diagnosis"].startswith(f"The reference is {name}: it")


@for_each("notes", [{}, {"diagnosis": {"same_start": True}}, {"diagnosis": {"verdict": None}}])
def test_a_ledger_without_a_verdict_goes_on(notes, tmp_path):
    write_ledger(tmp_path / "scores", {"id": [1], "score": [1.0]}, notes=notes)
    done = curate(tmp_path / "scores")
    assert (done.verdict, done.wrong_share, done.manifest.provenance["verdict"]) == (None, None, None)
    assert done.manifest.provenance["diagnosis"] == "The reference was not diagnosed"


def test_what_alignment_answers_is_no_objection_to_aligned_scores(tmp_path):
    aligned = CONFIG | {"align_doubtful": True}
    for name, diagnosis in (("unrelated", Diagnosis(samples=512, weight_cosine=0.0)), ("doubtful", DOUBTFUL)):
        done = curate(scored(tmp_path / name, diagnosis, config=aligned))
        assert done.verdict == name
        assert done.manifest.provenance["diagnosis"].endswith("; it was aligned from then on")
    with pytest.raises(CurationError, match=r"unsure: the reference is unsure: it looks so\. Decisions"):
        curate(scored(tmp_path / "unsure", "unsure", config=aligned))


def test_the_worst_verdict_of_the_attempts_whose_rows_count_decides(tmp_path):
    rows = [{"id": k, "score": 1.0, "attempt": k, "step": k} for k in range(3)]
    write_ledger(tmp_path, rows, starts=(0, 1, 2))
    verdicts = ("unsure", "doubtful", "compatible")
    for number, verdict in enumerate(verdicts):
        note(tmp_path, number, {"diagnosis": {"verdict": verdict, "findings": [f"attempt {number}"]}})
    with pytest.raises(CurationError, match=r"is unsure \(the worst verdict of 3 attempts\): attempt 0\. Decisions"):
        curate(tmp_path)
    note(tmp_path, 0, {"diagnosis": {"verdict": "unrelated"}})
    with pytest.raises(CurationError, match=r"is unrelated \(the worst verdict of 3 attempts\)\. Its scores"):
        curate(tmp_path, accept_verdict=True)


def test_the_verdict_on_rows_that_do_not_count_does_not_count(tmp_path):
    rows = [{"id": 1, "score": 1.0, "step": 0}, {"id": 1, "score": 1.0, "step": 0, "attempt": 1}]
    write_ledger(tmp_path, rows, starts=(0, 0))
    note(tmp_path, 0, {"diagnosis": {"verdict": "unrelated", "findings": []}})
    note(tmp_path, 1, {"diagnosis": {"verdict": "compatible", "findings": []}})
    assert curate(tmp_path).verdict == "compatible"


@for_each(("facts", "message"), [
    ({"diagnosis": {"verdict": "compatibel"}}, "the verdict on its reference is 'compatibel', which is unknown to "
     "this release; nearest: 'compatible'."),
    ({"diagnosis": {"verdict": 3}}, "the verdict on its reference is 3, which is unknown to this release;"),
    ({"diagnosis": {"verdict": ["doubtful"]}}, "the verdict on its reference is ['doubtful'], which"),
    ({"diagnosis": {"verdict": "doubtful", "findings": [1]}}, "the findings about its reference are [1]; expected"),
    ({"calibration": [1]}, "the calibration of its reference is [1]; expected wrong_share, low, high, samples."),
    ({"calibration": {"wrong_share": 0.3}}, "the calibration of its reference is {'wrong_share': 0.3}; expected"),
    ({"calibration": {"wrong_share": 1.5, "low": 0.1, "high": 0.5, "samples": 9}}, "the calibration of its reference "
     "has a share of wrong labels of 1.5, an interval from 0.1 to 0.5 and 9 samples; expected shares"),
    ({"calibration": {"wrong_share": 0.5, "low": 0.6, "high": 0.5, "samples": 9}}, "the calibration of its reference "
     "has a share of wrong labels of 0.5, an interval from 0.6 to 0.5"),
    ({"calibration": {"wrong_share": 0.5, "low": 0.4, "high": 0.6, "samples": 10**400}}, "the calibration of its "
     "reference has a share of wrong labels of 0.5, an interval from 0.4 to 0.6 and 1000"),
    ({"calibration": {"informative": "no"}}, "`informative` of the calibration is 'no'; expected true or false."),
    ({"calibration": {"wrong_share": True, "low": 0, "high": 1, "samples": 9}}, "the calibration of its reference is"),
])  # fmt: skip
def test_what_is_no_verdict_and_no_calibration_is_refused(facts, message, tmp_path):
    write_ledger(tmp_path, {"id": [1], "score": [1.0]}, notes=facts)
    with pytest.raises(CurationError, match=f"^{re.escape(f'{tmp_path}: {message}')}"):
        curate(tmp_path, accept_verdict=True)


def test_what_is_read_of_a_calibration_is_what_one_has():
    assert CALIBRATION.keys() <= {each.name for each in fields(Calibration)}


def test_the_estimated_share_of_wrong_labels_travels(tmp_path):
    done = curate(scored(tmp_path / "scores", "compatible", calibration=CALIBRATION))
    assert done.wrong_share == WrongShare(0.375, 0.25, 0.5, 900)
    assert str(done.wrong_share) == "37.5% (95 % interval 25.0% to 50.0%)"
    said = done.manifest.provenance["wrong_share"]
    assert said == {"estimate": 0.375, "low": 0.25, "high": 0.5, "samples": 900}


def test_the_last_attempt_that_has_a_calibration_tells_the_share(tmp_path):
    rows = [{"id": k, "score": 1.0, "attempt": k, "step": k} for k in range(3)]
    write_ledger(tmp_path, rows, starts=(0, 1, 2))
    for number, share in ((0, 0.125), (1, 0.25)):
        note(tmp_path, number, {"calibration": CALIBRATION | {"wrong_share": share, "low": 0.0}})
    assert curate(tmp_path).wrong_share.estimate == 0.25


def test_a_verdict_and_a_share_reach_what_is_made_of_manifests(tmp_path):
    made = {}
    for name, verdict in (("a", "compatible"), ("b", "unsure"), ("c", None)):
        folder = scored(tmp_path / name, verdict, calibration=CALIBRATION if name == "a" else None)
        made[name] = curate(folder, None, tmp_path / f"{name}_out", accept_verdict=True).manifest
    found = {each.name: (each.verdict, each.wrong_share) for each in compare(made).datasets}
    assert found == {"a": ("compatible", 0.375), "b": ("unsure", None), "c": (None, None)}
    both = select(f"{made['a'].path} and {made['b'].path}", tmp_path / "both.parquet")
    assert both.provenance["verdicts"] == {str(made["a"].path): "compatible", str(made["b"].path): "unsure"}
    alone = select(f"{made['c'].path}:score top 1", tmp_path / "alone.parquet")
    assert "verdicts" not in Manifest(alone.path).provenance


def test_accepting_is_true_or_false(tmp_path):
    write_scores(tmp_path / "scores", [1.0])
    with pytest.raises(CurationError, match=r"^`accept_verdict` is 'yes'; expected true or false\.$"):
        curate(tmp_path / "scores", accept_verdict="yes")
