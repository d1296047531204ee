"""Which sample every row of a forward pass belongs to: another order is refused, rows that come back are scored."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_mimic import GradMimic, Ledger, MimicError
from lightning_mimic.gradients.forward_trace import ForwardTrace
from lightning_mimic.gradients.sample_order import SampleOrder
from support.toys import HIDDEN, Toy, WithLosses, loader, toy, toy_data, trainer

COUNT, STEPS = 4, 3


def by(x: Tensor) -> Tensor:
    return x[:, 0, 0].argsort()


def put(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[places] = rows
    return out


def by_mask(x: Tensor) -> Tensor:
    chosen, out = x[:, 0, 0] > 0, torch.zeros_like(x)
    out[chosen] = x[chosen].exp()
    out[~chosen] = x[~chosen].tanh()
    return out


OTHER_ORDER = {
    "sorted": lambda x: x[by(x)],
    "sorted values": lambda x: x[:, 0, 0].sort().values,
    "index_select": lambda x: x.index_select(0, by(x)),
    "gather": lambda x: x.gather(0, by(x)[:, None, None].expand_as(x)),
    "a list": lambda x: x[by(x).tolist()],
    "numpy": lambda x: x[by(x).numpy()],
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "random": lambda x: x[torch.tensor([1, 0, 3, 2])],
    "halves": lambda x: torch.cat([x[2:], x[:2]]),
    "split by a mask": lambda x: torch.cat([x[x[:, 0, 0] > 0], x[x[:, 0, 0] <= 0]]),
    "one by one": lambda x: torch.stack([x[i] for i in (2, 0, 1, 3)]),
    "unbound": lambda x: torch.stack(x.unbind()[::-1]),
    "on a later axis": lambda x: x.transpose(0, 1)[:, by(x)].transpose(0, 1),
    "normalised before": lambda x: (x - x.mean(0))[by(x)],
    "through a layer": lambda x: nn.functional.linear(x.flip(0), torch.ones(2, 5)),
    "written to places": lambda x: put(x, by(x), x),
    "index_copy": lambda x: torch.zeros_like(x).index_copy(0, by(x), x),
    "the first of all": lambda x: x[:1].repeat(COUNT, 1, 1),
    "views one after the other": lambda x: torch.cat([x, x]),
}

BATCH_ORDER = {
    "as it is": lambda x: x.exp(),
    "sorted and back": lambda x: x[by(x)].exp()[by(x).argsort()],
    "written back": lambda x: put(x, by(x), x[by(x)].exp()),
    "index_copy back": lambda x: torch.zeros_like(x).index_copy(0, by(x), x[by(x)]),
    "flipped twice": lambda x: x.flip(0).exp().flip(0),
    "flipped in time": lambda x: x.flip(1),
    "rolled round": lambda x: x.roll(1, 0).roll(-1, 0),
    "halves": lambda x: torch.cat([x[:2].exp(), x[2:]]),
    "by a mask": by_mask,
    "one by one": lambda x: torch.stack([each.exp().mean() for each in x]),
    "mixup": lambda x: 0.7 * x + 0.3 * x.flip(0),
    "two views, of which one is left": lambda x: torch.cat([x, x])[:COUNT],
    "views side by side": lambda x: torch.cat([x, x.flip(1)], 1),
    "repeated in place": lambda x: x.repeat_interleave(2, 0),
    "tokens": lambda x: x.reshape(-1, 5).exp().reshape(COUNT, STEPS, 5),
    "a table": lambda x: torch.arange(10.0)[x[:, 0, 0].argsort()],
}


def differs(make) -> bool:
    batch = torch.randn(COUNT, STEPS, 5, generator=torch.Generator().manual_seed(3))
    trace = ForwardTrace(COUNT)
    trace.expect([batch], [])
    with trace.recording():
        made = make(batch)
    return SampleOrder(trace).differs(trace.ref(made).token)


@pytest.mark.parametrize("name", OTHER_ORDER)
def test_another_order_is_seen(name):
    assert differs(OTHER_ORDER[name])


@pytest.mark.parametrize("name", BATCH_ORDER)
def test_the_batchs_own_order_is_seen(name):
    assert not differs(BATCH_ORDER[name])


class Sorted(Toy):
    def training_step(self, batch, batch_idx):
        order = batch[0][:, 0].argsort()
        return F.cross_entropy(self(batch[0][order]), batch[1][order])


class SortedLosses(WithLosses):
    def sample_losses(self, batch):
        order = batch[0][:, 0].argsort()
        return super().sample_losses((batch[0][order], batch[1][order]))


class SortedInPython(Toy):
    """Only the labels show the order."""

    def training_step(self, batch, batch_idx):
        order = batch[0][:, 0].argsort().flip(0)
        rows = batch[0].tolist()
        x = torch.tensor([rows[row] for row in order.tolist()], dtype=torch.float64)
        return F.cross_entropy(self(x), batch[1][order])


class Relisted(Toy):
    """The same, in the batch's order."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(torch.tensor(batch[0].tolist(), dtype=torch.float64)), batch[1])


