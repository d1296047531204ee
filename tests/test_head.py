"""What is known of a last linear layer under cross-entropy: identities, labels, refusals, records and safe weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oracles
from lightning_mimic import Ledger
from lightning_mimic.errors import MimicError
from lightning_mimic.reweighting import Reweighter
from lightning_mimic.scorers import (
    HEAD_NEEDS,
    EndpointScore,
    HeadReferenceLoss,
    HeadRhoLoss,
    MimicScore,
    Posterior,
    ReferencePart,
)
from support.cases import for_each

FEATURES, CLASSES = 6, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class Watched:
    """A scorer that keeps all products of the last layer."""

    needs = frozenset({"dot"}) | HEAD_NEEDS

    def __init__(self):
        self.seen = []

    def __call__(self, products):
        self.seen.append(products)
        return -products.dot


def rounds(count=1, rows=8, seed=0, dtype=torch.float64, wrong=0.0):
    """Batches whose labels a linear layer explains, of which a share is wrong."""
    draw = torch.Generator().manual_seed(seed)
    truth = 3 * torch.randn(CLASSES, FEATURES, generator=draw, dtype=dtype)
    for first in range(0, count * rows, rows):
        x = torch.randn(rows, FEATURES, generator=draw, dtype=dtype)
        y = (x @ truth.T).argmax(1)
        spoilt = torch.rand(rows, generator=draw) < wrong
        y = torch.where(spoilt, (y + torch.randint(1, CLASSES, (rows,), generator=draw)) % CLASSES, y)
        yield (x, y), list(range(first, first + rows)), spoilt


def truth_of(seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return {
        "weight": 3 * torch.randn(CLASSES, FEATURES, generator=draw, dtype=dtype),
        "bias": torch.zeros(CLASSES, dtype=dtype),
    }


def network(seed=1, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, CLASSES)).to(dtype)


def reference_of(net, seed=2):
    draw = torch.Generator().manual_seed(seed)
    return {f"2.{n}": torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in net[2].named_parameters()}


def scored(net, reference, batches, *, loss=F.cross_entropy, lr=0.0, epoch=0, asserted=None, parameters="2", **options):
    """The results of one step per batch, by plain descent."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    options.setdefault("diagnose_reference", False)
    results = []
    with Reweighter(net, reference, parameters, loss=asserted, **options) as reweighter:
        for batch, ids, _ in batches:
            optimizer.zero_grad()
            with reweighter.step(batch, ids=ids, epoch=epoch) as step:
                inputs, labels = step.batch
                results.append(step.backward(loss(net(inputs), labels)))
            optimizer.step()
    return results


