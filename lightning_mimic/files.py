"""Atomic writes, on a disk or a store: a file or folder under its final name is complete, even after a crash.

Content is written under a hidden temporary name in the same folder (``.NAME.UUID.tmp``, never shared by two writers),
flushed to the disk, and renamed. If that fails, the temporary is removed and what was under the final name stays. A
writer that is killed leaves its temporary behind. Writers hold a lock on theirs, which goes with the process, so that
the next one tells what was left behind from what is being written, and removes it. A final name that is a symbolic link
is refused.

On a store (:mod:`lightning_mimic.stores`) content is written on the disk first, and put there whole. There are no
folders that could appear at once: of several files that belong together, the one that readers begin with is put last.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from lightning_mimic.stores import StorePath

#: Elsewhere nothing is locked, and what killed writers leave stays.
_HAS_LOCKS = os.name == "posix"
if _HAS_LOCKS:
    import fcntl


@contextlib.contextmanager
def atomic_write(
    path: str | Path,
    mode: Literal["wb", "w"] = "wb",
    *,
    exclusive: bool = False,
    newline: str | None = None,
    tidy: bool = True,
) -> Iterator[IO[Any]]:
    r"""Open a file for writing that gets its final name when the ``with`` block ends without an error.

    Args:
        path: Final name of the file, on the disk or a store; its folder must exist.
        mode: ``"wb"`` for bytes or ``"w"`` for text in UTF-8.
        exclusive: Fail if there is a file of this name already, at the start or at the end; of several writers that
            do this at the same time, exactly one succeeds.
        newline: As for :func:`open`; ``""`` for the csv module.
        tidy: Call :func:`remove_leftovers` first, which lists the folder; ``False`` for one of very many files, where
            the caller has done so.

    Yields:
        The open file. It must not be closed by the block.

    Raises:
        FileExistsError: ``exclusive``, and the file exists.
        OSError: The file cannot be written, or its name is a symbolic link.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with atomic_write(path, "w") as file:
        ...     print(1, 2, 3, file=file)
        ...     path.exists()
        False
        >>> path.read_text()
        '1 2 3\n'
    """
    with _temporary(path, exclusive, tidy) as temporary:
        encoding = None if "b" in mode else "utf-8"
        with temporary.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_path(path: str | Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Like :func:`atomic_write`, for writers that open the file themselves by its name.

    Args:
        path: Final name of the file; its folder must exist.
        exclusive: As for :func:`atomic_write`.

    Yields:
        The name of an empty temporary file, which the block must write.

    Raises:
        FileExistsError: ``exclusive``, and the file exists.
        OSError: The file cannot be written, its name is a symbolic link, or the block has written nothing.
    """
    with _temporary(path, exclusive, tidy=True) as temporary:
        yield temporary
        if not temporary.stat().st_size:
            raise FileNotFoundError(errno.ENOENT, "nothing was written for", str(path))
        _sync(temporary)


