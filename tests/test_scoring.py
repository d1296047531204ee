"""Every scorer inside training against its formula by hand, and what each asks for."""

import json
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracles
from lightning_mimic import GradMimic, Ledger, MimicError
from lightning_mimic.scorers import (
    CosineSimilarity,
    GradNorm,
    MimicScore,
    ReferenceLoss,
    RhoLoss,
    Scorer,
    Uniform,
    normalised_weights,
)
from support.oracle_training import trained_by_oracle
from support.toys import HIDDEN, Convolution, Toy, WithLosses, loader, losses_of, parameters_of, toy, toy_data, trainer

NAMES = ("head.weight", "head.bias")


def norms_of(gradients: dict[str, Tensor]) -> Tensor:
    return sum(gradients[name].square().flatten(1).sum(1) for name in NAMES).sqrt()


def mimic(module: Toy, batch: Any, gradients: dict[str, Tensor]) -> Tensor:
    return oracles.mimic_scores(gradients, parameters_of(other()), {n: module.get_parameter(n) for n in NAMES})


def reference_losses(batch: Any) -> Tensor:
    return losses_of(other(), batch).detach()


def other() -> Toy:
    return toy(WithLosses, seed=1)


# scorer: its formula from module, batch and per-sample gradients
FORMULAS: dict[Scorer, Any] = {
    MimicScore(): mimic,
    CosineSimilarity(): lambda m, b, g: mimic(m, b, g) / norms_of(g),
    GradNorm(): lambda m, b, g: norms_of(g),
    RhoLoss(): lambda m, b, g: losses_of(m, b).detach() - reference_losses(b),
    ReferenceLoss(): lambda m, b, g: -reference_losses(b),
    Uniform(): lambda m, b, g: torch.zeros(len(b[1]), dtype=torch.float64),
}


def arguments(scorer: Scorer, reference: Any = None) -> dict[str, Any]:
    given: dict[str, Any] = {"scorer": scorer}
    if scorer.needs & {"dot", "reference_losses"}:
        given["reference"] = parameters_of(other()) if reference is None else reference
    return given | ({"parameters": "head"} if scorer.needs & {"dot", "norms"} else {})


@pytest.mark.parametrize("scorer", FORMULAS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("reweight", ["all", "target"])
def test_a_scorer_weighs_as_its_formula_says(scorer, reweight, tmp_path):
    if reweight == "target" and "parameters" not in arguments(scorer):
        with pytest.raises(ValueError, match="`reweight='target'` weights the target parameters"):
            GradMimic(**arguments(scorer), reweight=reweight)
        return
    ours, oracle, data = toy(WithLosses), toy(WithLosses), toy_data(14)
    settings = {"temperature": 0.7, "min_ess": 0, "reweight": reweight, "ledger": tmp_path / "s"}
    trainer(GradMimic(**arguments(scorer), **settings)).fit(ours, loader(data))
    batches = [data[i : i + 4] for i in range(0, 14, 4)]
    seen = trained_by_oracle(oracle, batches, {}, reweight=reweight, score=FORMULAS[scorer])
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)
    scores = torch.tensor(Ledger(tmp_path / "s").table()["score"].to_pylist())
    torch.testing.assert_close(scores, torch.cat([s for s, _ in seen]).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scorer", [GradNorm(), CosineSimilarity()], ids=lambda s: type(s).__name__)
def test_norms_of_a_layer_that_is_no_cut_come_from_a_pass_of_their_own(scorer, tmp_path):
    class Residual(WithLosses):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.body(x))
            return self.head(hidden) + hidden[:, :3]

    ours, oracle, data = toy(Residual), toy(Residual), toy_data(8)
    callback = GradMimic(**arguments(scorer), temperature=0.7, min_ess=0, ledger=tmp_path / "s")
    trainer(callback).fit(ours, loader(data))
    trained_by_oracle(oracle, [data[:4], data[4:]], {}, score=FORMULAS[find(scorer)])
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)


def find(scorer: Scorer) -> Scorer:
    return next(known for known in FORMULAS if type(known) is type(scorer))


def test_uniform_weights_are_plain_training():
    plain, ours, data = toy(), toy(), toy_data(14)
    trainer(epochs=2).fit(plain, loader(data))
    trainer(GradMimic(scorer=Uniform()), epochs=2).fit(ours, loader(data))
    torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=1e-12, atol=1e-12)


def test_a_reference_of_another_architecture_gives_its_own_losses(tmp_path):
    class Wide(WithLosses):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 2 * HIDDEN)
            self.head = nn.Linear(2 * HIDDEN, 3)

    wide, data = toy(Wide, seed=2), toy_data(4)
    callback = GradMimic(**arguments(ReferenceLoss(), wide), ledger=tmp_path / "s")
    trainer(callback).fit(toy(WithLosses), loader(data))
    scores = torch.tensor(Ledger(tmp_path / "s").table()["score"].to_pylist())
    torch.testing.assert_close(scores, -losses_of(wide, data[:]).detach().float())
    assert all(p.requires_grad for p in wide.parameters())  # a copy was frozen


