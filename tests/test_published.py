"""References by the names of open_clip's published models, from a cache as the hub keeps it and without a network."""

import os
import pickle
import re

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file

import oracles
from lightning_mimic import Aligned, GradMimic, Ledger
from lightning_mimic.models import CLIP
from lightning_mimic.reference import ReferenceLoadError, read_reference
from lightning_mimic.reference.open_clip_hub import open_clip_model
from support.clips import KINDS, TEXT, VISION, clip, losses_of, pairs, targets_of, towers
from support.toys import loader, trainer

NAME = "open_clip:ViT-B-32/datacomp_xl_s13b_b90k"
REPOSITORY, COMMIT = "models--laion--CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "0" * 40
FILES = {"bin": "open_clip_pytorch_model.bin", "safetensors": "open_clip_model.safetensors"}


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """The folder of a published ViT-B-32's files in the hub's cache; the architecture itself is a small one."""
    small = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", small)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / REPOSITORY
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    files = folder / "snapshots" / COMMIT
    files.mkdir(parents=True)
    return files


def publish(folder, kind="bin", dtype=torch.float32):
    """Saves what is published; what it should be read as."""
    weights = {name: tensor.to(dtype) for name, tensor in towers("wide", seed=1).state_dict().items()}
    if kind == "bin":
        torch.save(weights, folder / FILES[kind])
    else:
        save_file(weights, folder / FILES[kind])
    return {name: tensor.float() for name, tensor in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", FILES)
def test_weights_by_name(kind, dtype, snapshot):
    weights = publish(snapshot, kind, dtype)
    found = read_reference(NAME)
    torch.testing.assert_close(found, weights, rtol=0, atol=0)
    torch.testing.assert_close(dict(open_clip_model(NAME).state_dict()), weights, rtol=0, atol=0)


def test_a_fit_starts_from_published_weights(snapshot):
    weights = publish(snapshot)
    module = CLIP(towers("wide", dtype=torch.float32), pretrained=NAME)
    torch.testing.assert_close(dict(module.towers.state_dict()), weights, rtol=0, atol=0)


def test_scores_towards_published_weights(snapshot, tmp_path):
    weights, module, data = publish(snapshot), clip("wide"), pairs(4)
    reference = {f"towers.{name}": tensor for name, tensor in weights.items()}
    gradients = oracles.per_sample_gradients(module, losses_of, data[:4])
    expected = oracles.mimic_scores(gradients, reference, targets_of(module, "wide"))
    trainer(GradMimic(NAME, KINDS["wide"][-1], ledger=tmp_path / "s")).fit(module, loader(data))
    found = torch.tensor(Ledger(tmp_path / "s").table()["score"].to_pylist()).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_published_model_of_another_architecture_is_aligned(snapshot):
    publish(snapshot)
    fitted = []
    for reference in (NAME, towers("wide", seed=1, dtype=torch.float32)):
        callback = GradMimic(Aligned(reference, every=1), KINDS["vit"][-1])
        trainer(callback).fit(clip(), loader(pairs(96), 32))
        fitted.append(callback.state_dict()["target"]["aligned"])
    torch.testing.assert_close(fitted[0]["reference"], fitted[1]["reference"], rtol=0, atol=0)
    assert bool(fitted[0]["fitted"])
    assert fitted[0]["of"] == fitted[1]["of"]


def test_a_file_may_stand_in_the_tags_place(snapshot, tmp_path):
    wrapped = {f"module.{name}": tensor for name, tensor in publish(snapshot).items()}
    torch.save({"epoch": 1, "state_dict": wrapped}, tmp_path / "epoch_1.pt")
    found = read_reference(f"open_clip:ViT-B-32/{tmp_path}/epoch_1.pt")
    torch.testing.assert_close(found, publish(snapshot), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-33/openai", r"`reference`: open_clip has no architecture 'ViT-B-33'; .*ViT-B-32"),
        (
            "ViT-B-32/datacomp_xl",
            r"`reference`: open_clip has no weights 'datacomp_xl' for ViT-B-32 \(.*datacomp_xl_s13b",
        ),
        ("ViT-B-32", r"`reference`: open_clip has no weights '' for ViT-B-32 .*Write open_clip:ViT-B-32/TAG\.$"),
        ("ViT-B-32/", r"`reference`: open_clip has no weights '' for ViT-B-32 "),
        ("", r"`reference`: open_clip has no architecture ''; "),
        ("hf-hub:laion/CLIP-ViT-B-32", r"`reference`: open_clip has no architecture 'hf-hub:laion'; "),
        ("ViT-B-32/none/here.pt", r"`reference`: open_clip has no weights 'none/here.pt' .* there is no such file"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, message, snapshot):
    with pytest.raises(ReferenceLoadError, match=f"^{message}"):
        read_reference(f"open_clip:{name}")
    with pytest.raises(ReferenceLoadError, match=f"^{message.replace('reference', 'pretrained', 1)}"):
        CLIP(towers(), pretrained=f"open_clip:{name}")
    with pytest.raises(ReferenceLoadError, match=f"^{message}"):
        trainer(GradMimic(Aligned(f"open_clip:{name}"), KINDS["vit"][-1])).fit(clip(), loader(pairs(4)))


def test_what_is_not_in_the_cache_and_cannot_be_fetched(snapshot):
    with pytest.raises(ReferenceLoadError, match=f"^`reference`: {re.escape(NAME)} could not be loaded: .*Failed to"):
        read_reference(NAME)


@pytest.mark.parametrize("place", ["cache", "file"])
def test_a_flipped_bit_is_found(place, snapshot, tmp_path):
    weights = publish(snapshot)
    path = snapshot / FILES["bin"] if place == "cache" else tmp_path / "own.pt"
    torch.save(weights, path)
    name = NAME if place == "cache" else f"open_clip:ViT-B-32/{path}"
    data, number = path.read_bytes(), next(iter(weights.values())).numpy().tobytes()
    at = data.index(number)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ReferenceLoadError, match=f"^`reference`: {re.escape(str(path))} is damaged: its entry '"):
        read_reference(name)


def test_weights_of_other_shapes_are_refused(snapshot):
    torch.save(towers("narrow").state_dict(), snapshot / FILES["bin"])
    with pytest.raises(ReferenceLoadError, match=f"^`reference`: {re.escape(NAME)} could not be loaded: "):
        read_reference(NAME)


@pytest.mark.parametrize("write", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
@pytest.mark.parametrize("place", ["cache", "file"])
def test_no_code_is_unpickled(place, write, snapshot, tmp_path):
    canary, weights = tmp_path / "canary", publish(snapshot)
    path = snapshot / FILES["bin"] if place == "cache" else tmp_path / "own.pt"
    write({"state_dict": weights, "optimizer": Malicious(canary)}, path)
    name = NAME if place == "cache" else f"open_clip:ViT-B-32/{path}"
    with pytest.raises(ReferenceLoadError, match=f"^`reference`: {re.escape(name)} could not be loaded: "):
        read_reference(name)
    with pytest.raises(ReferenceLoadError):
        trainer(GradMimic(Aligned(name), KINDS["vit"][-1])).fit(clip(), loader(pairs(4)))
    assert not canary.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert canary.exists(), "a check that could not fail"
