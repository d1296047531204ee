"""Models sharded by `fully_shard` on two gloo processes, against one process with the whole model and all samples."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_mimic import Aligned, GradMimic, Ledger, Reweighter, WithIds, collate_with_ids
from lightning_mimic.gradients import select_parameters
from lightning_mimic.reference import diagnose, weight_similarity
from lightning_mimic.scorers import GradNorm, Influence, RhoLoss, Uniform
from support.ranks import WORLD, on_two_ranks, two
from support.toys import HIDDEN, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer

pytestmark = pytest.mark.slow

EVEN, UNEVEN = (2, 2), (3, 1)
REFERENCE = 1  # the seed of the reference's weights


class Deep(WithLosses):
    """Has a parameter outside of its layers, and a layer that is no last one."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(HIDDEN, HIDDEN)
        self.scale = nn.Parameter(1 + torch.rand(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(torch.tanh(self.body(x)))) * self.scale)


class PairwiseCentred(Deep):
    """The losses of a pair of samples depend on each other; both are on one rank."""

    def sample_losses(self, batch: Any) -> Tensor:
        logits = self(batch[0])
        pairs = logits.view(-1, 2, logits.shape[1])
        centred = pairs - pairs.mean(1, keepdim=True)
        return F.cross_entropy(centred.flatten(0, 1), batch[1], reduction="none")


# name: module, rows per rank, how it is sharded, the Reweighter's arguments, micro-batches per optimizer step
CASES: dict[str, tuple[type[Toy], tuple[int, int], str, dict[str, Any], int]] = {
    "last layer": (Toy, EVEN, "layers", {}, 1),
    "last layer, one group": (Toy, EVEN, "root", {}, 1),
    "last layer, resharded after forward": (Toy, UNEVEN, "resharded", {}, 1),
    "last layer, sample_losses": (Deep, UNEVEN, "layers", {}, 1),
    "last layer, weight only": (Toy, UNEVEN, "layers", {"parameters": "head.weight"}, 1),
    "last layer, scores alone": (Toy, EVEN, "layers", {"reweight": "none"}, 1),
    "last layer, norms": (Toy, UNEVEN, "layers", {"reference": None, "scorer": GradNorm()}, 1),
    "last layer, mean around it": (Toy, EVEN, "layers", {"uncovered": "mean"}, 1),
    "last layer, accumulated": (Toy, EVEN, "layers", {}, 3),
    "body": (Deep, UNEVEN, "resharded", {"parameters": "body"}, 1),
    "all": (Deep, UNEVEN, "layers", {"parameters": "all"}, 1),
    "all, from the start": (Deep, UNEVEN, "resharded", {"parameters": "all", "direction": "start"}, 1),
    "all, one group": (Deep, EVEN, "root", {"parameters": "all"}, 1),
    "all, scores alone": (Deep, EVEN, "resharded", {"parameters": "all", "reweight": "none"}, 1),
    "all, accumulated": (Deep, EVEN, "resharded", {"parameters": "all"}, 3),
    "all, mixed": (PairwiseCentred, EVEN, "layers", {"parameters": "all"}, 1),
    "last layer, mixed": (PairwiseCentred, EVEN, "resharded", {}, 1),
    "no gradient": (
        WithLosses,
        UNEVEN,
        "layers",
        {"reference": toy(WithLosses, seed=1), "parameters": None, "scorer": RhoLoss()},
        1,
    ),
}


class Sharded(Toy):
    """As a user of ModelParallelStrategy has it."""

    def configure_model(self) -> None:
        shard(self, "layers", self.device_mesh["data_parallel"])


class ShardedDeep(Sharded, Deep):
    """The same, with losses of its samples."""


# name: module, the callback's arguments, the Trainer's
FITS: dict[str, tuple[type[Toy], dict[str, Any], dict[str, Any]]] = {
    "last layer": (Sharded, {}, {}),
    "all": (ShardedDeep, {"parameters": "all"}, {}),
    "accumulated": (Sharded, {}, {"accumulate_grad_batches": 2}),
    "clipped": (Sharded, {"reweight": "none"}, {"gradient_clip_val": 0.1}),
    "resumed": (ShardedDeep, {}, {}),
    "resumed, from the start": (ShardedDeep, {"parameters": "all", "direction": "start"}, {}),
}
PLAIN = {Sharded: Toy, ShardedDeep: Deep}


def shard(module: nn.Module, how: str, mesh: Any = None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,)) if mesh is None else mesh
    for layer in [each for each in module.modules() if isinstance(each, nn.Linear)] if how != "root" else []:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if how == "resharded":
        module.set_reshard_after_forward(True)  # the root, too
    return module


