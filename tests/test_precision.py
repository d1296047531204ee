"""Half precision, gradient scalers and samples that are not finite."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

import oracles
from lightning_mimic import GradMimic, Ledger
from support.cases import pairwise
from support.toys import Toy, WithLosses, loader, losses_of, parameters_of, toy, toy_data, trainer

NAN, INF = float("nan"), float("inf")


def half(kind: type[Toy] = Toy) -> Toy:
    return toy(kind, dtype=torch.float32)


def scaled(growth_interval: int = 2000, scale: float = 2.0**16) -> dict[str, Any]:
    """A GradScaler that really works on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


MIXED = {"float16, scaled": (scaled, 5e-3), "bfloat16": (lambda: {"precision": "bf16-mixed"}, 5e-2)}


@pytest.mark.parametrize(
    *pairwise(parameters=["head", "all"], precision=MIXED, reweight=["all", "target"], accumulate=[1, 2])
)
def test_mixed_precision_scores_the_same_within_its_digits(parameters, precision, reweight, accumulate, tmp_path):
    options, tolerance = MIXED[precision]
    module, data = half(WithLosses), toy_data(8, dtype=torch.float32)
    module.lr = 0.0
    reference = parameters_of(toy(seed=1))
    callback = GradMimic(reference, parameters, reweight=reweight, ledger=tmp_path / "s")
    trainer(callback, accumulate_grad_batches=accumulate, **options()).fit(module, loader(data))
    gradients = oracles.per_sample_gradients(module, losses_of, data[:])
    chosen = {n: p for n, p in module.named_parameters() if parameters == "all" or n.startswith(parameters)}
    expected = oracles.mimic_scores(gradients, reference, chosen)
    rows = Ledger(tmp_path / "s").table().sort_by("id")
    scores = torch.tensor(rows["score"].to_pylist())
    torch.testing.assert_close(scores, expected.float(), rtol=tolerance, atol=tolerance)
    weights = torch.cat([oracles.softmax_weights(part, 1.0) for part in scores.split(4)]).float()
    torch.testing.assert_close(torch.tensor(rows["weight"].to_pylist()), weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.parametrize("reweight", ["all", "target"])
def test_a_step_under_a_scaler_is_the_step_without(parameters, reweight):
    reference, data = parameters_of(toy(seed=1)), loader(toy_data(8, dtype=torch.float32))
    plain, ours = half(), half()
    trainer(GradMimic(reference, parameters, reweight=reweight), epochs=2).fit(plain, data)
    trainer(GradMimic(reference, parameters, reweight=reweight), epochs=2, **scaled()).fit(ours, data)
    torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=1e-2, atol=1e-2)


class Overflows(WithLosses):
    """One sample's gradient leaves float16's range under a large scale; its loss is finite."""

    def sample_losses(self, batch: Any) -> torch.Tensor:
        x, y = batch
        losses = torch.nn.functional.cross_entropy(self(x), y, reduction="none")
        return losses * torch.where(torch.arange(len(y)) == 2, 1e3, 1.0)


@pytest.mark.parametrize(
    ("parameters", "kind", "reweight"),
    [
        ("head", Overflows, "all"),
        ("head", Overflows, "target"),
        ("all", Overflows, "all"),
        ("all", Overflows, "target"),
        ("head", WithLosses, "target"),
        ("all", WithLosses, "all"),
    ],
)
def test_an_overflow_reaches_the_scaler_which_lowers_its_scale(parameters, kind, reweight, tmp_path):
    module, options = half(kind), scaled()
    before = parameters_of(module)
    callback = GradMimic(parameters_of(toy(seed=1)), parameters, reweight=reweight, ledger=tmp_path / "s")
    trainer(callback, **options).fit(module, loader(toy_data(4, dtype=torch.float32)))
    rows, scaler = Ledger(tmp_path / "s").table().to_pylist(), options["plugins"][0].scaler
    if kind is Overflows:
        assert [r["flag"] for r in rows] == ["ok", "ok", "overflow", "ok"]
        assert rows[2]["score"] is None
        assert rows[2]["loss"] is not None
        assert scaler.get_scale() == 2.0**15
        torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)  # the step was left out
    else:
        assert {r["flag"] for r in rows} == {"ok"}
        assert scaler.get_scale() == 2.0**16


class Broken(Toy):
    """A loss that is not finite although the sample and its logits are."""

    bad = (1,)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.losses(batch).mean()

    def losses(self, batch: Any) -> torch.Tensor:
        losses = losses_of(self, batch)
        broken = (batch[0][:, :1] == toy_data(4).tensors[0][list(self.bad), 0]).any(1)
        return losses * torch.where(broken, INF, 1.0)


