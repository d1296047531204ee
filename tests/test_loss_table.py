"""Every loss of the table is scored as each sample alone would be, or refused, whatever the batch's size."""

import pytest
import torch

import oracles
from lightning_mimic import MimicError, Reweighter
from support.cases import case
from support.losses import COUPLED, PLAIN, UNDEFINED_ALONE, Net, WithOwnLosses, alone, batch_of, net
from support.ranks import on_two_ranks

SIZES = (2, 7, 32)
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def scores(kind, loss, batch, parameters):
    """The engine's scores of one step."""
    module, reference = net(kind, loss), dict(net(kind, loss, seed=1).named_parameters())
    with (
        Reweighter(module, reference, parameters, diagnose_reference=False) as reweighter,
        reweighter.step(batch) as step,
    ):
        return step.backward(module.loss(step.batch)).scores


def expected(loss, batch, parameters):
    module, reference = net(Net, loss), dict(net(Net, loss, seed=1).named_parameters())
    chosen = {name: p for name, p in module.named_parameters() if parameters == "all" or name.startswith(parameters)}
    return oracles.mimic_scores(alone(module, batch), reference, chosen)


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_mean_is_scored(name, parameters):
    for size in SIZES:
        batch = batch_of(size)
        with case(size):
            torch.testing.assert_close(
                scores(Net, PLAIN[name], batch, parameters), expected(PLAIN[name], batch, parameters), **CLOSE
            )


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_mixes_samples_is_refused(name, parameters):
    for size in SIZES:
        with case(size), pytest.raises(MimicError, match=r"not shown to be a plain mean over samples|`parameters`: "):
            scores(Net, COUPLED[name], batch_of(size), parameters)


@pytest.mark.parametrize("name", [name for name in (*PLAIN, *COUPLED) if name not in UNDEFINED_ALONE])
def test_with_losses_of_its_own_every_loss_is_scored(name):
    loss = (PLAIN | COUPLED)[name]
    for size in SIZES:
        batch = batch_of(size)
        with case(size):
            torch.testing.assert_close(
                scores(WithOwnLosses, loss, batch, "head"), expected(loss, batch, "head"), **CLOSE
            )
