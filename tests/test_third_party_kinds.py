"""The kinds of batches and losses of other libraries' modules: scored as each sample alone, or refused with a fix."""

import pytest
import torch

import oracles
from lightning_mimic import MimicError, Reweighter
from support.third_party import REFUSED, SAMPLES, SCORED

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def module_of(kind, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().double()


def scores(kind, parameters, **options):
    """The engine's scores of one step."""
    module, reference = module_of(kind), dict(module_of(kind, seed=1).named_parameters())
    with (
        Reweighter(module, reference, parameters, diagnose_reference=False, **options) as reweighter,
        reweighter.step(module.batch()) as step,
    ):
        return step.backward(module.loss(step.batch)).scores


def expected(kind, parameters):
    """From the gradient of each sample in a batch of its own."""
    module, reference = module_of(kind), dict(module_of(kind, seed=1).named_parameters())
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    chosen = {n: p for n, p in named.items() if parameters == "all" or n.startswith(f"{parameters}.")}
    rows = []
    for sample in range(SAMPLES):
        loss = module.loss(module.alone(module.batch(), sample))
        rows.append(torch.autograd.grad(loss, list(chosen.values()), allow_unused=True, materialize_grads=True))
    gradients = {name: torch.stack(parts) for name, parts in zip(chosen, zip(*rows, strict=True), strict=True)}
    return oracles.mimic_scores(gradients, reference, chosen)


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.parametrize("name", SCORED)
def test_a_plain_mean_is_scored_as_it_is(name, parameters):
    kind = SCORED[name]
    torch.testing.assert_close(scores(kind, parameters), expected(kind, parameters), **CLOSE)


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.parametrize("name", REFUSED)
def test_another_loss_is_refused_and_scored_with_the_fix(name, parameters):
    kind, sentence, fixed, options = REFUSED[name]
    with pytest.raises(MimicError, match=sentence):
        scores(kind, parameters)
    if fixed is not None:
        torch.testing.assert_close(scores(fixed, parameters, **options), expected(fixed, parameters), **CLOSE)
