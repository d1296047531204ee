"""What a file is, by its first bytes, and what to do with one that cannot be read."""

import re
from pathlib import Path

from lightning_mimic.errors import ReferenceLoadError

_HEAD = 512
_UNPACK = "Unpack it and give the checkpoint in it"
_EXPECTED = "expected a torch checkpoint (.ckpt, .pt, .pth, .bin) or .safetensors"
_EXPORT = f"Export its weights for torch; {_EXPECTED}"
# The number that torch.save, before it wrote archives, began its files with.
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

#: Files that hold no weights that can be read: how they begin, what they are, what to do.
_OTHER = (
    (rb"\0{512}", "nothing but zeros, as a download that was broken off leaves it", "Fetch it again"),
    (rb"version https://git-lfs", "a Git LFS pointer in the file's place", "Fetch the file itself: `git lfs pull`"),
    (rb"\s*<(!doctype|html|head|body|\?xml|error)", "a web page in the file's place", "Fetch the file itself"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it", _EXPORT),
    (rb"\x93NUMPY", "a single NumPy array (.npy) without a name", f"Save a dict of tensors; {_EXPECTED}"),
    (rb"GGUF|GGML|ggjt|tjgg", "a model for llama.cpp (GGUF)", "Give the checkpoint that it was made from"),
    (rb".{4}TFL3", "a TensorFlow Lite model", _EXPORT),
    (rb"model_checkpoint_path:", "a TensorFlow checkpoint's list", _EXPORT),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|\xfd7zXZ\0|BZh\d|7z\xbc\xaf|Rar!", "a compressed file", _UNPACK),
    (rb".{257}ustar", "a tar archive", _UNPACK),
    (rb"\x08\x01\x12", "a TensorFlow SavedModel", _EXPORT),
    (
        rb"\x08[\x02-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]",
        "an ONNX model, whose weights have other names and layouts than the module's",
        "Give the checkpoint that it was exported from",
    ),
    (rb"[\x80-\x8f][\xa1-\xbf][a-z]", "a msgpack file, as Flax writes it", _EXPORT),
)
# Protocols 2 to 5 begin alike; 0 and 1 with a class or a container.
_PICKLE = rb"\x80[\x02-\x05]|c[\w.]+\n[\w.]+\n|\(?[dl](p\d+\n|\.)|[\]}]q\0|[(]i?[\w.]+\n[\w.]+\n"


def kind_of(path: Path, argument: str) -> str:
    """Return which reader a file is for, by its content whatever its name.

    Args:
        path: An existing file.
        argument: Name of the caller's argument that holds the path, for messages.

    Returns:
        ``"archive"`` and ``"legacy"`` (torch's, as of today and as before 1.6), ``"safetensors"``, ``"json"`` or
        ``"pickle"`` (one that torch did not write).

    Raises:
        ReferenceLoadError: Any other file, by what it is.
    """
    if path.suffix == ".distcp":
        raise ReferenceLoadError(
            f"`{argument}`: {path} is one part of a distributed checkpoint. Give its folder, {path.parent}."
        )
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK"):
        return "archive"
    if head.startswith(b"\x80") and _LEGACY in head[:32]:
        return "legacy"
    if head[8:9] == b"{" and (head[5:8] == bytes(3) or path.suffix.lower() == ".safetensors"):
        return "safetensors"
    if head.lstrip()[:1] in (b"{", b"["):
        return "json"
    if re.match(_PICKLE, head):
        return "pickle"
    raise _other_kind(path, head, argument)


def lies_beside(name: str) -> bool:
    """Whether a name that a checkpoint gives for one of its files leads to no other folder.

    Example:
        >>> lies_beside("model-00001-of-00002.safetensors"), lies_beside("../model.safetensors")
        (True, False)
    """
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _other_kind(path: Path, head: bytes, argument: str) -> ReferenceLoadError:
    size = path.stat().st_size
    start = f"`{argument}`: {path} ({size} bytes) is"
    whole = "safetensors file" if path.suffix.lower() == ".safetensors" else "torch checkpoint"
    if not head:
        return ReferenceLoadError(f"{start} not a complete {whole}: it is empty. Fetch or save it again.")
    for pattern, what, fix in _OTHER:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return ReferenceLoadError(f"{start} not a complete {whole} but {what}. {fix}.")
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        if file.read() == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb":
            return ReferenceLoadError(f"{start} the index of a TensorFlow checkpoint. {_EXPORT}.")
    return ReferenceLoadError(
        f"{start} not a complete {whole}: it begins with {head[:8]!r}, as no format does that is known here; "
        f"{_EXPECTED}."
    )
