"""AGRA, TracIn and GRAD-MATCH inside training against slow versions of what their papers say."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import oracles
from lightning_mimic import GradMimic, Ledger
from lightning_mimic.scorers import Agra, GradMatch, Influence, Products
from support.competitors import HEAD, NAN, OTHERS, Mixed, mixed_losses
from support.oracle_training import trained_by_oracle
from support.toys import (
    CLASSES,
    HIDDEN,
    Residual,
    Toy,
    WithLosses,
    loader,
    losses_of,
    parameters_of,
    toy,
    toy_data,
    trainer,
)


class Regular(WithLosses):
    """What a pass in training mode would disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(HIDDEN), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.body(x)))))


class Weighted(WithLosses):
    """A blank sample has no loss."""

    def sample_losses(self, batch: Any) -> Tensor:
        return super().sample_losses(batch) * (batch[0] != 0).any(1)


def formula(scorer: Any, names: Any = HEAD, losses: Any = losses_of) -> Any:
    """The scores of a micro-batch by explicit gradients; of the reference batches, one after the other."""
    others = itertools.cycle(OTHERS)

    def score(module: Toy, batch: Any, gradients: dict[str, Tensor]) -> Tensor:
        rows = oracles.flat(gradients, names)
        if isinstance(scorer, GradMatch):
            return oracles.matched(rows, math.ceil(scorer.fraction * len(rows)), scorer.regularization)
        mean = oracles.mean_gradient(module, losses, next(others), names)
        return oracles.agreements(rows, mean) if isinstance(scorer, Agra) else rows @ mean

    return score


