"""Weighted gradients formed from kept output gradients, beside those of a second pass and of a loop over samples."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

import oracles
from lightning_mimic import GradMimic, Ledger, MimicError, Reweighter
from lightning_mimic.scorers import EndpointScore, GradNorm, RhoLoss
from support.networks import made
from support.toys import HIDDEN, Toy, WithLosses, loader, losses_of, parameters_of, toy, toy_data, trainer

NETS = [
    "mlp of tokens",
    "conv net",
    "torchvision vit",
    "timm vit, qk norm, registers, dropout",
    "timm vit, attention pooling",
    "CLIP image tower",
    "CLIP text tower, class token",
    "torchvision swin",
    "torchvision resnet in eval mode",
]


def moved(net: nn.Module) -> dict[str, Tensor]:
    """A reference near the network."""
    generator = torch.Generator().manual_seed(1)
    return {
        n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in net.named_parameters()
    }


def step_of(net: nn.Module, batch: Any, keep: bool = True, run: Any = Tensor.backward, **settings: Any) -> Any:
    """One step from the same weights; returns its result and every parameter's gradient."""
    net = copy.deepcopy(net)
    settings = {"reference": moved(net), "parameters": "all", "temperature": 0.3, "min_ess": 0.0} | settings
    torch.manual_seed(3)  # the same dropout
    reweighter = Reweighter(net, diagnose_reference=False, keep_output_gradients=keep, **settings)
    with reweighter, reweighter.step(batch) as step:
        result = step.backward(losses_of(net, step.batch).mean(), run)
    return result, {n: p.grad for n, p in net.named_parameters()}


def keeping(module: Toy) -> Reweighter:
    return Reweighter(module, parameters_of(toy(seed=1)), "all", diagnose_reference=False, keep_output_gradients=True)


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    """All gradients, to within the rounding of the largest."""
    assert {n for n, g in actual.items() if g is None} == {n for n, g in expected.items() if g is None}
    size = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=tolerance, atol=tolerance * size, msg=name)


def targets_of(net: nn.Module, x: Tensor) -> Tensor:
    return torch.arange(len(x)) % net(x).shape[-1]


@pytest.mark.parametrize("kind", NETS)
def test_the_gradients_are_those_of_a_second_pass_and_of_a_loop(kind):
    net, x, _ = made(kind)
    if kind == "mlp of tokens":
        net = nn.Sequential(net, nn.Flatten())
    batch = (x, targets_of(net, x))
    result, kept = step_of(net, batch)
    plain, expected = step_of(net, batch, keep=False)
    torch.testing.assert_close(result.scores, plain.scores, rtol=1e-12, atol=1e-12)
    assert_same(kept, expected, 1e-12)
    torch.manual_seed(3)
    by_hand = oracles.per_sample_gradients(net, losses_of, batch)
    weights = result.weights.weights
    assert weights.max() > 1.05 * weights.min(), "the weights do nothing"
    assert_same(kept, {n: torch.tensordot(weights, g, 1) for n, g in by_hand.items()}, 1e-11)


@pytest.mark.parametrize("kind", ["torchvision vit", "conv net", "CLIP text tower"])
def test_in_single_precision_within_its_rounding(kind):
    net, x, _ = made(kind, dtype=torch.float32)
    batch = (x, targets_of(net, x))
    assert_same(step_of(net, batch)[1], step_of(net, batch, keep=False)[1], 1e-6)


