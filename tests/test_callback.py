"""The callback against the oracle: scores, weights and every optimizer step, on modules that know nothing of it."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint

import oracles
from lightning_mimic import GradMimic, Ledger
from lightning_mimic.gradients import Direction
from support.cases import pairwise
from support.oracle_training import trained_by_oracle
from support.toys import Convolution, Tokens, Toy, WithLosses, loader, losses_of, parameters_of, toy, toy_data, trainer


@pytest.mark.parametrize(
    *pairwise(
        kind=[Toy, WithLosses, Convolution, Tokens],
        options=[{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}],
        reweight=["all", "target"],
    )
)
def test_every_step_is_the_weighted_sum_of_sample_gradients(kind, reweight, options, tmp_path):
    reference, data = parameters_of(toy(kind, seed=1)), toy_data(14)  # a last batch of 2, a last window of 1
    ours, oracle = toy(kind), toy(kind)
    callback = GradMimic(reference, "head", temperature=0.7, min_ess=0, reweight=reweight, ledger=tmp_path / "s")
    trainer(callback, epochs=2, **options).fit(ours, loader(data))
    batches = [data[i : i + 4] for i in range(0, 14, 4)]
    settings = {"reweight": reweight, "accumulate": options.get("accumulate_grad_batches", 1)}
    settings["clip"] = options.get("gradient_clip_val")
    seen = [row for _ in range(2) for row in trained_by_oracle(oracle, batches, reference, **settings)]
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)
    rows = Ledger(tmp_path / "s").table()
    scores, weights = (torch.cat([pair[k] for pair in seen]) for k in (0, 1))
    torch.testing.assert_close(torch.tensor(rows["score"].to_pylist()), scores.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(rows["weight"].to_pylist()), weights.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", ["head.weight", "head.bias", "body"])
def test_any_one_layer_can_be_the_target(targets, tmp_path):
    reference, data, module, oracle = parameters_of(toy(seed=1)), toy_data(8), toy(), toy()
    names = ("body.weight", "body.bias") if targets == "body" else (targets,)
    callback = GradMimic(reference, targets, temperature=0.7, min_ess=0, reweight="target", ledger=tmp_path / "s")
    trainer(callback).fit(module, loader(data))
    batches = [data[i : i + 4] for i in range(0, 8, 4)]
    seen = trained_by_oracle(oracle, batches, reference, reweight="target", targets=names)
    torch.testing.assert_close(parameters_of(module), parameters_of(oracle), rtol=1e-9, atol=1e-9)
    scores = torch.tensor(Ledger(tmp_path / "s").table()["score"].to_pylist())
    torch.testing.assert_close(scores, torch.cat([s for s, _ in seen]).float(), rtol=1e-6, atol=1e-6)


def test_only_scoring_leaves_training_bit_identical(tmp_path):
    reference, data = parameters_of(toy(seed=1)), toy_data(14)
    plain, scored = toy(dtype=torch.float32), toy(dtype=torch.float32)
    data = toy_data(14, dtype=torch.float32)
    trainer(epochs=3).fit(plain, loader(data))
    trainer(GradMimic(reference, "head", reweight="none", ledger=tmp_path / "s"), epochs=3).fit(scored, loader(data))
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, scored.get_parameter(name)), name
    assert Ledger(tmp_path / "s").table()["score"].null_count == 0


@pytest.mark.parametrize("reweight", ["all", "target"])
def test_an_infinite_temperature_is_plain_training(reweight):
    reference, data = parameters_of(toy(seed=1)), toy_data(14)
    plain, ours = toy(), toy()
    trainer(epochs=3).fit(plain, loader(data))
    trainer(GradMimic(reference, "head", temperature=1e12, reweight=reweight), epochs=3).fit(ours, loader(data))
    torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=1e-6, atol=1e-6)


def test_a_finite_temperature_is_not():
    reference, data = parameters_of(toy(seed=1)), toy_data(14)
    plain, ours = toy(), toy()
    trainer().fit(plain, loader(data))
    trainer(GradMimic(reference, "head", temperature=0.3)).fit(ours, loader(data))
    assert not torch.equal(ours.head.weight, plain.head.weight)


def test_min_ess_holds_in_every_batch(tmp_path):
    callback = GradMimic(parameters_of(toy(seed=1)), "head", temperature=1e-3, min_ess=0.6, ledger=tmp_path / "s")
    trainer(callback).fit(toy(), loader(toy_data(12)))
    rows = Ledger(tmp_path / "s").table()
    weights = torch.tensor(rows["weight"].to_pylist()).view(3, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    ess = 1 / (weights**2).sum(1)
    assert float(ess.min()) >= 0.6 * 4 * (1 - 1e-5)
    assert float(ess.max()) < 4  # and the floor does not flatten them


def test_each_sample_has_one_row_an_epoch_under_shuffling_workers(tmp_path):
    data, ids = toy_data(14), [f"img-{k}" for k in range(14)]
    order = torch.Generator().manual_seed(3)
    batches = loader(data, ids=ids, shuffle=True, num_workers=2, generator=order)
    trainer(GradMimic(parameters_of(toy(seed=1)), "head", ledger=tmp_path / "s"), epochs=2).fit(toy(), batches)
    rows = Ledger(tmp_path / "s").table(deduplicate=False)
    for epoch in (0, 1):
        assert sorted(r["id"] for r in rows.to_pylist() if r["epoch"] == epoch) == sorted(ids)


def test_scores_belong_to_their_ids(tmp_path):
    module, data = toy(WithLosses), toy_data(12)
    module.lr = 0.0  # nothing moves, so one score per sample
    reference = parameters_of(toy(seed=1))
    batches = loader(data, shuffle=True, generator=torch.Generator().manual_seed(3))
    trainer(GradMimic(reference, "head", ledger=tmp_path / "s")).fit(module, batches)
    whole = data[:]
    gradients = oracles.per_sample_gradients(module, losses_of, whole)
    expected = oracles.mimic_scores(gradients, reference, dict(module.head.named_parameters(prefix="head"))).float()
    losses = losses_of(module, whole).detach().float()
    rows = Ledger(tmp_path / "s").table().to_pylist()
    assert [r["id"] for r in rows] != sorted(r["id"] for r in rows)  # shuffled indeed
    for row in rows:
        assert row["score"] == pytest.approx(float(expected[row["id"]]), abs=1e-5)
        assert row["loss"] == pytest.approx(float(losses[row["id"]]), abs=1e-5)
        assert (row["label"], row["predicted"]) == (int(whole[1][row["id"]]), 0)
        assert (row["flag"], row["batch_size"], row["rank"]) == ("ok", 4, 0)


def test_rows_say_where_they_were_scored(tmp_path):
    callback = GradMimic(parameters_of(toy(seed=1)), "head", ledger=tmp_path / "s")
    trainer(callback, epochs=2, accumulate_grad_batches=2).fit(toy(), loader(toy_data(12)))
    rows = Ledger(tmp_path / "s").table()
    places = [(r["epoch"], r["step"], r["batch"]) for r in rows.to_pylist() if r["position"] == 0]
    assert places == [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 0), (1, 2, 1), (1, 3, 2)]
    attempt = Ledger(tmp_path / "s").meta["attempts"][0]
    assert attempt["score_kind"] == "own_loss"
    assert attempt["data"]["samples"] == 12
    assert attempt["config"]["parameters"] == ["head.weight", "head.bias"]


def test_ids_can_come_from_a_key_or_a_function(tmp_path):
    class Keyed(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    data = [{"x": x, "y": y, "id": k + 100} for k, (x, y) in enumerate(toy_data(8))]
    reference = parameters_of(toy(seed=1))
    plain_loader = torch.utils.data.DataLoader(data, 4)
    trainer(GradMimic(reference, "head", ledger=tmp_path / "a")).fit(toy(Keyed), plain_loader)
    by_function = GradMimic(reference, "head", ledger=tmp_path / "b", id_from=lambda b: [f"i{k}" for k in b["id"]])
    trainer(by_function).fit(toy(Keyed), plain_loader)
    assert Ledger(tmp_path / "a").table()["id"].to_pylist() == list(range(100, 108))
    assert Ledger(tmp_path / "b").table()["id"].to_pylist()[0] == "i100"


def test_figures_reach_the_logger_and_the_progress_bar():
    names = {"mimic/score_mean", "mimic/ess", "mimic/direction_norm", "mimic/negative_share"}
    fit = trainer(GradMimic(parameters_of(toy(seed=1)), "head"))
    module, data = toy(), toy_data(4)
    reference, before = parameters_of(toy(seed=1)), toy()
    fit.fit(module, loader(data))
    assert names <= fit.callback_metrics.keys()
    assert names <= fit.progress_bar_metrics.keys()
    assert names <= fit.logged_metrics.keys()
    scores = trained_by_oracle(before, [data[:]], reference)[0][0]
    assert float(fit.callback_metrics["mimic/score_mean"]) == pytest.approx(float(scores.mean()))
    assert float(fit.callback_metrics["mimic/negative_share"]) == pytest.approx(float((scores < 0).double().mean()))


def test_should_score_leaves_the_other_batches_plain(tmp_path):
    class OddEpochs(GradMimic):
        def should_score(self, trainer: Any) -> bool:
            return trainer.current_epoch % 2 == 1

    reference, plain, ours = parameters_of(toy(seed=1)), toy(), toy()
    trainer(epochs=1).fit(plain, loader(toy_data(8)))
    trainer(OddEpochs(reference, "head", ledger=tmp_path / "s"), epochs=1).fit(ours, loader(toy_data(8)))
    torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=0, atol=0)
    trainer(OddEpochs(reference, "head", ledger=tmp_path / "t"), epochs=4).fit(ours, loader(toy_data(8)))
    assert set(Ledger(tmp_path / "t").table()["epoch"].to_pylist()) == {1, 3}


def test_a_flipped_direction_does_not_pass(monkeypatch, tmp_path):
    look_up = Direction.__getitem__
    monkeypatch.setattr(Direction, "__getitem__", lambda self, name: -look_up(self, name))
    with pytest.raises(AssertionError, match="not close"):
        test_every_step_is_the_weighted_sum_of_sample_gradients(Toy, "all", {}, tmp_path)


@pytest.mark.parametrize("reweight", ["all", "target"])
def test_a_regulariser_keeps_its_own_weight(reweight):
    class Regularised(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            penalty = sum(p.square().sum() for p in self.parameters())
            return super().training_step(batch, batch_idx) + 0.1 * penalty

    reference, data, ours, oracle = parameters_of(toy(seed=1)), toy_data(4), toy(Regularised), toy()
    before = parameters_of(oracle)
    callback = GradMimic(reference, "head", temperature=0.7, min_ess=0, reweight=reweight, uncovered="mean")
    trainer(callback).fit(ours, loader(data))
    trained_by_oracle(oracle, [data[:]], reference, reweight=reweight)
    expected = {name: p - oracle.lr * 0.2 * before[name] for name, p in parameters_of(oracle).items()}
    torch.testing.assert_close(parameters_of(ours), expected, rtol=1e-9, atol=1e-9)


def test_activation_checkpointing_changes_nothing(tmp_path):
    class Recomputed(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    reference, data = parameters_of(toy(seed=1)), toy_data(8)
    plain, recomputed = toy(), toy(Recomputed)
    for module in (plain, recomputed):
        trainer(GradMimic(reference, "head"), epochs=2).fit(module, loader(data))
    torch.testing.assert_close(parameters_of(recomputed), parameters_of(plain), rtol=1e-12, atol=1e-12)


def test_a_pass_without_gradient_of_the_same_layer_is_not_a_use(tmp_path):
    class Watches(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self(batch[0] * 2)
            return super().training_step(batch, batch_idx)

    reference, plain, ours = parameters_of(toy(seed=1)), toy(), toy(Watches)
    for module in (plain, ours):
        trainer(GradMimic(reference, "head")).fit(module, loader(toy_data(8)))
    torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=0, atol=0)


def test_another_hook_on_the_layer_does_not_change_the_scores(tmp_path):
    class Tripled(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head.register_forward_hook(lambda module, args, output: output * 3)

    class TripledInForward(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 3

    for kind in (Tripled, TripledInForward):
        callback = GradMimic(parameters_of(toy(seed=1)), "head", ledger=tmp_path / kind.__name__)
        trainer(callback).fit(toy(kind), loader(toy_data(8)))
    scores = [Ledger(tmp_path / kind.__name__).table()["score"].to_pylist() for kind in (Tripled, TripledInForward)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_an_id_of_the_users_own_is_none_of_ours():
    class Keyed(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    data = [{"x": x, "y": y, "id": [7, 8]} for x, y in toy_data(8)]
    trainer(GradMimic(parameters_of(toy(seed=1)), "head")).fit(toy(Keyed), torch.utils.data.DataLoader(data, 4))


def test_a_batch_that_a_hook_changed_is_the_one_that_is_trained_on():
    class Mixes(Toy):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            batch[0].mul_(0.5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen = batch[0].clone()
            return super().training_step(batch, batch_idx)

    module, data = toy(Mixes), toy_data(4)
    expected = data[:][0] * 0.5
    trainer(GradMimic(parameters_of(toy(seed=1)), "head")).fit(module, loader(data))
    torch.testing.assert_close(module.seen, expected, rtol=0, atol=0)
