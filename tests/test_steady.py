"""What could go wrong between the first step and the later ones, or beside what is looked at."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import oracles
from lightning_mimic import GradMimic, Ledger, ReferenceLoadError
from lightning_mimic.gradients.layer_hooks import LayerCall
from lightning_mimic.reference import match_reference
from lightning_mimic.scorers import ReferenceLoss
from support.oracle_training import trained_by_oracle
from support.toys import (
    CLASSES,
    FEATURES,
    HIDDEN,
    Toy,
    WithLosses,
    loader,
    losses_of,
    parameters_of,
    toy,
    toy_data,
    trainer,
)


class TimeFirst(WithLosses):
    """Tokens whose losses are taken with the time first, and summed over it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 5 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).view(len(x), 5, HIDDEN))

    def sample_losses(self, batch: Any) -> Tensor:
        x, y = batch
        logits = self(x).transpose(0, 1)
        return F.cross_entropy(logits.permute(1, 2, 0), y[:, None].expand(-1, 5), reduction="none").mean(1)


class TimeFirstUnmodified(TimeFirst):
    sample_losses = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return TimeFirst.sample_losses(self, batch).mean()


@pytest.mark.parametrize("kind", [TimeFirst, TimeFirstUnmodified])
def test_a_later_batch_as_long_as_another_axis_is_not_gated_there(kind):
    data, ours, oracle = toy_data(13), toy(kind), toy(kind)  # batches of 8 and of 5, the tokens' number
    reference = parameters_of(toy(kind, seed=1))
    trainer(GradMimic(reference, "all", temperature=0.7, min_ess=0)).fit(ours, loader(data, 8))
    losses = lambda m, b: TimeFirst.sample_losses(m, b)  # noqa: E731
    trained_by_oracle(oracle, [data[:8], data[8:]], reference, targets=list(reference), losses=losses)
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)


def test_another_term_of_the_loss_is_not_scored_with_the_samples_losses(tmp_path):
    class Confident(WithLosses):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            p = self(batch[0]).softmax(1).mean(0)
            return self.sample_losses(batch).mean() + 2 * (p * p.log()).sum()

        def forward(self, x: Tensor) -> Tensor:
            # Both terms share one call of every layer.
            if getattr(self, "kept", None) is None or self.kept[0] is not x:
                self.kept = (x, super().forward(x))
            return self.kept[1]

    module, data, reference = toy(Confident), toy_data(4), parameters_of(toy(seed=1))
    callback = GradMimic(reference, "head", uncovered="mean", ledger=tmp_path / "s")
    trainer(callback).fit(module, loader(data))
    gradients = oracles.per_sample_gradients(toy(), losses_of, data[:])
    expected = oracles.mimic_scores(gradients, reference, dict(toy().head.named_parameters(prefix="head")))
    scores = torch.tensor(Ledger(tmp_path / "s").table()["score"].to_pylist())
    torch.testing.assert_close(scores, expected.float())


