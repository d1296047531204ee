"""What must hold of any scores whatever the module, the way they are taken, the reference and the temperature."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from lightning_mimic import GradMimic, Ledger
from lightning_mimic.gradients import select_parameters
from support.examples import examples
from support.method_cases import CASES, own_losses
from support.toys import WithLosses, loader, losses_of, parameters_of, toy, toy_data, trainer

RESIDUAL = "residual around the layer"
SOME = ["all", "deep, with sample_losses", RESIDUAL, "tied", "functional", "attention", "contrastive, all"]
CHOSEN = [*SOME, "two terms, one layer", "tied by hand"]


def scored(case: str, batch: Any, reference: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
    """Scores and weights of one batch, in its order."""
    kind, parameters, _ = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        callback = GradMimic(reference, parameters, min_ess=0, reweight="none", ledger=Path(folder) / "s", **options)
        data = torch.utils.data.TensorDataset(*batch)
        trainer(callback).fit(toy(kind), loader(data, len(data)))
        rows = Ledger(Path(folder) / "s").table().sort_by("position")
        return tuple(torch.tensor(rows[name].to_pylist()) for name in ("score", "weight"))


def gradients_of(case: str, batch: Any) -> dict[str, torch.Tensor]:
    kind, _, _ = CASES[case]
    return oracles.per_sample_gradients(toy(kind), own_losses if issubclass(kind, WithLosses) else losses_of, batch)


def reference_of(case: str) -> dict[str, torch.Tensor]:
    return parameters_of(toy(CASES[case][0], seed=1))


@pytest.mark.parametrize("case", CHOSEN)
def test_permuting_the_batch_permutes_the_scores(case):
    batch, order = toy_data(6)[:], torch.tensor([3, 0, 5, 1, 4, 2])
    scores, weights = scored(case, batch, reference_of(case))
    permuted = scored(case, [t[order] for t in batch], reference_of(case))
    torch.testing.assert_close(permuted, (scores[order], weights[order]), rtol=1e-5, atol=1e-6)
    assert scores.std() > 0


@pytest.mark.parametrize(
    ("case", "factor"), [*((case, (0.01, 7.0)[k % 2]) for k, case in enumerate(CHOSEN)), (RESIDUAL, 7.0)]
)
def test_the_length_of_the_way_changes_nothing(case, factor):
    start, far = parameters_of(toy(CASES[case][0])), reference_of(case)
    moved = {name: start[name] + factor * (far[name] - start[name]) for name in far}
    batch = toy_data(6)[:]
    torch.testing.assert_close(scored(case, batch, moved), scored(case, batch, far), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["all", "tied", "functional", "attention", "contrastive, all"])
def test_a_reference_one_step_ahead_gives_the_gradients_length(case):
    batch = toy_data(6)[:]
    gradients, start = gradients_of(case, batch), parameters_of(toy(CASES[case][0]))
    for i in range(3):
        ahead = {name: start[name] - gradients[name][i] for name in start}
        length = sum(g[i].square().sum() for g in gradients.values()) ** 0.5
        scores, _ = scored(case, batch, ahead)
        torch.testing.assert_close(scores[i].double(), length, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["all", "tied", "functional", "attention", "contrastive, all"])
def test_the_scores_sum_to_that_of_the_sum(case):
    batch, reference = toy_data(6)[:], reference_of(case)
    gradients = gradients_of(case, batch)
    start = {name: p for name, p in parameters_of(toy(CASES[case][0])).items() if name in gradients}
    total = oracles.mimic_scores({n: g.sum(0, keepdim=True) for n, g in gradients.items()}, reference, start)
    scores, _ = scored(case, batch, reference)
    torch.testing.assert_close(scores.double().sum(), total[0], rtol=1e-5, atol=1e-5)


@examples(25)
@given(
    case=st.sampled_from(CHOSEN),
    rows=st.integers(2, 9),
    seed=st.integers(0, 99),
    temperature=st.floats(1e-2, 1e2),
)
def test_scores_and_weights_are_the_oracles_at_any_size_and_temperature(case, rows, seed, temperature):
    kind, parameters, _ = CASES[case]
    batch, reference = toy_data(rows, seed=seed)[:], parameters_of(toy(kind, seed=seed + 1))
    targets = select_parameters(toy(kind), parameters)
    expected = oracles.mimic_scores(gradients_of(case, batch), reference, targets)
    scores, weights = scored(case, batch, reference, temperature=temperature)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, oracles.softmax_weights(expected, temperature).float(), rtol=1e-3, atol=1e-5)
