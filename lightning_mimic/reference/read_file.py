"""Read what one checkpoint file holds, of any format, without ever unpickling code."""

import io
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from lightning_mimic.errors import ReferenceLoadError
from lightning_mimic.files import fetched
from lightning_mimic.reference.archive import LARGEST_PICKLE, check_archive, too_many_objects
from lightning_mimic.reference.file_kinds import kind_of

# The header names the tensors, in about 100 bytes for each; the library takes several times its size to parse it.
_LARGEST_HEADER = 16 * 2**20
_TO_TENSORS = (
    "f = lambda o: f(o.state_dict()) if hasattr(o, 'state_dict') else {str(k): f(v) for k, v in o.items()} "
    "if isinstance(o, dict) else o if torch.is_tensor(o) else torch.tensor(o) if type(o).__module__ == 'numpy' "
    "and o.dtype.kind in 'fiub' else None"
)


def read_file(path: Path, argument: str) -> Any:
    """Return what a checkpoint file holds; which format it is in is seen from its content.

    Args:
        path: An existing file; one on a store is fetched.
        argument: Name of the caller's argument that holds the path, for messages.

    Raises:
        ReferenceLoadError: A damaged or foreign file, one that could run code, or one that would fill the memory; the
            original error is chained.
    """
    with fetched(path) as content:
        return _read_content(content, argument)


def _read_content(path: Path, argument: str) -> Any:
    kind = kind_of(path, argument)
    size = path.stat().st_size
    if kind == "safetensors":
        return _read_safetensors(path, size, argument)
    if kind == "json":
        raise ReferenceLoadError(
            f"`{argument}`: {path} ({size} bytes) is not a complete torch checkpoint but a JSON file; it may be a "
            "configuration, or a server's answer in the file's place. Give the file of the weights."
        )
    if kind == "pickle":
        read = f"import pathlib, pickle, torch; c = pickle.loads(pathlib.Path({str(path)!r}).read_bytes())"
        raise ReferenceLoadError(
            f"`{argument}`: {path} is a pickle that torch.save did not write; it holds Python objects besides tensors, "
            f"and reading those could run code, so it is refused. {_convert(read, path)} (For a file of joblib: "
            "`joblib.load(path)` in place of `pickle.loads(...)`.)"
        )
    if kind == "legacy":
        with _Limited(io.FileIO(path)) as file:
            return _load(file, size, str(path), argument)
    with path.open("rb") as archive:
        return read_archive(archive, size, str(path), argument)


def read_archive(file: IO[bytes], size: int, origin: str, argument: str) -> Any:
    """Return what ``torch.save`` wrote into an archive, which is checked beforehand.

    Args:
        file: Open for reading; from its start to its end it is the archive.
        size: Its size in bytes.
        origin: Where it is from, for messages.
        argument: Name of the caller's argument that holds it, for messages.

    Raises:
        ReferenceLoadError: As :func:`read_file`.
    """
    check_archive(file, size, origin, argument)
    file.seek(0)
    return _load(file, size, origin, argument)


class _Limited(io.BufferedReader):
    """A file of which no more is read than Python objects may take; torch reads the tensors past it."""

    left = LARGEST_PICKLE

    def read(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().readline(size))

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise MemoryError(f"more than {LARGEST_PICKLE} bytes of Python objects")
        return data


def _load(file: IO[bytes], size: int, origin: str, argument: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks to report pickle protocols that it then refuses
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file ends in almost any type of error
        # An intact file that is refused names what it would have to import; a broken one does not.
        if isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL|[Uu]nsupported class", str(error)):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            first = f" (the first is {named[1]})" if named else ""
            read = f"import torch; c = torch.load({origin!r}, map_location='cpu', weights_only=False)"
            raise ReferenceLoadError(
                f"`{argument}`: {origin} holds Python objects besides tensors{first}, and reading those could run "
                f"code, so it is refused. {_convert(read, Path(origin))}"
            ) from error
        if isinstance(file, _Limited) and file.left < 0:
            raise too_many_objects(origin, argument) from error
        raise ReferenceLoadError(
            f"`{argument}`: {origin} ({size} bytes) is not a complete torch checkpoint; it is cut off or damaged "
            f"({type(error).__name__}). Fetch or save it again."
        ) from error
    _refuse_expanding(content, size, origin, argument)
    return content


def _convert(read: str, path: Path) -> str:
    target = "weights.pt" if path.name != "weights.pt" else "converted.pt"
    return (
        "Convert it once, where you trust the file and its classes can be imported, and give what this line of Python "
        f"makes: `{read}; {_TO_TENSORS}; torch.save(f(c), {target!r})`."
    )


def _refuse_expanding(content: Any, size: int, origin: str, argument: str) -> None:
    """Refuse tensors that repeat a few numbers to more than the whole file has, which any copy would write out."""
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if type(value) in (Tensor, nn.Parameter):
            if value.layout == torch.strided and not value.is_meta and value.numel() * value.element_size() > size:
                raise ReferenceLoadError(
                    f"`{argument}`: {origin} ({size} bytes): {name!r} has shape {tuple(value.shape)}, for which the "
                    "file is too small; it repeats a part that any copy would write out. Save it `.contiguous()`."
                )
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.items()


def _read_safetensors(path: Path, size: int, argument: str) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ReferenceLoadError(
            f"`{argument}`: {path} is a safetensors file, which needs the package safetensors: `pip install "
            "lightning-mimic[vision]`."
        ) from error
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if _LARGEST_HEADER < header <= size:
        raise ReferenceLoadError(
            f"`{argument}`: {path} has a header of {header} bytes; the limit is {_LARGEST_HEADER}, which names some "
            "100,000 tensors. Save the model's weights alone."
        )
    try:
        return safetensors.torch.load_file(os.fspath(path))
    except Exception as error:  # safetensors raises its own types and plain Exception
        raise ReferenceLoadError(
            f"`{argument}`: {path} ({size} bytes) is not a complete safetensors file: {error}. Fetch or save it again."
        ) from error
