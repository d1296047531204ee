"""Read a checkpoint of several files: shards with an index, and folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_mimic.errors import ReferenceLoadError, join_names, nearest_names
from lightning_mimic.reference.distributed_checkpoint import METADATA, read_distributed
from lightning_mimic.reference.file_kinds import lies_beside
from lightning_mimic.reference.read_file import read_file

_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".safetensors"}
_LARGEST_INDEX = 16 * 2**20


def read_folder(path: Path, argument: str) -> Any:
    """Return what a folder holds that is one checkpoint: shards with their index, or a distributed checkpoint.

    Args:
        path: An existing folder.
        argument: Name of the caller's argument that holds the path, for messages.

    Raises:
        ReferenceLoadError: A folder that is no one checkpoint, by what it is, or whose files cannot be read.
    """
    names = {each.name for each in path.iterdir()}
    odd = sorted(name for name in names if (name == METADATA or is_index(path / name)) and not (path / name).is_file())
    if odd:  # reading a pipe or a device would have no end
        raise ReferenceLoadError(f"`{argument}`: {path / odd[0]} is no file, or leads to none. Fetch it again.")
    if METADATA in names:
        return read_distributed(path, argument)
    indices = sorted(name for name in names if is_index(path / name))
    if len(indices) == 1:
        return read_index(path / indices[0], argument)
    start = f"`{argument}`: {path} is a directory"
    if "saved_model.pb" in names:
        raise ReferenceLoadError(f"{start}, a TensorFlow SavedModel; expected weights of torch.")
    if "zero_to_fp32.py" in names:
        raise ReferenceLoadError(
            f"{start}, a checkpoint of DeepSpeed; give the file that `python zero_to_fp32.py . weights` makes in it."
        )
    if {"data.pkl", "data", "version"} <= names:
        raise ReferenceLoadError(
            f"{start}, an unpacked torch checkpoint. Pack it: `cd {path.parent} && zip -0 -r weights.pt {path.name}`."
        )
    if any(name.endswith(METADATA) for name in names):
        raise ReferenceLoadError(
            f"{start}, a distributed checkpoint whose ranks wrote without each other, so that it has no {METADATA}; "
            "save the whole state dict in one file."
        )
    files = indices or sorted(name for name in names if Path(name).suffix in _SUFFIXES)
    hint = f", such as {join_names(files)}" if files else ""
    raise ReferenceLoadError(f"{start}; give one file (.ckpt, .pt, .safetensors){hint}.")


def read_index(path: Path, argument: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint in shards, as Hugging Face's libraries write them.

    Args:
        path: The index, ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``.
        argument: Name of the caller's argument that holds the path, for messages.

    Raises:
        ReferenceLoadError: An index that is damaged, that names files outside its folder, or that does not fit its
            shards, each by name; a shard that cannot be read.
    """
    shards = _shards(path, argument)
    missing = sorted(name for name in shards if not (path.parent / name).is_file())
    if missing:
        raise ReferenceLoadError(
            f"`{argument}`: {path} names {len(shards)} shards, of which {len(missing)} are not there: "
            f"{join_names(missing)}. Fetch them, too."
        )
    tensors: dict[str, Tensor] = {}
    for shard, names in shards.items():
        content = read_file(path.parent / shard, argument)
        held = content if isinstance(content, Mapping) else {}
        for name in names:
            if not isinstance(held.get(name), Tensor):
                raise ReferenceLoadError(
                    f"`{argument}`: {path} says that {name!r} is in {shard}, which does not hold it "
                    f"({nearest_names(name, map(str, held))}). Index and shards are not of one checkpoint."
                )
        beside = sorted(str(name) for name, value in held.items() if isinstance(value, Tensor) and name not in names)
        if beside:
            raise ReferenceLoadError(
                f"`{argument}`: {path.parent / shard} holds {join_names(beside)}, which {path.name} says is not in it. "
                "Index and shards are not of one checkpoint."
            )
        tensors |= {name: held[name] for name in names}
    return tensors


def is_index(path: Path) -> bool:
    """Whether a file is named as the index of a checkpoint in shards."""
    return path.name.endswith(".index.json")


def _shards(path: Path, argument: str) -> dict[str, list[str]]:
    """The index's shards with the names of the tensors in each."""
    start = f"`{argument}`: {path}"
    size = path.stat().st_size
    if size > _LARGEST_INDEX:
        raise ReferenceLoadError(f"{start} has {size} bytes; an index has {_LARGEST_INDEX} at most.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ReferenceLoadError(f"{start} has {name!r} twice. Keep one of the two.")
            found[name] = value
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except ReferenceLoadError:
        raise
    except (ValueError, RecursionError) as error:
        raise ReferenceLoadError(f"{start} ({size} bytes) is no JSON ({error}). Fetch or save it again.") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise ReferenceLoadError(f"{start} has no `weight_map` from names to files, as an index of shards has.")
    shards: dict[str, list[str]] = {}
    for name, shard in places.items():
        if not lies_beside(shard):
            raise ReferenceLoadError(
                f"{start} says that {name!r} is in {shard!r}; the shards must lie beside it, in the same folder."
            )
        shards.setdefault(shard, []).append(name)
    return shards
