"""The CLIP module: what it trains and how fast, what it starts from, and what it says of pairs and of classes."""

import math
import re
from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from open_clip.loss import SigLipLoss
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_mimic.models import CLIP, pair_losses
from support.cases import for_each
from support.clips import KINDS, TEXT, TIMM, clip, losses_of, pairs, towers
from support.toys import loader, trainer

STEP = {"optimizer": partial(torch.optim.SGD, lr=0.1)}


class Rates(Callback):
    """The learning rate of every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        self.seen.append(optimizer.param_groups[0]["lr"])


class Known:
    """All that an optimizer asks of a trainer."""

    estimated_stepping_batches = 1


def timm_tower(name):
    return {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}


@for_each(
    ("vision", "betas", "eps"),
    [
        ({"layers": 1, "width": 64, "patch_size": 8}, (0.9, 0.98), 1e-6),  # open_clip's ViT
        (timm_tower("test_vit"), (0.9, 0.98), 1e-6),
        ({"layers": [1, 1, 1, 1], "width": 8}, (0.9, 0.999), 1e-8),  # its ResNet
        (timm_tower("test_convnext"), (0.9, 0.999), 1e-8),
    ],
)
def test_adamw_has_the_moments_that_open_clip_trains_an_architecture_with(vision, betas, eps):
    made = open_clip.CLIP(32, vision | {"image_size": 32}, TEXT)
    for options, expected in (
        ({}, (betas, eps, 5e-4)),
        ({"optimizer": partial(torch.optim.AdamW, lr=0.1, betas=(0.5, 0.6))}, ((0.5, 0.6), eps, 0.1)),
    ):
        module = CLIP(made, **options)
        module.trainer = Known()
        groups = module.configure_optimizers()["optimizer"].param_groups
        assert {(group["betas"], group["eps"], group["initial_lr"]) for group in groups} == {expected}


def excluded(name, parameter):
    """From weight decay, as open_clip has it."""
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


@pytest.mark.parametrize("kind", [*KINDS, "RN50", "ViT-B-32", "coca_ViT-B-32", "convnext_base"])
def test_weight_decay_spares_what_open_clip_spares(kind):
    if kind in KINDS:
        made = towers(kind)
    else:
        with torch.device("meta"):
            made = open_clip.create_model(kind, load_weights=False, device="meta")
    groups = []
    module = CLIP(made, optimizer=lambda given: groups.extend(map(dict, given)) or torch.optim.SGD(given, 1.0))
    module._trainer = Known()
    module.configure_optimizers()
    spared = {id(p) for p in groups[1]["params"]}
    assert spared == {id(p) for name, p in made.named_parameters() if excluded(name, p)}
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in made.parameters()} - spared
    assert groups[1]["weight_decay"] == 0.0
    assert set(groups[0]) == {"params"}


@pytest.mark.parametrize(("accumulate", "warmup"), [(1, 4), (2, 3), (1, 0), (1, 1), (1, 20)])
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_the_end(accumulate, warmup):
    rates, module = Rates(), clip(warmup_steps=warmup, **STEP)
    trainer(rates, epochs=5, accumulate_grad_batches=accumulate).fit(module, loader(pairs(8 * accumulate)))
    expected = []
    for step in range(10):
        fall = (1 + math.cos(math.pi * (step - warmup) / (10 - warmup))) / 2 if warmup < 10 else 1.0
        expected.append(0.1 * min((step + 1) / warmup if warmup else 1.0, fall if step >= warmup else 1.0))
    assert rates.seen == pytest.approx(expected, rel=1e-9)


class Stream(torch.utils.data.IterableDataset):
    """Pairs of which nobody says how many there are."""

    def __iter__(self):
        return iter(pairs(16))


@pytest.mark.parametrize("epochs", [2, -1])
def test_a_fit_whose_end_is_not_known_is_refused(epochs):
    batches = DataLoader(Stream(), 4)
    with pytest.raises(ValueError, match="needs the number of steps, which is unknown: set `max_steps`"):
        trainer(epochs=epochs, limit_train_batches=4 if epochs == -1 else 1.0).fit(clip(), batches)
    rates = Rates()
    trainer(rates, max_steps=3, epochs=epochs).fit(clip(**STEP), batches)
    assert rates.seen == pytest.approx([0.1, 0.075, 0.025])


@pytest.mark.parametrize(("start", "uphill", "end"), [(99.9, 1.0, 100.0), (1.1, -1.0, 1.0)])
def test_the_scale_stays_between_1_and_100(start, uphill, end):
    module = clip(optimizer=partial(torch.optim.SGD, lr=0.5))
    with torch.no_grad():
        module.towers.logit_scale.fill_(math.log(start))
    module.towers.logit_scale.register_hook(lambda gradient: torch.full_like(gradient, -uphill))
    trainer(max_steps=1).fit(module, loader(pairs(4)))
    assert float(module.scale.detach()) == pytest.approx(end)


def norm_towers():
    """An image tower with running statistics."""
    torch.manual_seed(0)
    return open_clip.CLIP(12, TIMM | {"timm_model_name": "test_resnet"}, TEXT).double()


EVERY = [*KINDS, "batch norm"]
ONE = [["image"], ["text"]]


@pytest.mark.parametrize(
    ("kind", "locked"),
    [
        *((kind, ["image", "text"]) for kind in EVERY),
        *((kind, ONE[k % 2]) for k, kind in enumerate(EVERY)),
        ("vit", []),
        ("batch norm", ["image"]),
    ],
)
def test_locked_towers_train_their_projections_alone(kind, locked):
    module = CLIP(norm_towers(), locked=locked, warmup_steps=0, **STEP) if kind == "batch norm" else None
    module = clip(kind, locked=locked, **STEP) if module is None else module
    projections = ("visual.proj", "visual.head.proj", "text_projection", "text.text_projection", "logit_")
    before = {name: tensor.clone() for name, tensor in module.towers.state_dict().items()}
    modes = {}
    look = Callback()
    look.on_before_zero_grad = lambda trainer, module, optimizer: modes.update(
        (name, child.training) for name, child in module.towers.named_children()
    )
    trainer(look, epochs=2).fit(module, loader(pairs(8)))
    after = module.towers.state_dict()
    for name in before:
        of = "image" if name.startswith("visual.") else "text"
        free = of not in locked or name.startswith(projections)
        moved = not torch.equal(before[name], after[name])
        assert moved == free, name
    assert modes == {name: ("image" if name == "visual" else "text") not in locked for name in modes}
    assert "visual" in modes


@pytest.mark.parametrize("options", [{"grad_checkpointing": True}, {"grad_checkpointing": True, "locked": ["text"]}])
def test_checkpointing_gives_the_same_gradients(options):
    gradients = []
    for more in (options, options | {"grad_checkpointing": False}):
        module = clip(**more)
        module.train()
        module.sample_losses(pairs(4)[:4]).mean().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    assert module.towers.visual.transformer.grad_checkpointing is False
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert clip(**options).towers.visual.transformer.grad_checkpointing


def unknown_end():
    made = towers()
    made.visual.proj = None
    return made


REFUSED = {
    "a classifier": (lambda: nn.Linear(2, 2), {}, "`towers` is a Linear; expected a CLIP of open_clip"),
    "no block": (towers, {"block_size": 0}, "`block_size` is 0; expected a whole number of 1 or more."),
    "an unknown tower": (towers, {"locked": ["images"]}, "`locked`: there is no tower 'images'; "),
    "no projection": (unknown_end, {"locked": ["image"]}, "`locked`: the image tower of CLIP has none of"),
    "no such file": (towers, {"pretrained": "none.ckpt"}, "`pretrained`: no file none.ckpt"),
    "other weights": (
        towers,
        {"pretrained": towers("wide")},
        "`pretrained`: 'text_projection' has shape (16, 20), ",
    ),
    "part of the weights": (towers, {"pretrained": {"visual.proj": torch.zeros(16, 12)}}, "`pretrained` has no tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_in_a_sentence(case):
    make, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        CLIP(make(), **options)


def lightning_checkpoint(path, kind):
    saver = trainer(max_steps=1, enable_checkpointing=True)
    module = clip(kind, seed=1)
    saver.fit(module, loader(pairs(4)))
    saver.save_checkpoint(path / "ours.ckpt")
    return path / "ours.ckpt", module.towers


def open_clip_checkpoint(path, kind):
    made = towers(kind, seed=1)
    state = {f"module.{name}": tensor for name, tensor in made.state_dict().items()}
    torch.save({"epoch": 3, "name": "a run", "state_dict": state}, path / "epoch_3.pt")
    return path / "epoch_3.pt", made


def safetensors_file(path, kind):
    made = towers(kind, seed=1)
    save_file({name: tensor.clone() for name, tensor in made.state_dict().items()}, path / "open_clip.safetensors")
    return str(path / "open_clip.safetensors"), made


@pytest.mark.filterwarnings("ignore:.*checkpoint directory")
@pytest.mark.parametrize("save", [lightning_checkpoint, open_clip_checkpoint, safetensors_file])
@pytest.mark.parametrize("kind", ["vit", "biases"])
def test_weights_are_taken_over_from_any_checkpoint(kind, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, saved = save(tmp_path, kind)
    module = CLIP(towers(kind, dtype=torch.float32), pretrained=source, locked=["image"])
    wanted = {name: tensor.float() for name, tensor in saved.state_dict().items()}
    torch.testing.assert_close(module.towers.state_dict(), wanted, rtol=0, atol=0)
    assert not module.towers.visual.training


def test_running_statistics_are_taken_over():
    saved = norm_towers()
    saved.train()
    saved(*pairs(8)[:8])
    module = CLIP(norm_towers(), pretrained=saved)
    found, wanted = (dict(m.named_buffers()) for m in (module.towers, saved))
    names = [name for name in wanted if name.endswith(("running_mean", "running_var"))]
    assert names
    torch.testing.assert_close({n: found[n] for n in names}, {n: wanted[n] for n in names}, rtol=0, atol=0)


@for_each(("kind", "rows"), [("wide", 1), ("wide", 2), ("wide", 7), ("siglip", 1), ("siglip", 7)])
def test_losses_are_half_of_a_pair_s_row_and_half_of_its_column(kind, rows):
    module, batch = clip(kind, block_size=3), pairs(rows)[:rows]
    losses = module.sample_losses(batch)
    torch.testing.assert_close(losses, losses_of(module, batch), rtol=1e-12, atol=1e-12)
    images, texts = module.encode_image(batch[0]), module.encode_text(batch[1])
    assert not torch.allclose(images, module.encode_image(batch[0], normalize=True))
    torch.testing.assert_close(F.normalize(texts, dim=1), module.encode_text(batch[1], normalize=True))
    found = pair_losses(3 * images, texts / 7, module.scale, module.bias)
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=1e-12)


def test_losses_are_open_clips_own():
    images, texts = torch.randn(6, 5), torch.randn(6, 5)
    normalised, scale, bias = (F.normalize(images), F.normalize(texts)), torch.tensor(20.0), torch.tensor(-3.0)
    theirs = open_clip.ClipLoss()(*normalised, scale)
    torch.testing.assert_close(pair_losses(images, texts, scale).mean(), theirs)
    theirs = SigLipLoss()(*normalised, scale, bias)
    torch.testing.assert_close(pair_losses(images, texts, scale, bias).mean(), theirs)


@for_each("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_before_the_losses(dtype):
    images, texts = torch.randn(6, 5).to(dtype), torch.randn(6, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        losses = pair_losses(images, texts, torch.tensor(100.0))
    assert losses.dtype == torch.float32
    exact = pair_losses(images.double(), texts.double(), torch.tensor(100.0))
    torch.testing.assert_close(losses.double(), exact, rtol=1e-4, atol=1e-4)