class Shared(nn.Module):
    """A layer that is called twice in a row, an embedding that is the head's weight, and a factor used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.twice = nn.Linear(4, 4)
        self.factor = nn.Parameter(torch.rand(4) + 0.5)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(self.twice(self.embed(x) * self.factor))
        return self.head((torch.tanh(hidden) * self.factor).mean(1))


def test_reused_and_tied_parameters():
    torch.manual_seed(0)
    net, x = Shared().double(), torch.randint(7, (5, 3))
    batch = (x, torch.arange(5))
    result, kept = step_of(net, batch)
    by_hand = oracles.per_sample_gradients(net, losses_of, batch)
    assert_same(kept, {n: torch.tensordot(result.weights.weights, g, 1) for n, g in by_hand.items()}, 1e-12)
    assert_same(kept, step_of(net, batch, keep=False)[1], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_a_second_pass_gives_within_its_rounding(dtype):
    net, x, _ = made("timm vit", dtype=torch.float32)
    batch = (x, targets_of(net, x))

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return self.net(x).float()

    _, kept = step_of(Mixed(), batch)
    _, expected = step_of(Mixed(), batch, keep=False)
    _, exact = step_of(net, batch)
    size = sum(g.square().sum() for g in exact.values()) ** 0.5
    error = sum((kept[f"net.{n}"] - g).square().sum() for n, g in exact.items()) ** 0.5
    other = sum((expected[f"net.{n}"] - g).square().sum() for n, g in exact.items()) ** 0.5
    assert all(g.dtype == torch.float32 for g in kept.values())
    assert 0 < error < 1.5 * other + 1e-3 * size < 0.1 * size


def scaled(scale: float) -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))]}


class Overflows(WithLosses):
    """One sample's gradient leaves float16's range under a large scale."""

    def sample_losses(self, batch: Any) -> Tensor:
        losses = super().sample_losses(batch)
        return losses * torch.where(torch.arange(len(losses)) == 2, 1e3, 1.0)


@pytest.mark.parametrize("kind", [WithLosses, Overflows])
def test_a_gradient_scaler_sees_what_overflows(kind, tmp_path):
    module, options = toy(kind, dtype=torch.float32), scaled(2.0**16)
    before = parameters_of(module)
    callback = GradMimic(parameters_of(toy(seed=1)), "all", keep_output_gradients=True, ledger=tmp_path / "s")
    trainer(callback, **options).fit(module, loader(toy_data(4, dtype=torch.float32)))
    flags = [row["flag"] for row in Ledger(tmp_path / "s").table().to_pylist()]
    if kind is Overflows:
        assert flags == ["ok", "ok", "overflow", "ok"]
        assert options["plugins"][0].scaler.get_scale() == 2.0**15
        torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)
        return
    assert flags == ["ok"] * 4
    expected = toy(kind, dtype=torch.float32)
    trainer(GradMimic(parameters_of(toy(seed=1)), "all")).fit(expected, loader(toy_data(4, dtype=torch.float32)))
    torch.testing.assert_close(parameters_of(module), parameters_of(expected), rtol=1e-2, atol=1e-2)


class Extras(Toy):
    """Returns more than its loss, and keeps it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.last = {"loss": super().training_step(batch, batch_idx), "label": batch[1], "predicted": batch[1] * 0}
        return self.last


class Pair(WithLosses):
    """Half of it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)
        self.middle = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(torch.tanh(self.body(x))))


@pytest.mark.filterwarnings("ignore:.*samples held NaN")
@pytest.mark.parametrize("kind", [Toy, WithLosses, Extras, Pair])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, {"gradient_clip_val": 0.1, "precision": "64-true"}],
)
def test_a_fit_is_the_fit_with_a_second_pass(kind, options, tmp_path):
    data = toy_data(12)
    data.tensors[0][[2, 9]] = float("nan")
    fits = []
    for keep in (False, True):
        module, ledger = toy(kind), tmp_path / str(keep)
        callback = GradMimic(parameters_of(toy(kind, 1)), "all", keep_output_gradients=keep, ledger=ledger)
        trainer(callback, epochs=2, **options).fit(module, loader(data))
        fits.append((parameters_of(module), Ledger(ledger).table().to_pylist()))
    torch.testing.assert_close(fits[1][0], fits[0][0], rtol=1e-11, atol=1e-11)
    assert len(fits[1][1]) == 24
    for one, two in zip(fits[0][1], fits[1][1], strict=True):
        assert {n: type(v) for n, v in one.items()} == {n: type(v) for n, v in two.items()}
        assert one["flag"] == two["flag"]
        numbers = [n for n, v in one.items() if isinstance(v, float)]
        assert [one[n] for n in numbers] == pytest.approx([two[n] for n in numbers], rel=1e-6)
    if kind is Extras:
        assert all(row["label"] is not None for row in fits[1][1])
        assert module.last["loss"].grad_fn.name() != "_AttachedBackward"  # what it returned is left as it was


def test_what_the_backward_pass_multiplies_the_loss_by_stays_in_the_gradients():
    net, data = toy(), toy_data(4)[:]
    _, once = step_of(net, data)
    _, seven = step_of(net, data, run=lambda loss: (loss * 7).backward())
    assert_same(seven, {n: 7 * g for n, g in once.items()}, 1e-12)
    _, twice = step_of(net, data, run=lambda loss: [(loss / 2).backward(retain_graph=True)])
    assert_same(twice, {n: g / 2 for n, g in once.items()}, 1e-12)


def test_the_value_of_the_loss_stays_and_other_losses_of_the_same_pass_too():
    module, (x, y) = toy(), toy_data(4)[:]
    with keeping(module) as reweighter, reweighter.step((x, y)) as step:
        hidden = torch.tanh(module.body(x))
        given, seen = F.cross_entropy(module.head(hidden), y), []
        step.backward(given, lambda loss: [seen.append(loss), loss.backward()])
        assert seen[0] is not given
        torch.testing.assert_close(seen[0], given.detach(), rtol=0, atol=0)
        before = module.body.weight.grad.clone()
        hidden.square().sum().backward()  # the graph is still there
        (expected,) = torch.autograd.grad(torch.tanh(module.body(x)).square().sum(), module.body.weight)
        torch.testing.assert_close(module.body.weight.grad - before, expected)


def test_hooks_after_accumulation_see_the_weighted_gradient_once():
    module, seen = toy(), []
    module.body.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    batch = toy_data(4)[:]
    with keeping(module) as reweighter, reweighter.step(batch) as step:
        step.backward(losses_of(module, batch).mean())
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], module.body.weight.grad, rtol=0, atol=0)


class Sometimes(WithLosses):
    """Half of the batches leave a layer out."""

    uses = True

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(self.extra(hidden) if self.uses else hidden)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.uses = batch_idx % 2 == 0


def test_a_layer_that_a_batch_does_not_use():
    found = []
    for keep in (False, True):
        module = toy(Sometimes)
        callback = GradMimic(parameters_of(toy(Sometimes, 1)), "all", keep_output_gradients=keep)
        trainer(callback).fit(module, loader(toy_data(12)))
        found.append(parameters_of(module))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_nothing_of_a_step_outlives_it():
    module, batch = toy(), toy_data(4)[:]
    seen: list[Any] = []
    module.body.register_forward_hook(lambda layer, args, output: seen.append(weakref.ref(output)))
    with keeping(module) as reweighter:
        for _ in range(2):  # the first step has checks of its own
            seen.clear()
            gc.collect()
            gc.disable()
            try:
                with reweighter.step(batch) as step:
                    step.backward(losses_of(module, batch).mean())
                assert [each() for each in seen] == [None]
            finally:
                gc.enable()


# What is refused


class Normalised(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


class Checkpointed(WithLosses):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class InputGradient(WithLosses):
    def sample_losses(self, batch: Any) -> Tensor:
        self.given = batch[0].clone().requires_grad_()
        return super().sample_losses((self.given, batch[1]))


class Hooked(WithLosses):
    """A hook that was registered after the run began."""

    def on_train_start(self) -> None:
        self.body.weight.register_hook(lambda gradient: 2 * gradient)


class Mixing(WithLosses):
    def sample_losses(self, batch: Any) -> Tensor:
        losses = super().sample_losses(batch)
        return losses + losses.roll(1) / 2


class Penalised(WithLosses):
    """A penalty that begins within an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        penalty = self.body.weight.square().sum() if batch_idx == 2 else 0.0
        return self.sample_losses(batch).mean() + penalty