@pytest.mark.parametrize("uncovered", ["error", "mean"])
def test_tolerating_what_goes_around_takes_no_weights_from_what_does_not(uncovered):
    data, ours, oracle, reference = toy_data(8), toy(), toy(), parameters_of(toy(seed=1))
    callback = GradMimic(reference, "body", temperature=0.7, min_ess=0, uncovered=uncovered)
    trainer(callback).fit(ours, loader(data))
    trained_by_oracle(oracle, [data[:4], data[4:]], reference, targets=["body.weight", "body.bias"])
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", [True, False])
def test_targets_left_out_by_either_of_two_losses_are_seen(first):
    class Two(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits, y = self(batch[0]), batch[1]
            fewer = torch.where(batch[0][:, 0] > 0, -100, y)
            return sum(F.cross_entropy(logits, t) for t in ((fewer, y) if first else (y, fewer)))

    with pytest.raises(ValueError, match=r"different numbers of them \(ignore_index\)"):
        trainer(GradMimic(parameters_of(toy(seed=1)), "head")).fit(toy(Two), loader(toy_data(8)))


class LeavesOut(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        y = torch.where(batch[0][:, 0] > 0, -100, batch[1]) if batch_idx == 2 else batch[1]
        return F.cross_entropy(self(batch[0]), y)


class NotTheMean(WithLosses):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.sample_losses(batch)
        return losses.topk(2).values.mean() if batch_idx == 2 else losses.mean()


@pytest.mark.parametrize(
    ("kind", "message"),
    [(LeavesOut, "samples have different numbers of them"), (NotTheMean, "does not return the plain mean")],
)
@pytest.mark.parametrize("parameters", ["head", "all"])
def test_scores_in_doubt_stop_training_and_are_not_kept(kind, message, parameters, tmp_path):
    callback = GradMimic(parameters_of(toy(seed=1)), parameters, ledger=tmp_path / "s")
    with pytest.raises(ValueError, match=message):
        trainer(callback).fit(toy(kind), loader(toy_data(20)))
    assert Ledger(tmp_path / "s").table()["batch"].to_pylist() == [0] * 4 + [1] * 4  # what came before


@pytest.mark.parametrize("reweight", ["all", "target"])
def test_gradient_hooks_of_others_on_what_is_scored_are_refused(reweight):
    class Mixed(WithLosses):
        def sample_losses(self, batch: Any) -> Tensor:
            logits = self(batch[0])
            return F.cross_entropy(logits - logits.mean(0), batch[1], reduction="none")

    module = toy(Mixed if reweight == "all" else Toy)
    module.head.weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    with pytest.raises(ValueError, match=r"'head\.weight' carry gradient hooks of their own"):
        trainer(GradMimic(parameters_of(toy(seed=1)), "head", reweight=reweight)).fit(module, loader(toy_data(8)))


class Coupled(Toy):
    """Features that see each other, below a head that starts at zero and hides it."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden - hidden.roll(1, 0))


def test_a_head_that_starts_at_zero_hides_nothing_for_long():
    with pytest.raises(ValueError, match="the loss of one sample shows in the rows of others"):
        trainer(GradMimic(parameters_of(toy(seed=1)), "all")).fit(toy(Coupled), loader(toy_data(20)))


def test_a_unit_that_stays_dead_is_not_looked_at_for_ever(monkeypatch):
    from lightning_mimic.reweighting import choice, reweighter

    looks = []
    choose = choice.choose_method
    monkeypatch.setattr(reweighter, "choose_method", lambda *given: looks.append(1) or choose(*given))

    class Dead(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)) * 0)

    trainer(GradMimic(parameters_of(toy(seed=1)), "all")).fit(toy(Dead), loader(toy_data(4 * (choice.MAX_CHECKS + 5))))
    assert len(looks) == choice.MAX_CHECKS


def test_losses_of_a_reference_for_other_samples_are_refused():
    class PerView(WithLosses):
        def sample_losses(self, batch: Any) -> Tensor:
            return super().sample_losses(batch).repeat_interleave(2)

    callback = GradMimic(toy(PerView, seed=1), scorer=ReferenceLoss())
    with pytest.raises(ValueError, match=r"the reference's `sample_losses` returned shape \(8,\), the model's \(4,\)"):
        trainer(callback).fit(toy(WithLosses), loader(toy_data(8)))


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_a_layer_that_later_gets_fewer_rows_is_refused(parameters):
    class Fewer(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            keep = slice(0, 3 if batch_idx else None)
            return F.cross_entropy(self(batch[0][keep]), batch[1][keep])

    with pytest.raises(ValueError, match=r"rows? for (each of )?4 samples"):
        trainer(GradMimic(parameters_of(toy(seed=1)), parameters)).fit(toy(Fewer), loader(toy_data(8)))


@pytest.mark.slow
def test_nothing_of_the_forward_pass_is_held_during_the_backward_pass():
    class Looks(Toy):
        def on_before_backward(self, loss: Tensor) -> None:
            gc.collect()
            self.held = [each for each in gc.get_objects() if type(each) is LayerCall]

    module = toy(Looks)
    trainer(GradMimic(parameters_of(toy(seed=1)), "all")).fit(module, loader(toy_data(8)))
    assert module.held == []


class Blocks(Toy):
    """Fused attention, a scale and plain layers, recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 4 * HIDDEN)
        self.block = nn.TransformerEncoderLayer(HIDDEN, 2, 2 * HIDDEN, dropout=0.0, batch_first=True)
        self.gamma = nn.Parameter(torch.rand(HIDDEN))

    def compute(self, tokens: Tensor) -> Tensor:
        return tokens + self.gamma * self.block(tokens)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.body(x)).view(len(x), 4, HIDDEN)
        return self.head(torch.utils.checkpoint.checkpoint(self.compute, tokens, use_reentrant=False).mean(1))


def test_checkpointed_attention_is_exact():
    data, ours, oracle, reference = toy_data(6), toy(Blocks), toy(Blocks), parameters_of(toy(Blocks, seed=1))
    trainer(GradMimic(reference, "all", temperature=0.7, min_ess=0)).fit(ours, loader(data, 3))
    trained_by_oracle(oracle, [data[:3], data[3:]], reference, targets=list(reference))
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scale", "accumulate"), [(2.0**16, 1), (2.0**22, 8)])
def test_a_confidently_contradicted_sample_overflows_no_sooner_in_the_scoring_pass(scale, accumulate, tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    class Certain(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head.bias.data = torch.tensor([20.0] + [0.0] * (CLASSES - 1))

    module = toy(Certain, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    callback = GradMimic(parameters_of(toy(seed=1)), "all", ledger=tmp_path / "s")
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    options = {"plugins": plugins, "accumulate_grad_batches": accumulate}
    trainer(callback, **options).fit(module, loader(toy_data(64, dtype=torch.float32), 64))
    assert set(Ledger(tmp_path / "s").table()["flag"].to_pylist()) == {"ok"}


def test_two_whole_models_in_one_file_are_not_chosen_between():
    names = {"head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
    file = {f"{prefix}.{name}": torch.ones(1) for prefix in ("model", "ema") for name in names}
    with pytest.raises(ReferenceLoadError, match=r"fits several of its tensors: 'ema\.head\.weight', 'model\.head"):
        match_reference(file | {"ema.n_averaged": torch.ones(1)}, names)
