"""Two gloo processes against one with the same global micro-batches; every case runs inside one spawned pair."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mimic import Aligned, GradMimic, Ledger, WithIds, collate_with_ids, diagnose
from lightning_mimic.scorers import (
    Agra,
    CosineSimilarity,
    GradMatch,
    GradNorm,
    Influence,
    ReferenceLoss,
    RhoLoss,
    Uniform,
)
from support.ranks import WORLD, on_two_ranks, two
from support.ranks import strategy as strategy_of
from support.small_images import assert_alike, of_a_rank, train_on_a_rank
from support.toys import FEATURES, Residual, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer

pytestmark = pytest.mark.slow

EVEN, UNEVEN = (2, 2), (3, 1)
USED = ["all", "!spare"]


class Unused(Toy):
    """Has parameters that no loss reaches, for find_unused_parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = torch.nn.Linear(2, 2)


class Lossy(Unused, WithLosses):
    """The same, with losses of its samples."""


class Contrastive(WithLosses):
    """Losses of all ranks' pairs; attached are this rank's embeddings, and the temperature of its own losses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(2 + torch.rand(()))

    def sample_losses(self, batch: Any) -> Tensor:
        x, _ = batch
        left, right = (gathered(F.normalize(e)) for e in (self(x), self.body(x)[:, :3]))
        here = torch.arange(len(left))
        own = here // len(x) == self.global_rank
        scale = torch.where(own, self.scale, self.scale.detach())[:, None]
        return sum(F.cross_entropy(scale * s, here, reduction="none") for s in (left @ right.T, right @ left.T))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # DDP averages over ranks; each holds its part of every sample's gradient.
        return self.sample_losses(batch).mean() * self.trainer.world_size


class Named(Contrastive):
    """Labels are a part of what is embedded."""

    def sample_losses(self, batch: Any) -> Tensor:
        return super().sample_losses((batch[0] + F.one_hot(batch[1], FEATURES), batch[1]))


class Keep(pl.Callback):
    """Saves what a rank has fitted, while it is there."""

    def __init__(self, callback: GradMimic, path: Path) -> None:
        self.callback, self.path = callback, path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(self.callback.state_dict()["target"]["aligned"], self.path)


class Divided:
    """Reference batches of 4, of which each rank has its part."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Any:
        mine = slice(None)
        if torch.distributed.is_initialized():
            mine = slice(self.first) if torch.distributed.get_rank() == 0 else slice(self.first, None)
        return iter([[part[mine] for part in toy_data(12, seed=6)[start : start + 4]] for start in (0, 4, 8)])


def gathered(embeddings: Tensor) -> Tensor:
    if not torch.distributed.is_initialized():
        return embeddings
    parts = [torch.empty_like(embeddings) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, embeddings.detach().contiguous())
    parts[torch.distributed.get_rank()] = embeddings
    return torch.cat(parts)


UNRELATED = {"reference": Aligned(toy(seed=1), every=2)}
CACHED = {"reference": Aligned(toy(seed=1), every=2, cache=True)}
WHOLE = [toy_data(8, seed=5)[:3], toy_data(8, seed=5)[3:8]]  # reference batches that every rank has
KEPT = {"parameters": "all", "keep_output_gradients": True}
SOFTMAX: dict[str, Any] = {"reference": None}
SHARES: dict[str, Any] = {"reference": None, "temperature": None, "min_ess": None}

