"""CLIPs on two and four gloo processes against one with the same global batches; all cases share the processes."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_mimic import Aligned, GradMimic, Ledger, WithIds, collate_with_ids
from lightning_mimic.models import CLIP, global_pair_losses
from support.clips import KINDS, clip, losses_of, pairs
from support.ranks import WORLD, on_two_ranks, strategy, two
from support.toys import loader, parameters_of, trainer

pytestmark = pytest.mark.slow

ROWS = 4  # of each rank
UNEVEN = ([0, 8, 16], [4])  # where each rank's batches begin
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STATIC = {"static_graph": True}

# kind, count of pairs, options of the module, of DDP, of the callback (None: without) and of the Trainer
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "plain": ("vit", 24, {}, {}, None, {}),
    "as they are": ("vit", 24, {}, {}, {}, {}),
    "in blocks": ("vit", 24, {"block_size": 3}, {}, {}, {}),
    "in blocks, bfloat16": ("vit", 24, {"block_size": 3}, {}, {}, {"precision": "bf16-mixed"}),
    "checkpointed": ("vit", 24, {"grad_checkpointing": True}, {}, {}, {}),
    "siglip, plain": ("siglip", 24, {}, {}, None, {}),
    "siglip": ("siglip", 24, {"block_size": 3}, {}, {}, {}),
    "scale and bias": ("siglip", 24, {}, {}, {"parameters": ["towers.logit_scale", "towers.logit_bias"]}, {}),
    "static_graph": ("vit", 24, {}, STATIC, {}, {}),
    "accumulated": ("vit", 48, {}, {}, {}, {"accumulate_grad_batches": 2}),
    "locked": ("vit", 24, {"locked": ["image"]}, {}, {}, {}),
    "both locked": ("biases", 24, {"locked": ["image", "text"]}, {}, {}, {}),
    "the scale": ("vit", 24, {}, {}, {"parameters": "towers.logit_scale"}, {}),
    "aligned": ("vit", 96, {}, {}, {"reference": "vit"}, {}),
    "aligned, wider": ("vit", 96, {}, {}, {"reference": "wide"}, {}),
    "aligned, narrower, cached": ("vit", 96, {}, {}, {"reference": "narrow", "cache": True}, {}),
    "aligned, another architecture": ("vit", 96, {}, STATIC, {"reference": "biases"}, {}),
    "aligned, siglip": ("siglip", 96, {}, {}, {"reference": "wide", "temperature": 0.01}, {}),
    "aligned, accumulated, locked": (
        "vit",
        96,
        {"locked": ["image", "text"]},
        {},
        {"reference": "vit"},
        {"accumulate_grad_batches": 2},
    ),
    "aligned, a broken image": ("vit", 96, {}, {}, {"reference": "vit"}, {}),
}
FOUR, ON_FOUR = 4, ["plain", "in blocks", "siglip, plain", "siglip"]
ALIGNED = [case for case in CASES if case.startswith("aligned")]


class Keep(pl.Callback):
    """Holds the losses that a fit logged, and what was aligned."""

    def __init__(self, callback: GradMimic | None) -> None:
        self.callback, self.losses, self.aligned = callback, [], None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss_step"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        target = {} if self.callback is None else self.callback.state_dict().get("target", {})
        self.aligned = target.get("aligned")


def data_of(case: str) -> torch.utils.data.TensorDataset:
    data = pairs(CASES[case][1])
    if "broken" in case:
        data.tensors[0][[5, 14, 15, 21], 0, 0, 0] = float("nan")  # each in the second rank's half of a batch
    return data


def module_of(case: str) -> CLIP:
    return clip(CASES[case][0], **CASES[case][2])


def callback_of(case: str, ledger: Path) -> GradMimic | None:
    options = CASES[case][4]
    if options is None:
        return None
    options = {"parameters": KINDS[CASES[case][0]][-1], "temperature": 0.05, "min_ess": 0.0, "ledger": ledger} | options
    kind, cache = options.pop("reference", None), options.pop("cache", False)
    if kind is None:
        reference = parameters_of(clip(CASES[case][0], seed=1))
        return GradMimic(reference | {"towers.logit_scale": torch.tensor(3.0).double()}, **options)
    return GradMimic(Aligned(clip(kind, seed=1), every=2, cache=cache), **options)


def fit(case: str, folder: Path, batches: Any, **options: Any) -> tuple[CLIP, Keep]:
    module, callback = module_of(case), callback_of(case, folder / case)
    keep = Keep(callback)
    callbacks = [keep] if callback is None else [callback, keep]
    trainer(*callbacks, **CASES[case][5], **options).fit(module, batches)
    return module, keep


def own_gradients(rank: int, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of all pairs, and this rank's part of the gradient of a weighted sum of them."""
    module, data = clip(), pairs(WORLD * rows)
    losses = module.sample_losses(data[rank * rows : (rank + 1) * rows])
    (losses * torch.arange(1, 1 + WORLD * rows)).sum().backward()
    return losses.detach(), {name: p.grad for name, p in module.named_parameters()}


