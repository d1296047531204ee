"""A reference that is less sure than the model, or knows less, never turns the weights upside down."""

import contextlib
import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

import lightning_mimic.reference.margins as margins_module
from lightning_mimic import Diagnosis, GradMimic, Ledger, Reweighter
from lightning_mimic.callbacks import AtCheckpoints
from lightning_mimic.curation import curate
from lightning_mimic.errors import CurationError, MimicError
from lightning_mimic.reference.diagnosis import Estimate
from lightning_mimic.reference.margins import RunningMargins
from lightning_mimic.scorers import HeadRhoLoss, MimicScore, Posterior, ReferencePart
from support.cases import case, for_each
from support.toys import CLASSES, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer

CPU = torch.device("cpu")


def outputs(margin, count=300, seed=0):
    """Logits whose highest stands out from their mean so far, and its place."""
    predicted = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed))
    return F.one_hot(predicted, 4) * (margin * 4 / 3) + 7.0, predicted


def test_the_ratio_is_that_of_the_margins_at_what_the_model_predicts():
    own, predicted = outputs(3.0)
    elsewhere = torch.roll(0.9 * own, 1, 1)  # as sure, of another class
    for theirs, ratio in ((0.2 * own - 1, 0.2), (5 * own, 5.0), (elsewhere, -0.3)):
        running = RunningMargins(CPU)
        running.update(own, theirs, predicted)
        with case(ratio):
            torch.testing.assert_close(float(running.ratio), ratio, rtol=1e-4, atol=0)
            assert bool(running.unsure) == (ratio < 0.5)
            assert running.facts()["margin_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_rows_without_a_label_or_with_infinite_outputs_do_not_count():
    own, labels = outputs(3.0, 600)
    theirs = 0.9 * own
    theirs[:150], labels[150:300] = float("inf"), -1
    running = RunningMargins(CPU)
    running.update(own, theirs, labels)
    torch.testing.assert_close(float(running.ratio), 0.9, rtol=1e-4, atol=0)


def test_nothing_is_said_of_few_samples_and_old_ones_are_forgotten():
    running = RunningMargins(CPU)
    own, labels = outputs(3.0, 255)
    running.update(own, 0.1 * own, labels)
    assert (bool(running.unsure), running.facts()) == (False, {})
    running.update(own, 0.1 * own, labels)
    assert running.unsure
    for _ in range(12):
        running.update(own, own, labels)
    assert not running.unsure
    torch.testing.assert_close(float(running.ratio), 0.947, rtol=0.01, atol=0)


def test_two_ranks_are_as_one_and_a_state_goes_on(monkeypatch):
    own, labels = outputs(3.0, 300)
    one, two = RunningMargins(CPU), RunningMargins(CPU)
    one.update(torch.cat([own, own]), torch.cat([own, own]) / 4, torch.cat([labels, labels]))
    with monkeypatch.context() as ranks:
        ranks.setattr(margins_module, "sum_over_ranks", lambda sums: 2 * sums)
        two.update(own, own / 4, labels)
    torch.testing.assert_close(two.state_dict(), one.state_dict())
    more = RunningMargins(CPU)
    more.load_state_dict(copy.deepcopy(one.state_dict()))
    for each in (one, more):
        each.update(own, own, labels)
    torch.testing.assert_close(more.ratio, one.ratio, rtol=0, atol=0)


def test_the_verdict_is_between_doubtful_and_unrelated():
    unsure = Diagnosis(512, margin_ratio=0.49, weight_cosine=0.3)
    assert (unsure.verdict, unsure.unsure) == ("unsure", True)
    assert [verdict for verdict, _ in unsure.findings] == ["unsure", "doubtful"]
    assert "(0.49 of its margin)" in str(unsure)
    assert Diagnosis(512, margin_ratio=0.51).verdict == "compatible"
    assert Diagnosis(512, agreement=0.2, model_agreement=0.4, knows_less=True).verdict == "unsure"
    assert Diagnosis(512, margin_ratio=0.1, weight_cosine=0.0).verdict == "unrelated"
    ignorant = Diagnosis(512, margin_ratio=0.1, label_gap=Estimate(0.01, 0.01, 500))
    assert (ignorant.verdict, ignorant.unsure) == ("unrelated", True)


def noisy(count=1280):
    """Samples of a task that a linear layer learns, 30 % of whose labels are wrong."""
    x = toy_data(count, dtype=torch.float32).tensors[0]
    drawn = torch.Generator().manual_seed(1)
    right = x[:, :CLASSES].argmax(1)
    wrong = torch.rand(count, generator=drawn) < 0.3
    return x, torch.where(wrong, (right + 1 + torch.randint(0, 2, (count,), generator=drawn)) % CLASSES, right), wrong


def start() -> Toy:
    return toy(WithLosses, dtype=torch.float32)


def reference(scale):
    """The same backbone with a head taught by right labels, whose logits are multiplied."""
    net = start()
    x = toy_data(600, seed=5, dtype=torch.float32).tensors[0]
    optimizer = torch.optim.Adam(net.head.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(net(x), x[:, :CLASSES].argmax(1)).backward()
        optimizer.step()
    with torch.no_grad():
        for p in net.head.parameters():
            p *= scale
    return parameters_of(net)


def train(given, passes=3, sharpened=1.0, **options):
    """Train the head; returns the last pass's weights and scores, which samples are wrong, and what was warned of."""
    net, (x, y, wrong) = start(), noisy()
    net.body.requires_grad_(False)
    optimizer = torch.optim.Adam(net.head.parameters(), lr=0.02)
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Reweighter(net, given, "head", **options) as reweighter:
            for epoch in range(passes):
                for rows in torch.arange(len(x)).split(64):
                    optimizer.zero_grad()
                    with reweighter.step((x[rows], y[rows]), rows, epoch=epoch) as step:
                        results.append(step.backward(net.sample_losses(step.batch).mean()))
                    optimizer.step()
                with torch.no_grad():
                    net.head.weight *= sharpened
    last = results[-len(results) // passes :]
    weights, scores = (torch.cat(each) for each in zip(*((r.weights.weights, r.scores) for r in last), strict=True))
    return weights, scores, wrong, [str(w.message) for w in caught if "reference" in str(w.message)]


def separation(weights, wrong):
    """Mean weight of right labels over that of wrong ones."""
    return float(weights[~wrong].mean() / weights[wrong].mean())


RAW = [{}, {"temperature": "auto"}, {"scorer": HeadRhoLoss()}]


@for_each("options", RAW)
def test_raw_scores_of_an_unsure_reference_give_uniform_weights_and_the_fix_is_named(options, tmp_path):
    weights, scores, wrong, warned = train(reference(0.02), ledger=tmp_path, **options)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 64))
    assert scores.isfinite().all()  # nothing that is recorded is lost
    assert float(scores[wrong].mean()) > float(scores[~wrong].mean())
    assert len(warned) == 1
    assert warned[0].startswith("the reference is unsure: it is less sure of what the model predicts than the model (")
    assert warned[0].endswith(
        "Weights are uniform as long as it is so unsure. Calibrate it: `weighting=Posterior()`, or "
        "`scorer=MimicScore(calibrated=True)`."
    )
    found = Ledger(tmp_path).meta["attempts"][0]["diagnosis"]
    assert found["verdict"] == "unsure"
    assert found["margin_ratio"] < 0.5


def test_without_the_look_they_are_upside_down():
    weights, _, wrong, warned = train(reference(0.02), temperature="auto", diagnose_reference=False)
    assert separation(weights, wrong) < 0.9
    assert warned == []


@for_each("options", RAW)
def test_a_sure_reference_is_weighted_by(options, tmp_path):
    weights, _, wrong, warned = train(reference(1.0), ledger=tmp_path, **options)
    assert separation(weights, wrong) > 1.05
    assert warned == []
    assert Ledger(tmp_path).meta["attempts"][0]["diagnosis"]["verdict"] == "compatible"


@for_each(
    "options",
    [
        {"weighting": Posterior()},
        {"scorer": MimicScore(calibrated=True), "temperature": "auto"},
        {"scorer": ReferencePart(), "temperature": "auto"},
    ],
)
def test_what_is_calibrated_goes_on_with_an_unsure_one(options):
    weights, _, wrong, warned = train(reference(0.02), **options)
    assert separation(weights, wrong) > 1.5
    assert len(warned) == 1
    assert warned[0].endswith("The weights go by what is calibrated, and are not affected.")


@for_each("options", [*RAW, {"weighting": Posterior()}, {"scorer": ReferencePart()}])
def test_a_reference_of_random_weights_gives_uniform_weights(options):
    for seed, scale in ((0, 0.3), (1, 3.0)):
        torch.manual_seed(seed)
        given = {n: scale * torch.randn_like(p) if n.startswith("head") else p for n, p in reference(1.0).items()}
        weights, _, _, _ = train(given, **options)
        with case(seed):
            torch.testing.assert_close(weights, torch.full_like(weights, 1 / 64))


def test_who_wants_it_stops():
    with pytest.raises(MimicError, match=re.escape("the reference is unsure: it is less sure")):
        train(reference(0.02), on_doubtful="raise")


def test_a_reference_that_the_model_overtakes_later_is_noted_then(tmp_path):
    weights, _, _, warned = train(reference(1.0), sharpened=8.0, ledger=tmp_path)
    torch.testing.assert_close(weights[-64:], torch.full((64,), 1 / 64))
    assert len(warned) == 1
    assert Ledger(tmp_path).meta["attempts"][0]["diagnosis"]["verdict"] == "unsure"


def test_scoring_at_checkpoints_finds_it_and_nothing_else(tmp_path):
    net = start()
    torch.save(net.state_dict(), tmp_path / "model.pt")
    data = toy_data(320, dtype=torch.float32)
    for name, scale in (("unsure", 0.1), ("sure", 2.0)):
        given = {n: scale * p.detach() if n.startswith("head") else p for n, p in net.named_parameters()}
        mimic = GradMimic(given, "head", reweight="none", ledger=tmp_path / name)
        fit = trainer(mimic, AtCheckpoints([tmp_path / "model.pt"]))
        warned = pytest.warns(UserWarning, match="the reference is unsure: it is less sure of what the model predicts")
        with case(name), warned if name == "unsure" else contextlib.nullcontext():
            fit.fit(start(), loader(data, 64))
        found = Ledger(tmp_path / name).meta["attempts"][0].get("diagnosis")
        assert (found and found["verdict"]) == ("unsure" if name == "unsure" else None)
    with pytest.raises(CurationError, match="the reference is unsure: it is less sure of what the model predicts"):
        curate(tmp_path / "unsure")
    assert curate(tmp_path / "sure", unscored="drop").verdict is None
