"""Read the folder that ``torch.distributed.checkpoint`` writes, without unpickling code."""

import io
import math
import pickle
import pickletools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lightning_mimic.errors import ReferenceLoadError
from lightning_mimic.reference.file_kinds import lies_beside
from lightning_mimic.reference.read_file import read_archive

#: The file of such a folder that says where its tensors are.
METADATA = ".metadata"
#: The command that makes one file of such a folder, followed by both; it unpickles.
ONE_FILE = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"

_LARGEST = 16 * 2**20
_DTYPES = {name: kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)}
# Of what the metadata consists; whatever else it names is refused.
_RECORDS = ("torch.distributed.checkpoint.", "pathlib")


def read_distributed(path: Path, argument: str) -> dict[str, Any]:
    """Return the tensors of a distributed checkpoint, put together from all ranks' parts and nested as they were saved.

    What torch itself would unpickle is read here as inert records: no class is imported, nothing is called.

    Args:
        path: The folder.
        argument: Name of the caller's argument that holds the path, for messages.

    Raises:
        ReferenceLoadError: Metadata that names anything else than torch's records, that is damaged, or that does not
            fit the parts; a part that is missing or damaged.
    """
    origin = str(path / METADATA)
    try:
        metadata = _records(path / METADATA, argument)
        places = {
            (index.state["fqn"], tuple(index.state.get("offset") or ())): info.state
            for index, info in metadata.state["storage_data"].items()
        }
        _check_places(places, path, argument)
        keys = metadata.state["planner_data"] or {}
        tensors = {
            name: _assemble(name, entry.state, places, path, argument)
            for name, entry in metadata.state["state_dict_metadata"].items()
            if entry.kind == "TensorStorageMetadata"
        }
        return _nested(tensors, keys)
    except ReferenceLoadError:
        raise
    except Exception as error:  # damaged metadata ends in almost any type of error
        raise ReferenceLoadError(
            f"`{argument}`: {origin} is damaged, or of a version that is not known here ({type(error).__name__}: "
            f"{error}). Save the checkpoint again, or convert it where you trust it, `{ONE_FILE} "
            f"{shlex.quote(str(path))} weights.pt`."
        ) from error


class _Record:
    """Stands for an object of the metadata; holds its state and does nothing."""

    kind = ""
    state: Any

    def __new__(cls, *_: Any) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        self.state = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Makes records, containers, numbers and text, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module.startswith(_RECORDS) or (module, name) == ("torch.serialization", "_get_layout"):
            return type(name, (_Record,), {"kind": name})
        raise pickle.UnpicklingError(f"{module}.{name}")


def _records(path: Path, argument: str) -> Any:
    if path.stat().st_size > _LARGEST:
        raise ReferenceLoadError(f"`{argument}`: {path} has {path.stat().st_size} bytes; the limit is {_LARGEST}.")
    data = path.read_bytes()
    for operation, value, _ in pickletools.genops(data):
        # The unpickler makes room for as many objects as the highest number says.
        if "PUT" in operation.name and int(value or 0) > len(data):
            raise ReferenceLoadError(f"`{argument}`: {path} is damaged: it numbers an object {value}. Save it again.")
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise ReferenceLoadError(
            f"`{argument}`: {path} is damaged, or names other Python objects than a distributed checkpoint consists "
            f"of ({error}); reading those could run code, so it is refused. Save the checkpoint again, or convert it "
            f"where you trust it, `{ONE_FILE} {shlex.quote(str(path.parent))} weights.pt`."
        ) from error


def _check_places(places: Mapping[Any, Mapping[str, Any]], path: Path, argument: str) -> None:
    """Refuse parts that are not there, lie elsewhere, or are more than their file holds."""
    used: dict[str, int] = {}
    for (fqn, _), info in places.items():
        start = f"`{argument}`: {path}: {fqn!r}"
        name, offset, length = info["relative_path"], info["offset"], info["length"]
        if info.get("transform_descriptors"):
            raise ReferenceLoadError(
                f"{start} is stored through {info['transform_descriptors']}; expected parts as torch saves them by "
                "default."
            )
        if not lies_beside(name):
            raise ReferenceLoadError(f"{start} is said to be in {name!r}; the parts must lie in the folder itself.")
        if not (path / name).is_file():
            raise ReferenceLoadError(f"{start} is in {name}, which is not there. Fetch it, too.")
        size, used[name] = (path / name).stat().st_size, used.get(name, 0) + length
        if offset < 0 or length < 0 or offset + length > size:
            raise ReferenceLoadError(
                f"{start} is said to be in the bytes {offset} to {offset + length} of {name}, which has {size}: it is "
                "cut off. Fetch or save it again."
            )
        if used[name] > size:
            raise ReferenceLoadError(f"{start}: the parts in {name} overlap. Save it again.")


def _assemble(
    name: str, entry: Mapping[str, Any], places: Mapping[Any, Mapping[str, Any]], path: Path, argument: str
) -> Tensor:
    """Put one tensor together from its chunks."""
    start = f"`{argument}`: {path}: {name!r}"
    shape, chunks = tuple(entry["size"]), [chunk.state for chunk in entry["chunks"]]
    dtype = entry["properties"].state[0]
    if math.prod(shape) != sum(math.prod(chunk["sizes"]) for chunk in chunks):
        raise ReferenceLoadError(
            f"{start} has shape {shape}, which its {len(chunks)} parts do not fill. Save it again."
        )
    if len({tuple(chunk["offsets"]) for chunk in chunks}) < len(chunks):
        raise ReferenceLoadError(f"{start}: its parts overlap. Save it again.")
    parts = []
    for chunk in chunks:
        part = _part(start, places[name, tuple(chunk["offsets"])], path, argument)
        if (part.dtype, tuple(part.shape)) != (dtype, tuple(chunk["sizes"])):
            raise ReferenceLoadError(
                f"{start}: a part has dtype {part.dtype} and shape {tuple(part.shape)}, in {METADATA} {dtype} and "
                f"{tuple(chunk['sizes'])}. Save it again."
            )
        parts.append((tuple(slice(at, at + n) for at, n in zip(chunk["offsets"], chunk["sizes"], strict=True)), part))
    if len(parts) == 1:
        return parts[0][1]
    whole = torch.empty(shape, dtype=dtype)
    filled = torch.zeros(shape, dtype=torch.bool)
    for place, part in parts:
        whole[place] = part
        filled[place] = True
    if not bool(filled.all()):
        raise ReferenceLoadError(f"{start}: its parts overlap, and leave others empty. Save it again.")
    return whole


def _part(start: str, info: Mapping[str, Any], path: Path, argument: str) -> Tensor:
    """Read one chunk out of the file that it is in."""
    name, offset, length = info["relative_path"], info["offset"], info["length"]
    with (path / name).open("rb") as file:
        file.seek(offset)
        data: IO[bytes] = io.BytesIO(file.read(length))
    part = read_archive(data, length, f"{path / name} (at byte {offset})", argument)
    if not isinstance(part, Tensor):
        raise ReferenceLoadError(f"{start}: {name} holds a {type(part).__name__} in its place. Save it again.")
    return part


def _nested(tensors: Mapping[str, Tensor], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Undo the flattening of names, by the keys that the metadata keeps for each; without any they were flat."""
    nested: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = map(str, keys[name] if keys else (name,))
        if ".".join([*path, last]) != name:
            raise KeyError(name)
        place = nested
        for key in path:
            place = place.setdefault(key, {})
        if last in place:
            raise KeyError(name)
        place[last] = tensor
    return nested
