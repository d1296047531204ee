"""Files that are given as references: checksums, what is named for what it is, recipes, and limits."""

import argparse
import collections
import gzip
import io
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_mimic.reference import ReferenceLoadError, match_reference, read_reference
from support.cases import for_each
from support.checkpoints import repacked, weights


def refusal(path: Path | str) -> str:
    with pytest.raises(ReferenceLoadError, match=r"^`reference`") as caught:
        read_reference(path)
    return str(caught.value)


def saved(content: object, path: Path, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


# Checksums


@pytest.mark.parametrize("name", ["w.pt", "last.ckpt"])
def test_a_flipped_bit_in_any_entry_of_an_archive_is_found_and_its_entry_named(name, tmp_path):
    path = saved({"state_dict": weights()}, tmp_path / name)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [(each.filename, data.index(archive.read(each), each.header_offset)) for each in archive.infolist()]
    assert len(entries) > 4
    for entry, start in entries:
        path.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
        assert f"{path} is damaged: its entry {entry!r} does not fit its checksum" in refusal(path)
    path.write_bytes(data)
    torch.testing.assert_close(read_reference(path), weights(), rtol=0, atol=0)


def test_an_entry_without_a_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"1")
        archive.writestr("x", b"1")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data.replace(b"x", b"\0"))
    assert "w.pt (" in refusal(tmp_path / "w.pt")


@for_each(("offset", "value"), [(38, b"\x10"), (20, bytes(4))])  # attributes, compressed size
def test_an_entry_that_torch_would_not_read_is_refused(offset, value, tmp_path):
    path = saved(weights(), tmp_path / "w.pt")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"w/data/2") - 46 + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    assert "is damaged: its entry 'w/data/2' of 32 bytes is said to" in refusal(path)


