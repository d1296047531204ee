"""Every scoring method against the oracle: several layers, deep ones, tied parameters, mixed losses."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.reweighting import reweighter
from lightning_mimic.reweighting.methods import InBackward, ScoringMethod
from support.method_cases import CASES, own_losses
from support.oracle_training import trained_by_oracle
from support.toys import WithLosses, loader, losses_of, parameters_of, toy, toy_data, trainer


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> list[type[ScoringMethod]]:
    """The methods that were chosen."""
    found: list[type[ScoringMethod]] = []
    choose = reweighter.choose_method

    def spied(*given: Any) -> Any:
        choice = choose(*given)
        found.append(type(choice.method))
        return choice

    monkeypatch.setattr(reweighter, "choose_method", spied)
    return found


# Their gate of the target alone is that of another case.
ALIKE = {"all, with sample_losses", "deep, with sample_losses", "weights only", "residual, all", "two terms"}
ALIKE |= {"without the functional", "attention alone", "contrastive, all"}
TARGET = [case for case in CASES if case not in ALIKE]


@pytest.mark.parametrize(
    ("case", "reweight"), [*((case, "all") for case in CASES), *((case, "target") for case in TARGET)]
)
def test_every_way_is_the_weighted_sum_of_sample_gradients(case, reweight, methods, tmp_path):
    kind, parameters, expected = CASES[case]
    data, ours, oracle, other = toy_data(14), toy(kind), toy(kind), toy(kind, seed=1)
    callback = GradMimic(
        parameters_of(other), parameters, temperature=0.7, min_ess=0, reweight=reweight, ledger=tmp_path / "s"
    )
    trainer(callback, accumulate_grad_batches=2).fit(ours, loader(data))
    targets = Ledger(tmp_path / "s").meta["attempts"][0]["config"]["parameters"]
    losses = own_losses if issubclass(kind, WithLosses) else losses_of
    batches = [data[i : i + 4] for i in range(0, 14, 4)]
    seen = trained_by_oracle(
        oracle, batches, parameters_of(other), reweight=reweight, accumulate=2, targets=targets, losses=losses
    )
    assert set(methods) == {expected} or (reweight == "target" and set(methods) <= {expected, InBackward})
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)
    rows = Ledger(tmp_path / "s").table()
    scores, weights = (torch.cat([pair[k] for pair in seen]) for k in (0, 1))
    torch.testing.assert_close(torch.tensor(rows["score"].to_pylist()), scores.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(rows["weight"].to_pylist()), weights.float(), rtol=1e-6, atol=1e-6)