def weighted(module: Any, batches: Sequence[Any], options: dict[str, Any], accumulate: int) -> Tensor:
    """Train two epochs in a loop of one's own; returns the scores of this process."""
    settings = {"reference": parameters_of(toy(type_of(module), seed=REFERENCE)), "parameters": "head"} | options
    settings |= {"temperature": 0.7, "min_ess": 0.0}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    scores = []
    with Reweighter(module, **settings) as reweighter:
        for epoch in range(2):
            for number, batch in enumerate(batches, 1):
                last = number % accumulate == 0
                if hasattr(module, "set_requires_gradient_sync"):
                    module.set_requires_gradient_sync(last)
                with reweighter.step(batch, epoch=epoch) as step:
                    x, y = step.batch
                    by_sample = hasattr(module, "sample_losses")
                    loss = module.sample_losses((x, y)).mean() if by_sample else F.cross_entropy(module(x), y)
                    result = step.backward(loss, lambda total: (total / accumulate).backward())
                scores.append(result.scores)
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
    return torch.cat(scores)


def type_of(module: nn.Module) -> type[Toy]:
    """The class that the module had before it was sharded."""
    return next(kind for kind in type(module).__mro__ if kind in (Toy, WithLosses, Deep, PairwiseCentred))


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor() for name, p in module.named_parameters()}


def mine(rank: int, rows: tuple[int, int]) -> list[list[int]]:
    first = sum(rows[:rank])
    return [list(range(start + first, start + first + rows[rank])) for start in range(0, 12, 4)]


