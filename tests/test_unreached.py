"""Parameters that the loss does not reach: their share is zero if all parameters are scored, and else an error."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.errors import MimicError
from oracles import mimic_scores, per_sample_gradients
from support.oracle_training import trained_by_oracle
from support.toys import FEATURES, HIDDEN, Toy, loader, losses_of, parameters_of, toy, toy_data, trainer


class Unused(Toy):
    """A head that nothing uses, and one that runs for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.idle = nn.Linear(HIDDEN, 2), nn.LSTM(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        self.idle(hidden)
        return self.head(hidden)


class Experts(Toy):
    """Experts of which a batch uses those that its first feature names."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(FEATURES, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        named = x[:, 0].long().clamp(0, 2)
        hidden = torch.tanh(self.body(x))
        for k in named.unique().tolist():
            hidden = hidden + torch.where((named == k)[:, None], self.experts[k](x), 0.0)
        return self.head(hidden)


class Contrastive(Unused):
    """Every sample's loss depends on all samples."""

    def sample_losses(self, batch: Any) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)), reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.sample_losses(batch).mean()


def reference_of(kind: type[Toy]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: p + torch.randn(p.shape, generator=generator) / 10 for n, p in parameters_of(toy(kind)).items()}


WARNED = r"^`parameters`: no path leads from the loss to {} of {} parameters, {} of their elements: "


@pytest.mark.parametrize("reweight", ["all", "target"])
def test_an_unused_head_has_no_share_and_is_reported_once(reweight, tmp_path):
    ours, oracle, data, reference = toy(Unused), toy(Unused), toy_data(12), reference_of(Unused)
    settings = {"temperature": 0.7, "min_ess": 0, "reweight": reweight, "ledger": tmp_path / "s"}
    with pytest.warns(UserWarning, match=WARNED.format(6, 10, "57.9%") + r"'spare.weight'.*zero in this batch") as seen:
        trainer(GradMimic(reference, "all", **settings), epochs=2).fit(ours, loader(data))
    assert len([each for each in seen if "no path leads" in str(each.message)]) == 1
    batches = [data[i : i + 4] for i in range(0, 12, 4)] * 2
    expected = trained_by_oracle(oracle, batches, reference, reweight=reweight, targets=list(reference))
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)
    table = Ledger(tmp_path / "s").table().sort_by([("epoch", "ascending"), ("id", "ascending")])
    scores = torch.tensor(table["score"].to_pylist())
    torch.testing.assert_close(scores, torch.cat([s for s, _ in expected]).float(), rtol=1e-6, atol=1e-6)


def test_exclusions_alone_mean_all_others_too():
    with pytest.warns(UserWarning, match=WARNED.format(4, 8, ".*")):
        trainer(GradMimic(reference_of(Unused), "!spare")).fit(toy(Unused), loader(toy_data(8)))


@pytest.mark.parametrize("parameters", ["spare", ["all", "spare"], ["head", "idle.*"], "*"])
def test_what_is_named_must_be_reached(parameters):
    with pytest.raises(MimicError, match=r"'(spare.weight|idle.weight_ih_l0)' \(no path leads from the loss to it\)"):
        trainer(GradMimic(reference_of(Unused), parameters)).fit(toy(Unused), loader(toy_data(8)))


def test_experts_without_samples_have_no_share_in_that_batch(tmp_path):
    data = toy_data(12)
    x, labels = data.tensors
    x[:, 0] = torch.tensor([0, 1, 0, 1, 2, 2, 2, 2, 0, 1, 2, 0]) + 0.5
    ours, oracle, reference = toy(Experts), toy(Experts), reference_of(Experts)
    settings = {"temperature": 0.7, "min_ess": 0, "ledger": tmp_path / "s"}
    with pytest.warns(UserWarning, match=WARNED.format(2, 10, ".*") + r"'experts.2.weight', 'experts.2.bias'\. T"):
        trainer(GradMimic(reference, "all", **settings)).fit(ours, loader(data))
    batches = [(x[i : i + 4], labels[i : i + 4]) for i in range(0, 12, 4)]
    expected = trained_by_oracle(oracle, batches, reference, targets=list(reference))
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)
    scores = torch.tensor(Ledger(tmp_path / "s").table().sort_by("id")["score"].to_pylist())
    torch.testing.assert_close(scores, torch.cat([s for s, _ in expected]).float(), rtol=1e-6, atol=1e-6)


def test_losses_that_mix_samples_leave_the_unused_out_too(tmp_path):
    module, data, reference = toy(Contrastive), toy_data(8), reference_of(Contrastive)
    module.lr = 0.0
    with pytest.warns(UserWarning, match=WARNED.format(6, 10, ".*")) as seen:
        trainer(GradMimic(reference, "all", ledger=tmp_path / "s"), epochs=2).fit(module, loader(data))
    assert len([each for each in seen if "no path leads" in str(each.message)]) == 1
    batches = [data[i : i + 4] for i in range(0, 8, 4)]
    own = [per_sample_gradients(module, lambda m, batch: m.sample_losses(batch), batch) for batch in batches]
    expected = torch.cat([mimic_scores(g, reference, dict(module.named_parameters())) for g in own])
    table = Ledger(tmp_path / "s").table().sort_by([("epoch", "ascending"), ("id", "ascending")])
    scores = torch.tensor(table["score"].to_pylist())
    torch.testing.assert_close(scores, expected.repeat(2).float(), rtol=1e-6, atol=1e-6)
    with pytest.raises(MimicError, match=r"no path leads from the losses to 'spare.weight'"):
        trainer(GradMimic(reference, ["all", "spare"])).fit(toy(Contrastive), loader(data))


class WithoutGradient(Unused):
    """A layer that the graph cannot show, although it is used."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        with torch.no_grad():
            spare = self.spare(hidden).sum(1, keepdim=True)
        return self.head(hidden) * spare


class RecurrentWithoutGradient(Unused):
    """The same, of a layer whose calls are not recorded."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            idle = self.idle(torch.tanh(self.body(x)))[0].sum(1, keepdim=True)
        return self.head(torch.tanh(self.body(x)) * idle)


class Reentrant(Unused):
    """Layers and a bare parameter within reentrant activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(HIDDEN))

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) * self.factor

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.inner, x.requires_grad_(), use_reentrant=True))


class ReentrantLater(Reentrant):
    """The checkpointing begins with the second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x) if batch_idx else self.head(self.inner(x)), y)


@pytest.mark.filterwarnings("ignore:`parameters`. no path leads")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WithoutGradient, "'spare.weight' (its layer ran without gradient"),
        (RecurrentWithoutGradient, "'idle.weight_ih_l0' (its layer ran without gradient"),
        (Reentrant, "'factor' (no path leads from the loss to it but through reentrant activation checkpointing"),
        (ReentrantLater, "'body.weight' (its layer ran without gradient"),
    ],
)
def test_what_the_graph_may_hide_is_refused(kind, message):
    module = toy(kind)
    if not issubclass(kind, Reentrant):
        parameters: Any = "all"
    else:
        parameters = ["all", "!spare", "!idle"]
    with pytest.raises(MimicError, match=re.escape(message)):
        trainer(GradMimic(reference_of(kind), parameters, uncovered="mean")).fit(module, loader(toy_data(8)))


def test_losses_of_the_toys_are_those_of_the_oracle():
    """The toys' own loss is the mean of what the oracle differentiates."""
    module, data = toy(Experts), toy_data(4)
    torch.testing.assert_close(module.training_step(data[:], 0), losses_of(module, data[:]).mean())
