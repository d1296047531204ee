"""Read the tensors of a reference checkpoint, of any format, without ever unpickling code."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lightning_mimic.errors import MimicError, ReferenceLoadError
from lightning_mimic.reference.distributed_checkpoint import ONE_FILE
from lightning_mimic.reference.read_file import read_file
from lightning_mimic.reference.read_folder import is_index, read_folder, read_index
from lightning_mimic.reference.weights import choose_weights
from lightning_mimic.stores import StorePath, path_of

#: What a reference may be given as.
ReferenceSource = str | Path | nn.Module | Mapping[str, Tensor]

#: What the name of one of open_clip's published models begins with.
PUBLISHED = "open_clip:"

_LOAD = "torch.load({!r}, map_location='cpu', weights_only=True)"


def read_reference(source: ReferenceSource, *, argument: str = "reference") -> dict[str, Tensor]:
    """The named tensors of a reference.

    Args:
        source: Path of a Lightning ``.ckpt``, a ``.pt``/``.pth`` state dict or a ``.safetensors`` file, of the index
            of a checkpoint in shards (``model.safetensors.index.json``) or its folder, or of a folder that
            ``torch.distributed.checkpoint`` wrote; a URL of any of these; a module; a state dict; one of open_clip's
            models, ``"open_clip:ARCHITECTURE/TAG"``. Files are read with ``weights_only=True``, always, whatever their
            suffix, and their checksums are compared where the format has any (torch's archives).
        argument: Name of the caller's argument that holds the source, for messages.

    Returns:
        Name to tensor, on the CPU for files; dtypes as stored.

    Raises:
        ReferenceLoadError: Missing, damaged or foreign file, one that needs code to be unpickled, one without
            tensors, or one with several sets of weights that differ (a moving average beside them); the original
            error is chained.

    Example:
        >>> sorted(read_reference(nn.Linear(2, 1)))
        ['bias', 'weight']
    """
    if isinstance(source, nn.Module):
        return dict(source.state_dict())
    if isinstance(source, Mapping):
        return choose_weights(source, "the given state dict", argument, None)
    if not isinstance(source, str | Path | StorePath):
        raise ReferenceLoadError(
            f"`{argument}` has type {type(source).__name__}; expected a path (.ckpt, .pt, .safetensors), a module, a "
            "state dict or 'open_clip:ARCHITECTURE/TAG'."
        )
    if str(source).startswith(PUBLISHED):
        from lightning_mimic.reference.open_clip_hub import open_clip_model  # it imports from here

        return dict(open_clip_model(str(source), argument=argument).state_dict())
    try:
        path = path_of(source, argument)
    except MimicError as error:
        raise ReferenceLoadError(str(error)) from error
    try:
        return _read_path(path, argument)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ReferenceLoadError):
            raise
        raise ReferenceLoadError(f"`{argument}`: {str(path)!r} may not or cannot be read: {error}.") from error


def _read_path(path: Path, argument: str) -> dict[str, Tensor]:
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in {".ckpt", ".pt", ".pth", ".safetensors"})
        hint = f"; there are: {', '.join(beside[:5])}" if beside else ""
        raise ReferenceLoadError(f"`{argument}`: no file {path}{hint}.")
    if path.is_dir():
        # Only a distributed checkpoint can hold several sets of weights.
        prepare = f"Make one file of it, `{ONE_FILE} {shlex.quote(str(path))} all.pt`. "
        return choose_weights(read_folder(path, argument), str(path), argument, _LOAD.format("all.pt"), prepare)
    if not path.is_file():
        raise ReferenceLoadError(f"`{argument}`: {path} is neither a file nor a folder; expected a checkpoint.")
    read = read_index if is_index(path) else read_file
    return choose_weights(read(path, argument), str(path), argument, _LOAD.format(str(path)))
