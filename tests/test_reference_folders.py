"""References of several files: shards with an index, distributed checkpoints, and folders that are neither."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_mimic.reference import ReferenceLoadError, read_reference
from support.cases import for_each
from support.checkpoints import weights, write_chunks, write_distributed, write_shards
from support.unpickling import Canary


def refusal(path: Path) -> str:
    with pytest.raises(ReferenceLoadError, match=r"^`reference`") as caught:
        read_reference(path)
    return str(caught.value)


# Shards


@for_each("form", ["safetensors", "bin"])
def test_shards_are_read_from_their_index_or_its_folder(form, tmp_path):
    index = write_shards(tmp_path, weights(), form)
    for source in (index, tmp_path, str(tmp_path)):
        torch.testing.assert_close(read_reference(source), weights(), rtol=0, atol=0)


def test_shards_that_do_not_fit_their_index_are_refused_by_name(tmp_path):
    index = write_shards(tmp_path, weights())
    text = index.read_text()
    second = tmp_path / "model-00002-of-00002.safetensors"
    (tmp_path / "aside").mkdir()
    second.rename(tmp_path / "aside" / second.name)
    assert f"names 2 shards, of which 1 are not there: '{second.name}'" in refusal(index)
    for place in (f"../{tmp_path.name}/aside/{second.name}", str(tmp_path / "aside" / second.name), "..", "", "a\0"):
        index.write_text(text.replace(json.dumps(second.name), json.dumps(place)))
        assert f"is in {place!r}; the shards must lie beside it" in refusal(index)
    index.write_text(text)
    own = {name: tensor for name, tensor in weights().items() if name.startswith("head")}
    save_file(own | {"body.bias": torch.ones(4)}, second)
    assert f"{second} holds 'body.bias', which {index.name} says is not in it" in refusal(index)
    save_file({"head.weight": own["head.weight"]}, second)
    assert f"says that 'head.bias' is in {second.name}, which does not hold it" in refusal(tmp_path)
    save_file(own, second)
    index.write_text(text.replace('"head.bias"', '"head.weight"'))
    assert "has 'head.weight' twice" in refusal(index)
    second.write_bytes(second.read_bytes()[:-3])
    index.write_text(text)
    assert f"{second} (" in refusal(index)
    index.write_text(text[:-3])
    assert f"{index} (" in refusal(index)
    assert "is no JSON" in refusal(index)
    for content in ("[" * 100_000, "[]", "{}", '{"weight_map": {"w": 3}}', '{"weight_map": {}}', "\ud800"):
        index.write_bytes(content.encode("utf-8", "surrogatepass"))
        assert str(index) in refusal(index)


# Folders


def test_a_folder_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path):
    def folder(*names: str) -> Path:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        for name in names:
            (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "x" / name).write_text("")
        return tmp_path / "x"

    assert "such as 'model.safetensors', 'w.pt'." in refusal(folder("config.json", "model.safetensors", "w.pt"))
    assert "a TensorFlow SavedModel" in refusal(folder("saved_model.pb", "variables/variables.index"))
    assert "`python zero_to_fp32.py . weights`" in refusal(folder("zero_to_fp32.py", "latest"))
    assert "an unpacked torch checkpoint. Pack it" in refusal(folder("data.pkl", "version", "data/0"))
    assert "whose ranks wrote without each other" in refusal(folder("__0.metadata", "__0_0.distcp"))
    both = folder("model.safetensors.index.json", "pytorch_model.bin.index.json")
    assert "such as 'model.safetensors.index.json', 'pytorch_model.bin.index.json'" in refusal(both)
    part = folder("__0_0.distcp") / "__0_0.distcp"
    assert f"is one part of a distributed checkpoint. Give its folder, {part.parent}" in refusal(part)


# Distributed checkpoints


def write_twice(folder: Path, part: Tensor) -> Path:
    """Write a checkpoint of two tensors that are said to be in the same bytes."""
    write_chunks(folder, part, {(0, 0): part})
    content = pickle.loads((folder / ".metadata").read_bytes())
    ((index, info),) = content.storage_data.items()
    content.storage_data[replace(index, fqn="v")] = info
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    return folder


@for_each("content", [weights(), {"model": weights(), "epoch": 3}, {"state_dict": weights(), "other": {"x": [1, 2]}}])
def test_a_distributed_checkpoint_is_read(content, tmp_path):
    torch.testing.assert_close(read_reference(write_distributed(tmp_path, content)), weights(), rtol=0, atol=0)


def test_several_sets_of_weights_in_a_distributed_checkpoint_are_refused(tmp_path):
    folder = write_distributed(tmp_path, {"model": weights(0), "model_ema": weights(1)})
    message = refusal(folder)
    assert "['model'] and ['model_ema']" in message
    assert f"dcp_to_torch {folder} " in message


def test_the_parts_of_several_ranks_are_put_together(tmp_path):
    whole = torch.arange(30.0).view(6, 5)
    chunks = {(0, 0): whole[:3, :2], (0, 2): whole[:3, 2:], (3, 0): whole[3:]}
    chunks = {at: chunk.clone() for at, chunk in chunks.items()}
    torch.testing.assert_close(read_reference(write_chunks(tmp_path / "a", whole, chunks))["w"], whole, rtol=0, atol=0)
    missing = {at: chunk for at, chunk in chunks.items() if at != (3, 0)}
    assert "'w' has shape (6, 5), which its 2 parts do not fill" in refusal(
        write_chunks(tmp_path / "b", whole, missing)
    )
    overlapping = missing | {(1, 0): chunks[3, 0]}
    assert "its parts overlap" in refusal(write_chunks(tmp_path / "c", whole, overlapping))
    assert "the parts in __0_0.distcp overlap" in refusal(write_twice(tmp_path / "e", whole[:3, :2].clone()))
    outside = missing | {(4, 0): chunks[3, 0]}
    assert str(tmp_path / "d") in refusal(write_chunks(tmp_path / "d", whole, outside))


def test_a_part_that_is_missing_or_damaged_is_named(tmp_path):
    folder = write_distributed(tmp_path, weights())
    (part,) = folder.glob("*.distcp")
    data = part.read_bytes()
    at = data.index(weights()["head.weight"].numpy().tobytes())
    part.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert f"{part} (at byte " in refusal(folder)
    assert "does not fit its checksum" in refusal(folder)
    part.write_bytes(data[:-200])
    assert f"of {part.name}, which has {len(data) - 200}: it is cut off" in refusal(folder)
    part.unlink()
    assert f"is in {part.name}, which is not there" in refusal(folder)


@for_each("protocol", range(6))
def test_nothing_in_the_metadata_runs(protocol, tmp_path):
    canary = tmp_path / "canary"
    folder = write_distributed(tmp_path / "dcp", weights())
    metadata = folder / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    content.planner_data = Canary(canary)
    metadata.write_bytes(pickle.dumps(content, protocol=protocol))
    message = refusal(folder)
    assert re.search(r"names other Python objects .*\(((posix|nt)\.mkdir|copy_?reg)", message)
    assert not canary.exists()
    pickle.loads(metadata.read_bytes())
    assert canary.exists(), "the bait must be live, or the test proves nothing"


def test_metadata_that_names_other_files_or_asks_for_memory_is_refused(tmp_path):
    folder = write_distributed(tmp_path / "dcp", weights())
    metadata = folder / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    for place in ("../x.distcp", "/etc/passwd", "a/b", ""):
        for info in content.storage_data.values():
            info.relative_path = place
        metadata.write_bytes(pickle.dumps(content))
        assert f"is said to be in {place!r}; the parts must lie in the folder itself" in refusal(folder)
    metadata.write_bytes(b"\x80\x04]r\x00\x00\x00\x7f.")
    assert "it numbers an object 2130706432" in refusal(folder)
    for data in (b"", b"\x80\x04N.", b"\x80\x04}.", b"not a pickle", metadata.read_bytes()[:-1]):
        metadata.write_bytes(data)
        assert str(metadata) in refusal(folder)


@for_each("name", [".metadata", "model.safetensors.index.json"])
def test_a_pipe_or_a_device_in_a_folder_is_not_read(name, tmp_path):
    place = tmp_path / name
    os.mkfifo(place)
    assert f"{place} is no file" in refusal(tmp_path)
    place.unlink()
    place.symlink_to("/dev/zero")
    assert f"{place} is no file" in refusal(tmp_path)