@for_each("smoothing", [0.0, 0.1])
def test_the_mimic_score_is_rho_loss_and_a_divergence_and_the_difference_of_two_parts(smoothing):
    net, watched = network(), Watched()
    reference = reference_of(net)
    (batch, ids, _) = next(rounds())
    scored(
        net,
        reference,
        [(batch, ids, None)],
        scorer=watched,
        loss=lambda z, y: F.cross_entropy(z, y, label_smoothing=smoothing),
    )
    (products,) = watched.seen
    features = net[:2](batch[0]).detach()
    layer = {name.removeprefix("2."): tensor for name, tensor in reference.items()}
    expected = oracles.head_products(net[2], layer, features, batch[1])
    z, theirs = expected["outputs"], expected["reference_outputs"]
    torch.testing.assert_close(products.outputs.double(), z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(products.reference_outputs.double(), theirs, rtol=1e-6, atol=1e-6)
    assert products.labels.tolist() == batch[1].tolist()
    mimic = -products.dot
    if not smoothing:
        p, q = z.softmax(1), theirs.softmax(1)
        divergence = (p * (p.log() - q.log())).sum(1)
        torch.testing.assert_close(mimic, expected["losses"] - expected["reference_losses"] + divergence, **CLOSE)
    by_parts = -(products.output_gradients * theirs).sum(1) + (products.output_gradients * z).sum(1)
    torch.testing.assert_close(mimic, by_parts, **CLOSE)


def test_the_scorers_of_the_last_layer_are_their_formulas():
    net = network()
    reference = reference_of(net)
    batch, ids, _ = next(rounds())
    layer = {name.removeprefix("2."): tensor for name, tensor in reference.items()}
    given = oracles.head_products(net[2], layer, net[:2](batch[0]).detach(), batch[1])
    y, q = F.one_hot(batch[1], CLASSES).double(), given["reference_outputs"].softmax(1)
    for scorer, expected in (
        (HeadReferenceLoss(), -given["reference_losses"]),
        (HeadRhoLoss(), given["losses"] - given["reference_losses"]),
        (EndpointScore(), ((y - q) * (given["reference_outputs"] - given["outputs"])).sum(1)),
    ):
        (result,) = scored(net, reference, [(batch, ids, None)], scorer=scorer)
        torch.testing.assert_close(result.scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_calibrated_scores_are_those_of_the_scaled_reference_and_come_with_the_calibration():
    net, truth = network(), truth_of()
    net[0].weight.data, net[0].bias.data = torch.eye(FEATURES).double() * 1e-3, torch.zeros(FEATURES).double()
    # Features of a thousandth, so that the reference's layer is a thousand times the true one, and unsure by 16.
    reference = {"2.weight": truth["weight"] * 1e3 / 16, "2.bias": truth["bias"]}
    batches = list(rounds(count=40, rows=20))
    for scorer in (MimicScore(calibrated=True), ReferencePart()):
        results = scored(net, reference, batches, scorer=scorer)
        assert results[0].scores.isnan().all()
        assert float(results[0].weights.ess) == pytest.approx(20)
        batch = batches[-1][0]
        z = net(batch[0]).detach()
        theirs = net[:2](batch[0]).detach() @ reference["2.weight"].T
        minus = F.one_hot(batch[1], CLASSES) - z.softmax(1)
        # The scale is the one that makes the scores, up to the grid: their ratio is the same for all samples.
        part = (minus * theirs).sum(1)
        if isinstance(scorer, ReferencePart):
            ratio = results[-1].scores.double() / part
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
            norm = reference["2.weight"].norm()
            torch.testing.assert_close(ratio.mean(), 1 / norm, rtol=1e-3, atol=0)
        else:
            own = (minus * z).sum(1)
            both, scores = torch.stack([part, -own], 1), results[-1].scores.double()
            solution = torch.linalg.lstsq(both, scores[:, None]).solution[:, 0]
            assert float(solution[0] / solution[1]) > 4  # right labels alone ask for a sure reference
            torch.testing.assert_close(both @ solution, scores, rtol=1e-3, atol=1e-6)


def square(outputs, labels):
    return (outputs - F.one_hot(labels, CLASSES)).square().sum(1).mean()


def weighted(outputs, labels):
    losses = F.cross_entropy(outputs, labels, reduction="none", weight=torch.arange(1.0, 5.0, dtype=outputs.dtype))
    return losses.mean()


def mixed(outputs, labels):
    targets = 0.6 * F.one_hot(labels, CLASSES) + 0.4 * F.one_hot(labels.roll(1), CLASSES)
    return F.cross_entropy(outputs, targets.to(outputs.dtype))


def tempered(outputs, labels):
    return F.cross_entropy(outputs / 3, labels)


@for_each("loss", [square, weighted, mixed, tempered])
def test_what_is_no_cross_entropy_of_the_outputs_is_refused_where_labels_are_needed(loss):
    net = network()
    with pytest.raises(MimicError, match=r"only for the last linear layer under a cross-entropy.*not one label per"):
        scored(net, reference_of(net), rounds(), loss=loss, weighting=Posterior())
    # And leaves other scores alone.
    (result,) = scored(net, reference_of(net), rounds(), loss=loss)
    assert result.head is None
    assert result.scores.isfinite().all()


def test_a_loss_that_changes_within_an_epoch_is_refused_when_the_scores_are_written():
    net = network()
    losses = iter([F.cross_entropy, F.cross_entropy, tempered])
    with pytest.raises(MimicError, match="is no longer"):
        scored(
            net,
            reference_of(net),
            rounds(3),
            loss=lambda z, y: next(losses)(z, y),
            weighting=Posterior(),
            asserted="mean",
        )


def of_two(kind, outputs, labels):
    outputs = outputs[:, :2]
    losses = F.cross_entropy(outputs, labels % 2, reduction="none")
    if kind == "smaller":
        return 0.4 * losses
    if kind == "weights":
        return losses * torch.where(labels % 2 == 0, 0.3, 1.0)
    if kind == "mixed":
        return 0.6 * losses + 0.4 * F.cross_entropy(outputs, labels.roll(1) % 2, reduction="none")
    return F.cross_entropy(outputs, labels % 2, reduction="none", label_smoothing=0.8)


def two_classes():
    """A network of two classes that is sure of its predictions, and a reference."""
    net = network()
    net[2] = nn.Linear(FEATURES, 2, dtype=torch.float64)
    nn.init.normal_(net[2].weight, std=4.0)
    return net, {f"2.{n}": torch.randn_like(p) for n, p in net[2].named_parameters()}


@for_each("kind", ["smaller", "weights", "mixed", "smoothed"])
def test_two_targets_that_differ_from_sample_to_sample_are_no_smoothed_label(kind):
    net, reference = two_classes()

    def loss(outputs, labels):
        return of_two(kind, outputs, labels).mean()

    (result,) = scored(net, reference, rounds(rows=40), loss=loss, asserted="mean")
    ((_, labels), _, _) = next(rounds(rows=40))
    if kind == "smoothed":
        assert result.head["label"].tolist() == (labels % 2).tolist()
        return
    assert result.head is None
    with pytest.raises(MimicError, match="not one label per sample"):
        scored(net, reference, rounds(rows=40), loss=loss, weighting=Posterior(), asserted="mean")


@for_each("classes", [2, CLASSES])
def test_a_sample_that_the_loss_ignores_has_no_label(classes):
    net, reference = two_classes() if classes == 2 else (network(), reference_of(network()))

    def loss(outputs, labels):
        given = torch.where(torch.arange(len(labels)) < 8, -100, labels % classes)
        return F.cross_entropy(outputs, given, reduction="none", ignore_index=-100).mean()

    for options in ({}, {"weighting": Posterior()}):
        (result,) = scored(net, reference, rounds(rows=40), loss=loss, asserted="mean", **options)
        ((_, labels), _, _) = next(rounds(rows=40))
        assert result.head["label"][8:].tolist() == (labels % classes).tolist()[8:]
        assert (result.head["label"][:8] < 0).all()


def test_a_part_of_the_layer_is_refused():
    net = network()
    with pytest.raises(MimicError, match=r"must name one whole nn\.Linear"):
        scored(net, reference_of(net), rounds(), weighting=Posterior(), parameters="2.weight")


@for_each("record", ["posterior", "softmax"])
def test_the_ledger_has_labels_predictions_and_posteriors_without_being_given_any(record, tmp_path):
    net = network(dtype=torch.float32)
    net[0].weight.data, net[0].bias.data = torch.eye(FEATURES) * 1e-3, torch.zeros(FEATURES)
    truth = truth_of(dtype=torch.float32)
    reference = {"2.weight": truth["weight"] * 1e3, "2.bias": truth["bias"]}
    batches = list(rounds(count=60, rows=20, dtype=torch.float32, wrong=0.3))
    weighting = {"weighting": Posterior()} if record == "posterior" else {}
    scored(net, reference, batches, ledger=tmp_path / "scores", **weighting)
    ledger = Ledger(tmp_path / "scores")
    table = ledger.table().sort_by("id").to_pydict()
    labels = torch.cat([batch[1] for batch, _, _ in batches])
    inputs, spoilt = torch.cat([batch[0] for batch, _, _ in batches]), torch.cat([each for _, _, each in batches])
    assert table["label"] == labels.tolist()
    assert table["predicted"] == net(inputs).argmax(1).tolist()
    first = next(row for row, value in enumerate(table["posterior"]) if value is not None)
    assert table["posterior"][:first] == [None] * first
    assert 200 < first < 700
    assert None not in table["posterior"][first:]
    assert table["reference_predicted"][first:] == (inputs @ truth["weight"].T).argmax(1).tolist()[first:]
    kept = torch.tensor(table["posterior"][first:]) >= 0.5
    assert float((kept == ~spoilt[first:]).double().mean()) > 0.97
    loss, sure = torch.tensor(table["reference_loss"][first:]), torch.tensor(table["reference_confidence"][first:])
    hit = torch.tensor(table["reference_predicted"][first:]) == labels[first:]
    torch.testing.assert_close(torch.exp(-loss[hit]), sure[hit], rtol=1e-4, atol=1e-5)
    calibration = ledger.meta["attempts"][-1]["calibration"]
    assert abs(calibration["wrong_share"] - float(spoilt.double().mean())) < 0.05
    assert calibration["low"] <= calibration["wrong_share"] <= calibration["high"]


def test_weights_are_the_posteriors_over_their_sum():
    net = network(dtype=torch.float32)
    net[0].weight.data, net[0].bias.data = torch.eye(FEATURES) * 1e-3, torch.zeros(FEATURES)
    truth = truth_of(dtype=torch.float32)
    reference = {"2.weight": truth["weight"] * 1e3, "2.bias": truth["bias"]}
    results = scored(
        net, reference, list(rounds(count=60, rows=20, dtype=torch.float32, wrong=0.3)), weighting=Posterior()
    )
    torch.testing.assert_close(results[0].weights.weights, torch.full((20,), 1 / 20), rtol=0, atol=1e-7)
    posteriors = results[-1].head["posterior"]
    torch.testing.assert_close(results[-1].weights.weights, posteriors / posteriors.sum())
    assert float(results[-1].weights.ess) < 19
    assert "mimic/wrong_share" in results[-1].figures()
    assert "mimic/wrong_share" not in results[0].figures()


@for_each("options", [{"weighting": Posterior()}, {"scorer": MimicScore(calibrated=True)}, {"scorer": ReferencePart()}])
def test_a_reference_of_random_weights_gives_uniform_weights(options):
    net = network(dtype=torch.float32)
    reference = {name: 10 * tensor for name, tensor in reference_of(net).items()}
    for result in scored(net, reference, list(rounds(count=60, rows=20, dtype=torch.float32, wrong=0.3)), **options):
        torch.testing.assert_close(result.weights.weights, torch.full((20,), 1 / 20), rtol=0, atol=1e-7)


def test_the_calibration_is_in_the_state_of_a_run():
    batches = list(rounds(count=40, rows=20, dtype=torch.float32, wrong=0.3))
    net = network(dtype=torch.float32)
    net[0].weight.data, net[0].bias.data = torch.eye(FEATURES) * 1e-3, torch.zeros(FEATURES)
    truth = truth_of(dtype=torch.float32)
    reference = {"2.weight": truth["weight"] * 1e3, "2.bias": truth["bias"]}
    whole = scored(net, reference, batches, weighting=Posterior())
    first = Reweighter(net, reference, "2", weighting=Posterior(), diagnose_reference=False)
    second = Reweighter(net, reference, "2", weighting=Posterior(), diagnose_reference=False)
    for number, (batch, ids, _) in enumerate(batches):
        if number == 20:
            state = first.state_dict()
            first.finish()
            first.close()
            second.load_state_dict(state)
        with (first if number < 20 else second).step(batch, ids=ids, epoch=0) as step:
            result = step.backward(F.cross_entropy(net(batch[0]), batch[1]))
        torch.testing.assert_close(result.weights.weights, whole[number].weights.weights, rtol=0, atol=0)
    second.finish()
    second.close()


def test_a_damaged_state_of_the_calibration_is_refused():
    net, batches = network(dtype=torch.float32), list(rounds(count=3, dtype=torch.float32))
    with Reweighter(net, reference_of(net), "2", weighting=Posterior(), diagnose_reference=False) as reweighter:
        reweighter.load_state_dict({"head": {"logits": torch.zeros(0, CLASSES)}})
        with (
            pytest.raises(MimicError, match="state of the calibration is damaged"),
            reweighter.step(*batches[0][:2]) as step,
        ):
            step.backward(F.cross_entropy(net(batches[0][0][0]), batches[0][0][1]))
