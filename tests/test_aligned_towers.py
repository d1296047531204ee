"""A CLIP's unrelated reference: fitted anew from lists of all that was seen, and what must not matter."""

import contextlib
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import oracles
from lightning_mimic import Aligned, GradMimic, Ledger, WithIds, collate_with_ids
from lightning_mimic.reference.procrustes import Rotation
from support.aligned_towers import ROWS, STILL, TAU, WIDTH, fit
from support.clips import KINDS, clip, oracle_steps, pairs, targets_of, towers
from support.toys import diagnosing, loader, parameters_of, trainer

pytestmark = pytest.mark.slow  # fits and processes

CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # the ledger holds float32
BOTH = {"locked": ["image", "text"]}


def features_of(module, kind, batch):
    """What the two projections are multiplied with: what the towers give without them."""
    bare = copy.deepcopy(module.towers).requires_grad_(False)
    for path in KINDS[kind][-1]:
        owner, _, name = path.removeprefix("towers.").rpartition(".")
        owner = bare.get_submodule(owner)
        width = 64 if hasattr(bare.visual, "trunk") and "visual" in path else WIDTH
        if name == "proj" and isinstance(getattr(owner, name), nn.Linear):
            owner.proj = nn.Identity()
        else:
            setattr(owner, name, nn.Parameter(torch.eye(width).double()))
    with torch.no_grad():
        return bare.encode_image(batch[0]), bare.encode_text(batch[1])


class Listed:
    """The aligned score from lists of all pairs seen: stacked rows, a singular value decomposition, least squares."""

    def __init__(self, kind, reference, every, needed):
        self.kind, self.reference, self.every, self.needed = kind, reference.eval(), every, needed
        self.weights = torch.zeros(0).double()
        self.seen = [[[], [], []], [[], [], []]]  # images' and texts': features, the reference's and own embeddings
        self.steps, self.found, self.known = 0, None, []

    def __call__(self, module, batch, gradients):
        enough = self.found is not None
        if not enough or self.steps % self.every == 0:
            self.weights = torch.cat([self.weights * (0.9 if enough else 1.0), torch.ones(len(batch[0])).double()])
            with torch.no_grad():
                own, theirs = ((m.encode_image(batch[0]), m.encode_text(batch[1])) for m in (module, self.reference))
            for lists, *rows in zip(self.seen, features_of(module, self.kind, batch), theirs, own, strict=True):
                for rows_so_far, more in zip(lists, rows, strict=True):
                    rows_so_far.extend(more)
            if len(self.weights) >= self.needed:
                self.found = self.solved(module)
        self.steps += 1
        self.known += [self.found is not None] * len(batch[0])
        if self.found is None:
            return torch.zeros(len(batch[0])).double()
        return oracles.mimic_scores(gradients, self.found, targets_of(module, self.kind))

    def about(self, rows, mean):
        return (rows - mean) * self.weights.sqrt()[:, None]

    def mean(self, rows):
        return (self.weights[:, None] * rows).sum(0) / self.weights.sum()

    def solved(self, module):
        towers = [[torch.stack(rows) for rows in lists] for lists in self.seen]
        theirs = [F.normalize(t, dim=1) for _, t, _ in towers]
        ours = [F.normalize(o, dim=1) for _, _, o in towers]
        stacked, beside = (torch.cat([self.about(r, self.mean(r)) for r in rows]) for rows in (theirs, ours))
        leading = torch.eye(stacked.shape[1]).double()
        if stacked.shape[1] > beside.shape[1]:
            leading = torch.linalg.svd(stacked)[2][: beside.shape[1]].T
        left, _, right = torch.linalg.svd((stacked @ leading).T @ beside, full_matrices=False)
        rotation = leading @ left @ right
        found = {}
        for (x, _, own), unit, path in zip(towers, theirs, KINDS[self.kind][-1], strict=True):
            y = unit * own.norm(dim=1, keepdim=True)
            bias = f"{path}.bias" in targets_of(module, self.kind)
            centre_x, centre_y = (self.mean(x), self.mean(y)) if bias else (0.0, 0.0)
            rows, aims = self.about(x, centre_x), self.about(y, centre_y)
            penalty = (0.01 * rows.square().sum() / rows.shape[1]).sqrt() * torch.eye(rows.shape[1]).double()
            none = torch.zeros(rows.shape[1], aims.shape[1]).double()
            weight = torch.linalg.lstsq(torch.cat([rows, penalty]), torch.cat([aims, none])).solution
            linear = f"{path}.weight" in targets_of(module, self.kind)
            found[f"{path}.weight" if linear else path] = (weight @ rotation).T if linear else weight @ rotation
            if bias:
                found[f"{path}.bias"] = (centre_y - centre_x @ weight) @ rotation
        return found


