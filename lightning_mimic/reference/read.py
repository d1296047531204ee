"""Read the tensors of a reference checkpoint, of any format, without ever unpickling code."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic.errors import ReferenceLoadError

#: What a reference may be given as.
ReferenceSource = str | Path | nn.Module | Mapping[str, Tensor]

#: What the name of one of open_clip's published models begins with.
PUBLISHED = "open_clip:"

# Where training code puts a model's weights within a checkpoint, Lightning's own key first.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
_CONVERT = (
    "Convert it once, where you trust the file: `import torch; c = torch.load(path, weights_only=False); "
    f"c = next((c[k] for k in {_CONTAINERS} if k in c), c) if isinstance(c, dict) else c.state_dict(); "
    "torch.save(c, 'weights.pt')`."
)


def read_reference(source: ReferenceSource, *, argument: str = "reference") -> dict[str, Tensor]:
    """The named tensors of a reference.

    Args:
        source: Path of a Lightning ``.ckpt``, a ``.pt``/``.pth`` state dict or a ``.safetensors`` file, or
            a module, or a state dict, or one of open_clip's models, ``"open_clip:ARCHITECTURE/TAG"``. Files are read
            with ``weights_only=True``, always.
        argument: Name of the caller's argument that holds the source, for messages.

    Returns:
        Name to tensor, on the CPU for files; dtypes as stored.

    Raises:
        ReferenceLoadError: Missing, truncated or foreign file, one that needs code to be unpickled, or one
            without tensors; the original error is chained.

    Example:
        >>> sorted(read_reference(nn.Linear(2, 1)))
        ['bias', 'weight']
    """
    if isinstance(source, nn.Module):
        return dict(source.state_dict())
    if isinstance(source, Mapping):
        return _tensors(source, "the given state dict", argument)
    if not isinstance(source, str | Path):
        raise ReferenceLoadError(
            f"`{argument}` has type {type(source).__name__}; expected a path (.ckpt, .pt, .safetensors), a module, a "
            "state dict or 'open_clip:ARCHITECTURE/TAG'."
        )
    if str(source).startswith(PUBLISHED):
        from lightning_mimic.reference.open_clip_hub import open_clip_model  # it imports from here

        return dict(open_clip_model(str(source), argument=argument).state_dict())
    if "://" in str(source):
        raise ReferenceLoadError(f"`{argument}`: {source} is an address; download the file and give its path.")
    path = Path(source).expanduser()
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in {".ckpt", ".pt", ".pth", ".safetensors"})
        hint = f"; there are: {', '.join(beside[:5])}" if beside else ""
        raise ReferenceLoadError(f"`{argument}`: no file {path}{hint}.")
    if path.is_dir():
        raise ReferenceLoadError(f"`{argument}`: {path} is a directory; give one file (.ckpt, .pt, .safetensors).")
    read = _read_safetensors if path.suffix.lower() == ".safetensors" else _read_torch
    return _tensors(read(path, argument), str(path), argument)


def _read_torch(path: Path, argument: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks to report pickle protocols that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ReferenceLoadError(f"`{argument}`: {path} may not be read: {error}.") from error
    except Exception as error:  # a damaged file ends in almost any type of error
        # An intact file that is refused names what it would have to import; a broken one does not.
        if isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL|[Uu]nsupported class", str(error)):
            raise ReferenceLoadError(
                f"`{argument}`: {path} holds Python objects besides tensors, and reading those could run code, so it "
                f"is refused. {_CONVERT}"
            ) from error
        raise _broken(path, argument) from error


def _broken(path: Path, argument: str) -> ReferenceLoadError:
    return ReferenceLoadError(
        f"`{argument}`: {path} ({path.stat().st_size} bytes) is not a complete torch checkpoint; it may be cut off, "
        "a web page saved in its place, or a pickle that torch did not write. Fetch it again."
    )


def _read_safetensors(path: Path, argument: str) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ReferenceLoadError(
            f"`{argument}`: .safetensors files need the package safetensors: `pip install lightning-mimic[vision]`."
        ) from error
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # safetensors raises its own types and plain Exception
        raise ReferenceLoadError(
            f"`{argument}`: {path} ({path.stat().st_size} bytes) is not a complete safetensors file. Fetch it again."
        ) from error


def _tensors(content: Any, origin: str, argument: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in _CONTAINERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
        keys = ", ".join(repr(str(k)) for k in list(content)[:6]) or "none"
        raise ReferenceLoadError(
            f"`{argument}`: {origin} holds no named tensors; its keys: {keys}. Expected a state dict, itself or below "
            f"one of: {', '.join(_CONTAINERS)}."
        )
    raise ReferenceLoadError(f"`{argument}`: {origin} holds a {type(content).__name__}; expected a state dict.")
