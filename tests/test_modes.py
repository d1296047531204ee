"""Compiled modules, activation checkpointing, fused attention, and what changes while training goes on."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

import oracles
from lightning_mimic import GradMimic, Ledger, Reweighter
from support.oracle_training import trained_by_oracle
from support.toys import FEATURES, HIDDEN, Toy, WithLosses, loader, losses_of, parameters_of, toy, toy_data, trainer


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(module: Toy, part: str) -> Any:
    if part == "whole":
        return torch.compile(module, backend="aot_eager")
    if part == "call":
        module.compile(backend="aot_eager")
        return module
    if part == "losses":
        module.sample_losses = torch.compile(module.sample_losses, backend="aot_eager")
        return module
    if part == "method":
        module.forward = torch.compile(module.forward, backend="aot_eager")
        return module
    if part == "layers":
        module.body = torch.compile(module.body, backend="aot_eager")
    module.head = torch.compile(module.head, backend="aot_eager")
    return module


class MixingLosses(WithLosses):
    """Losses that depend on other samples, so that they are differentiated twice."""

    def sample_losses(self, batch: Any) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits - logits.mean(0), batch[1], reduction="none")


# Dynamo looks at what it was not meant to look at.
dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")


@pytest.mark.slow
@dynamo
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("part", ["whole", "layers", "call", "method"])
@pytest.mark.parametrize("kind", [Toy, WithLosses])
def test_a_compiled_module_is_scored_as_the_module(kind, part, tmp_path):
    reference, data, eager, ours = parameters_of(toy(seed=1)), loader(toy_data(14)), toy(kind), toy(kind)
    settings = {"temperature": 0.7, "min_ess": 0}
    trainer(GradMimic(reference, "head", **settings, ledger=tmp_path / "eager"), epochs=2).fit(eager, data)
    callback = GradMimic(reference, "head", **settings, ledger=tmp_path / "ours")
    trainer(callback, epochs=2).fit(compiled(ours, part), data)
    pairs = zip(eager.parameters(), ours.parameters(), strict=True)
    torch.testing.assert_close(*zip(*pairs, strict=True), rtol=1e-9, atol=1e-9)
    scores = [torch.tensor(Ledger(tmp_path / n).table()["score"].to_pylist()) for n in ("eager", "ours")]
    torch.testing.assert_close(*scores)


@pytest.mark.slow
@dynamo
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("part", ["whole", "layers", "call", "method", "head"])
@pytest.mark.parametrize("kind", [Toy, WithLosses, MixingLosses])
def test_a_second_pass_over_a_compiled_module_is_refused_before_it_is_trained(kind, part):
    before = parameters_of(toy(kind))
    module = compiled(toy(kind), part)
    with pytest.raises(ValueError, match=r"takes a second reverse pass, which torch.compile leaves no room for"):
        trainer(GradMimic(parameters_of(toy(seed=1)), "all")).fit(module, loader(toy_data(8)))
    trained = {name.replace("_orig_mod.", ""): p.detach() for name, p in module.named_parameters()}
    torch.testing.assert_close(trained, before, rtol=0, atol=0)


class UsedTwice(WithLosses):
    """The head's weight is used outside of its call, too."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden + F.linear(hidden, self.head.weight) @ self.head.weight)


@pytest.mark.slow
@dynamo
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", [MixingLosses, UsedTwice])
@pytest.mark.parametrize("part", ["call", "losses"])
def test_a_compiled_module_hides_nothing_from_the_first_step(kind, part):
    module = compiled(toy(kind), part)
    with pytest.raises(ValueError, match=r"takes a second reverse pass, which torch.compile leaves no room for"):
        trainer(GradMimic(parameters_of(toy(seed=1)), "head")).fit(module, loader(toy_data(8)))


@pytest.mark.slow
@dynamo
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("kind", "part"), [(Toy, "whole"), (Toy, "layers"), (WithLosses, "call"), (WithLosses, "method")]
)
def test_a_compiled_module_with_batches_of_any_size_is_not_compiled_again_and_again(kind, part):
    batches = list(zip(*[part.split([4, 7, 5, 3, 4]) for part in toy_data(23)[:]], strict=True))
    found, graphs = {}, []
    for name in ("eager", "compiled"):
        module = toy(kind)
        model = module if name == "eager" else compiled(module, part)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        scores = []
        with Reweighter(model, parameters_of(toy(seed=1)), "head", diagnose_reference=False) as reweighter:
            for epoch in range(4):
                for x, y in batches:
                    with reweighter.step((x, y), epoch=epoch) as step:
                        loss = F.cross_entropy(model(x), y) if kind is Toy else model.sample_losses((x, y)).mean()
                        scores.append(step.backward(loss).scores)
                    optimizer.step()
                    optimizer.zero_grad()
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        found[name] = torch.cat(scores)
    torch.testing.assert_close(found["compiled"], found["eager"], rtol=1e-9, atol=1e-9)
    assert 0 < graphs[-2] == graphs[-1]


