"""Transposed convolutions, PReLU, Bilinear, RMSNorm and registered layers within whole networks and in a fit."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.errors import MimicError
from lightning_mimic.gradients import LayerRule, layer_rules, register_layer_rule
from lightning_mimic.gradients.layer_hooks import LayerCalls, LayerHooks
from lightning_mimic.scorers import GradNorm
from oracles import mimic_scores, per_sample_gradients
from support.gradient_checks import Ad, assert_exact, losses_of, traced, vectors_of
from support.oracle_training import trained_by_oracle
from support.toys import CLASSES, FEATURES, HIDDEN, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer
from support.toys import losses_of as toy_losses


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(layer_rules, "_REGISTERED", {})


class Scale(nn.Module):
    def __init__(self, features: int = HIDDEN) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


SCALE = LayerRule(lambda layer, p, x: x * p["factor"], ("factor",))


D, B, T = 4, 3, 2
NETS: dict[str, Any] = {
    "decoder": (
        lambda n, x: n.c(torch.tanh(n.a(x)), output_size=[8]).tanh() + n.c(n.p(x), [8]),
        lambda: {"a": nn.ConvTranspose1d(D, D, 3, padding=1), "c": nn.ConvTranspose1d(D, 2, 4, 2), "p": nn.PReLU(D)},
        (B, D, 3),
    ),
    "prelu twice": (
        lambda n, x: n.p(n.m(n.p(n.l(x)))),
        lambda: {"l": nn.Linear(D, D), "m": nn.Linear(D, D), "p": nn.PReLU()},
        (B, T, D),
    ),
    "prelu of channels, images": (
        lambda n, x: n.p(n.c(x)),
        lambda: {"c": nn.ConvTranspose2d(D, 2, 3, groups=2), "p": nn.PReLU(2)},
        (B, D, 3, 2),
    ),
    "voxels": (lambda n, x: n.p(n.c(x)), lambda: {"c": nn.ConvTranspose3d(D, 2, 2), "p": nn.PReLU()}, (B, D, 2, 2, 2)),
    "rms norm": (
        lambda n, x: n.l(n.r(x)) + n.s(x),
        lambda: {"l": nn.Linear(D, D), "r": nn.RMSNorm(D), "s": nn.RMSNorm((T, D), eps=1e-3)},
        (B, T, D),
    ),
    "bilinear": (
        lambda n, x: n.b(n.l(x).tanh().to(x), x) + n.b(input2=n.l(x).to(x), input1=x),  # autocast leaves it alone
        lambda: {"l": nn.Linear(D, D), "b": nn.Bilinear(D, D, 3)},
        (B, T, D),
    ),
    "bilinear without tokens or bias": (
        lambda n, x: n.b(x, x),
        lambda: {"b": nn.Bilinear(D, D, 3, bias=False)},
        (B, D),
    ),
    "registered": (
        lambda n, x: n.s(n.l(n.s(x)).tanh()),
        lambda: {"l": nn.Linear(D, D), "s": Scale(D)},
        (B, T, D),
    ),
}


@pytest.mark.parametrize("kind", NETS)
def test_products_over_whole_networks_are_those_of_a_loop(kind):
    register_layer_rule(Scale, SCALE)
    torch.manual_seed(0)
    compute, parts, shape = NETS[kind]
    net = Ad(compute, **parts()).double()
    x = torch.randn(shape).double()
    assert_exact(net, x)
    for name, _ in net.named_parameters():
        assert_exact(net, x, names=[name])


@pytest.mark.parametrize("kind", NETS)
def test_products_under_autocast_are_those_without_within_its_digits(kind):
    register_layer_rule(Scale, SCALE)
    torch.manual_seed(0)
    compute, parts, shape = NETS[kind]
    net, x = Ad(compute, **parts()), torch.randn(shape)
    vectors = vectors_of(net)
    exact = traced(net, losses_of, x, vectors)[1].dot(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        _, rows, unseen = traced(net, losses_of, x, vectors)
        dot = rows.dot(vectors)
    assert not unseen
    assert dot.dtype == torch.float32
    torch.testing.assert_close(dot, exact, rtol=5e-2, atol=5e-2 * float(exact.abs().max()))


def test_a_tensor_within_a_list_or_a_dictionary_is_watched_too():
    class Gather(Scale):
        def forward(self, parts: Any, more: Any = None) -> Tensor:
            return (parts[0] + more["x"]) * self.factor

    layer, x, y = Gather(3), torch.randn(4, 3), torch.randn(4, 3)
    register_layer_rule(Gather, LayerRule(lambda layer, p, q, more: (q[0] + more["x"]) * p["factor"], ("factor",)))
    hooks = LayerHooks("gather", layer, {"factor": "gather.factor"})
    hooks.into = into = LayerCalls()
    layer([x], more={"x": y})
    dot = into.calls[0].gradients(torch.ones(4, 3)).dot({"factor": torch.ones(3)})
    torch.testing.assert_close(dot, (x + y).sum(1))
    y.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        into.calls[0].gradients(torch.ones(4, 3))


def test_a_layer_with_a_rule_that_returns_no_tensor_is_refused_when_it_is_called():
    class Pair(Scale):
        def forward(self, x: Tensor) -> Any:
            return x * self.factor, x

    register_layer_rule(Pair, SCALE)
    layer = Pair(3)
    hooks = LayerHooks("pair", layer, {"factor": "pair.factor"})
    hooks.into = LayerCalls()
    with pytest.raises(MimicError, match=r"`parameters`: 'pair' returned a tuple; a layer with a rule must ret"):
        layer(torch.ones(2, 3))


class Rich(WithLosses):
    """Layers of all the kinds, the last of which is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.scale = nn.RMSNorm(HIDDEN), nn.PReLU(HIDDEN), Scale()
        self.up = nn.ConvTranspose1d(1, 2, 2, stride=2)
        self.head = nn.Bilinear(2 * 2 * HIDDEN, HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.scale(self.norm(self.act(self.body(x))))
        return self.head(self.up(hidden[:, None]).flatten(1).tanh().to(x), hidden.to(x))


class Scaled(Toy):
    """The target is a registered layer, scored within the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, CLASSES), Scale(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def reference_of(kind: type[Toy]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: p + torch.randn(p.shape, generator=generator) / 10 for n, p in parameters_of(toy(kind)).items()}


@pytest.mark.parametrize("reweight", ["all", "target"])
@pytest.mark.parametrize(("kind", "parameters"), [(Rich, "all"), (Rich, "head"), (Rich, "act"), (Scaled, "head")])
def test_a_fit_with_such_layers_is_training_by_a_loop(kind, parameters, reweight, tmp_path):
    register_layer_rule(Scale, SCALE)
    ours, oracle, data = toy(kind), toy(kind), toy_data(12)
    reference = reference_of(kind)
    names = [n for n in reference if parameters == "all" or n.startswith(parameters)]
    settings = {"temperature": 0.7, "min_ess": 0, "reweight": reweight, "ledger": tmp_path / "s"}
    trainer(GradMimic(reference, parameters, **settings)).fit(ours, loader(data))
    batches = [data[i : i + 4] for i in range(0, 12, 4)]
    seen = trained_by_oracle(oracle, batches, reference, reweight=reweight, targets=names, losses=toy_losses)
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)
    scores = torch.tensor(Ledger(tmp_path / "s").table().sort_by("id")["score"].to_pylist())
    torch.testing.assert_close(scores, torch.cat([s for s, _ in seen]).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "parameters"), [(Scaled, "head"), (Scaled, "all"), (Rich, "scale"), (Rich, "all")])
def test_a_wrong_rule_stops_the_fit_before_the_first_step(kind, parameters):
    register_layer_rule(Scale, LayerRule(lambda layer, p, x: 2 * x * p["factor"], ("factor",)))
    module = toy(kind)
    before = parameters_of(module)
    with pytest.raises(MimicError, match=r"^the rule for Scale cannot be used: its product with other values of"):
        trainer(GradMimic(reference_of(kind), parameters)).fit(module, loader(toy_data()))
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of its own RMSNorm
def test_mixed_precision_scores_such_layers_within_its_digits(tmp_path):
    register_layer_rule(Scale, SCALE)
    module, data = toy(Rich, dtype=torch.float32), toy_data(8, dtype=torch.float32)
    module.lr = 0.0
    reference = reference_of(Rich)
    trainer(GradMimic(reference, "all", ledger=tmp_path / "s"), precision="bf16-mixed").fit(module, loader(data))
    gradients = per_sample_gradients(module, toy_losses, data[:])
    expected = mimic_scores(gradients, reference, dict(module.named_parameters()))
    scores = torch.tensor(Ledger(tmp_path / "s").table().sort_by("id")["score"].to_pylist())
    torch.testing.assert_close(scores, expected.float(), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("parameters", ["act", "norm", "up", "head"])
def test_norms_of_such_layers_are_refused_before_training(parameters):
    with pytest.raises(ValueError, match=r"GradNorm needs the norms of per-sample gradients, which are known for n"):
        trainer(GradMimic(scorer=GradNorm(), parameters=parameters)).fit(toy(Rich), loader(toy_data()))


class Bent(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x * self.factor.square())


class WithBent(Scaled):
    """The head is a subclass of a registered class, with a forward of its own that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Bent(CLASSES)


@pytest.mark.parametrize("kind", [Scaled, WithBent])
def test_a_layer_of_an_unregistered_kind_is_scored_by_the_graph(kind, tmp_path):
    if kind is WithBent:
        register_layer_rule(Scale, SCALE)
    module, data, reference = toy(kind), toy_data(8), reference_of(kind)
    module.lr = 0.0
    trainer(GradMimic(reference, "head", ledger=tmp_path / "s")).fit(module, loader(data))
    gradients = per_sample_gradients(module, toy_losses, data[:])
    expected = mimic_scores(gradients, reference, {"head.factor": module.head.factor})
    scores = torch.tensor(Ledger(tmp_path / "s").table().sort_by("id")["score"].to_pylist())
    torch.testing.assert_close(scores, expected.float(), rtol=1e-6, atol=1e-6)