class BrokenWithLosses(Broken):
    def sample_losses(self, batch: Any) -> torch.Tensor:
        return self.losses(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.sample_losses(batch).mean()


def without(row: int) -> torch.utils.data.Dataset:
    return torch.utils.data.Subset(toy_data(4), [k for k in range(4) if k != row])


@pytest.mark.filterwarnings("ignore:.*samples held NaN")
@pytest.mark.parametrize(
    *pairwise(parameters=["head", "all"], kind=[Broken, BrokenWithLosses], reweight=["all", "target"])
)
def test_a_sample_with_a_loss_that_is_not_finite_is_left_out(parameters, kind, reweight, tmp_path):
    reference = parameters_of(toy(seed=1))
    ours, expected = toy(kind), toy()
    callback = GradMimic(reference, parameters, reweight=reweight, min_ess=0, ledger=tmp_path / "s")
    trainer(callback).fit(ours, loader(toy_data(4)))
    trainer(GradMimic(reference, parameters, reweight=reweight, min_ess=0)).fit(expected, loader(without(1), 3))
    rows = Ledger(tmp_path / "s").table().to_pylist()
    assert [r["flag"] for r in rows] == ["ok", "nonfinite_loss", "ok", "ok"]
    assert (rows[1]["score"], rows[1]["weight"]) == (None, 0.0)
    if (
        reweight == "target" and parameters == "head"
    ):  # all else gets the plain mean over 4, of which one counts nothing
        expected.body.weight.data = toy().body.weight + 0.75 * (expected.body.weight - toy().body.weight)
        expected.body.bias.data = toy().body.bias + 0.75 * (expected.body.bias - toy().body.bias)
    torch.testing.assert_close(parameters_of(ours), parameters_of(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.filterwarnings("ignore:.*samples held NaN")
@pytest.mark.parametrize("kind", [Toy, WithLosses])
def test_a_sample_that_holds_nan_does_not_reach_any_weight(parameters, kind, tmp_path):
    data, reference = toy_data(4), parameters_of(toy(seed=1))
    data.tensors[0][1, 0] = NAN
    ours, expected = toy(kind), toy(kind)
    trainer(GradMimic(reference, parameters, min_ess=0, ledger=tmp_path / "s")).fit(ours, loader(data))
    trainer(GradMimic(reference, parameters, min_ess=0)).fit(expected, loader(without(1), 3))
    torch.testing.assert_close(parameters_of(ours), parameters_of(expected), rtol=1e-9, atol=1e-9)
    flags = Ledger(tmp_path / "s").table()["flag"].to_pylist()
    assert flags == ["ok", "nonfinite_loss", "ok", "ok"]
    assert bool(data.tensors[0][1, 0].isnan())  # the user's data are as they were


def test_left_out_samples_are_said():
    data = toy_data(4)
    data.tensors[0][1, 0] = NAN
    with pytest.warns(UserWarning, match="1 samples held NaN or had a loss that is not finite"):
        trainer(GradMimic(parameters_of(toy(seed=1)), "head")).fit(toy(), loader(data))


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.filterwarnings("ignore:.*samples held NaN")
def test_when_no_sample_is_finite_the_loss_goes_through(parameters, tmp_path):
    module = toy(AllBroken)
    trainer(GradMimic(parameters_of(toy(seed=1)), parameters, ledger=tmp_path / "s")).fit(module, loader(toy_data(4)))
    assert not bool(module.head.weight.isfinite().any())
    assert set(Ledger(tmp_path / "s").table()["flag"].to_pylist()) == {"nonfinite_loss"}


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.filterwarnings("ignore:.*samples held NaN")
def test_when_every_sample_holds_nan_it_goes_through(parameters, tmp_path):
    data = toy_data(4)
    data.tensors[0][:, 0] = NAN
    module = toy()
    trainer(GradMimic(parameters_of(toy(seed=1)), parameters)).fit(module, loader(data))
    assert not bool(module.head.weight.isfinite().any())


class FillsGaps(Toy):
    """NaN stands for a value that was not measured, and infinity for a place to leave out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nan_to_num(x, nan=0.5, posinf=1.0))


def test_nan_that_is_meant_can_be_kept(tmp_path):
    gaps, filled = toy_data(4), toy_data(4)
    gaps.tensors[0][1, 0], gaps.tensors[0][2, 0] = NAN, INF
    filled.tensors[0][1, 0], filled.tensors[0][2, 0] = 0.5, 1.0
    modules = toy(FillsGaps), toy(FillsGaps)
    for module, data in zip(modules, (gaps, filled), strict=True):
        trainer(GradMimic(parameters_of(toy(seed=1)), "head", on_nonfinite="mask_loss")).fit(module, loader(data))
    torch.testing.assert_close(*map(parameters_of, modules), rtol=0, atol=0)


class MissingTargets(Toy):
    """Several targets of each sample, NaN where they were not measured, as models of molecules have them."""

    def targets(self, batch: Any) -> torch.Tensor:
        return batch[0][:, :3]

    def sample_losses(self, batch: Any) -> torch.Tensor:
        targets = self.targets(batch)
        known = targets.isfinite()
        errors = (self(torch.nan_to_num(batch[0], nan=0.5)) - torch.nan_to_num(targets)).square()
        return (errors * known).sum(1) / known.sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.sample_losses(batch).mean()


class MissingOfTheBatch(MissingTargets):
    sample_losses = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        targets = self.targets(batch)
        known = targets.isfinite()
        return (self(torch.nan_to_num(batch[0], nan=0.5)) - targets).square()[known].mean()


def with_gaps():
    data = toy_data(4)
    data.tensors[0][[1, 2, 3], [0, 2, 0]] = NAN
    return data


@pytest.mark.parametrize("kind", [FillsGaps, MissingTargets])
def test_nan_that_may_be_meant_asks_for_a_choice(kind, tmp_path):
    callback = GradMimic(parameters_of(toy(seed=1)), "head", ledger=tmp_path / "s")
    with pytest.raises(ValueError, match=r"the module looks for NaN itself .* Choose `on_nonfinite='mask_loss'`"):
        trainer(callback).fit(toy(kind), loader(with_gaps()))
    trainer(GradMimic(parameters_of(toy(seed=1)), "head")).fit(toy(kind), loader(toy_data(4)))  # no NaN, no question


def test_targets_that_are_missing_are_scored_by_those_that_are_there(tmp_path):
    module, reference, data = toy(MissingTargets), parameters_of(toy(seed=1)), with_gaps()
    module.lr = 0.0
    callback = GradMimic(reference, "head", on_nonfinite="mask_loss", ledger=tmp_path / "s")
    trainer(callback).fit(module, loader(data))
    gradients = oracles.per_sample_gradients(module, lambda net, batch: net.sample_losses(batch), data[:])
    head = {name: p for name, p in module.named_parameters() if name.startswith("head")}
    scores = torch.tensor(Ledger(tmp_path / "s").table()["score"].to_pylist())
    torch.testing.assert_close(scores, oracles.mimic_scores(gradients, reference, head).float())


def test_a_mean_over_the_targets_that_are_there_is_refused():
    with pytest.raises(ValueError, match="samples are chosen by a mask"):
        trainer(GradMimic(parameters_of(toy(seed=1)), "head")).fit(toy(MissingOfTheBatch), loader(with_gaps()))


def test_infinity_in_a_batch_is_not_touched():
    data = toy_data(4)
    data.tensors[0][2, 0] = INF
    modules = toy(FillsGaps), toy(FillsGaps)
    for module, how in zip(modules, ("mask", "mask_loss"), strict=True):
        trainer(GradMimic(parameters_of(toy(seed=1)), "head", on_nonfinite=how)).fit(module, loader(data))
    torch.testing.assert_close(*map(parameters_of, modules), rtol=0, atol=0)


class AllBroken(Broken):
    bad = (0, 1, 2, 3)


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.parametrize(("kind", "positions"), [(Broken, r"\[1\]"), (AllBroken, r"\[0, 1, 2, 3\]")])
def test_on_request_such_a_sample_stops_training(parameters, kind, positions):
    module = toy(kind)
    before = parameters_of(module)
    callback = GradMimic(parameters_of(toy(seed=1)), parameters, on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match=rf"positions {positions} of the batch"):
        trainer(callback).fit(module, loader(toy_data(4)))
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.filterwarnings("ignore:.*samples held NaN")
def test_only_scoring_leaves_a_broken_sample_alone(parameters):
    plain, ours = toy(Broken), toy(Broken)
    trainer().fit(plain, loader(toy_data(4)))
    trainer(GradMimic(parameters_of(toy(seed=1)), parameters, reweight="none")).fit(ours, loader(toy_data(4)))
    torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU TESTS NOT RUN: this machine has no CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("parameters", ["head", "all"])
def test_a_gpu_scores_like_the_cpu(parameters, precision, tmp_path):
    module, data = half(WithLosses), toy_data(8, dtype=torch.float32)
    module.lr = 0.0
    reference = parameters_of(toy(seed=1))
    callback = GradMimic(reference, parameters, ledger=tmp_path / "s")
    trainer(callback, accelerator="gpu", precision=precision).fit(module, loader(data, pin_memory=True))
    gradients = oracles.per_sample_gradients(module.cpu(), losses_of, data[:])
    chosen = {n: p for n, p in module.named_parameters() if parameters == "all" or n.startswith(parameters)}
    expected = oracles.mimic_scores(gradients, reference, chosen)
    scores = torch.tensor(Ledger(tmp_path / "s").table().sort_by("id")["score"].to_pylist())
    tolerance = {"32-true": 1e-4, "16-mixed": 5e-3, "bf16-mixed": 5e-2}[precision]
    torch.testing.assert_close(scores, expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU TESTS NOT RUN: this machine has no CUDA device")
@pytest.mark.parametrize("parameters", ["head", "all"])
def test_a_scored_step_does_not_wait_for_the_gpu(parameters):
    class Strict(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            # The first step of an epoch looks at the graph, which may wait.
            torch.cuda.set_sync_debug_mode("error" if batch_idx > 0 else "default")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    callback = GradMimic(parameters_of(toy(seed=1)), parameters)
    module = half(Strict)
    trainer(callback, accelerator="gpu").fit(module, loader(toy_data(16, dtype=torch.float32)))
