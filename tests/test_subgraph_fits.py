"""Fits over parameters that no rule leads to the batch are training by a loop over samples."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.errors import MimicError
from oracles import mimic_scores, per_sample_gradients
from support.oracle_training import trained_by_oracle
from support.toys import CLASSES, FEATURES, HIDDEN, Toy, loader, losses_of, parameters_of, toy, toy_data, trainer

pytestmark = pytest.mark.slow
TOKENS = 3


class TiedByHand(Toy):
    """The target is called, and used outside of its call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(self.body(x), self.head.weight)))


class TiedBeyond(Toy):
    """The target is used again above its call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(super().forward(x)), self.head.weight.t())


class Beside(Toy):
    """The target is called, and used again beside its call."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) + F.linear(hidden.sin(), self.head.weight.square())


class Centred(Toy):
    """Features less their mean: the loss of a sample depends on all of them, but on its own row of the difference."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden - hidden.mean(0))


class Pruned(Toy):
    """The target's weight is made of another one."""

    def __init__(self) -> None:
        super().__init__()
        prune.identity(self.head, "weight")


class SequenceFirst(Toy):
    """The batch's axis is the second one at the target."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([torch.tanh(self.body(x)), self.body(x).sin()])  # (T, B, D)
        return self.head(steps).mean(0)


class Sequence(Toy):
    """Positions, a recurrence, attention to learned queries, and a head with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        wide = FEATURES // TOKENS
        self.body, self.positions = nn.Linear(wide, HIDDEN), nn.Embedding(TOKENS, HIDDEN)
        self.gru, self.queries = nn.GRU(HIDDEN, HIDDEN, batch_first=True), nn.Parameter(torch.randn(2, HIDDEN))
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.head = parametrizations.weight_norm(nn.Linear(HIDDEN, CLASSES))

    def encoded(self, x: Tensor) -> Tensor:
        tokens = self.body(x.view(len(x), TOKENS, -1)) + self.positions(torch.arange(TOKENS))
        outputs, last = self.gru(tokens)
        return outputs + last[-1][:, None]

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoded(x)
        return self.head(self.attention(self.queries.expand(len(x), -1, -1), h, h.tanh())[0].mean(1))


class Checkpointed(Sequence):
    """The same, run again in the backward pass."""

    def encoded(self, x: Tensor) -> Tensor:
        return checkpoint(super().encoded, x, use_reentrant=False)


def reference_of(kind: type[Toy]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: p + torch.randn(p.shape, generator=generator) / 10 for n, p in parameters_of(toy(kind)).items()}


KINDS = [TiedByHand, TiedBeyond, Beside, Centred, Pruned, SequenceFirst, Sequence, Checkpointed]
CASES = [*product(KINDS, ["all", "head"]), (Sequence, "gru"), (Checkpointed, "gru")]


@pytest.mark.parametrize("reweight", ["all", "target"])
@pytest.mark.parametrize(("kind", "parameters"), CASES)
def test_a_fit_is_training_by_a_loop(kind, parameters, reweight, tmp_path):
    ours, oracle, data = toy(kind), toy(kind), toy_data(11)  # as many samples as tokens in the last batch
    reference = reference_of(kind)
    names = [n for n in reference if parameters == "all" or n.startswith(parameters)]
    settings = {"temperature": 0.7, "min_ess": 0, "reweight": reweight, "ledger": tmp_path / "s"}
    trainer(GradMimic(reference, parameters, **settings)).fit(ours, loader(data))
    batches = [data[i : i + 4] for i in range(0, 11, 4)]
    seen = trained_by_oracle(oracle, batches, reference, reweight=reweight, targets=names)
    torch.testing.assert_close(parameters_of(ours), parameters_of(oracle), rtol=1e-9, atol=1e-9)
    scores = torch.tensor(Ledger(tmp_path / "s").table().sort_by("id")["score"].to_pylist())
    torch.testing.assert_close(scores, torch.cat([s for s, _ in seen]).float(), rtol=1e-6, atol=1e-6)


def test_mixed_precision_is_near(tmp_path):
    module, data = toy(Sequence, dtype=torch.float32), toy_data(8, dtype=torch.float32)
    module.lr = 0.0
    reference = reference_of(Sequence)
    trainer(GradMimic(reference, "all", ledger=tmp_path / "s"), precision="bf16-mixed").fit(module, loader(data))
    expected = mimic_scores(
        per_sample_gradients(module, losses_of, data[:]), reference, dict(module.named_parameters())
    )
    scores = torch.tensor(Ledger(tmp_path / "s").table().sort_by("id")["score"].to_pylist())
    torch.testing.assert_close(scores, expected.float(), rtol=5e-2, atol=5e-2)


class Lengthening(Toy):
    """The batch's axis is the second one at the target, and as long as the first from the second batch on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        steps = torch.tanh(self.body(x)).expand(4 if batch_idx else 5, -1, -1)
        return F.cross_entropy(F.linear(steps.sin(), self.head.weight.exp()).sum(0), y)


def test_axes_that_become_equally_long_later_are_looked_at_again():
    names = ["head.weight"]
    trainer(GradMimic(reference_of(Toy), names)).fit(toy(Lengthening), loader(toy_data(4)))
    with pytest.raises(MimicError, match=r"where 'head.weight' is used, the loss of one sample shows in the rows"):
        trainer(GradMimic(reference_of(Toy), names)).fit(toy(Lengthening), loader(toy_data(8)))


def test_gradient_hooks_on_what_is_differentiated_twice_are_refused():
    module = toy(Sequence)
    module.positions.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(MimicError, match=r"'positions.weight' carry gradient hooks of their own"):
        trainer(GradMimic(reference_of(Sequence), "all")).fit(module, loader(toy_data(8)))
