"""An unrelated reference: fitted anew from lists of all that was seen, and against what must not matter."""

import contextlib
import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_mimic import Aligned, GradMimic, Ledger, WithIds, collate_with_ids
from lightning_mimic.scorers import CosineSimilarity, RhoLoss
from support.aligned_heads import CLOSE, Listed, fit, scores_of, unrelated
from support.cases import for_each
from support.oracle_training import trained_by_oracle
from support.toys import (
    CLASSES,
    FEATURES,
    HIDDEN,
    Convolution,
    Tokens,
    Toy,
    WithLosses,
    loader,
    parameters_of,
    toy,
    toy_data,
    trainer,
)


class Bare(Toy):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False)


class Keyed(Toy):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def cosine(listed):
    def score(module, batch, gradients):
        norms = torch.cat([gradients[n].flatten(1) for n in ("head.weight", "head.bias")], 1).norm(dim=1)
        return listed(module, batch, gradients) / norms

    return score


# module, reference, every, the rest for Aligned, for GradMimic and for the Trainer
CASES = {
    "plain": (Toy, "wider", 3, {}, {}, {}),
    "at every step": (Toy, "wider", 1, {}, {}, {}),
    "every ten": (Toy, "wider", 10, {}, {}, {}),
    "cached": (Toy, "wider", 3, {"cache": True}, {}, {}),
    "another architecture": (WithLosses, "convolution", 3, {}, {}, {}),
    "target": (Toy, "wider", 3, {}, {"reweight": "target"}, {}),
    "target, clipped": (WithLosses, "toy", 4, {}, {"reweight": "target"}, {"gradient_clip_val": 0.05}),
    "accumulated": (Toy, "wider", 3, {}, {}, {"accumulate_grad_batches": 2}),
    "clipped": (Toy, "toy", 5, {}, {}, {"gradient_clip_val": 0.05}),
    "no bias": (Bare, "wider", 3, {}, {}, {}),
    "tokens": (Tokens, "tokens", 3, {}, {}, {}),
    "tokens, cached": (Tokens, "tokens", 2, {"cache": True}, {"reweight": "target"}, {}),
    "normalisation and dropout": (Toy, "moody", 3, {}, {}, {}),
    "cosine": (Toy, "wider", 3, {}, {"scorer": CosineSimilarity()}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_goes_by_the_layer_fitted_to_all_that_was_seen(case, tmp_path):
    kind, name, every, aligning, settings, options = CASES[case]
    ours, theirs, data = toy(kind), toy(kind), toy_data(42)  # ten batches of 4, one of 2
    aligned = Aligned(unrelated(name), every=every, **aligning)
    callback = GradMimic(aligned, "head", temperature=0.3, min_ess=0, ledger=tmp_path / "s", **settings)
    trainer(callback, epochs=2, **options).fit(ours, loader(data))
    listed = Listed(unrelated(name), every, centred=kind is not Bare)
    loops = {"reweight": settings.get("reweight", "all"), "accumulate": options.get("accumulate_grad_batches", 1)}
    loops |= {"clip": options.get("gradient_clip_val"), "tau": 0.3, "targets": ("head.weight", "head.bias")}
    loops["score"] = cosine(listed) if case == "cosine" else listed
    batches = [data[i : i + 4] for i in range(0, 42, 4)]
    seen = [row for _ in range(2) for row in trained_by_oracle(theirs, batches, {}, **loops)]
    torch.testing.assert_close(parameters_of(ours), parameters_of(theirs), rtol=1e-8, atol=1e-8)
    known, scores = torch.tensor(listed.known), torch.cat([s for s, _ in seen])
    assert known.tolist().index(True) == (4 if kind is Tokens else 28)
    torch.testing.assert_close(scores_of(tmp_path / "s"), scores.where(known, torch.nan), equal_nan=True, **CLOSE)
    torch.testing.assert_close(scores_of(tmp_path / "s", "weight"), torch.cat([w for _, w in seen]), **CLOSE)
    flags = Ledger(tmp_path / "s").table()["flag"].to_pylist()
    assert flags == ["ok" if k else "zero_direction" for k in known]


@pytest.mark.filterwarnings("ignore:.*samples held NaN")
@pytest.mark.parametrize("part", [0, 2])  # what both are called with, and a part that neither is
def test_a_sample_with_nan_is_as_if_it_were_not_there(part, tmp_path):
    x, y = toy_data(42).tensors
    extra, gone = torch.ones(42, 1).double(), [5, 17, 34]
    [x, y, extra][part][gone] = float("nan")
    data = torch.utils.data.TensorDataset(x, y, extra)

    class Three(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    left = [[k for k in range(start, min(start + 4, 42)) if k not in gone] for start in range(0, 42, 4)]
    without = torch.utils.data.DataLoader(WithIds(data), batch_sampler=left, collate_fn=collate_with_ids)
    aligned = Aligned(unrelated(), every=2)
    expected = fit(toy(Three), aligned, without, ledger=tmp_path / "a")
    found = fit(toy(Three), aligned, loader(data), ledger=tmp_path / "b")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    here = torch.tensor([k not in gone for k in range(42)] * 2)
    torch.testing.assert_close(scores_of(tmp_path / "b")[here], scores_of(tmp_path / "a"), equal_nan=True, **CLOSE)
    assert scores_of(tmp_path / "b", "weight")[~here].tolist() == [0.0] * 6


@pytest.mark.parametrize("cache", [False, True])
def test_a_batch_may_be_a_dict(cache):
    samples = [{"x": x, "y": y, "id": k} for k, (x, y) in enumerate(toy_data(42))]
    aligned = Aligned(unrelated(), lambda batch: batch["x"], 3, cache=cache)
    found = fit(toy(Keyed), aligned, torch.utils.data.DataLoader(samples, 4))
    torch.testing.assert_close(found, fit(toy(), Aligned(unrelated(), every=3)), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_reference_follows_the_trainers_precision(precision):
    batches = torch.utils.data.DataLoader(toy_data(42, dtype=torch.float32), 4)
    aligned = Aligned(unrelated(dtype=torch.float32))
    assert all(p.isfinite().all() for p in fit(toy(), aligned, batches, options={"precision": precision}).values())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("saved", ["within the fit", "after it"])
@pytest.mark.parametrize("count", [42, 20])  # the break after the warm-up, or in it
def test_a_resumed_fit_equals_the_uninterrupted_one(count, saved, tmp_path):
    aligned, batches, whole, resumed = Aligned(unrelated(), every=3), loader(toy_data(count)), toy(), toy()
    fit(whole, aligned, batches, epochs=3, ledger=tmp_path / "a")
    first = GradMimic(aligned, "head", temperature=0.3, min_ess=0, ledger=tmp_path / "b")
    saver = ModelCheckpoint(tmp_path / "c", "within")
    half = trainer(first, saver, enable_checkpointing=True)
    with contextlib.ExitStack() as stack:
        if count == 20:
            stack.enter_context(pytest.warns(UserWarning, match="never aligned"))
        half.fit(toy(), batches)
    half.save_checkpoint(tmp_path / "after.ckpt")
    again = GradMimic(aligned, "head", temperature=0.3, min_ess=0, ledger=tmp_path / "b")
    path = tmp_path / ("c/within.ckpt" if saved == "within the fit" else "after.ckpt")
    trainer(again, epochs=3).fit(resumed, batches, ckpt_path=path, weights_only=True)
    torch.testing.assert_close(parameters_of(resumed), parameters_of(whole), rtol=0, atol=0)
    columns = ["id", "epoch", "step", "batch", "position", "score", "weight"]
    one, two = (Ledger(tmp_path / name).table().select(columns) for name in ("a", "b"))
    assert one.equals(two)


SHAPE = (
    "`Aligned`: the reference gives shape {} where the target layer gives (4, 3); both must say the same things "
    "(classes, in one order) of the same samples."
)
PART = (
    "`parameters`: an aligned reference refits one whole nn.Linear, not {}. Name the path of the model's last linear "
    "layer."
)
UNDIRECTED = (
    "`reference`: RhoLoss takes no direction, so there is nothing to align; pass the reference itself, without Aligned."
)
FIVE = nn.Linear(FEATURES, 5).double()
TWICE = nn.Sequential(nn.Linear(FEATURES, 6), nn.Flatten(0), nn.Unflatten(0, (-1, 3))).double()  # two rows a sample
PAIR = nn.LSTM(FEATURES, CLASSES).double()
REFUSED = {
    "classes": (Toy, Aligned(FIVE), "head", SHAPE.format((4, 5))),
    "rows": (Toy, Aligned(TWICE), "head", SHAPE.format((8, 3))),
    "rows, cached": (Toy, Aligned(TWICE, cache=True), "head", SHAPE.format((8, 3))),
    "a tuple": (Toy, Aligned(PAIR), "head", "`Aligned`: the reference gives a tuple; expected a tensor."),
    "a convolution": (Convolution, Aligned(FIVE), "head", PART.format("head.bias, head.weight of a Conv2d")),
    "a part": (Toy, Aligned(FIVE), "head.weight", PART.format("head.weight of a Linear")),
    "layers": (
        Toy,
        Aligned(FIVE),
        "all",
        "`parameters` selects 2 layers ('body', 'head'), but the scorer needs one nn.Linear.",
    ),
    "no direction": (WithLosses, Aligned(toy(WithLosses)), None, UNDIRECTED),
    "no direction to an unrelated one": (WithLosses, Aligned(unrelated()), None, UNDIRECTED),
    "no rotation": (
        Toy,
        Aligned(unrelated(), rotate=False),
        "head",
        "`Aligned(rotate=False)`: only the embeddings of a CLIP are rotated (a module with `encode_image` and "
        "`encode_text`), and this is a Toy; leave `rotate` out.",
    ),
    "no ids": (
        Toy,
        Aligned(unrelated(), cache=True),
        "head",
        "`Aligned(cache=True)` keeps outputs by sample id, and the batch carries none. Use "
        "DataLoader(WithIds(dataset), collate_fn=collate_with_ids), or leave the cache off.",
    ),
    "no inputs": (
        Keyed,
        Aligned(unrelated()),
        "head",
        "the batch is a dict; say what of it the reference is called with: "
        "`Aligned(..., inputs=lambda batch: batch['image'])`.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_aligned_is_refused_in_a_sentence(case):
    kind, aligned, parameters, message = REFUSED[case]
    module, data, scorer = toy(kind), toy_data(8), None if parameters else RhoLoss()
    batches = [{"x": x, "y": y} for x, y in data] if kind is Keyed else data
    batches = torch.utils.data.DataLoader(batches, 4) if case.startswith("no i") else loader(data)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer(GradMimic(aligned, parameters, scorer=scorer)).fit(module, batches)
    assert not module.head._forward_hooks
    assert "training_step" not in vars(module)


@for_each("every", [0, -1, True, 2.5, "10", None])
def test_every_is_a_positive_whole_number(every):
    message = f"`every` counts micro-batches between two refits, 1 or more, not {every!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Aligned(unrelated(), every=every)
    assert Aligned(unrelated()).every == 10