def scores_of(folder, column="score"):
    values = Ledger(folder).table()[column].to_pylist()
    return torch.tensor([float("nan") if value is None else value for value in values]).double()


# kind of the model and of the reference, every, options of Aligned, the callback, the module and the Trainer
CASES = {
    "the same": ("vit", "vit", 3, {}, {}, {}, {}),
    "wider": ("vit", "wide", 2, {}, {}, BOTH, {}),
    "narrower": ("vit", "narrow", 1, {}, {}, BOTH, {}),
    "another architecture": ("vit", "biases", 2, {}, {}, BOTH, {}),
    "linear layers": ("convolution", "vit", 1, {}, {}, BOTH, {}),
    "cached": ("vit", "wide", 2, {"cache": True}, {}, BOTH, {}),
    "accumulated": ("vit", "vit", 2, {}, {}, BOTH, {"accumulate_grad_batches": 2}),
    "checkpointed": ("vit", "vit", 3, {}, {}, {"grad_checkpointing": True, "locked": ["text"]}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_goes_by_the_projections_fitted_to_all_that_was_seen(case, tmp_path):
    kind, other, every, aligning, settings, making, options = CASES[case]
    accumulate = options.get("accumulate_grad_batches", 1)  # which an epoch's end does not cut short
    needed, epochs, more = (4 * WIDTH, 2, accumulate) if kind == "vit" else (4 * 64, 1, 2)
    ours, theirs, data = clip(kind, **making), clip(kind, **making), pairs(needed + more * ROWS)
    aligned = Aligned(towers(other, seed=1), every=every, **aligning)
    callback = GradMimic(aligned, KINDS[kind][-1], temperature=TAU, min_ess=0, ledger=tmp_path / "s", **settings)
    trainer(callback, epochs=epochs, **options).fit(ours, loader(data, ROWS))
    listed = Listed(kind, towers(other, seed=1), every, needed)
    batches = [data[start : start + ROWS] for start in range(0, len(data), ROWS)] * epochs
    seen = oracle_steps(theirs, batches, listed, TAU, accumulate=accumulate)
    known = torch.tensor(listed.known)
    assert known.tolist().index(True) == needed - ROWS
    expected = torch.cat([scores for scores, _ in seen]).where(known, torch.nan)
    torch.testing.assert_close(scores_of(tmp_path / "s"), expected, equal_nan=True, **CLOSE)
    torch.testing.assert_close(scores_of(tmp_path / "s", "weight"), torch.cat([w for _, w in seen]), **CLOSE)
    torch.testing.assert_close(parameters_of(ours), parameters_of(theirs), rtol=1e-8, atol=1e-9)
    held = callback.state_dict()["target"]["aligned"]["reference"]
    torch.testing.assert_close(held, listed.found, rtol=1e-7, atol=1e-9)
    assert float(torch.cat([w for _, w in seen]).max()) > 1.5 / ROWS, "weights that hardly differ"
    flags = Ledger(tmp_path / "s").table()["flag"].to_pylist()
    assert flags == ["ok" if k else "zero_direction" for k in known]


def rotated(model, seed=3):
    """The same towers with both embeddings turned, which their loss does not notice."""
    model = copy.deepcopy(model)
    width = model.visual.proj.shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double())[0]
    with torch.no_grad():
        model.visual.proj.copy_(model.visual.proj @ turn)
        model.text_projection.copy_(model.text_projection @ turn)
    return model


@pytest.mark.parametrize("other", ["vit", "wide", "narrow"])
def test_scores_do_not_depend_on_how_the_reference_lays_out_its_space(other, tmp_path):
    for name, reference in (("a", towers(other, seed=1)), ("b", rotated(towers(other, seed=1)))):
        fit(clip(), Aligned(reference, every=2), ledger=tmp_path / name)
    a, b = (scores_of(tmp_path / name) for name in "ab")
    assert float(a[64:].abs().max()) > 1e-3
    torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-7)


