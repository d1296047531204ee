"""Backbones of torchvision and timm: Vision Transformers, published weights by tag or file, what is refused."""

import os
import pickle
import re
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from torch.utils.data import DataLoader

from lightning_mimic import GradMimic, ReferenceLoadError
from lightning_mimic.models import ImageClassifier, timm_backbone, torchvision_backbone
from support.toys import parameters_of, trainer

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32}
HUB = "resnet18-f37072fd.pth"  # torchvision's name of the file


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict:
    """By package, a backbone and the published model with its head; both two blocks deep, for 32 × 32 pixels."""
    build = torchvision.models.vision_transformer._vision_transformer
    shape = {"image_size": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}
    monkeypatch.setattr(
        torchvision.models.vision_transformer, "_vision_transformer", lambda **given: build(**given | shape)
    )
    return {
        "torchvision": (
            lambda: torchvision_backbone("vit_b_16"),
            lambda: moved(torchvision.models.get_model("vit_b_16")),
            {"conv_proj.weight", "class_token", "encoder.layers.encoder_layer_1.mlp.0.weight", "heads.head.weight"},
        ),
        "timm": (
            lambda: timm_backbone("vit_base_patch16_224", **SMALL),
            lambda: moved(timm.create_model("vit_base_patch16_224", **SMALL)),
            {"patch_embed.proj.weight", "cls_token", "blocks.1.mlp.fc1.weight", "head.weight"},
        ),
    }