@contextlib.contextmanager
def atomic_directory(path: str | Path, last: str | None = None) -> Iterator[Path]:
    """Create a folder that gets its final name when the ``with`` block ends without an error.

    Args:
        path: Final name of the folder; an empty folder of this name is replaced. Missing parents are created.
        last: Name of the file that readers begin with: on a store, where files appear one after another, the last one.

    Yields:
        The temporary folder in which the block writes.

    Raises:
        FileExistsError: There is something other than an empty folder under this name.
        OSError: The folder cannot be created or renamed, or its name is a symbolic link.
    """
    if (store := _store(path)) is not None:
        with TemporaryFolder("lightning-mimic-put-") as made:
            yield made.path
            _put_folder(made.path, store, last)
        return
    final = Path(path).absolute()
    remove_leftovers(final.parent)
    _refuse_link(final)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise _exists(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lambda: _temporary_path(final), Path.mkdir) as temporary:
        try:
            yield temporary
            for each in sorted(temporary.rglob("*"), reverse=True):
                _sync(each)
            _sync(temporary)
            if os.name != "posix" and final.is_dir():
                final.rmdir()  # elsewhere a rename does not replace a folder
            os.replace(temporary, final)
            _sync(final.parent)
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
        OSError: The file cannot be written, or its name is a symbolic link.
    """
    with atomic_write(path, "w", exclusive=exclusive) as file:
        json.dump(content, file, indent=indent)


def remove_leftovers(directory: str | Path) -> None:
    """Remove the temporary files and folders of writers that were killed.

    Those of running writers stay, and so does everything where the file system has no locks.

    Args:
        directory: Where their final names would be; nothing is done if it does not exist, or is on a store.
    """
    if not _store(directory):
        _remove_unlocked(Path(directory), _TEMPORARY)


@contextlib.contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """Yield a path whose content is on the disk within the ``with`` block: the path itself, or one that shows as it.

    Args:
        path: From :func:`~lightning_mimic.stores.path_of`. What is on a store is fetched by one request, into the
            system's place for temporary files; a folder is not.

    Yields:
        The path; ``os.fspath`` returns the name of the file on the disk.

    Raises:
        FileNotFoundError: There is no such file on the store.
        OSError: It cannot be fetched.
    """
    store = _store(path)
    if store is None or store.is_fetched:
        yield path
        return
    with TemporaryFolder("lightning-mimic-get-") as folder:
        yield copied(path, folder.path / "content")


def copied(path: Path, to: Path) -> Path:
    """Return a path on a store that is read from a copy on the disk, which is made if it is not there.

    Args:
        path: From :func:`~lightning_mimic.stores.path_of`, on a store.
        to: Path of the copy.

    Raises:
        OSError: The file cannot be fetched.
    """
    store = _store(path)
    assert store is not None
    if not to.exists():
        half = to.with_name(f"{to.name}.half")
        store.fetch(half)
        os.replace(half, to)
    return cast(Path, store.at_copy(to))


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


class TemporaryFolder:
    """A folder in the system's place for temporary files, which exists as long as this object and its process.

    A process that is killed leaves its folder behind; the next one with the same prefix removes it.

    Args:
        prefix: What the folder's name begins with; of this purpose alone.

    Attributes:
        path: Path of the folder.

    Raises:
        OSError: It cannot be created.

    Example:
        >>> with TemporaryFolder("lightning-mimic-example-") as folder:
        ...     folder.path.is_dir()
        True
        >>> folder.path.exists()
        False
    """

    def __init__(self, prefix: str) -> None:
        place = Path(tempfile.gettempdir())
        _remove_unlocked(place, re.compile(re.escape(prefix) + "[0-9a-f]{32}"))
        lock = contextlib.ExitStack()
        self.path = lock.enter_context(_locked(lambda: place / f"{prefix}{uuid.uuid4().hex}", _make_private))
        self._end = weakref.finalize(self, _end_folder, self.path, lock, os.getpid())

    def close(self) -> None:
        """Remove the folder; can be called again."""
        self._end()

    def __enter__(self) -> "TemporaryFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end_folder(path: Path, lock: contextlib.ExitStack, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has a copy of the object
        shutil.rmtree(path, ignore_errors=True)
    lock.close()


def _make_empty(path: Path) -> None:
    path.touch(exist_ok=False)


def _make_private(path: Path) -> None:
    path.mkdir(mode=0o700)


@contextlib.contextmanager
def _temporary(path: str | Path, exclusive: bool, tidy: bool) -> Iterator[Path]:
    """Yield an empty file on the disk, which gets its final name afterwards, on a disk or a store."""
    store = _store(path)
    if store is None:
        with _renamed(Path(path), exclusive, tidy) as temporary:
            yield temporary
        return
    with TemporaryFolder("lightning-mimic-put-") as folder:
        temporary = folder.path / store.name
        _make_empty(temporary)
        yield temporary
        store.put(temporary, exclusive=exclusive)


def _store(path: "str | Path | StorePath") -> "StorePath | None":
    """Return a path that is on a store; ``None`` for one on the disk."""
    return None if isinstance(path, str | Path) else path


def _put_folder(made: Path, final: "StorePath", last: str | None) -> None:
    """Put the files of a folder on a store, one of them last, and none in the place of another writer's."""
    names = sorted(each.relative_to(made).as_posix() for each in made.rglob("*") if each.is_file())
    for name in sorted(names, key=lambda name: name == last):
        (final / name).put(made / name, exclusive=True)