# name: module, rows per rank, DDP's options, the callback's, the Trainer's
CASES: dict[str, tuple[type[Toy], tuple[int, int], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": (Toy, EVEN, {}, {}, {}),
    "with sample_losses": (WithLosses, EVEN, {}, {}, {}),
    "find_unused_parameters": (Unused, EVEN, {"find_unused_parameters": True}, {}, {}),
    "static_graph": (Toy, EVEN, {"static_graph": True}, {}, {}),
    "static_graph, target": (Toy, EVEN, {"static_graph": True}, {"reweight": "target"}, {}),
    "uneven ranks": (Toy, UNEVEN, {}, {}, {}),
    "uneven ranks, static_graph": (WithLosses, UNEVEN, {"static_graph": True}, {}, {}),
    "target": (Toy, EVEN, {}, {"reweight": "target"}, {}),
    "floor": (Toy, UNEVEN, {}, {"temperature": 0.01, "min_ess": 0.6}, {}),
    "automatic temperature": (Toy, UNEVEN, {}, {"temperature": "auto"}, {}),
    "accumulated": (Toy, EVEN, {}, {}, {"accumulate_grad_batches": 2}),
    "clipped": (Toy, UNEVEN, {}, {}, {"gradient_clip_val": 0.05}),
    "broken samples on one rank": (Toy, UNEVEN, {}, {}, {}),
    "only scored": (Toy, EVEN, {}, {"reweight": "none"}, {}),
    "all": (Toy, UNEVEN, {}, {"parameters": "all"}, {}),
    "all, from the start": (Toy, UNEVEN, {}, {"parameters": "all", "direction": "start"}, {}),
    "all, accumulated": (Toy, EVEN, {}, {"parameters": "all"}, {"accumulate_grad_batches": 2}),
    "all, find_unused_parameters": (Unused, EVEN, {"find_unused_parameters": True}, {"parameters": USED}, {}),
    "all, static_graph": (WithLosses, EVEN, {"static_graph": True}, {"parameters": "all"}, {}),
    "all, target": (Toy, EVEN, {}, {"parameters": ["all", "!head.bias"], "reweight": "target"}, {}),
    "kept, accumulated": (Toy, UNEVEN, {}, KEPT, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    "kept, find_unused_parameters": (Lossy, EVEN, {"find_unused_parameters": True}, KEPT | {"parameters": USED}, {}),
    "kept, static_graph": (WithLosses, EVEN, {"static_graph": True}, KEPT, {}),
    "broken samples, kept": (WithLosses, UNEVEN, {}, KEPT, {}),
    "contrastive": (Contrastive, EVEN, {}, {"parameters": "all"}, {}),
    "contrastive, static_graph": (Contrastive, EVEN, {"static_graph": True}, {}, {}),
    "contrastive, target": (Contrastive, EVEN, {}, {"reweight": "target"}, {"accumulate_grad_batches": 2}),
    "uniform": (Toy, UNEVEN, {}, {"scorer": Uniform(), "reference": None, "parameters": None}, {}),
    "grad_norm": (Toy, UNEVEN, {}, {"scorer": GradNorm(), "reference": None}, {}),
    "cosine": (WithLosses, UNEVEN, {}, {"scorer": CosineSimilarity()}, {}),
    "rho_loss": (WithLosses, UNEVEN, {}, {"scorer": RhoLoss(), "parameters": None}, {}),
    "rho_loss, static_graph": (WithLosses, EVEN, {"static_graph": True}, {"scorer": RhoLoss(), "parameters": None}, {}),
    "reference_loss": (WithLosses, UNEVEN, {}, {"scorer": ReferenceLoss(), "parameters": None}, {}),
    "aligned, accumulated": (Toy, EVEN, {}, UNRELATED, {"accumulate_grad_batches": 2}),
    "aligned, uneven ranks": (WithLosses, UNEVEN, {}, UNRELATED, {}),
    "aligned, static_graph": (WithLosses, EVEN, {"static_graph": True}, CACHED | {"reweight": "target"}, {}),
    "aligned, contrastive": (Contrastive, EVEN, {}, UNRELATED, {}),
    "broken samples, aligned": (Toy, UNEVEN, {}, CACHED, {}),
    "agra, last batch smaller": (WithLosses, EVEN, {}, SHARES | {"scorer": Agra(WHOLE)}, {}),
    "agra, divided": (WithLosses, UNEVEN, {}, SHARES | {"scorer": Agra(Divided(3))}, {"accumulate_grad_batches": 2}),
    "agra, target": (
        WithLosses,
        EVEN,
        {"static_graph": True},
        SHARES | {"scorer": Agra(WHOLE), "reweight": "target"},
        {},
    ),
    "agra, residual": (Residual, EVEN, {}, SHARES | {"scorer": Agra(Divided(2))}, {}),
    "influence": (Lossy, UNEVEN, {"find_unused_parameters": True}, SOFTMAX | {"scorer": Influence(Divided(1))}, {}),
    "influence, all": (WithLosses, EVEN, {}, SOFTMAX | {"scorer": Influence(WHOLE), "parameters": "all"}, {}),
    "influence, contrastive": (Contrastive, EVEN, {}, SOFTMAX | {"scorer": Influence(Divided(2))}, {}),
    "grad_match, last batch smaller": (Toy, EVEN, {}, SHARES | {"scorer": GradMatch(0.5)}, {}),
    "grad_match, residual": (Residual, UNEVEN, {"static_graph": True}, SHARES | {"scorer": GradMatch(0.75, 0.1)}, {}),
    "broken samples, grad_match": (WithLosses, UNEVEN, {}, SHARES | {"scorer": GradMatch(0.75, 0.1)}, {}),
}
ALIGNED = [case for case in CASES if "aligned" in case]
JUDGED: dict[str, type[Toy]] = {"doubtful": WithLosses, "doubtful, contrastive": Named}


def data_of(case: str) -> torch.utils.data.TensorDataset:
    data = toy_data(40 if case in ALIGNED else 19 if "last batch" in case else 16)
    if case.startswith("broken"):
        data.tensors[0][[3, 7, 9]] = float("nan")  # 3 and 7 are all that the second rank has of their batches
    return data


def callback_of(case: str, ledger: Path) -> GradMimic:
    kind, _, _, options, _ = CASES[case]
    settings = {"temperature": 0.7, "min_ess": 0.0, "parameters": "head"} | options
    return GradMimic(ledger=ledger, **({"reference": parameters_of(toy(kind, seed=1))} | settings))


def one_process(case: str, folder: Path) -> Toy:
    kind, _, _, _, options = CASES[case]
    module = toy(kind)
    trainer(callback_of(case, folder / "one" / case), epochs=2, **options).fit(module, loader(data_of(case)))
    return module


def on_rank(rank: int, folder: Path) -> None:
    """All cases on one of the two ranks; what comes out is saved."""
    fit_on_two = two()
    for case, (kind, rows, ddp, _, options) in CASES.items():
        module, first, data = toy(kind), sum(rows[:rank]), data_of(case)
        starts = range(first, len(data), 4)
        batches = [list(range(start, min(start + rows[rank], len(data)))) for start in starts]
        mine = torch.utils.data.DataLoader(WithIds(data), batch_sampler=batches, collate_fn=collate_with_ids)
        strategy = strategy_of(**ddp)
        callback = callback_of(case, folder / "two" / case)
        more = [Keep(callback, folder / f"{case}-{rank}-aligned.pt")] if case in ALIGNED else []
        trainer(callback, *more, epochs=2, strategy=strategy, **fit_on_two, **options).fit(module, mine)
        torch.save(module.state_dict(), folder / f"{case}-{rank}.pt")
    # 13 batches of 40, of which the ranks have 24 and 16, and 20 each.
    for case, kind in JUDGED.items():
        first, rows = ((0, 24), (24, 16))[rank] if kind is WithLosses else (20 * rank, 20)
        batches = [list(range(start + first, start + first + rows)) for start in range(0, 600, 40)]
        mine = torch.utils.data.DataLoader(WithIds(toy_data(600)), batch_sampler=batches, collate_fn=collate_with_ids)
        callback = GradMimic(toy(kind, seed=1), "head", on_doubtful="raise", ledger=folder / case)
        module, strategy = toy(kind), strategy_of()
        module.lr = 0.0
        try:
            trainer(callback, strategy=strategy, **fit_on_two).fit(module, mine)
        except ValueError as error:
            (folder / f"{case}-{rank}").write_text(str(error).partition(" Looking")[0])
    (folder / "images").mkdir(exist_ok=True)
    train_on_a_rank(rank, folder / "images")
    # Only the second rank's reference is bad, and both stop.
    bad = {"head.weight": torch.zeros(1), "head.bias": torch.zeros(1)} if rank else parameters_of(toy(seed=1))
    try:
        trainer(GradMimic(bad, "head"), strategy=strategy_of(), **fit_on_two).fit(toy(), loader(toy_data(4)))
    except ValueError as error:
        (folder / f"error-{rank}").write_text(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_two_ranks(on_rank, tmp_path_factory.mktemp("ddp"))


@pytest.mark.filterwarnings("ignore:.*samples held NaN")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, folder):
    expected = parameters_of(one_process(case, folder))
    for rank in range(WORLD):
        state = torch.load(folder / f"{case}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-6)
    one, two = (
        Ledger(folder / n / case).table().sort_by([("epoch", "ascending"), ("id", "ascending")]) for n in ("one", "two")
    )
    for column in ("id", "epoch", "step", "batch", "batch_size", "flag"):
        assert one[column].to_pylist() == two[column].to_pylist(), column
    for column in ("score", "weight", "loss"):
        pair = [torch.tensor([float("nan") if v is None else v for v in t[column].to_pylist()]) for t in (one, two)]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6, equal_nan=True)
    rows = CASES[case][1]
    assert two["rank"].to_pylist().count(0) == 2 * math.ceil(len(data_of(case)) / 4) * rows[0]


@pytest.mark.parametrize("case", ALIGNED)
def test_every_rank_has_fitted_the_same_layer(case, folder):
    one, two = (torch.load(folder / f"{case}-{rank}-aligned.pt", weights_only=True) for rank in range(WORLD))
    assert one.pop("of") == two.pop("of")
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert one["enough"]
    assert not torch.equal(one["reference"]["head.weight"], toy(CASES[case][0]).head.weight)


def test_the_weights_matter_in_what_is_compared(folder):
    weighted = parameters_of(one_process("plain", folder / "again"))
    plain = toy()
    trainer(epochs=2).fit(plain, loader(toy_data(16)))
    assert not torch.equal(weighted["head.weight"], plain.head.weight)


def test_a_fault_on_one_rank_stops_all_of_them(folder):
    assert "'head.weight' has shape (1,)" in (folder / "error-1").read_text()
    assert (
        "another rank could not start: rank 1: `reference`: 'head.weight' has shape (1,)"
        in (folder / "error-0").read_text()
    )


def test_two_processes_train_on_one_file_of_features(folder):
    for rank in range(WORLD):
        plain, cached = (of_a_rank(rank, folder / "images", name) for name in ("plain", "cached"))
        assert_alike(cached, plain)
        assert set(cached["rows"]["rank"]) == {0, 1}
    assert len(list((folder / "images" / "features").iterdir())) == 1


@pytest.mark.parametrize("case", JUDGED)
def test_all_ranks_judge_the_reference_by_the_samples_of_all(case, folder):
    kind = JUDGED[case]
    facts = Ledger(folder / case).meta["attempts"][0]["diagnosis"]
    said = [(folder / f"{case}-{rank}").read_text() for rank in range(WORLD)]
    assert said[0] == said[1]
    assert said[0].startswith(f"the reference is unrelated: {facts['findings'][0]}")
    with pytest.warns(UserWarning, match="attempt 0 has not ended"):
        rows = Ledger(folder / case).table().num_rows
    assert rows == facts["samples"] == facts["score"]["count"] == 520
    assert facts["label_gap"]["count"] <= 520
    if kind is WithLosses:  # labels are exchanged within a rank
        parts = toy_data(600)
        parts = [parts[start + a : start + b] for start in range(0, 520, 40) for a, b in ((0, 24), (24, 40))]
        expected = diagnose(toy(kind), toy(kind, seed=1), parts, "head", samples=520).facts() | {"path_losses": {}}
        assert facts.pop("verdict") == expected.pop("verdict")
        # What the outputs of both networks show comes while they train.
        before = [finding for finding in facts.pop("findings") if "than the model" not in finding]
        assert len(before) == len(expected.pop("findings"))
        of_outputs = dict.fromkeys(("margin_ratio", "agreement", "model_agreement")) | {"knows_less": False}
        facts |= {name: expected[name] for name in of_outputs}
        torch.testing.assert_close(facts, expected, rtol=1e-6, atol=1e-6)
