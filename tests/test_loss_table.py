"""Every loss of the table is scored as each sample alone would be, or refused, whatever the batch's size."""

import json

import pytest
import torch

import oracles
from lightning_mimic import MimicError, Reweighter
from lightning_mimic.gradients.forward_trace import ForwardTrace
from lightning_mimic.gradients.plain_mean import DataFlow
from support.cases import case, for_each
from support.losses import COUPLED, PLAIN, UNDEFINED_ALONE, Net, WithOwnLosses, alone, batch_of, net
from support.ranks import on_two_ranks

SIZES = (2, 7, 32)
RANKS = ((2, 2), (3, 4))  # samples of two ranks
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def scores(kind, loss, batch, parameters):
    """The engine's scores of one step."""
    module, reference = net(kind, loss), dict(net(kind, loss, seed=1).named_parameters())
    with (
        Reweighter(module, reference, parameters, diagnose_reference=False) as reweighter,
        reweighter.step(batch) as step,
    ):
        return step.backward(module.loss(step.batch)).scores


def on_a_rank(rank, folder):
    """The scores of this rank's part of a batch, or None where it is refused."""
    found = {}
    for name, loss in (PLAIN | COUPLED).items():
        for kind in (Net, WithOwnLosses):
            if kind is WithOwnLosses and name in UNDEFINED_ALONE:
                continue
            for sizes in RANKS if kind is Net else RANKS[-1:]:
                part = dict(zip(("first", "second"), torch.arange(sum(sizes)).split(sizes), strict=True))
                batch = {key: rows[part[("first", "second")[rank]]] for key, rows in batch_of(sum(sizes)).items()}
                try:
                    result = scores(kind, loss, batch, "head").tolist()
                except MimicError:
                    result = None
                found[f"{name}, {kind.__name__}, {sum(sizes)}"] = result
    (folder / f"{rank}.json").write_text(json.dumps(found))


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


@for_each("name", [*PLAIN, *COUPLED])
def test_the_data_flow_alone_tells_them_apart(name):
    loss = (PLAIN | COUPLED)[name]
    for size in SIZES:
        module, batch, trace = net(Net, loss), batch_of(size), ForwardTrace(size)
        trace.expect(batch.values(), module.parameters())
        with trace.recording():
            logits = module(batch["x"])
            value = module.loss_of(logits, batch)
        objection = DataFlow(trace, logits.grad_fn).objection(value)
        assert (objection is None) is (name in PLAIN)


@pytest.mark.parametrize("name", [name for name in (*PLAIN, *COUPLED) if name not in UNDEFINED_ALONE])
def test_with_losses_of_its_own_every_loss_is_scored(name):
    loss = (PLAIN | COUPLED)[name]
    for size in SIZES:
        batch = batch_of(size)
        with case(size):
            torch.testing.assert_close(
                scores(WithOwnLosses, loss, batch, "head"), expected(loss, batch, "head"), **CLOSE
            )


@pytest.mark.slow
def test_on_two_ranks_the_same_losses_are_scored_and_refused(tmp_path):
    on_two_ranks(on_a_rank, tmp_path)
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for case_name, first in parts[0].items():
        name, kind, size = case_name.rsplit(", ", 2)
        with case(case_name):
            second = parts[1][case_name]
            if kind == "Net" and name in COUPLED:
                assert first is None
                assert second is None
                continue
            right = expected((PLAIN | COUPLED)[name], batch_of(int(size)), "head")
            torch.testing.assert_close(torch.tensor(first + second, dtype=right.dtype), right, **CLOSE)
