"""Atomic writes: a file or folder under its final name is complete, even after a crash or a power failure.

Content is written under a hidden temporary name in the same folder (``.NAME.UUID.tmp``, never shared by two writers),
flushed to the disk, and renamed. If that fails, the temporary is removed and what was under the final name stays.
"""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal


@contextlib.contextmanager
def atomic_write(
    path: str | Path, mode: Literal["wb", "w"] = "wb", *, exclusive: bool = False, newline: str | None = None
) -> Iterator[IO[Any]]:
    r"""Open a file for writing that gets its final name when the ``with`` block ends without an error.

    Args:
        path: Final name of the file; its folder must exist.
        mode: ``"wb"`` for bytes or ``"w"`` for text in UTF-8.
        exclusive: Fail if there is a file of this name already, at the start or at the end; of several writers that
            do this at the same time, exactly one succeeds.
        newline: As for :func:`open`; ``""`` for the csv module.

    Yields:
        The open file. It must not be closed by the block.

    Raises:
        FileExistsError: ``exclusive``, and the file exists.
        OSError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with atomic_write(path, "w") as file:
        ...     print(1, 2, 3, file=file)
        ...     path.exists()
        False
        >>> path.read_text()
        '1 2 3\n'
    """
    with _renamed(Path(path), exclusive) as temporary:
        encoding = None if "b" in mode else "utf-8"
        with temporary.open(mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
            yield file
            _sync(file)


@contextlib.contextmanager
def atomic_path(path: str | Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Like :func:`atomic_write`, for writers that open the file themselves by its name.

    Args:
        path: Final name of the file; its folder must exist.
        exclusive: As for :func:`atomic_write`.

    Yields:
        The temporary name under which the block must create the file.

    Raises:
        FileExistsError: ``exclusive``, and the file exists.
        OSError: The file cannot be written, or the block has not created it.
    """
    with _renamed(Path(path), exclusive) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            _sync(file)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Create a folder that gets its final name when the ``with`` block ends without an error.

    Args:
        path: Final name of the folder, or of a link to it; an empty folder of this name is replaced. Missing parents
            are created.

    Yields:
        The temporary folder in which the block writes.

    Raises:
        FileExistsError: There is something other than an empty folder under this name.
        OSError: The folder cannot be created or renamed.
    """
    final = Path(path).resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise _exists(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(final)
    temporary.mkdir()
    try:
        yield temporary
        _sync_directory(temporary)
        if final.is_dir():
            final.rmdir()
        os.replace(temporary, final)
        _sync_directory(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(
    path: str | Path, content: Mapping[str, Any] | Sequence[Any], *, exclusive: bool = False, indent: int = 2
) -> None:
    """Write a JSON file atomically.

    Args:
        path: Final name of the file; its folder must exist.
        content: What the file holds.
        exclusive: As for :func:`atomic_write`.
        indent: Spaces per level.

    Raises:
        FileExistsError: ``exclusive``, and the file exists.
        OSError: The file cannot be written.
    """
    with atomic_write(path, "w", exclusive=exclusive) as file:
        json.dump(content, file, indent=indent)


@contextlib.contextmanager
def _renamed(path: Path, exclusive: bool) -> Iterator[Path]:
    """Yield a temporary name, whose file is renamed afterwards and removed after an error."""
    if exclusive and os.path.lexists(path):
        raise _exists(path)
    temporary = _temporary_path(path)
    try:
        yield temporary
        if exclusive:
            _claim(temporary, path)
        else:
            os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _claim(temporary: Path, path: Path) -> None:
    """Give a file its final name unless there is one of this name."""
    try:
        os.link(temporary, path)  # fails if the name exists; the file has both names until the temporary is removed
    except FileExistsError:
        raise _exists(path) from None
    except (OSError, NotImplementedError):
        # Without hard links the name is reserved by an empty file first, just before the rename.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Make a rename durable, where the system can do that."""
    if os.name != "posix":
        return  # elsewhere a directory cannot be opened
    with contextlib.suppress(OSError):  # the file is there under its name by now; not every file system can do this
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