def test_the_reference_is_evaluated_as_in_evaluation(tmp_path):
    class Dropping(WithLosses):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(HIDDEN), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.drop(self.norm(self.body(x))))

    reference, data = toy(Dropping, seed=1), toy_data(4)
    reference.norm.running_mean.fill_(0.3)
    before = reference.norm.running_mean.clone()
    trainer(GradMimic(**arguments(ReferenceLoss(), reference.state_dict()), ledger=tmp_path / "s")).fit(
        toy(Dropping), loader(data)
    )
    scores = torch.tensor(Ledger(tmp_path / "s").table()["score"].to_pylist())
    torch.testing.assert_close(scores, -losses_of(reference.eval(), data[:]).detach().float())
    torch.testing.assert_close(reference.norm.running_mean, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`reference` is missing; MimicScore needs one: a checkpoint's path."),
        ({"reference": {}}, "`parameters` is missing; MimicScore needs one: a layer's path or 'all'."),
        ({"scorer": GradNorm(), "parameters": "head", "reference": {}}, "`reference` is given, but GradNorm takes no"),
        ({"scorer": RhoLoss(), "reference": {}, "parameters": "head"}, "`parameters` is given, but RhoLoss takes none"),
        ({"scorer": GradNorm, "parameters": "head"}, "`scorer` is the class GradNorm; expected an object: GradNorm"),
        ({"scorer": "grad_norm"}, "`scorer` is 'grad_norm', which cannot be called"),
    ],
)
def test_what_a_scorer_does_not_take_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GradMimic(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Toy, arguments(RhoLoss()), "RhoLoss needs the loss of every sample: give Toy a method `sample_losses(batch)`"),
        (Convolution, {"scorer": GradNorm(), "parameters": "head"}, "known for nn.Linear; 'head' is a Conv2d."),
        (Toy, {"scorer": GradNorm(), "parameters": "all"}, "selects 2 layers ('body', 'head'), but the scorer needs"),
        (WithLosses, arguments(RhoLoss(), {"head.weight": torch.zeros(3, 8)}), "has no tensor for 'body.weight'"),
    ],
)
def test_what_cannot_be_had_is_refused_before_training(kind, options, message):
    module = toy(kind)
    before = parameters_of(module)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(GradMimic(**options)).fit(module, loader(toy_data(8)))
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)


def test_norms_of_a_loss_that_mixes_samples_are_refused():
    class Mixed(WithLosses):
        def sample_losses(self, batch: Any) -> Tensor:
            logits = self(batch[0])
            return F.cross_entropy(logits - logits.mean(0), batch[1], reduction="none")

    with pytest.raises(
        ValueError, match=r"needs the norms of per-sample gradients, which can be computed only for a single nn.Linear"
    ):
        trainer(GradMimic(scorer=GradNorm(), parameters="head")).fit(toy(Mixed), loader(toy_data(8)))


@pytest.mark.parametrize("scorer", FORMULAS, ids=lambda s: type(s).__name__)
def test_the_ledger_says_what_was_scored(scorer, tmp_path):
    trainer(GradMimic(**arguments(scorer), ledger=tmp_path / "s")).fit(toy(WithLosses), loader(toy_data(4)))
    meta = json.loads((tmp_path / "s" / "_meta.json").read_text())
    kind = "own_loss" if scorer.needs & {"dot", "norms"} else "no_gradient"
    assert f'"scorer": "{type(scorer).__name__}"' in json.dumps(meta)
    assert f'"score_kind": "{kind}"' in json.dumps(meta)


class HalfByNorm:
    """Weights made of products, and not of the scores."""

    needs = frozenset({"norms", "losses"})

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, scores, products=None, *, valid=None, uniform=None):
        raw = products.norms**self.power + products.losses
        return normalised_weights(raw, scores, valid=valid, uniform=uniform)


def test_a_weighting_of_ones_own_gets_the_products_that_it_declares(tmp_path):
    data, reference, ours, oracle = toy_data(18), parameters_of(other()), toy(WithLosses), toy(WithLosses)
    callback = GradMimic(reference, "head", weighting=HalfByNorm(2.0), ledger=tmp_path / "s")
    trainer(callback, accumulate_grad_batches=2).fit(ours, loader(data))
    weights, batches = [], [data[start : start + 4] for start in range(0, 18, 4)]

    def weigh(module, batch, gradients):
        raw = norms_of(gradients) ** 2 + losses_of(module, batch).detach()
        weights.append(raw / raw.sum())
        return weights[-1]

    trained_by_oracle(oracle, batches, {}, accumulate=2, score=weigh, weigh=lambda scores: scores)
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)
    recorded = torch.tensor(Ledger(tmp_path / "s").table()["weight"].to_pylist())
    torch.testing.assert_close(recorded, torch.cat(weights).float())
    config = Ledger(tmp_path / "s").meta["attempts"][0]["config"]
    assert (config["weighting"], config["weighting_settings"]) == ("HalfByNorm", {"power": 2.0})


class Undeclared:
    needs = frozenset()

    def __call__(self, scores, products=None, *, valid=None, uniform=None):
        return normalised_weights(products.norms, scores, valid=valid, uniform=uniform)


class NoWeights(Undeclared):
    def __call__(self, scores, products=None, *, valid=None, uniform=None):
        return torch.ones_like(scores)


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (Undeclared(), "Undeclared reads `norms`, which it does not declare"),
        (NoWeights(), "NoWeights returned a torch.float64 tensor of shape (4,) on cpu; expected BatchWeights"),
    ],
)
def test_a_weighting_is_held_to_what_it_declares_and_returns(weighting, message):
    with pytest.raises(MimicError, match=re.escape(message)):
        trainer(GradMimic(parameters_of(other()), "head", weighting=weighting)).fit(toy(), loader(toy_data(8)))
