"""Scores and steps of CLIPs: a real ViT-B-32 against finite differences, small ones against a loop over the pairs."""

import math
import re
from functools import partial

import open_clip
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import oracles
from lightning_mimic import GradMimic, Ledger
from lightning_mimic.models import CLIP
from lightning_mimic.scorers import ReferenceLoss, RhoLoss
from support.clips import KINDS, clip, losses_of, oracle_steps, pairs, targets_of
from support.toys import loader, parameters_of, trainer

CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # the ledger holds float32
TAU = 0.05
BLOCK = "{}transformer.resblocks.{}.mlp.c_proj.weight"


def scores_of(folder, column="score"):
    values = Ledger(folder).table()[column].to_pylist()
    return torch.tensor([float("nan") if value is None else value for value in values]).double()


def batches_of(data, rows=4):
    return [data[start : start + rows] for start in range(0, len(data), rows)]


@pytest.fixture(scope="module")
def real():
    """A ViT-B-32 in float64, of which only what is scored trains, and two pairs of few patches and few words."""
    torch.manual_seed(0)
    towers = open_clip.create_model(
        "ViT-B-32", pretrained=None, precision="fp64", force_image_size=64, force_context_length=16
    )
    module = CLIP(towers, optimizer=partial(torch.optim.SGD, lr=0.0)).double()
    images, texts = torch.randn(2, 3, 64, 64).double(), torch.randint(1, 49406, (2, 16))
    return module.requires_grad_(False), (images, texts.scatter(1, torch.tensor([[7], [15]]), 49407))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ["towers.visual.proj", "towers.text_projection"],
        [BLOCK.format("towers.visual.", 11), BLOCK.format("towers.", 11)],
    ],
)
def test_scores_of_a_real_vit_are_directional_derivatives(names, real, tmp_path):
    module, batch = real
    generator = torch.Generator().manual_seed(1)
    chosen = {name: module.get_parameter(name).requires_grad_() for name in names}
    reference = {n: p.detach() + 0.01 * torch.randn(p.shape, generator=generator) for n, p in chosen.items()}
    callback = GradMimic(reference, names, reweight="none", ledger=tmp_path / "s")
    trainer(callback).fit(module, loader(TensorDataset(*batch), 2))
    expected = oracles.finite_difference_scores(module, losses_of, batch, reference, names, 1e-4)
    assert float(expected.abs().min()) > 1e-5, "a check that could not fail"
    torch.testing.assert_close(scores_of(tmp_path / "s"), expected, rtol=1e-5, atol=1e-8)
    assert Ledger(tmp_path / "s").meta["attempts"][0]["score_kind"] == "own_loss"


