"""Checkpoints of several kinds, intact and not."""

import json
import pickle
import random
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo


def weights(seed: int = 0) -> dict[str, Tensor]:
    """The state dict of two layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"body.weight": (4, 3), "body.bias": (4,), "head.weight": (2, 4), "head.bias": (2,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def repacked(path: Path, target: Path, method: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """Write an archive anew, with other content for the entries that end so (``data_pkl`` for ``data.pkl``)."""
    changed = {name.replace("_", "."): content for name, content in entries.items()}
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, changed.get(Path(entry.filename).name, old.read(entry)))
    return target


def write_shards(folder: Path, tensors: Mapping[str, Tensor], form: str = "safetensors") -> Path:
    """Write tensors as two shards and their index, as Hugging Face's libraries do, and return the index."""
    folder.mkdir(exist_ok=True)
    names, stem = list(tensors), "model" if form == "safetensors" else "pytorch_model"
    places = {}
    for part, held in enumerate((names[:2], names[2:]), start=1):
        shard = f"{stem}-0000{part}-of-00002.{form}"
        save = save_file if form == "safetensors" else torch.save
        save({name: tensors[name] for name in held}, folder / shard)
        places |= dict.fromkeys(held, shard)
    index = folder / f"{stem}.{form}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def write_distributed(folder: Path, content: Mapping[str, object]) -> Path:
    """Write a distributed checkpoint from one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(content), checkpoint_id=str(folder), no_dist=True)
    return folder


def write_chunks(folder: Path, whole: Tensor, chunks: Mapping[tuple[int, ...], Tensor]) -> Path:
    """Write a distributed checkpoint of one tensor, ``w``, as several ranks do, each its chunk by its offsets."""
    folder.mkdir()
    listed, storage = [], {}
    for rank, (offsets, chunk) in enumerate(chunks.items()):
        torch.save(chunk, folder / f"__{rank}_0.distcp")
        listed.append(records.ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
        length = (folder / f"__{rank}_0.distcp").stat().st_size
        storage[records.MetadataIndex("w", offsets, rank)] = _StorageInfo(f"__{rank}_0.distcp", 0, length)
    entry = records.TensorStorageMetadata(records.TensorProperties(whole.dtype), whole.shape, listed)
    metadata = records.Metadata({"w": entry}, {"w": ("w",)}, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def mutated(data: bytes, source: random.Random) -> bytes:
    """Return bytes that are damaged in one place: flipped, overwritten, cut, spliced, put in or taken out."""
    content, at = bytearray(data), source.randrange(len(data))
    count = source.randrange(1, 64)
    match source.choice(["flip", "flip", "overwrite", "cut", "splice", "insert", "zero", "remove"]):
        case "flip":
            content[at] ^= 1 << source.randrange(8)
        case "overwrite":
            content[at] = source.randrange(256)
        case "cut":
            del content[at:]
        case "splice":
            other = source.randrange(len(content))
            content[at : at + count] = content[other : other + count]
        case "insert":
            content[at:at] = source.randbytes(count)
        case "zero":
            content[at : at + count] = bytes(len(content[at : at + count]))
        case "remove":
            del content[at : at + count]
    return bytes(content)