def fit_all(rank: int, folder: Path, cases: Any, world: int) -> None:
    """Cases on one of the ranks; what comes out is saved."""
    rows = WORLD * ROWS // world
    for case in cases:
        _, count, _, ddp, _, _ = CASES[case]
        starts = range(rank * rows, count, world * rows)
        mine = [list(range(start, start + rows)) for start in starts]
        batches = torch.utils.data.DataLoader(WithIds(data_of(case)), batch_sampler=mine, collate_fn=collate_with_ids)
        module, keep = fit(case, folder / str(world), batches, strategy=strategy(**ddp), **two(world))
        torch.save([module.state_dict(), keep.losses, keep.aligned], folder / f"{case}-{rank}.pt")


def on_rank(rank: int, folder: Path) -> None:
    """All cases on one of the two ranks."""
    options = two()
    fit_all(rank, folder, CASES, WORLD)
    torch.save(own_gradients(rank, 3), folder / f"gradients-{rank}.pt")
    # Retrieval and zero-shot accuracy over the pairs of both.
    module, starts = clip(), range(rank * ROWS, 24, WORLD * ROWS)
    mine = [list(range(start, start + ROWS)) for start in starts]
    batches = torch.utils.data.DataLoader(pairs(24), batch_sampler=mine)
    (figures,) = trainer(strategy=strategy(), **options).validate(module, batches, verbose=False)
    torch.save(figures, folder / f"figures-{rank}.pt")
    # One rank has three batches, the other one.
    mine = [list(range(start, start + ROWS)) for start in UNEVEN[rank]]
    batches = torch.utils.data.DataLoader(pairs(24), batch_sampler=mine)
    (figures,) = trainer(strategy=strategy(), **options).validate(module, batches, verbose=False)
    torch.save(figures, folder / f"uneven-{rank}.pt")
    # One rank has a pair less.
    images = torch.randn(3 - rank, 5)
    for what, call in {
        "losses": lambda: global_pair_losses(images, images, torch.tensor(1.0)),
        "fit": lambda: trainer(strategy=strategy(), **options).fit(clip(), loader(pairs(4 - rank))),
        "scored fit": lambda: trainer(
            GradMimic(Aligned(clip(seed=1)), KINDS["vit"][-1]), strategy=strategy(), **options
        ).fit(clip(), loader(pairs(4 - rank))),
    }.items():
        try:
            call()
        except ValueError as error:
            (folder / f"{what}-{rank}").write_text(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_two_ranks(on_rank, tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def folder_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    act = partial(fit_all, cases=ON_FOUR, world=FOUR)
    return on_two_ranks(act, tmp_path_factory.mktemp("ddp"), world=FOUR)


@pytest.mark.filterwarnings("ignore:.*samples held NaN")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, folder):
    check_equal_to_one(case, folder, WORLD)


@pytest.mark.parametrize("case", ON_FOUR)
def test_four_processes_equal_one(case, folder_of_four):
    check_equal_to_one(case, folder_of_four, FOUR)


def check_equal_to_one(case: str, folder: Path, world: int) -> None:
    module, keep = fit(case, folder / "one", loader(data_of(case), WORLD * ROWS))
    ends = [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(world)]
    for state, losses, aligned in ends:
        torch.testing.assert_close(state, module.state_dict(), **CLOSE)
        torch.testing.assert_close(losses, keep.losses, **CLOSE)
        if case in ALIGNED:
            assert aligned["enough"]
            assert bool(aligned["fitted"])
            for part in ("statistics", "reference"):
                torch.testing.assert_close(aligned[part], keep.aligned[part], **CLOSE)
    for end in ends[1:]:
        torch.testing.assert_close(ends[0][0], end[0], rtol=0, atol=0)
    moved = [n for n, p in module_of(case).named_parameters() if not torch.equal(p, module.get_parameter(n))]
    assert set(moved) == {n for n, p in module.named_parameters() if p.requires_grad}
    if CASES[case][4] is None:
        return
    one, two = (Ledger(folder / str(n) / case).table().sort_by([("id", "ascending")]) for n in ("one", world))
    for column in ("id", "epoch", "step", "batch", "batch_size", "flag"):
        assert one[column].to_pylist() == two[column].to_pylist(), column
    for column in ("score", "weight", "loss"):
        pair = [torch.tensor([float("nan") if v is None else v for v in t[column].to_pylist()]) for t in (one, two)]
        torch.testing.assert_close(*pair, **CLOSE, equal_nan=True)
    weights = torch.tensor(two["weight"].to_pylist())
    assert float(weights.max()) > 1.2 / (WORLD * ROWS), "weights that hardly differ"
    assert two["rank"].to_pylist().count(0) == CASES[case][1] // world


def test_losses_of_all_ranks_and_their_gradients_add_up(folder):
    module, data, parts = clip(), pairs(6), []
    expected = losses_of(module, data[:6])
    (expected * torch.arange(1, 7)).sum().backward()
    for rank in range(WORLD):
        losses, gradients = torch.load(folder / f"gradients-{rank}.pt", weights_only=True)
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-9, atol=1e-12)
        parts.append(gradients)
    whole = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    torch.testing.assert_close(whole, {n: p.grad for n, p in module.named_parameters()}, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(parts[0]["towers.logit_scale"], parts[1]["towers.logit_scale"])


def test_retrieval_is_among_the_pairs_of_all_ranks(folder):
    one, two = (torch.load(folder / f"figures-{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert one == two
    (expected,) = trainer().validate(clip(), loader(pairs(24), 24), verbose=False)
    expected.pop("val/loss")  # of a process's batch
    losses = [float(losses_of(clip(), pairs(24)[start : start + ROWS]).mean().detach()) for start in range(0, 24, ROWS)]
    assert one.pop("val/loss") == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert one == pytest.approx(expected)
    assert {f"val/{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} == set(one)


def test_ranks_of_unlike_length_can_be_evaluated(folder):
    one, two = (torch.load(folder / f"uneven-{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert one == two
    seen = [row for starts in UNEVEN for start in starts for row in range(start, start + ROWS)]
    (expected,) = trainer().validate(clip(), loader(torch.utils.data.Subset(pairs(24), seen), 16), verbose=False)
    assert one | {"val/loss": 0} == pytest.approx(expected | {"val/loss": 0})


@pytest.mark.parametrize(("what", "sizes"), [("losses", [3, 2]), ("fit", [4, 3]), ("scored fit", [4, 3])])
def test_ranks_with_unlike_batches_are_refused(what, sizes, folder):
    message = (
        f"the ranks have batches of {sizes} pairs; a contrastive loss over all ranks needs batches of equal size. "
        "Leave out the last incomplete batch (`drop_last=True`)."
    )
    for rank in range(WORLD):
        assert re.fullmatch(re.escape(message), (folder / f"{what}-{rank}").read_text())