# kind, parameters, the callback's options, the module's, the Trainer's
PROJECTIONS, LOWEST = None, ["towers.token_embedding", "towers.visual.class_embedding"]
CASES = {
    **{kind: (kind, PROJECTIONS, {}, {}, {}) for kind in KINDS},
    "accumulated": ("vit", PROJECTIONS, {}, {}, {"accumulate_grad_batches": 2}),
    "everything": ("vit", ["all"], {"math_attention": True}, {}, {}),
    "everything of a convolution": ("convolution", ["all"], {"math_attention": True}, {}, {}),
    "the scale": ("vit", ["towers.logit_scale"], {}, {}, {}),
    "one projection": ("vit", ["towers.visual.proj"], {}, {}, {}),
    "below attention": ("vit", LOWEST, {"math_attention": True}, {}, {}),
    "above attention": ("vit", [BLOCK.format(part, 0) for part in ("towers.visual.", "towers.")], {}, {}, {}),
    "checkpointed": ("vit", PROJECTIONS, {}, {"grad_checkpointing": True}, {}),
    "checkpointed throughout": ("vit", ["all"], {"math_attention": True}, {"grad_checkpointing": True}, {}),
    "locked image tower": ("vit", PROJECTIONS, {}, {"locked": ["image"]}, {}),
    "locked convolution": ("biases", PROJECTIONS, {}, {"locked": ["image", "text"]}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_weighted_sum_of_the_pairs_own_gradients(case, tmp_path):
    kind, parameters, settings, making, options = CASES[case]
    parameters = KINDS[kind][-1] if parameters is None else parameters
    ours, theirs, data = clip(kind, **making), clip(kind, **(making | {"grad_checkpointing": False})), pairs(12)
    reference = parameters_of(clip(kind, seed=1))
    reference["towers.logit_scale"] = reference["towers.logit_scale"] + 0.3
    callback = GradMimic(reference, parameters, temperature=TAU, min_ess=0, ledger=tmp_path / "s", **settings)
    trainer(callback, **options).fit(ours, loader(data))

    def score(module, batch, gradients):
        trained = {n: p for n, p in module.named_parameters() if n in gradients}
        chosen = {n: p for n, p in trained.items() if any("all" in parameters or n.startswith(p) for p in parameters)}
        return oracles.mimic_scores(gradients, reference, chosen)

    accumulate = options.get("accumulate_grad_batches", 1)
    before = parameters_of(theirs)
    seen = oracle_steps(theirs, batches_of(data), score, TAU, accumulate=accumulate)
    torch.testing.assert_close(scores_of(tmp_path / "s"), torch.cat([s for s, _ in seen]), **CLOSE)
    torch.testing.assert_close(scores_of(tmp_path / "s", "weight"), torch.cat([w for _, w in seen]), **CLOSE)
    torch.testing.assert_close(parameters_of(ours), parameters_of(theirs), rtol=1e-8, atol=1e-10)
    assert max(float(w.max()) for _, w in seen) > 0.3, "weights that hardly differ"
    moved = {n for n, p in theirs.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in theirs.named_parameters() if p.requires_grad}


def test_target_scope_weights_the_projections_and_nothing_else(tmp_path):
    reference, data = parameters_of(clip(seed=1)), pairs(4)
    weighted, plain, target = clip(), clip(), clip()
    fits = {"all": weighted, "target": target}
    for reweight, module in fits.items():
        callback = GradMimic(reference, KINDS["vit"][-1], temperature=TAU, min_ess=0, reweight=reweight)
        trainer(callback).fit(module, loader(data))
    trainer().fit(plain, loader(data))
    wanted = parameters_of(plain) | {n: p.detach() for n, p in targets_of(weighted, "vit").items()}
    torch.testing.assert_close(parameters_of(target), wanted, rtol=1e-9, atol=1e-12)
    assert not torch.equal(plain.towers.visual.proj, target.towers.visual.proj)


def test_a_plain_fit_follows_the_plain_mean():
    ours, theirs, data = clip(), clip(), pairs(12)
    trainer().fit(ours, loader(data))
    oracle_steps(theirs, batches_of(data), lambda module, batch, gradients: torch.zeros(4), 1.0)
    torch.testing.assert_close(parameters_of(ours), parameters_of(theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scorer", [RhoLoss(), ReferenceLoss()])
def test_a_reference_clip_is_asked_for_its_own_losses_of_the_same_pairs(scorer, tmp_path):
    module, reference, data = clip("convolution"), clip("wide", seed=1), pairs(4)
    own, theirs = (losses_of(m, data[:4]).detach() for m in (module, reference))
    trainer(GradMimic(reference, scorer=scorer, ledger=tmp_path / "s")).fit(module, loader(data))
    expected = own - theirs if isinstance(scorer, RhoLoss) else -theirs
    torch.testing.assert_close(scores_of(tmp_path / "s"), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*samples held NaN")
def test_a_pair_with_a_broken_image_has_no_weight(tmp_path):
    broken, data, reference = pairs(8), pairs(8), parameters_of(clip(seed=1))
    broken.tensors[0][[2, 5], 1, 3, 4] = float("nan")
    data.tensors[0][[2, 5]] = 0.0
    ours, theirs = clip(), clip()
    callback = GradMimic(reference, KINDS["vit"][-1], temperature=TAU, min_ess=0, ledger=tmp_path / "s")
    trainer(callback).fit(ours, loader(broken))
    gone = iter([2, 1])

    def score(module, batch, gradients):
        scores = oracles.mimic_scores(gradients, reference, targets_of(module, "vit"))
        scores[next(gone)] = -math.inf
        return scores

    seen = oracle_steps(theirs, batches_of(data), score, TAU)
    torch.testing.assert_close(scores_of(tmp_path / "s", "weight"), torch.cat([w for _, w in seen]), **CLOSE)
    torch.testing.assert_close(parameters_of(ours), parameters_of(theirs), rtol=1e-8, atol=1e-10)
    flags = Ledger(tmp_path / "s").table()["flag"].to_pylist()
    assert [k for k, flag in enumerate(flags) if flag != "ok"] == [2, 5]
    scores = scores_of(tmp_path / "s")
    assert scores.isnan().nonzero().flatten().tolist() == [2, 5]
    torch.testing.assert_close(scores[:2], seen[0][0][:2], **CLOSE)


@pytest.mark.parametrize("kind", ["vit", "convolution"])
def test_bfloat16_is_near_to_float32(kind, tmp_path):
    reference, found, data = parameters_of(clip(kind, seed=1)), [], pairs(32, dtype=torch.float32)
    for precision in ("32-true", "bf16-mixed"):
        module = clip(kind, dtype=torch.float32)
        callback = GradMimic(reference, KINDS[kind][-1], reweight="none", ledger=tmp_path / precision)
        trainer(callback, precision=precision).fit(module, loader(data, 32))
        found.append(scores_of(tmp_path / precision))
    exact, rounded = found
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize(("precision", "most"), [("64-true", 1e-6), ("bf16-true", 0.1)])
def test_other_precisions_of_the_weights(precision, most, tmp_path):
    reference, data = parameters_of(clip(seed=1)), pairs(32, dtype=torch.float32)
    gradients = oracles.per_sample_gradients(clip(), losses_of, pairs(32)[:32])
    exact = oracles.mimic_scores(gradients, reference, targets_of(clip(), "vit"))
    settings = {"ledger": tmp_path / "s", "id_from": lambda batch: torch.arange(len(batch[0]))}
    callback = GradMimic(reference, KINDS["vit"][-1], reweight="none", **settings)
    trainer(callback, precision=precision).fit(clip(dtype=torch.float32), DataLoader(data, 32))
    assert float((scores_of(tmp_path / "s") - exact).norm() / exact.norm()) < most


def test_what_lies_below_fused_attention_is_refused_by_name():
    module = clip()
    message = "towers.token_embedding.weight"
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*cannot be differentiated twice") as caught:
        trainer(GradMimic(parameters_of(clip(seed=1)), "towers.token_embedding")).fit(module, loader(pairs(4)))
    assert "math_attention=True" in str(caught.value)
    assert "sample_losses" not in vars(module)