class Attentive(WithLosses):
    """A position embedding that is indexed, so that only the losses can tell; below attention."""

    recompute = False

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 4 * HIDDEN)
        self.position = nn.Parameter(torch.randn(5, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return torch.utils.checkpoint.checkpoint(self.attend, x, use_reentrant=False)
        return self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.body(x)).view(len(x), 1, 4, HIDDEN) + self.position[:4]
        return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2)))


class Recomputed(Attentive):
    recompute = True


class Differences(Attentive):
    """Every sample's loss depends on another one."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits - logits.roll(1, 0)


def test_parameters_below_fused_attention_are_refused_by_name():
    message = (
        r"where 'position' is used.*Scoring from the losses alone is not possible either: .*'position' lie below.*"
        "`math_attention=True`"
    )
    with pytest.raises(ValueError, match=message):
        trainer(GradMimic(parameters_of(toy(Attentive, seed=1)), "position")).fit(toy(Differences), loader(toy_data(8)))


@pytest.mark.parametrize("kind", [Attentive, Recomputed, Differences])
@pytest.mark.parametrize("parameters", ["position", "all"])
def test_they_are_scored_where_math_attention_is_allowed(kind, parameters):
    reference, data, ours, oracle = parameters_of(toy(kind, seed=1)), toy_data(8), toy(kind), toy(kind)
    callback = GradMimic(reference, parameters, temperature=0.7, min_ess=0, math_attention=True)
    trainer(callback).fit(ours, loader(data))
    targets = ["position"] if parameters == "position" else list(reference)
    trained_by_oracle(oracle, [data[:4], data[4:]], reference, targets=targets)
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-7, atol=1e-7)


class Sometimes(Toy):
    """A layer that some batches do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(HIDDEN, HIDDEN)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        self.step += 1
        return self.head(hidden if self.step == 2 else torch.tanh(self.extra(hidden)))


def test_a_layer_that_a_later_batch_does_not_use_counts_zero_there(tmp_path):
    module, other, data = toy(Sometimes), toy(Sometimes, seed=1), toy_data(8)
    module.lr = 0.0
    trainer(GradMimic(parameters_of(other), "all", ledger=tmp_path / "s")).fit(module, loader(data))
    module.step = 0
    expected = []
    for batch in (data[:4], data[4:]):
        gradients = oracles.per_sample_gradients(module, losses_of, batch)
        expected.append(oracles.mimic_scores(gradients, parameters_of(other), parameters_of(module)))
    scores = torch.tensor(Ledger(tmp_path / "s").table()["score"].to_pylist())
    torch.testing.assert_close(scores, torch.cat(expected).float())


class MixesLater(WithLosses):
    epoch = 0

    def sample_losses(self, batch: Any) -> Tensor:
        logits = self(batch[0])
        mixed = logits - logits.mean(0) if self.current_epoch else logits
        return F.cross_entropy(mixed, batch[1], reduction="none")


def test_a_loss_that_begins_to_mix_samples_stops_training():
    with pytest.raises(ValueError, match=r"can no longer be scored as in the first step .* do not mix"):
        trainer(GradMimic(parameters_of(toy(seed=1)), "head"), epochs=2).fit(toy(MixesLater), loader(toy_data(8)))


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_a_copy_of_the_module_made_while_it_trains_is_free_of_hooks(parameters):
    copies: list[Toy] = []

    class Copying(WithLosses):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not batch_idx:
                copies.append(copy.deepcopy(self))
            return super().training_step(batch, batch_idx)

    module, data = toy(Copying), toy_data(8)
    trainer(GradMimic(parameters_of(toy(seed=1)), parameters), WeightAveraging()).fit(module, loader(data))
    gradients = torch.autograd.grad(copies[0].sample_losses(data[:]).mean(), list(copies[0].parameters()))
    plain = toy(WithLosses)
    expected = torch.autograd.grad(plain.sample_losses(data[:]).mean(), list(plain.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parameters", ["body", "all"])
def test_after_fit_the_module_is_as_it_was(parameters):
    module = toy(WithLosses)
    trainer(GradMimic(parameters_of(toy(seed=1)), parameters, reweight="target")).fit(module, loader(toy_data(8)))
    assert not {"training_step", "sample_losses"} & vars(module).keys()
    assert not any(m._forward_hooks for m in module.modules())
    assert not any(p._backward_hooks for p in module.parameters())


@pytest.mark.parametrize("parameters", ["body", "all"])
def test_only_scoring_many_layers_leaves_training_bit_identical(parameters, tmp_path):
    data = toy_data(14, dtype=torch.float32)
    plain, scored = toy(dtype=torch.float32), toy(dtype=torch.float32)
    trainer(epochs=2).fit(plain, loader(data))
    callback = GradMimic(parameters_of(toy(seed=1)), parameters, reweight="none", ledger=tmp_path / "s")
    trainer(callback, epochs=2).fit(scored, loader(data))
    torch.testing.assert_close(parameters_of(scored), parameters_of(plain), rtol=0, atol=0)
    assert Ledger(tmp_path / "s").table()["score"].null_count == 0
