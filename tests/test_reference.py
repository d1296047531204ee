"""The reference checkpoint: what is read, what it is matched to, and what is refused before training starts."""

import argparse
import pickle
import re
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_mimic.reference import ReferenceLoadError, fingerprint, match_reference, read_reference, reference_model
from support.cases import for_each
from support.unpickling import Canary


class Small(pl.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.head = nn.Linear(width, 2)


def small() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small()


def w(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def lightning_checkpoint(model: nn.Module, path: Path) -> Path:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    assert "pytorch-lightning_version" in torch.load(path, weights_only=True)
    return path


def saved(content: object, path: Path, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


def safetensors_file(model: nn.Module, path: Path) -> Path:
    save_file(model.state_dict(), path)
    return path


WAYS = {
    "lightning .ckpt": lambda m, d: lightning_checkpoint(m, d / "last.ckpt"),
    ".ckpt as str": lambda m, d: str(lightning_checkpoint(m, d / "last.ckpt")),
    ".pt": lambda m, d: saved(m.state_dict(), d / "w.pt"),
    ".pth": lambda m, d: saved(m.state_dict(), d / "w.pth"),
    ".pt before zip": lambda m, d: saved(m.state_dict(), d / "w.pt", _use_new_zipfile_serialization=False),
    "below model_state_dict": lambda m, d: saved({"epoch": 3, "model_state_dict": m.state_dict()}, d / "w.pt"),
    "below model": lambda m, d: saved({"model": m.state_dict(), "step": w(1)}, d / "w.pt"),
    ".safetensors": lambda m, d: safetensors_file(m, d / "w.safetensors"),
    "module": lambda m, d: m,
    "state dict": lambda m, d: m.state_dict(),
    "dict below state_dict": lambda m, d: {"state_dict": m.state_dict()},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_format_gives_the_same_tensors(way, tmp_path):
    model = small()
    torch.testing.assert_close(read_reference(WAYS[way](model, tmp_path)), dict(model.state_dict()), rtol=0, atol=0)


@for_each("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_becomes_float32_and_float64_stays(stored, tmp_path):
    save_file({"w": w(0.5, -3.0, dtype=stored)}, tmp_path / "w.safetensors")
    tensors = read_reference(tmp_path / "w.safetensors")
    assert tensors["w"].dtype == stored
    used = w(0.5, -3.0, dtype=torch.float64 if stored == torch.float64 else torch.float32)
    torch.testing.assert_close(match_reference(tensors, {"w": w(0, 0)}), {"w": used})


@for_each(
    ("saved_as", "wanted"),
    [
        ("head.weight", "head.weight"),
        ("model.head.weight", "head.weight"),
        ("module.head.weight", "head.weight"),
        ("_orig_mod.head.weight", "head.weight"),
        ("model._orig_mod.head.weight", "model.head.weight"),
        ("module.model._orig_mod.head.weight", "head.weight"),
        ("model._fsdp_wrapped_module.head.weight", "model.head.weight"),
        ("head.weight", "model.head.weight"),
        ("model.head.weight", "model._orig_mod.head.weight"),
        ("head.weight", "module._orig_mod.model.head.weight"),
    ],
)
def test_prefixes_and_wrappers_are_seen_through(saved_as, wanted):
    bias_as, bias = saved_as.replace("weight", "bias"), wanted.replace("weight", "bias")
    tensors = {saved_as: w(1, 2), "other.x": w(9), bias_as: w(7)}
    found = match_reference(tensors, {wanted: w(0, 0), bias: w(0)})
    torch.testing.assert_close(found, {wanted: w(1, 2), bias: w(7)})


def test_the_models_own_names_win_and_else_the_one_prefix_that_fits_every_name():
    torch.testing.assert_close(match_reference({"ema.w": w(2), "w": w(1)}, {"w": w(0)}), {"w": w(1)})
    tensors = {"ema.w": w(2), "model.w": w(1), "model.b": w(3)}
    torch.testing.assert_close(match_reference(tensors, {"w": w(0), "b": w(0)}), {"w": w(1), "b": w(3)})


@for_each(
    ("tensors", "wanted", "candidates"),
    [
        ({"ema.w": w(2), "model.w": w(1)}, "w", "'ema.w', 'model.w'"),
        ({"b.w": w(2), "w": w(1)}, "model.b.w", "'b.w', 'w'"),
        ({"x.b.w": w(2), "w": w(1)}, "b.w", "'x.b.w', 'w'"),
    ],
)
def test_a_name_that_fits_twice_is_refused_naming_both(tensors, wanted, candidates):
    with pytest.raises(ReferenceLoadError, match=re.escape(f"{wanted!r} fits several of its tensors: {candidates}")):
        match_reference(tensors, {wanted: w(0)})


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_tied_parameter_is_found_under_any_of_its_names_with_one_value(prefix):
    parameters, aliases = {"embed.weight": w(0.0, 0.0)}, {"embed.weight": ["head.weight"]}
    embed, head = f"{prefix}embed.weight", f"{prefix}head.weight"
    for saved_as in ([embed], [head], [embed, head]):  # safetensors keeps one of the names
        found = match_reference({name: w(1.0, 2.0) for name in saved_as}, parameters, aliases)
        torch.testing.assert_close(found, {"embed.weight": w(1.0, 2.0)}, rtol=0, atol=0)
    with pytest.raises(
        ReferenceLoadError, match=r"embed\.weight' and '.*head\.weight' differ, but the model holds them"
    ):
        match_reference({embed: w(1.0, 2.0), head: w(1.0, 3.0)}, parameters, aliases)


def test_missing_tensor_is_named_with_the_nearest():
    with pytest.raises(ReferenceLoadError, match=re.escape("no tensor for 'haed.weight'; nearest: 'head.weight'")):
        match_reference({"head.weight": w(1), "xyz": w(1)}, {"haed.weight": w(0)})


def test_shape_mismatch_names_both_shapes():
    with pytest.raises(ReferenceLoadError, match=re.escape("'h.w' has shape (1000, 4), the model's has (10, 4)")):
        match_reference({"h.w": torch.zeros(1000, 4)}, {"h.w": torch.zeros(10, 4)})


@for_each("dtype", [torch.float16, torch.float64])
def test_nan_and_infinity_are_counted(dtype):
    bad = w(float("nan"), 1, float("inf"), float("-inf"), 2, dtype=dtype)
    with pytest.raises(ReferenceLoadError, match=re.escape("'w' holds 3 of 5 values that are NaN or infinite")):
        match_reference({"w": bad}, {"w": torch.zeros(5)})


@for_each("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating_point_are_refused(dtype):
    with pytest.raises(ReferenceLoadError, match=re.escape(f"'w' is of dtype {dtype}; expected a floating-point")):
        match_reference({"w": torch.ones(2, dtype=dtype)}, {"w": w(0, 0)})


def test_tensors_without_data_are_refused():
    with pytest.raises(ReferenceLoadError, match="'w' is on the meta device, without data"):
        match_reference({"w": torch.zeros(2, device="meta")}, {"w": w(0, 0)})


def test_missing_file_is_named_with_its_neighbours(tmp_path):
    saved({"w": w(1)}, tmp_path / "best.pt")
    with pytest.raises(ReferenceLoadError, match=re.escape(f"no file {tmp_path / 'bets.pt'}; there are: best.pt.")):
        read_reference(tmp_path / "bets.pt")


def test_directory_and_address_are_refused(tmp_path):
    with pytest.raises(ReferenceLoadError, match=re.escape(f"{tmp_path} is a directory; give one file")):
        read_reference(tmp_path)
    with pytest.raises(ReferenceLoadError, match="has the scheme 'nowhere', which fsspec does not know"):
        read_reference("nowhere://a.org/w.pt")


@for_each("source", [5, None, [w(1)], w(1)])
def test_other_types_are_named_and_refused(source):
    with pytest.raises(ReferenceLoadError, match=f"`reference` has type {type(source).__name__}; expected a path"):
        read_reference(source)


@pytest.mark.parametrize("way", ["lightning .ckpt", ".pt", ".safetensors"])
@for_each("share", [0, 0.3, 0.6, 0.999])
def test_truncated_and_empty_files_are_refused_with_their_size(way, share, tmp_path):
    path = WAYS[way](small(), tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    size = re.escape(f"{path} ({path.stat().st_size} bytes) is not a complete")
    with pytest.raises(ReferenceLoadError, match=size) as caught:
        read_reference(path)
    assert caught.value.__cause__ or not share


@for_each("name", ["w.ckpt", "w.pt", "w.safetensors"])
def test_a_web_page_in_the_files_place_is_refused(name, tmp_path):
    (tmp_path / name).write_text("<!DOCTYPE html><html><title>404 Not Found</title></html>")
    with pytest.raises(ReferenceLoadError, match=re.escape(f"{tmp_path / name} (56 bytes) is not a complete")):
        read_reference(tmp_path / name)


def test_a_safetensors_header_of_absurd_length_is_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes((2**62).to_bytes(8, "little") + b'{"w":{}}')
    with pytest.raises(ReferenceLoadError, match="is not a complete safetensors file"):
        read_reference(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [({"lr": 0.1}, "holds no named tensors; its keys: 'lr'"), ([w(1)], "holds a list"), (w(1), "holds a Tensor")],
)
def test_a_file_without_named_tensors_says_what_it_holds(content, message, tmp_path):
    with pytest.raises(ReferenceLoadError, match=f"{re.escape(str(tmp_path / 'w.pt'))} {re.escape(message)}"):
        read_reference(saved(content, tmp_path / "w.pt"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@for_each("form", ["zip", "before zip", "pickle 0", "pickle 2", "pickle 4", "pickle 5"])
def test_a_malicious_pickle_never_runs(form, tmp_path):
    path, canary = tmp_path / "evil.ckpt", tmp_path / "canary"
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(Canary(canary), protocol=int(form[-1])))
    else:
        content = {"state_dict": {"w": w(1)}, "extra": Canary(canary)}
        saved(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ReferenceLoadError, match="holds Python objects besides tensors"):
        read_reference(path)
    assert not canary.exists()
    with suppress(Exception):
        torch.load(path, weights_only=False)
    assert canary.exists(), "the bait must be live, or the test proves nothing"


@pytest.mark.parametrize("content", [small(), {"state_dict": small().state_dict(), "hp": argparse.Namespace(lr=1)}])
def test_the_conversion_recipe_works_as_printed(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(content, tmp_path / "whole.pt")
    with pytest.raises(ReferenceLoadError, match="holds Python objects besides tensors") as caught:
        read_reference(path)
    recipe = re.findall("`([^`]*weights_only=False[^`]*)`", str(caught.value))
    exec(recipe[0], {"torch": torch, "path": path})
    torch.testing.assert_close(read_reference("weights.pt"), dict(small().state_dict()))


def test_fingerprint_depends_on_content_and_not_on_order():
    a, b = torch.arange(6.0).view(2, 3), w(1)
    same = fingerprint({"a": a, "b": b})
    assert same == fingerprint({"b": b.clone(), "a": a.t().contiguous().t()})
    named = [{"a": a, "c": b}, {"a": a}, {"a": a.view(3, 2), "b": b}]
    others = [*named, {"a": a, "b": w(1.0000001)}, {"a": a, "b": b.view(torch.int32)}]
    assert len({same, *map(fingerprint, others)}) == 6


def test_another_branch_that_ends_alike_is_not_taken():
    tensors = {"decoder.aux.head.weight": w(1), "encoder.weight": w(2), "encoder.bias": w(3)}
    with pytest.raises(ReferenceLoadError, match=re.escape("no tensor for 'head.weight'")):
        match_reference(tensors, {"head.weight": w(0)})


WRONG = {
    "missing file": "none.pt",
    "address": "https://a.org/w.pt",
    "type": 3,
    "published": "open_clip:ViT-B-33/openai",
    "empty": {},
    "missing name": {"x": torch.ones(2, 4)},
    "twice": {"a.weight": torch.ones(2, 4), "b.weight": torch.ones(2, 4)},
    "shape": {"weight": torch.ones(9)},
    "whole numbers": {"weight": torch.ones(2, 4, dtype=torch.int64)},
    "NaN": {"weight": torch.full((2, 4), torch.nan)},
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_have_the_name_of_the_argument_at_fault(case):
    layer = nn.Linear(4, 2, bias=False)
    for name, options in (("reference", {}), ("pretrained", {"argument": "pretrained"})):
        with pytest.raises(ReferenceLoadError, match=f"^`{name}`"):
            match_reference(read_reference(WRONG[case], **options), dict(layer.named_parameters()), **options)
        with pytest.raises(ReferenceLoadError, match=f"^`{name}`"):
            reference_model(WRONG[case], layer, **options)
