"""Checks of a zip archive before torch reads it: what it is, that nothing in it inflates, and its checksums."""

import shlex
import zipfile
from pathlib import Path, PurePath
from typing import IO

from lightning_mimic.errors import ReferenceLoadError

#: Bytes of which torch.load makes Python objects, with up to some 100 bytes of memory for each.
LARGEST_PICKLE = 16 * 2**20
_CHUNK = 2**20
_WEIGHTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def check_archive(file: IO[bytes], size: int, origin: str, argument: str) -> None:
    """Refuse an archive that torch must not read, or that is damaged; memory does not grow with its size.

    torch compares no checksums, and takes flipped bits for weights. All are compared here, at the speed of one more
    reading of the file; an archive that was written without any (``set_crc32_options(False)``) has none to compare.

    Args:
        file: The archive, open for reading.
        size: Its size in bytes.
        origin: Where it is from, for messages.
        argument: Name of the caller's argument that holds it, for messages.

    Raises:
        ReferenceLoadError: Another kind of archive, compressed or overlapping entries, an entry that differs from its
            checksum, or no complete archive; the original error is chained.
    """
    with _opened(file, size, origin, argument) as archive:
        entries = archive.infolist()
    _refuse_other_kinds([entry.filename for entry in entries], origin, argument)
    _refuse_odd_entries(entries, size, origin, argument)
    _compare_checksums(file, size, origin, argument)


def check_checkpoint(path: Path, argument: str) -> None:
    """Refuse a file that is an archive of torch's and damaged, before somebody else reads it.

    Args:
        path: The file; one in another format has no checksums.
        argument: Name of the caller's argument that holds the path, for messages.

    Raises:
        ReferenceLoadError: An entry that differs from its checksum, or no complete archive; the original error is
            chained.
    """
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            _compare_checksums(file, path.stat().st_size, str(path), argument)


def _compare_checksums(file: IO[bytes], size: int, origin: str, argument: str) -> None:
    with _opened(file, size, origin, argument) as archive:
        entries = archive.infolist()
        if not any(entry.CRC for entry in entries):
            return
        for entry in entries:
            try:
                with archive.open(entry) as content:
                    while content.read(_CHUNK):
                        pass
            except Exception as error:  # a damaged archive ends in almost any type of error
                raise ReferenceLoadError(
                    f"`{argument}`: {origin} is damaged: its entry {entry.filename!r} does not fit its checksum "
                    f"({error}), so that it holds other numbers than were saved. Fetch or save it again."
                ) from error


def too_many_objects(origin: str, argument: str) -> ReferenceLoadError:
    """Return the error for a checkpoint that holds too many Python objects beside its tensors."""
    load = f"torch.load({origin!r}, map_location='cpu', weights_only=True)"
    return ReferenceLoadError(
        f"`{argument}`: {origin} holds more than {LARGEST_PICKLE} bytes of Python objects beside its tensors, with "
        "which a small file could fill the memory. Save the weights alone, such as `import torch; "
        f"torch.save({load}['state_dict'], 'weights.pt')`."
    )


def _opened(file: IO[bytes], size: int, origin: str, argument: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except Exception as error:  # a damaged archive ends in almost any type of error
        raise ReferenceLoadError(
            f"`{argument}`: {origin} ({size} bytes) is not a complete torch checkpoint: the zip archive that it is "
            f"cannot be read ({error}); it is cut off or damaged. Fetch or save it again."
        ) from error


def _refuse_other_kinds(names: list[str], origin: str, argument: str) -> None:
    """Refuse archives that other programs write, each with what to do."""
    last = {PurePath(name).name for name in names}
    if "constants.pkl" in last:
        what = "a TorchScript archive, whose code is not run here. Take its weights out, where you trust the file"
        code = f"import torch; torch.save(torch.jit.load({origin!r}, map_location='cpu').state_dict(), 'weights.pt')"
    elif last & {"archive_format", "serialized_exported_program.json", "archive_version"}:
        what = "a program that torch.export saved. Take its weights out, where you trust the file"
        code = f"import torch; torch.save(dict(torch.export.load({origin!r}).state_dict), 'weights.pt')"
    elif names and all(name.endswith(".npy") for name in names):
        what = "NumPy's arrays (.npz). Save them as tensors"
        code = (
            f"import numpy, torch; torch.save({{k: torch.from_numpy(v) for k, v in numpy.load({origin!r}).items()}}, "
            "'weights.pt')"
        )
    elif "data.pkl" in last:
        return
    elif "model.weights.h5" in last:
        raise ReferenceLoadError(f"`{argument}`: {origin} is a Keras model (.keras); expected weights of torch.")
    else:
        held = next((name for name in names if name.endswith(_WEIGHTS)), None)
        unpack = f"Unpack it, `python -m zipfile -e {shlex.quote(origin)} .`, and give {held!r}"
        raise ReferenceLoadError(
            f"`{argument}`: {origin} is a zip archive of {len(names)} files, none of which is torch's data.pkl. "
            f"{unpack if held else 'Give a checkpoint'}."
        )
    raise ReferenceLoadError(f"`{argument}`: {origin} is {what}: `{code}`.")


def _refuse_odd_entries(entries: list[zipfile.ZipInfo], size: int, origin: str, argument: str) -> None:
    names = set()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ReferenceLoadError(
                f"`{argument}`: {origin} has a compressed entry, {entry.filename!r} ({entry.compress_size} bytes that "
                f"become {entry.file_size}); torch.save compresses none, and a small file could fill the memory. "
                f"Save it again, where you trust the file: `import torch; torch.save(torch.load({origin!r}, "
                "map_location='cpu', weights_only=True), 'weights.pt')`."
            )
        # Of such entries torch reads nothing, and takes whatever the memory held for their content.
        folder = bool(entry.external_attr & 0x10) or entry.filename.endswith("/")
        if entry.compress_size != entry.file_size or (folder and entry.file_size):
            raise ReferenceLoadError(
                f"`{argument}`: {origin} is damaged: its entry {entry.filename!r} of {entry.file_size} bytes is said "
                f"to {'be a folder' if folder else f'take {entry.compress_size}'}. Fetch or save it again."
            )
        if entry.filename.lower() in names:
            raise ReferenceLoadError(
                f"`{argument}`: {origin} has two entries {entry.filename!r}; torch.save writes one. Save it again."
            )
        names.add(entry.filename.lower())  # torch does not tell them apart by case
        if PurePath(entry.filename).name == "data.pkl" and entry.file_size > LARGEST_PICKLE:
            raise too_many_objects(origin, argument)
    if sum(entry.file_size for entry in entries) > size:
        raise ReferenceLoadError(
            f"`{argument}`: {origin} ({size} bytes) has entries of {sum(e.file_size for e in entries)} bytes "
            "together, which must overlap; torch.save writes no such file."
        )