@contextlib.contextmanager
def _renamed(path: Path, exclusive: bool, tidy: bool) -> Iterator[Path]:
    """Yield an empty temporary file, which is renamed afterwards and removed after an error."""
    if tidy:
        remove_leftovers(path.parent)
    _refuse_link(path)
    if exclusive and path.exists() and not _is_reservation(path):
        raise _exists(path)
    with _locked(lambda: _temporary_path(path), _make_empty) as temporary:
        try:
            yield temporary
            if exclusive:
                _claim(temporary, path)
            else:
                os.replace(temporary, path)
            _sync(path.parent)
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
        with _reserved(path):
            os.replace(temporary, path)


@contextlib.contextmanager
def _reserved(path: Path) -> Iterator[None]:
    """Hold a name by an empty file under a lock; one that a killed process left is taken over."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        left = False
    except FileExistsError:
        left = True
    # Without locks, what was left cannot be told from what another writer holds.
    descriptor = _opened_and_locked(path, without=not left)
    try:
        if descriptor is None or os.fstat(descriptor).st_size:
            raise _exists(path)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_reservation(path: Path) -> bool:
    """Whether a file is empty, as one that reserves a name where there are no hard links."""
    return path.is_file() and path.stat().st_size == 0


@contextlib.contextmanager
def _locked(name: Callable[[], Path], make: Callable[[Path], None]) -> Iterator[Path]:
    """Make a temporary file or folder, and hold a lock on it.

    Args:
        name: Returns a path that nobody else uses.
        make: Makes it.
    """
    if not _HAS_LOCKS:
        path = name()
        make(path)
        yield path
        return
    descriptor = None
    while descriptor is None:
        path = name()
        make(path)
        # Until it is locked, another writer may take it for one that was left behind.
        descriptor = _opened_and_locked(path, without=True)
    try:
        yield path
    finally:
        os.close(descriptor)


def _opened_and_locked(path: Path, *, without: bool) -> int | None:
    """Open a file or folder and lock it until it is closed.

    Args:
        path: Not a symbolic link.
        without: Whether the file is opened where the file system has no locks.

    Returns:
        The descriptor; ``None`` if the file is gone, or somebody else holds the lock.
    """
    kind = os.O_RDONLY if path.is_dir() else os.O_RDWR  # a network's file system locks what can be written
    try:
        descriptor = os.open(path, kind | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return None
    if _lock(descriptor, without=without) and _is_file(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int, *, without: bool) -> bool:
    """Lock an open file until it is closed; return whether it is locked, or ``without`` where there are no locks."""
    if not _HAS_LOCKS:
        return without
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_unlocked(directory: Path, pattern: re.Pattern[str]) -> None:
    """Remove the files and folders of a name like this that no process holds a lock on."""
    with contextlib.suppress(OSError):  # what cannot be removed is in nobody's way
        for path in [Path(each.path) for each in os.scandir(directory) if pattern.fullmatch(each.name)]:
            _remove_if_unlocked(path)


def _remove_if_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = _opened_and_locked(path, without=False)
        if descriptor is None:
            return
        try:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(descriptor)


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise OSError(errno.ELOOP, "Nothing is written through a symbolic link", str(path))


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    if path.is_dir():
        if os.name != "posix":
            return  # elsewhere a folder cannot be opened
        with contextlib.suppress(OSError):  # not every file system can do this
            _sync_opened(path, os.O_RDONLY)
    elif path.is_file():
        _sync_opened(path, os.O_RDWR)


def _sync_opened(path: Path, how: int) -> None:
    descriptor = os.open(path, how)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