def refused(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    reference = parameters_of(toy(seed=REFERENCE))
    mesh = init_device_mesh("cpu", (WORLD,))
    across = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard"))
    columns = parallelize_module(toy(), mesh, {"head": ColwiseParallel()})

    def step(module: Any, reference: Any, parameters: Any, **options: Any) -> None:
        data = toy_data(4)[:]
        with Reweighter(module, reference, parameters, **options) as reweighter, reweighter.step(data) as step:
            step.backward(F.cross_entropy(module(data[0]), data[1]))

    attempts: dict[str, Callable[[], Any]] = {
        "target": lambda: Reweighter(shard(toy(), "root"), reference, "head", reweight="target"),
        "aligned": lambda: Reweighter(shard(toy(), "root"), Aligned(toy(seed=1)), "head"),
        "kept": lambda: Reweighter(shard(toy(), "root"), reference, "all", keep_output_gradients=True),
        "align": lambda: Reweighter(shard(toy(), "root"), reference, "head", on_doubtful="align"),
        "loader": lambda: Reweighter(
            shard(toy(WithLosses), "root"), parameters="head", scorer=Influence(loader=[toy_data(4)[:]])
        ),
        "weights of RhoLoss": lambda: Reweighter(shard(toy(WithLosses), "root"), reference, scorer=RhoLoss()),
        "DTensors": lambda: Reweighter(shard(toy(), "root"), shard(toy(seed=1), "root"), "head"),
        "two meshes": lambda: Reweighter(fully_shard(toy(), mesh=across), reference, "head"),
        "tensor parallel": lambda: Reweighter(columns, reference, "head"),
        "several layers": lambda: step(shard(toy(), "root"), reference, "all"),
        "no gradient": lambda: Reweighter(shard(toy(), "root"), scorer=Uniform()),
        "diagnose": lambda: diagnose(shard(toy(WithLosses), "root"), reference, []),
        "one rank's reference": lambda: Reweighter(shard(toy(), "root"), {} if rank else reference, "head"),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            message = "not refused"
        except ValueError as error:
            message = str(error)
        (folder / f"refused-{name}-{rank}").write_text(message)


def on_rank(rank: int, folder: Path) -> None:
    """All cases on one of the two ranks; what comes out is saved."""
    data = toy_data(12)
    for case, (kind, rows, how, options, accumulate) in CASES.items():
        module = shard(toy(kind), how)
        batches = [data[indices] for indices in mine(rank, rows)]
        scores = weighted(module, batches, options, accumulate)
        torch.save((scores, whole(module)), folder / f"{case}-{rank}.pt")
    for case, (kind, options, of_trainer) in FITS.items():
        module = toy(kind)
        batches = torch.utils.data.DataLoader(
            WithIds(data), batch_sampler=mine(rank, EVEN), collate_fn=collate_with_ids
        )
        path = folder / f"{case}.checkpoint" if case.startswith("resumed") else None
        if path is not None:
            first = trainer(callback_of(kind, options, folder / "two" / case), **on_two())
            first.fit(toy(kind), batches)
            first.save_checkpoint(path)
        callback = callback_of(kind, options, folder / "two" / case)
        trainer(callback, epochs=2, **on_two(), **of_trainer).fit(module, batches, ckpt_path=path)
        torch.save(whole(module), folder / f"fit-{case}-{rank}.pt")
    refused(rank, folder)
    torch.save(similarity(shard(toy(Deep), "layers")), folder / f"similarity-{rank}.pt")


def similarity(module: nn.Module) -> dict[str, Any]:
    reference = parameters_of(toy(Deep, seed=REFERENCE))
    return weight_similarity(module, reference, select_parameters(module, "head"), reference)


def on_two() -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1, process_group_backend="gloo")
    return {"strategy": strategy, **two()}


def callback_of(kind: type[Toy], options: dict[str, Any], ledger: Path) -> GradMimic:
    reference = parameters_of(toy(PLAIN[kind], seed=REFERENCE))
    return GradMimic(
        reference, **{"parameters": "head", "temperature": 0.7, "min_ess": 0.0, "ledger": ledger} | options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_two_ranks(on_rank, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_is_scored_and_weighted_as_the_whole_one(case, folder):
    kind, rows, _, options, accumulate = CASES[case]
    module, data = toy(kind), toy_data(12)
    expected = weighted(module, [data[start : start + 4] for start in (0, 4, 8)], options, accumulate)
    (first, weights), (second, others) = (torch.load(folder / f"{case}-{rank}.pt") for rank in range(WORLD))
    parts = zip(first.split(rows[0]), second.split(rows[1]), strict=True)
    torch.testing.assert_close(torch.cat([part for pair in parts for part in pair]), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights, parameters_of(module), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


@pytest.mark.parametrize("case", FITS)
def test_a_fit_under_model_parallel_strategy_equals_one_of_the_whole_model(case, folder):
    kind, options, of_trainer = FITS[case]
    module = toy(PLAIN[kind])
    callback = callback_of(kind, options, folder / "one" / case)
    trainer(callback, epochs=2, **of_trainer).fit(module, loader(toy_data(12)))
    for rank in range(WORLD):
        weights = torch.load(folder / f"fit-{case}-{rank}.pt")
        torch.testing.assert_close(weights, parameters_of(module), rtol=1e-6, atol=1e-6)
    one, two = (
        Ledger(folder / n / case).table().sort_by([("epoch", "ascending"), ("id", "ascending")]) for n in ("one", "two")
    )
    for column in ("id", "epoch", "step", "batch", "batch_size", "flag"):
        assert one[column].to_pylist() == two[column].to_pylist(), column
    for column in ("score", "weight"):
        pair = [torch.tensor(table[column].to_pylist()) for table in (one, two)]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)


def test_the_weights_of_a_sharded_model_are_compared_as_a_whole(folder):
    for rank in range(WORLD):
        found = torch.load(folder / f"similarity-{rank}.pt")
        torch.testing.assert_close(found, similarity(toy(Deep)), rtol=1e-9, atol=1e-9)


REFUSALS = {
    "target": r"sharded \(`fully_shard`\). `reweight='target'` adds .* 'all' or 'none', or train it under DDP",
    "kept": "`keep_output_gradients` adds to gradients that are sharded; leave it out, or train it under DDP",
    "aligned": "An aligned reference is fitted from whole layers; give one",
    "align": "`on_doubtful='align'` fits whole layers; take 'warn' or 'raise'",
    "loader": "Influence runs the model on batches of its own; take MimicScore",
    "weights of RhoLoss": "give the reference as a module that has `sample_losses`, which is not sharded",
    "DTensors": "'head.weight' is a DTensor, .* expected whole tensors, as `get_model_state_dict",
    "two meshes": r"sharded by fully_shard over a mesh of shape \(1, 2\); .*one dimension over all ranks",
    "tensor parallel": r"'head.weight' is sharded by tensor parallelism over a mesh of shape \(2,\)",
    "several layers": r"not the one last layer .* or give the module a method `sample_losses\(batch\)`",
    "no gradient": "Uniform needs no layer, so give the module a method `sample_losses",
    "diagnose": "FSDPWithLosses is sharded .* diagnose before it is sharded",
    "one rank's reference": "no named tensors",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_exact_is_refused_on_all_ranks(case, folder):
    for rank in range(WORLD):
        assert re.search(REFUSALS[case], (folder / f"refused-{case}-{rank}").read_text())