REFUSED: dict[str, tuple[type[Toy], Any, str]] = {
    "batch normalisation": (Normalised, "all", "batch normalisation in training mode .* `keep_output_gradients` out"),
    "activation checkpointing": (Checkpointed, "all", "activation checkpointing.* Leave one of the two out"),
    "parameters that are not scored": (Toy, "body", "reaches others, too: 'head.bias', 'head.weight'. Score all"),
    "an input with a gradient": (InputGradient, "all", "reaches others, too: 'a tensor outside the module'"),
    "a hook on a parameter": (Hooked, "all", "'body.weight' carry gradient hooks"),
    "losses that mix samples": (Mixing, "all", "the scores come from the losses, differentiated twice. Leave it out"),
    "one layer": (Toy, "head", "the scores come from one layer's output gradient"),
    "a penalty": (Penalised, "all", "the loss reaches 1 trainable parameters around .*'body.weight'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_whose_gradients_it_would_not_give_is_refused(case):
    kind, parameters, message = REFUSED[case]
    callback = GradMimic(parameters_of(toy(kind, 1)), parameters, keep_output_gradients=True)
    with pytest.raises(MimicError, match=message):
        trainer(callback).fit(toy(kind), loader(toy_data(12)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reweight": "target"}, "`reweight='target'`"),
        ({"reweight": "none"}, "`reweight='none'`"),
        ({"uncovered": "mean"}, "`uncovered='mean'`"),
        ({"scorer": GradNorm(), "reference": None}, "the norms of per-sample gradients, of one layer"),
        ({"scorer": EndpointScore()}, "of one layer, are needed"),
        ({"scorer": RhoLoss(), "parameters": None}, "RhoLoss takes no gradients"),
    ],
)
def test_settings_under_which_it_does_nothing_or_wrong_are_refused(settings, message):
    given = {"reference": parameters_of(toy()), "parameters": "all"} | settings
    with pytest.raises(MimicError, match=rf"^`keep_output_gradients` .*{message}.*; leave it out\.$"):
        GradMimic(keep_output_gradients=True, **given)


def test_a_second_pass_from_the_same_loss_is_refused():
    def twice(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    with pytest.raises(MimicError, match="a second backward pass"):
        step_of(toy(), toy_data(4)[:], run=twice)


def test_scoring_alone_goes_without():
    module = toy(WithLosses)
    batch = toy_data(4)[:]
    with keeping(module) as reweighter, reweighter.step(batch) as step:
        loss = module.sample_losses(batch).mean()
        assert step.after_forward(loss, backward_follows=False) is loss
    gradients = oracles.per_sample_gradients(module, losses_of, batch)
    expected = oracles.mimic_scores(gradients, parameters_of(toy(seed=1)), parameters_of(module))
    torch.testing.assert_close(step.finish().scores, expected)
