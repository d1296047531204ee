"""Files that users bring or name: paths, Parquet files whose every byte is verified, and failed writes as messages."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mimic.errors import CurationError, MimicError
from lightning_mimic.files import fetched
from lightning_mimic.stores import as_store_path, path_of

#: In front of the checksum that lies between the pages of a sealed file and its footer.
_MARK = b"\nlightning_mimic\n"
#: Key of the metadata of sealed files; it distinguishes one whose seal is lost from one that never had any.
SEALED = b"lightning_mimic.sealed"
_SEAL = len(_MARK) + hashlib.sha256().digest_size


def user_path(path: Any, argument: str) -> Path:
    """Return a path that a user gave, with his home directory in place of ``~``, or one on a store.

    Args:
        path: The path, or a URL; see :func:`~lightning_mimic.stores.path_of`.
        argument: Name of the argument, for the message.

    Raises:
        CurationError: It is no path, or a URL that cannot be used.

    Example:
        >>> user_path(None, "out")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: `out` is None; expected a path.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise CurationError(f"`{argument}` is {path!r}; expected a path.")
    try:
        found = path_of(path, argument)
        if not as_store_path(found):
            found.exists()  # a name may be too long, or not belong to the file system's encoding
        return found
    except MimicError as error:
        raise CurationError(str(error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise CurationError(f"`{argument}` is {str(path)!r}, which is no path: {first_line(error)}.") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none.

    Example:
        >>> first_line(MemoryError())
        'MemoryError'
    """
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the system's errors of a block that writes a file or folder into one that names it.

    Args:
        path: What is written.

    Raises:
        CurationError: A full disk, a missing permission, or another writer of the same name.

    Example:
        >>> with writing("out.csv"):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: out.csv was not written: No space left on device.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or first_line(error)
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            # Another writer may have been faster.
            why = f"{error.filename2 or error.filename or path} is there already; name another place, or delete it"
        raise CurationError(f"{path} was not written: {why}.") from error


def seal_parquet(path: Path) -> None:
    """Put a checksum between the pages and the footer of a Parquet file, which stays one for every reader.

    Args:
        path: Path of a file, complete and not yet under its final name, whose metadata has the key :data:`SEALED`.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("r+b") as file:
        start = _footer_start(file)
        digest, footer = _sha256(file, start)
        file.seek(start)
        file.write(_MARK + digest + footer)


@contextlib.contextmanager
def open_parquet(path: Path, fault: str = "cannot be read") -> Iterator[pq.ParquetFile]:
    """Open a Parquet file whose seal holds, or that never had any; checksums of pages are verified in either.

    Args:
        path: Path of the file; one on a store is fetched, unless it was (:func:`~lightning_mimic.files.fetched`).
        fault: What the message says of a file that is refused, behind its name.

    Raises:
        CurationError: No such file, another kind of file, or a damaged one; at the start or within the block.
    """
    try:
        if not path.is_file():
            raise CurationError(f"{path} {fault}: there is no such file.")
        with fetched(path) as content:
            sealed = _verify_seal(content)
            # A footer that was not verified may make pyarrow raise anything.
            with pq.ParquetFile(content, page_checksum_verification=True, pre_buffer=False) as file:
                if not sealed and SEALED in (file.metadata.metadata or {}):
                    raise ValueError("it was changed after it was written, as its checksum is gone")
                yield file
    except MimicError:
        raise
    except Exception as error:
        raise CurationError(f"{path} {fault}: {first_line(error)}.") from error


def _verify_seal(path: Path) -> bool:
    """Return whether a file is sealed, or raise :class:`ValueError` where its seal does not hold."""
    with path.open("rb") as file:
        try:
            start = _footer_start(file) - _SEAL
        except ValueError:
            return False  # pyarrow says what it is instead
        file.seek(max(start, 0))
        seal = file.read(_SEAL)
        if not seal.startswith(_MARK):
            return False
        if _sha256(file, start, _SEAL)[0] != seal[len(_MARK) :]:
            raise ValueError("it is damaged, as its checksum shows")
        return True


def _footer_start(file: IO[bytes]) -> int:
    """Return where the footer of a Parquet file begins, or raise :class:`ValueError`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
    if magic != b"PAR1" or length > size - 12:
        raise ValueError("no Parquet file")
    return size - 8 - length


def _sha256(file: IO[bytes], length: int, gap: int = 0) -> tuple[bytes, bytes]:
    """Return the checksum of a file without the gap behind its first bytes, and what follows the gap."""
    digest = hashlib.sha256()
    file.seek(0)
    while length:
        piece = file.read(min(length, 1 << 20))
        digest.update(piece)
        length -= len(piece)
    file.seek(gap, os.SEEK_CUR)
    rest = file.read()
    digest.update(rest)
    return digest.digest(), rest


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that stands for all that hold the same kind of values.

    Example:
        >>> plain_type(pa.dictionary(pa.int8(), pa.large_string())), plain_type(pa.uint8()), plain_type(pa.float32())
        (DataType(string), DataType(int64), DataType(double))
    """
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or str(kind) == "string_view":  # older Arrows do not know it
        return pa.string()
    if pa.types.is_integer(kind):
        return pa.uint64() if kind == pa.uint64() else pa.int64()
    return pa.float64() if pa.types.is_floating(kind) else kind