OWN = {Agra: oracles.agra_weights, GradMatch: lambda scores: scores / scores.sum(), Influence: None}
ALL = ("body.weight", "body.bias", *HEAD)
# name: module, scorer, target parameters, more of the callback, accumulated micro-batches
CASES: dict[str, tuple[type[Toy], Any, tuple[str, ...], dict[str, Any], int]] = {
    "agra": (WithLosses, Agra(OTHERS), HEAD, {}, 1),
    "agra, target": (WithLosses, Agra(OTHERS), HEAD, {"reweight": "target"}, 2),
    "agra, a pass of its own": (Residual, Agra(OTHERS), HEAD, {}, 1),
    "grad_match": (WithLosses, GradMatch(0.6), HEAD, {}, 1),
    "grad_match, accumulated": (Toy, GradMatch(0.75, 0.01), HEAD, {}, 2),
    "grad_match, target": (WithLosses, GradMatch(0.3), ("head.weight",), {"reweight": "target"}, 1),
    "grad_match, a pass of its own": (Residual, GradMatch(1.0, 0.1), HEAD, {}, 1),
    "influence": (WithLosses, Influence(OTHERS), HEAD, {}, 1),
    "influence, accumulated": (WithLosses, Influence(OTHERS), HEAD, {"reweight": "target"}, 2),
    "influence, all": (WithLosses, Influence(OTHERS), ALL, {}, 1),
    "influence, mixed": (Mixed, Influence(OTHERS), ALL, {}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_what_the_paper_says(case, tmp_path):
    kind, scorer, names, options, accumulate = CASES[case]
    ours, oracle, data = toy(kind), toy(kind), toy_data(18)
    softmax = {"temperature": 0.7, "min_ess": 0} if isinstance(scorer, Influence) else {}
    callback = GradMimic(scorer=scorer, parameters=list(names), ledger=tmp_path / "s", **softmax, **options)
    trainer(callback, accumulate_grad_batches=accumulate).fit(ours, loader(data))
    losses = mixed_losses if kind is Mixed else losses_of
    settings = {
        "reweight": options.get("reweight", "all"),
        "accumulate": accumulate,
        "targets": names,
        "losses": losses,
    }
    batches = [data[start : start + 4] for start in range(0, 18, 4)]
    score, weigh = formula(scorer, names, losses), OWN[type(scorer)]
    seen = trained_by_oracle(oracle, batches, {}, **settings, score=score, weigh=weigh)
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-8, atol=1e-9)
    table = Ledger(tmp_path / "s").table()
    for column, expected in zip(("score", "weight"), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(
            torch.tensor(table[column].to_pylist()), torch.cat(expected).float(), rtol=1e-5, atol=1e-6
        )
    assert len({round(w, 5) for w in table["weight"].to_pylist()}) > 1, "weights that could not be wrong"


def scored(folder: Any, scorer: Any, module: Toy, data: Any, **options: Any) -> Any:
    """The ledger of a fit that trains nothing."""
    callback = GradMimic(scorer=scorer, parameters="head", reweight="none", ledger=folder / "s")
    module.lr = 0.0
    trainer(callback, **options).fit(module, loader(data))
    return Ledger(folder / "s").table()


def test_influence_is_what_a_small_step_does_to_the_trusted_loss(tmp_path):
    trusted, data, module = toy_data(5, seed=3)[:], toy_data(8), toy(WithLosses)
    scores = scored(tmp_path, Influence([trusted]), module, data)["score"].to_pylist()
    gradients, eps = oracles.per_sample_gradients(module, losses_of, data[:]), 1e-5
    for i, score in enumerate(scores):
        after = {}
        for sign in (1, -1):
            moved = toy(WithLosses)
            with torch.no_grad():
                for name in HEAD:
                    moved.get_parameter(name).sub_(sign * eps * gradients[name][i])
            after[sign] = losses_of(moved, trusted).mean().item()
        assert score == pytest.approx((after[-1] - after[1]) / (2 * eps), rel=1e-5, abs=1e-6)
    assert min(scores) < -1e-2
    assert max(scores) > 1e-2


def gram_of(rows: Tensor) -> Products:
    return Products(rows[:, 0], gram=(rows @ rows.T).float(), own=slice(0, len(rows)))


def by_scipy(rows: Tensor, target: Tensor, ridge: float) -> Tensor:
    """On the gradients' own columns."""
    columns = torch.cat([rows.T, math.sqrt(ridge) * torch.eye(len(rows)).double()])
    return torch.from_numpy(nnls(columns.numpy(), F.pad(target, (0, len(rows))).numpy())[0])


@pytest.mark.parametrize(
    ("rows", "size", "fraction", "ridge"), [(6, 4, 0.5, 0.5), (24, 60, 0.3, 0.5), (32, 7, 0.3, 0.1)]
)
def test_the_choice_is_a_matching_pursuit_on_the_gradients(rows, size, fraction, ridge):
    torch.manual_seed(rows)
    vectors = torch.randn(rows, size).double() + 0.3
    weights = GradMatch(fraction, ridge)(gram_of(vectors)).double()
    fit = by_scipy if rows > 6 else oracles.nonnegative_fit
    torch.testing.assert_close(
        weights, oracles.matched(vectors, math.ceil(fraction * rows), ridge, fit), rtol=1e-4, atol=1e-4
    )
    chosen = int((weights > 0).sum())
    assert 1 < chosen <= math.ceil(fraction * rows)
    assert (weights >= 0).all()


def test_a_fraction_is_rounded_up_but_not_for_its_own_rounding():
    weights = GradMatch(0.07)(gram_of(torch.eye(100).double()))  # 0.07 * 100 is 7.000000000000001
    assert int((weights > 0).sum()) == 7
    assert int((GradMatch(0.071)(gram_of(torch.eye(100).double())) > 0).sum()) == 8


def test_only_samples_that_agree_share_the_step():
    scores = torch.tensor([0.5, 1e-9, 0.0, -1e-9, -1.0])
    assert Agra(OTHERS).weigh(scores).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_two_ways_to_fit_weights_that_are_not_negative_agree():
    torch.manual_seed(1)
    for ridge in (0.01, 0.5, 3.0):
        rows, target = torch.randn(5, 7).double(), torch.randn(7).double()
        torch.testing.assert_close(oracles.nonnegative_fit(rows, target, ridge), by_scipy(rows, target, ridge))


def test_copies_of_one_sample_are_chosen_once_and_a_sample_without_use_never():
    one, other = torch.tensor([3.0, 0.0, 0.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    weights = GradMatch(1.0, 0.0)(gram_of(torch.stack([one, one, other, -0.4 * one, 0 * one])))
    torch.testing.assert_close(weights, torch.tensor([1.6, 0.0, 1.0, 0.0, 0.0]), rtol=1e-4, atol=1e-4)


def test_a_sample_that_does_not_count_is_not_chosen_and_changes_nothing():
    torch.manual_seed(2)
    rows = torch.randn(10, 6).double() + 0.5
    holes = rows.clone()
    holes[[2, 7]] = torch.tensor([NAN, float("inf")]).double()[:, None]
    weights, counts = GradMatch(0.5)(gram_of(holes)), torch.ones(10).bool().index_fill(0, torch.tensor([2, 7]), False)
    assert weights[~counts].isnan().all()
    torch.testing.assert_close(weights[counts], GradMatch(0.5)(gram_of(rows[counts])))
    parts = [GradMatch(0.5)(Products(rows, gram=gram_of(holes).gram, own=own)) for own in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(torch.cat(parts), weights, equal_nan=True)


@pytest.mark.filterwarnings("ignore:1 samples held NaN")
@pytest.mark.parametrize("scorer", [GradMatch(0.7), Agra(OTHERS)], ids=lambda s: type(s).__name__)
def test_a_sample_that_holds_nan_is_left_out_of_what_is_weighed(scorer, tmp_path):
    ours, oracle, data = toy(WithLosses), toy(WithLosses), toy_data(6)
    rest = [data[:][0][[0, 1, 3, 4, 5]], data[:][1][[0, 1, 3, 4, 5]]]
    trained_by_oracle(oracle, [rest], {}, score=formula(scorer), weigh=OWN[type(scorer)])
    data.tensors[0][2] = NAN
    callback = GradMimic(scorer=scorer, parameters="head", ledger=tmp_path / "s")
    trainer(callback).fit(ours, loader(data, batch_size=6))
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-8, atol=1e-9)
    assert Ledger(tmp_path / "s").table()["flag"].to_pylist().count("nonfinite_loss") == 1


def test_where_no_sample_agrees_the_batch_moves_nothing(tmp_path):
    module, (x, y) = toy(WithLosses), toy_data(1)[:]
    before, wrong = parameters_of(module), [x, (y + 1) % CLASSES]
    callback = GradMimic(scorer=Agra([wrong]), parameters="head", ledger=tmp_path / "s")
    fit = trainer(callback)
    fit.fit(module, loader(toy_data(1)))
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)
    (row,) = Ledger(tmp_path / "s").table().to_pylist()
    assert row["score"] < 0
    assert (row["weight"], row["flag"], float(fit.callback_metrics["mimic/ess"])) == (0, "ok", 0)


@pytest.mark.parametrize("scorer", [Agra, Influence])
def test_a_reference_batch_without_a_gradient_leaves_weights_uniform(scorer, tmp_path):
    blank = [torch.zeros_like(each) for each in OTHERS[0]]
    callback = GradMimic(scorer=scorer([blank]), parameters="head", ledger=tmp_path / "s")
    with pytest.warns(
        UserWarning, match="or a reference batch has no gradient, so there is no direction: weights are uniform"
    ):
        trainer(callback).fit(toy(Weighted), loader(toy_data(4)))
    rows = Ledger(tmp_path / "s").table()
    assert rows["weight"].to_pylist() == [0.25] * 4
    assert set(rows["flag"].to_pylist()) == {"zero_direction"}
    assert rows["score"].to_pylist() == [None] * 4


def test_the_reference_batch_leaves_no_trace():
    def fitted(*callbacks: Any) -> dict[str, Tensor]:
        module = toy(Regular)
        module.norm.eval()
        module.body.bias.requires_grad_(False)
        torch.manual_seed(3)
        trainer(*callbacks, epochs=2).fit(module, DataLoader(toy_data(12), 4, shuffle=True))
        assert [m.training for m in (module, module.norm, module.drop, module.head)] == [True, False, True, True]
        assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["body.bias"]
        assert all(p.grad is None or n != "body.bias" for n, p in module.named_parameters())
        return module.state_dict() | {"random": torch.get_rng_state()}

    shuffled = DataLoader(toy_data(9, seed=2), 4, shuffle=True)
    scoring = GradMimic(scorer=Agra(shuffled), parameters="head", reweight="none")
    torch.testing.assert_close(fitted(scoring), fitted(), rtol=0, atol=0)


class Seen(Dataset):
    """Notes what is asked for."""

    def __init__(self) -> None:
        self.data, self.asked = toy_data(9, seed=2), []

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.data[index]


@pytest.mark.parametrize("with_sampler", [False, True])
def test_every_pass_over_the_reference_batches_has_its_own_order(with_sampler):
    seen = Seen()
    sampler = DistributedSampler(seen, num_replicas=1, rank=0) if with_sampler else None
    others = DataLoader(seen, 4, shuffle=None if with_sampler else True, sampler=sampler)
    trainer(GradMimic(scorer=Agra(others), parameters="head")).fit(toy(WithLosses), loader(toy_data(24)))
    first, second = seen.asked[:9], seen.asked[9:]
    assert sorted(first) == sorted(second) == list(range(9))
    assert first != second


def test_the_reference_batch_is_taken_in_evaluation_mode_and_full_precision():
    module = toy(Regular, dtype=torch.float32)
    module.norm.running_mean.fill_(0.2)
    others = [each.float() if each.is_floating_point() else each for each in OTHERS[0]]
    expected = oracles.mean_gradient(module, losses_of, others, HEAD).norm().float()
    fit = trainer(GradMimic(scorer=Influence([others]), parameters="head", reweight="none"), precision="bf16-mixed")
    fit.fit(module, loader(toy_data(4, dtype=torch.float32)))
    torch.testing.assert_close(fit.callback_metrics["mimic/direction_norm"], expected, rtol=1e-5, atol=0)
    # Of a module in double precision it is converted as training batches are.
    fit = trainer(GradMimic(scorer=Influence([others]), parameters="head"), precision="64-true")
    fit.fit(toy(WithLosses), DataLoader(toy_data(4, dtype=torch.float32), 4))


def test_a_frozen_target_is_scored_as_a_trained_one(tmp_path):
    frozen, free = toy(WithLosses), toy(WithLosses)
    frozen.head.requires_grad_(False)
    scores = [
        scored(tmp_path / name, Agra(OTHERS), module, toy_data(12))["score"].to_pylist()
        for name, module in (("frozen", frozen), ("free", free))
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert not frozen.head.weight.requires_grad


def test_a_resumed_fit_goes_on_with_the_reference_batch_that_is_due(tmp_path):
    def fit(name: str, epochs: int, checkpoint: Any = None) -> tuple[Toy, Any]:
        module = toy(WithLosses)
        shuffled = DataLoader(toy_data(10, seed=2), 4, shuffle=True)  # 3 batches beside the 4 of an epoch
        callback = GradMimic(scorer=Influence(shuffled), parameters="head", ledger=tmp_path / name)
        torch.manual_seed(len(name) + epochs)  # of what the order must not depend on
        run = trainer(callback, epochs=epochs)
        run.fit(module, loader(toy_data(16)), ckpt_path=checkpoint)
        return module, run

    whole, _ = fit("whole", 3)
    _, first = fit("parts", 1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed, _ = fit("parts", 3, tmp_path / "first.ckpt")
    torch.testing.assert_close(parameters_of(resumed), parameters_of(whole), rtol=0, atol=0)
    one, two = (Ledger(tmp_path / name).table() for name in ("whole", "parts"))
    assert one["score"].to_pylist() == two["score"].to_pylist()
    assert len(set(one["score"].to_pylist())) == 48