class Recurrent(Toy):
    """Each sample is a sequence of six numbers, of which the first says how many count."""

    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(1, HIDDEN, batch_first=True)

    def lengths(self, x):
        return 1 + (x[:, 0] * 7).long().abs() % 6


class Packed(Recurrent):
    """Sorted and brought back by torch."""

    def training_step(self, batch, batch_idx):
        lengths = self.lengths(batch[0])
        packed = pack_padded_sequence(batch[0][..., None], lengths, batch_first=True, enforce_sorted=False)
        padded = pad_packed_sequence(self.body(packed)[0], batch_first=True)[0]
        return F.cross_entropy(self.head(padded[torch.arange(len(lengths)), lengths - 1]), batch[1])


class PackedByHand(Recurrent):
    def training_step(self, batch, batch_idx):
        lengths, order = self.lengths(batch[0]).sort(descending=True)
        packed = pack_padded_sequence(batch[0][order][..., None], lengths, batch_first=True)
        hidden = self.body(packed)[1][0][-1][order.argsort()]
        return F.cross_entropy(self.head(hidden), batch[1])


class PackedAndLeft(Recurrent):
    """As it had to be before torch sorted; a loss that needs no labels does not show it."""

    def training_step(self, batch, batch_idx):
        lengths, order = self.lengths(batch[0]).sort(descending=True)
        packed = pack_padded_sequence(batch[0][order][..., None], lengths, batch_first=True)
        return self.head(self.body(packed)[1][0][-1]).square().mean()


def fit(kind, folder, **options):
    callback = GradMimic(
        toy(kind, seed=1), "head", ledger=folder / "scores", reweight="none", diagnose_reference=False, **options
    )
    module = toy(kind)
    module.lr = 0.0
    trainer(callback).fit(module, loader(toy_data(8), 8))
    return module, folder / "scores"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Sorted, {}),
        (Sorted, {"loss": "mean"}),
        (SortedLosses, {}),
        (SortedInPython, {}),
        (SortedInPython, {"loss": "mean"}),
        (PackedAndLeft, {}),
        (PackedAndLeft, {"loss": "mean"}),
    ],
)
def test_scores_of_reordered_samples_are_refused(kind, options, tmp_path):
    with pytest.raises(MimicError, match="row i of the batch must be sample i throughout the step"):
        fit(kind, tmp_path, **options)


@pytest.mark.parametrize("kind", [Packed, PackedByHand, Relisted])
def test_rows_that_come_back_are_scored_as_their_samples(kind, tmp_path):
    module, ledger = fit(kind, tmp_path)
    reference, data = toy(kind, seed=1), toy_data(8)
    direction = {n: p.detach() - module.get_parameter(n) for n, p in reference.named_parameters() if "head" in n}
    norm = sum(v.square().sum() for v in direction.values()).sqrt()
    rows = sorted(Ledger(ledger).table().to_pylist(), key=lambda row: row["id"])
    for row, (x, y) in zip(rows, data, strict=True):
        loss = module.training_step((x[None], y[None]), 0)
        gradients = torch.autograd.grad(loss, [module.get_parameter(n) for n in direction])
        dot = sum((g * v).sum() for g, v in zip(gradients, direction.values(), strict=True))
        assert row["score"] == pytest.approx((-dot / norm).item(), abs=1e-6)


class TwoViews(Toy):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(torch.cat([x, x + 0.1])), torch.cat([y, y]))


class Filtered(Toy):
    def training_step(self, batch, batch_idx):
        chosen = batch[0][:, 0] > 0
        return F.cross_entropy(self(batch[0][chosen]), batch[1][chosen])


@pytest.mark.parametrize("kind", [TwoViews, Filtered])
def test_fewer_or_more_rows_than_samples_are_refused(kind, tmp_path):
    with pytest.raises(MimicError, match="no tensor with a row for each of 8 samples"):
        fit(kind, tmp_path)