def test_an_archive_that_was_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(weights(), tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert {entry.CRC for entry in archive.infolist()} == {0}
    torch.testing.assert_close(read_reference(path), weights(), rtol=0, atol=0)


# What a file is


@for_each("name", ["w.pt", "w.bin", "w.ckpt", "w"])
def test_the_content_and_not_the_suffix_says_how_a_file_is_read(name, tmp_path):
    save_file(weights(), tmp_path / name)
    torch.testing.assert_close(read_reference(tmp_path / name), weights(), rtol=0, atol=0)
    for legacy in (False, True):
        path = saved(weights(), tmp_path / "w.safetensors", _use_new_zipfile_serialization=not legacy)
        torch.testing.assert_close(read_reference(path), weights(), rtol=0, atol=0)


def packed(form: str, data: bytes) -> bytes:
    file = io.BytesIO()
    if form == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            entry = tarfile.TarInfo("last.ckpt")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    elif form == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("run/last.ckpt", data)
    else:
        np.savez(file, **{name: tensor.numpy() for name, tensor in weights().items()})
    return file.getvalue()


FOREIGN = {
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x032.1:", "an ONNX model"),
    "SavedModel": (b"\x08\x01\x12\xd2\x80\x05", "a TensorFlow SavedModel"),
    "TensorFlow's index": (bytes(40) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "the index of a TensorFlow checkpoint"),
    "TFLite": (b"\x1c\0\0\0TFL3\x14\0", "a TensorFlow Lite model"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file, as Keras writes it"),
    "GGUF": (b"GGUF\3\0\0\0", "a model for llama.cpp (GGUF)"),
    "Flax": (b"\x81\xa6params\x82", "a msgpack file, as Flax writes it"),
    ".npy": (b"\x93NUMPY\1\0", "a single NumPy array"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Fetch the file itself: `git lfs pull`"),
    "web page": (b"\n<!DOCTYPE html><html>404", "a web page in the file's place"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "a web page in the file's place"),
    "JSON": (b'{"error": "Repository not found"}', "a JSON file"),
    "empty": (b"", "it is empty"),
    "zeros": (bytes(4096), "nothing but zeros"),
    "gzip": (gzip.compress(b"x"), "a compressed file. Unpack it"),
    "tar": (packed("tar", b"x"), "a tar archive. Unpack it"),
    "zip of a checkpoint": (packed("zip", b"x"), "and give 'run/last.ckpt'"),
    "pickle": (pickle.dumps([1]), "a pickle that torch.save did not write"),
    "text": (b"Entry not found", "begins with b'Entry no'"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named_for_what_it_is(kind, tmp_path):
    content, says = FOREIGN[kind]
    for suffix in (".pt", ".ckpt", ".safetensors"):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        message = refusal(path)
        assert says in message
        assert str(path) in message
        assert ("again" in message) == (kind in ("empty", "zeros")), "an intact file need not be fetched again"


def test_files_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refusal(tmp_path / "pipe")
    assert "no file w" in refusal("w\0.pt")
    assert "cannot be read" in refusal("x" * 5000)
    assert "~nobody-of-that-name" in refusal("~nobody-of-that-name/w.pt")


# Recipes


class Frozen(collections.OrderedDict):
    """A class of the user's own."""


class Average:
    """Such as timm's and YOLO's averages of old: no module, but it has one's state."""

    def __init__(self) -> None:
        self.weights = weights()

    def state_dict(self) -> dict:
        return self.weights


def net() -> nn.Module:
    module = nn.Module()
    module.body, module.head = nn.Linear(3, 4), nn.Linear(4, 2)
    module.load_state_dict(weights())
    return module


def arrays() -> dict:
    return {name: tensor.numpy() for name, tensor in weights().items()}


PICKLED = {
    "whole module": net,
    "DataParallel": lambda: nn.DataParallel(net()),
    "YOLO": lambda: {"epoch": 3, "model": net(), "ema": None, "updates": 2},
    "YOLO, the average alone": lambda: {"model": None, "ema": net()},
    "module and equal average": lambda: {"model": net(), "ema": Average()},
    "NumPy's scalar": lambda: {"state_dict": weights(), "best": np.float64(1)},
    "defaultdict": lambda: collections.defaultdict(list, weights()),
    "class of a dict": lambda: Frozen(weights()),
    "arrays": lambda: {"state_dict": arrays()},
    "arrays and text": lambda: {"model": arrays() | {"names": np.array(["a", "b"])}},
    "namespace": lambda: {"net": weights(), "args": argparse.Namespace(lr=1)},
    "path": lambda: {"net": weights(), "where": Path("x")},
    "optimizer": lambda: {"net": net(), "optimizer": torch.optim.Adam(net().parameters())},
}


@pytest.mark.parametrize("kind", PICKLED)
@pytest.mark.parametrize("form", ["archive", "legacy", "pickle"])
def test_the_recipe_for_pickled_objects_works_to_the_letter(kind, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it's.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(PICKLED[kind]()))
    else:
        torch.save(PICKLED[kind](), path, _use_new_zipfile_serialization=form == "archive")
    message = refusal(path)
    assert "holds Python objects besides tensors" in message
    (recipe,) = re.findall(r"`(import [^`]*)`", message)
    exec(recipe, {})
    found = match_reference(read_reference("weights.pt"), weights())
    torch.testing.assert_close(found, weights(), rtol=0, atol=0)


def test_the_recipe_does_not_overwrite_its_own_file(tmp_path):
    assert "'converted.pt'" in refusal(saved(net(), tmp_path / "weights.pt"))


def test_the_first_foreign_class_is_named(tmp_path):
    path = saved({"net": weights(), "args": argparse.Namespace()}, tmp_path / "w.pt")
    assert "(the first is argparse.Namespace)" in refusal(path)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_archives_of_other_programs_come_with_a_recipe_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(nn.Linear(3, 2)).save(tmp_path / "script.pt")
    (tmp_path / "arrays.npz").write_bytes(packed("npz", b""))
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(program, tmp_path / "program.pt2")
    for name, what, names in (
        ("script.pt", "a TorchScript archive", {"weight", "bias"}),
        ("arrays.npz", "NumPy's arrays", set(weights())),
        ("program.pt2", "a program that torch.export saved", {"weight", "bias"}),
    ):
        message = refusal(name)
        assert what in message
        exec(re.findall(r"`(import [^`]*)`", message)[0], {})
        assert set(read_reference("weights.pt")) == names


# Limits


def test_files_that_grow_in_memory_are_refused(tmp_path):
    one = saved({"w": torch.zeros(100_000)}, tmp_path / "one.pt")
    deflated = repacked(one, tmp_path / "deflated.pt", zipfile.ZIP_DEFLATED)
    assert deflated.stat().st_size < 5_000
    assert "has a compressed entry, 'one/" in refusal(deflated)
    for legacy in (False, True):
        wide = {"w": torch.zeros(1).expand(10**6, 10**6)}
        path = saved(wide, tmp_path / "wide.pt", _use_new_zipfile_serialization=not legacy)
        assert "'w' has shape (1000000, 1000000), for which the file is too small" in refusal(path)
    objects = b"\x80\x02](" + b"]" * (2**24) + b"e."
    assert "holds more than 16777216 bytes of Python objects" in refusal(
        repacked(one, tmp_path / "objects.pt", data_pkl=objects)
    )
    with zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("w/data.pkl", b"2")
    assert "has two entries 'w/data.pkl'" in refusal(tmp_path / "twice.pt")
    header = b"{" + b" " * 2**24 + b"}"
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "has a header of 16777218 bytes; the limit is 16777216" in refusal(tmp_path / "w.safetensors")


def test_objects_of_old_files_are_limited_and_their_tensors_are_not(tmp_path, monkeypatch):
    from lightning_mimic.reference import read_file

    monkeypatch.setattr(read_file._Limited, "left", 2000)
    content = {"w": torch.arange(10_000.0)}
    path = saved(content, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(read_reference(path), content, rtol=0, atol=0)
    path = saved(content | {"x": list(range(1000))}, path, _use_new_zipfile_serialization=False)
    assert "bytes of Python objects beside its tensors" in refusal(path)


def test_overlapping_entries_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", bytes(2000))
        (entry,) = archive.infolist()
        for copy in range(3):  # in the directory once more, at the same place
            other = zipfile.ZipInfo(f"w/data/{copy}")
            other.header_offset, other.CRC = entry.header_offset, entry.CRC
            other.file_size = other.compress_size = entry.file_size
            archive.filelist.append(other)
    assert "has entries of 8000 bytes together, which must overlap" in refusal(tmp_path / "w.pt")