class Unpenalised(Aligned):
    penalty = 1e-10


def test_a_reference_that_is_the_model_turned_says_that_the_model_is_there():
    module = clip(**STILL)
    with torch.no_grad():  # layers that normalise leave out a dimension
        for norm in (module.towers.visual.ln_post, module.towers.ln_final):
            norm.bias.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)))
    found = fit(module, Unpenalised(rotated(module.towers)))["reference"]
    torch.testing.assert_close(found, {n: p.detach() for n, p in targets_of(module, "vit").items()}, rtol=0, atol=1e-5)


def no_rotation(statistics):
    one = torch.ones(())
    return Rotation(torch.eye(len(statistics[0].xy)).double(), one, one > 0)


@pytest.mark.parametrize("kind", ["vit", "biases"])
def test_without_a_rotation_the_projections_are_fitted_in_the_references_own_frame(kind, monkeypatch):
    batches = loader(pairs(80 if kind == "vit" else 272), ROWS)
    reference = towers(kind, seed=1)
    found, rotated = (
        fit(clip(kind, **BOTH), Aligned(reference, every=2, rotate=r), batches, kind=kind) for r in (False, True)
    )
    monkeypatch.setattr("lightning_mimic.reference.aligned_towers.procrustes", no_rotation)
    expected = fit(clip(kind, **BOTH), Aligned(reference, every=2), batches, kind=kind)
    assert found["enough"]
    # A product with the identity is exact, but what follows may be summed in another order.
    torch.testing.assert_close(found["reference"], expected["reference"], rtol=0, atol=1e-12)
    assert all((found["reference"][n] - rotated["reference"][n]).abs().max() > 1e-2 for n in found["reference"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_resumed_without_the_rotation_begins_its_alignment_anew_and_its_scores_are_not_mixed(tmp_path):
    def callback(**aligning):
        return GradMimic(Aligned(towers(seed=1), **aligning), KINDS["vit"][-1], ledger=tmp_path / "s")

    first = trainer(callback(), ModelCheckpoint(tmp_path / "c", "half"), enable_checkpointing=True)
    first.fit(clip(), loader(pairs(80), ROWS))
    again = callback(rotate=False)
    resumed = trainer(again, epochs=2)
    anew, mixed = "another `rotate`, so it begins anew", r"goes on with other settings \(aligned_rotate: None, False\)"
    with pytest.warns(UserWarning, match=anew), pytest.warns(UserWarning, match=mixed):
        resumed.fit(clip(), loader(pairs(80), ROWS), ckpt_path=tmp_path / "c/half.ckpt", weights_only=True)
    assert again.state_dict()["target"]["aligned"]["steps"] == 5


class Counted(nn.Module):
    """A reference that tells which pairs it is asked about."""

    asked: list[tuple[int, int]] = []  # noqa: RUF012 - a copy of a module counts with it

    def __init__(self):
        super().__init__()
        self.towers = towers(seed=1)

    def encode_image(self, images):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.asked.append(len(images))
        return self.towers.encode_image(images)

    def encode_text(self, texts):
        return self.towers.encode_text(texts)


@pytest.mark.parametrize("cache", [False, True])
def test_a_cache_asks_once_for_each_pair_and_changes_nothing(cache, tmp_path):
    Counted.asked.clear()
    held = fit(clip(), Aligned(Counted(), every=2, cache=cache), epochs=3, ledger=tmp_path / "a")
    plain = fit(clip(), Aligned(towers(seed=1), every=2), epochs=3, ledger=tmp_path / "b")
    assert sum(Counted.asked) == (80 if cache else 80 + 5 * ROWS)
    for part in ("statistics", "reference"):
        torch.testing.assert_close(held[part], plain[part], rtol=0, atol=0)
    torch.testing.assert_close(scores_of(tmp_path / "a"), scores_of(tmp_path / "b"), equal_nan=True, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("count", [80, 48])  # the break after the warm-up, or in it
def test_a_resumed_fit_equals_the_uninterrupted_one(count, tmp_path):
    aligned, batches = Aligned(towers("wide", seed=1), every=3), loader(pairs(count), ROWS)
    # A learning rate that does not know where the fit ends.
    options = BOTH | {"warmup_steps": 1000, "optimizer": partial(torch.optim.SGD, lr=30.0)}
    whole, resumed = clip(**options), clip(**options)
    expected = fit(whole, aligned, batches, epochs=3, ledger=tmp_path / "a")
    first = GradMimic(aligned, KINDS["vit"][-1], temperature=TAU, min_ess=0, ledger=tmp_path / "b")
    half = trainer(first, ModelCheckpoint(tmp_path / "c", "half"), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="never aligned") if count == 48 else contextlib.nullcontext():
        half.fit(clip(**options), batches)
    again = GradMimic(aligned, KINDS["vit"][-1], temperature=TAU, min_ess=0, ledger=tmp_path / "b")
    trainer(again, epochs=3).fit(resumed, batches, ckpt_path=tmp_path / "c/half.ckpt", weights_only=True)
    torch.testing.assert_close(parameters_of(resumed), parameters_of(whole), rtol=0, atol=0)
    found = again.state_dict()["target"]["aligned"]
    assert found.pop("of") == expected.pop("of")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert expected["enough"]
    columns = ["id", "epoch", "step", "batch", "position", "score", "weight"]
    one, two = (Ledger(tmp_path / name).table().select(columns) for name in ("a", "b"))
    assert one.equals(two)


@pytest.mark.filterwarnings("ignore:.*samples held NaN")
@pytest.mark.parametrize("cache", [False, True])
def test_a_pair_with_a_broken_image_is_not_in_the_sums(cache):
    data, gone = pairs(80), [5, 17, 60]
    data.tensors[0][gone, 1, 2, 3] = float("nan")
    left = [[k for k in range(start, start + ROWS) if k not in gone] for start in range(0, 80, ROWS)]
    without = DataLoader(WithIds(data), batch_sampler=left, collate_fn=collate_with_ids)
    aligned = Aligned(towers("wide", seed=1), every=2, cache=cache)
    expected = fit(clip(**STILL), aligned, without, epochs=2)
    found = fit(clip(**STILL), aligned, loader(data, ROWS), epochs=2)
    assert float(found["statistics"]["image_layer"]["count"]) < 80 + 5 * ROWS
    for part in ("statistics", "reference"):
        torch.testing.assert_close(found[part], expected[part], rtol=1e-9, atol=1e-9)


def test_bfloat16_is_near_to_float32():
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        aligned = Aligned(towers("wide", seed=1, dtype=torch.float32), every=1)
        batches = loader(pairs(80, dtype=torch.float32), ROWS)
        state = fit(clip(dtype=torch.float32, **STILL), aligned, batches, options={"precision": precision})
        assert all(t.dtype == torch.float32 for part in state["statistics"].values() for t in part.values())
        found[precision] = torch.cat([state["reference"][name].flatten() for name in sorted(state["reference"])])
    exact, rounded = found.values()
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.05


def test_a_doubtful_reference_is_aligned_once_that_is_known(tmp_path):
    # It knows these pairs and nothing else, and shares no initialisation with the model.
    reference, data = clip(seed=1, optimizer=partial(torch.optim.Adam, lr=3e-3)), pairs(80)
    trainer(epochs=12).fit(reference, loader(data, ROWS))
    callback = GradMimic(reference, KINDS["vit"][-1], temperature=TAU, on_doubtful="align", ledger=tmp_path / "s")
    trainer(diagnosing(callback, 48), epochs=2).fit(clip(), loader(data, ROWS))
    facts = Ledger(tmp_path / "s").meta["attempts"][0]["diagnosis"]
    assert facts["verdict"] != "compatible"
    flags = Ledger(tmp_path / "s").table()["flag"].to_pylist()
    assert flags == ["zero_direction"] * 48 + ["ok"] * (160 - 48)