def moved(model: nn.Module) -> nn.Module:
    """With no weight where it begins."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("make", "name", "width"),
    [
        (torchvision_backbone, "vit_b_16", 768),
        (torchvision_backbone, "vit_l_16", 1024),
        (timm_backbone, "vit_base_patch16_224", 768),
        (timm_backbone, "vit_large_patch16_224", 1024),
    ],
)
def test_vision_transformers_give_features(make, name, width):
    with torch.device("meta"):
        assert make(name)(torch.zeros(1, 3, 224, 224)).shape == (1, width)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_published_file_is_taken_over_without_its_head(package, suffix, small, tmp_path):
    make, published, names = small[package]
    path, model = tmp_path / f"weights{suffix}", published()
    assert names <= set(model.state_dict())
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    classifier = ImageClassifier(make(), 5, (3, 32, 32), pretrained=path)
    images = torch.rand(2, 3, 32, 32)
    if package == "timm":
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    else:
        model.heads = nn.Identity()
        expected = model(images)
    torch.testing.assert_close(classifier.eval().backbone(images), expected, rtol=0, atol=0)
    assert classifier.head.weight.shape == (5, 24)


def test_a_file_that_lacks_a_weight_is_refused(small, tmp_path):
    make, published, _ = small["torchvision"]
    state = published().state_dict()
    del state["encoder.ln.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ReferenceLoadError, match=r"^`pretrained` has no tensor for 'encoder.ln.weight'; nearest: "):
        ImageClassifier(make(), 5, (3, 32, 32), pretrained=tmp_path / "a.pth")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
@pytest.mark.parametrize("frozen", [True, False], ids=["probe", "whole"])
def test_a_vision_transformer_trains_under_the_callback(package, frozen, small):
    model = ImageClassifier(small[package][0](), 3, (3, 32, 32), freeze_backbone=frozen)
    check_a_step(model, 32, frozen)


@pytest.mark.slow
def test_a_real_vit_b_16_is_probed():
    check_a_step(ImageClassifier(torchvision_backbone("vit_b_16"), 3, (3, 224, 224), freeze_backbone=True), 224, True)


def check_a_step(model: ImageClassifier, size: int, frozen: bool) -> None:
    before = parameters_of(model)
    reference = {name: torch.ones_like(p) for name, p in model.head.named_parameters(prefix="head")}
    data = [(torch.rand(3, size, size), k % 3) for k in range(2)]
    trainer(GradMimic(reference, "head")).fit(model, DataLoader(data, 2))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"head.weight", "head.bias"} <= changed
    assert (changed == {"head.weight", "head.bias"}) == frozen
    assert all(bool(p.isfinite().all()) for p in model.parameters())


NOT_FOUND = {
    "torchvision, tag": (
        lambda: torchvision_backbone("vit_l_16", "IMAGENET1K_V2"),
        "`weights`: 'vit_l_16' has no weights 'IMAGENET1K_V2'; its tags are 'IMAGENET1K_V1', "
        "'IMAGENET1K_SWAG_E2E_V1', 'IMAGENET1K_SWAG_LINEAR_V1', 'DEFAULT'. Give a file as ImageClassifier's "
        "`pretrained`.",
    ),
    "timm, name": (
        lambda: timm_backbone("vit_bas_patch16_224"),
        "`name`: timm has no model 'vit_bas_patch16_224'; nea",
    ),
    "timm, name with a tag": (
        lambda: timm_backbone("vit_base_patch16_224.dino"),
        "`name`: 'vit_base_patch16_224.dino' includes a tag of weights; give name='vit_base_patch16_224' and "
        "weights='dino'.",
    ),
    "timm, tag": (
        lambda: timm_backbone("vit_tiny_patch16_224", "a.pth"),
        "`weights`: 'vit_tiny_patch16_224' has no weights 'a.pth'; its tags are 'DEFAULT', 'augreg_in21k', "
        "'augreg_in21k_ft_in1k'. Give a file as ImageClassifier's `pretrained`.",
    ),
    "timm, none": (
        lambda: timm_backbone("botnet50ts_256", "DEFAULT"),
        "`weights`: 'botnet50ts_256' has no weights 'DEFAULT'; it has no published weights.",
    ),
}


@pytest.mark.parametrize("case", NOT_FOUND)
def test_what_is_not_there_is_refused(case):
    make, message = NOT_FOUND[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


def test_without_a_network_it_says_which_file_to_fetch(monkeypatch, tmp_path):
    def offline(*args: object, **options: object) -> None:
        raise URLError("no route")

    def unreachable(*args: object, **options: object) -> None:
        raise LocalEntryNotFoundError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    end = "on a machine with network access, and give the file's path as ImageClassifier's `pretrained`"
    said = re.escape(
        "`weights` of 'resnet18' could not be downloaded (<urlopen error no route>). Download "
        f"https://download.pytorch.org/models/{HUB} {end}"
    )
    with pytest.raises(ValueError, match=f"^{said}"):
        torchvision_backbone("resnet18", "DEFAULT")
    said = re.escape(f"Download model.safetensors of https://huggingface.co/timm/resnet18.a2_in1k {end}")
    with pytest.raises(ValueError, match=f"^`weights` of 'resnet18' could not be downloaded .*{said}"):
        timm_backbone("resnet18", "a2_in1k")


@pytest.mark.parametrize("tag", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_torchvision_takes_what_it_has_fetched(tag, monkeypatch, tmp_path):
    published = torchvision.models.resnet18()
    fetched(monkeypatch, tmp_path, lambda path: torch.save(published.state_dict(), path))
    backbone = torchvision_backbone("resnet18", tag)
    torch.testing.assert_close(backbone.layer4[1].conv2.weight, published.layer4[1].conv2.weight, rtol=0, atol=0)


def test_torchs_cache_runs_no_code(monkeypatch, tmp_path):
    fetched(monkeypatch, tmp_path, lambda path: path.write_bytes(pickle.dumps(Canary(tmp_path / "ran"), protocol=2)))
    with pytest.raises(pickle.UnpicklingError):
        torchvision_backbone("resnet18", "DEFAULT")
    assert not (tmp_path / "ran").exists()


def test_timm_is_asked_for_the_tag(monkeypatch):
    published, asked = timm.create_model("resnet18"), []

    def fetch(place: str, **options: object) -> dict:
        asked.append(place)
        return dict(published.state_dict())

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    for tag in ("DEFAULT", "a2_in1k", "resnet18.a3_in1k"):
        backbone = timm_backbone("resnet18", tag)
        torch.testing.assert_close(backbone.conv1.weight, published.conv1.weight, rtol=0, atol=0)
    assert asked == [f"timm/resnet18.{tag}" for tag in ("a1_in1k", "a2_in1k", "a3_in1k")]


def fetched(monkeypatch: pytest.MonkeyPatch, folder: Path, write) -> None:
    monkeypatch.setenv("TORCH_HOME", str(folder))
    path = folder / "hub" / "checkpoints" / HUB
    path.parent.mkdir(parents=True)
    write(path)


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)
