"""Paths on object stores, as fsspec's URLs name them: the methods of pathlib that the package uses.

A store's requests fail more often than a disk's. Here they are tried again for about half a minute, and what fails
then is an :class:`OSError`, whatever a store's own library raises, so that callers treat a store as they treat a disk.
"""

import contextlib
import errno
import fnmatch
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.core import url_to_fs

from lightning_mimic.errors import MimicError, nearest_names

_T = TypeVar("_T")

#: Seconds before each further try of a request that failed.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+-]+):/(?!/)(.*)", re.DOTALL)
#: A user's name and password in a URL; what follows a colon is a port if it has digits only. Passwords have slashes.
_PASSWORD = re.compile(r"(://)[^/\s'\"@:]+:(?!\d+[/\s'\"]|\d+$)[^\s'\"]*@")
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*=[^\s'\"]*")
#: Schemes of the disk.
_LOCAL = ("file", "local")
#: Stores that refuse by themselves to put a file in the place of another.
_CONDITIONAL = ("s3", "s3a", "gs", "gcs")
#: Errors that another try may not meet. Of the stores' libraries, not all derive theirs from Python's own.
_PASSING = {errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}
_PASSING_NAMES = {"ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "TransportError"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}
#: A store in memory is shared by the threads of one process.
_in_memory = threading.Lock()


def path_of(given: str | os.PathLike[str], argument: str) -> Path:
    """Return a path on the disk, or a :class:`StorePath`, which has the methods of one that the package uses.

    Args:
        given: A path, whose ``~`` is the home directory, or a URL that fsspec knows (``s3://bucket/run``).
        argument: Name of the argument, for messages.

    Raises:
        MimicError: A URL that names nothing, whose scheme is not known or lacks its package, or that has a password.

    Example:
        >>> path_of("memory://runs/scores", "ledger").parent
        StorePath('memory://runs')
        >>> path_of("s3:/bucket/scores", "ledger")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.MimicError: `ledger`: s3:/bucket/scores has one slash behind s3:; ... s3://bucket/scores.
    """
    if isinstance(given, StorePath):
        return cast(Path, given)
    text = os.fspath(given)
    typo = _ONE_SLASH.fullmatch(text)
    if typo and typo[1].lower() in fsspec.available_protocols() and not os.path.lexists(text):
        meant = hide_secrets(f"{typo[1]}://{typo[2]}")
        raise MimicError(
            f"`{argument}`: {meant.replace('://', ':/', 1)} has one slash behind {typo[1]}:; a URL is text with two (a "
            f"pathlib.Path drops one), {meant}."
        )
    url = _URL.fullmatch(text)
    if url is None and not ("://" in text and "::" in text):
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise MimicError(f"`{argument}`: {text!r} is no path: {error}") from error
    if url is not None and url[1].lower() in _LOCAL:
        return path_of(url[2] or "/", argument)
    _check_url(text, argument)
    return cast(Path, StorePath(text))


def as_store_path(path: object) -> "StorePath | None":
    """Return a path from :func:`path_of` if it is on a store; ``None`` if it is on the disk."""
    return path if isinstance(path, StorePath) else None


def hide_secrets(text: str) -> str:
    """Return text without the passwords and signed queries of the URLs in it.

    Example:
        >>> hide_secrets("GET https://me:secret@host/a.ckpt?X-Amz-Signature=1f failed")
        'GET https://host/a.ckpt failed'
    """
    return _QUERY.sub(r"\1", _PASSWORD.sub(r"\1", text))


def _check_url(text: str, argument: str) -> None:
    """Raise ``MimicError`` for a URL that cannot be one of a store; nothing is asked of the store."""
    shown = hide_secrets(text)
    if "::" in text:
        raise MimicError(f"`{argument}`: {shown} joins several file systems; give the URL of one.")
    scheme, rest = cast(re.Match[str], _URL.fullmatch(text)).groups()
    if "\0" in text or not rest.strip("/"):
        raise MimicError(f"`{argument}`: {text!r} names no place on a store; expected such as s3://bucket/folder.")
    if _PASSWORD.search(text):
        raise MimicError(
            f"`{argument}`: the URL has a password in it, which would come into logs and ledgers. Give {shown}, and "
            f"the password in fsspec's configuration or the environment (FSSPEC_{scheme.upper()}_PASSWORD), or in the "
            "store's own."
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        known = fsspec.available_protocols()
        raise MimicError(
            f"`{argument}`: {shown} has the scheme {scheme!r}, which fsspec does not know; "
            f"{nearest_names(scheme, known)}."
        ) from error
    except ImportError as error:
        raise MimicError(
            f"`{argument}`: {shown} needs a package that is not installed ({error}): pip install {_package(scheme)}."
        ) from error


def _package(scheme: str) -> str:
    """Name of the package that knows a scheme."""
    packages = {"s3": "'lightning-mimic[s3]'", "s3a": "'lightning-mimic[s3]'", "gs": "gcsfs", "gcs": "gcsfs"}
    packages |= dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs")
    return packages.get(scheme, f"'fsspec[{scheme}]'")


class StorePath:
    """A file or folder on an object store.

    A store has no folders, only names with slashes in them: one is there when a file in it is, and is never made.
    Nothing about the store is kept between two calls. ``str`` gives the URL without a query, which may be a signature,
    for messages and records; ``os.fspath`` what opens it, the URL, or the copy's name.

    Args:
        url: With its scheme.
        copy: A file on the disk with its content, from which it is read.

    Example:
        >>> path = StorePath("memory://bucket/run/_meta.json")
        >>> path.name, path.suffix, path.parent / "a.parquet"
        ('_meta.json', '.json', StorePath('memory://bucket/run/a.parquet'))
    """

    def __init__(self, url: str, copy: Path | None = None) -> None:
        scheme, rest = cast(re.Match[str], _URL.fullmatch(url)).groups()
        self._scheme = scheme.lower()
        # Elsewhere a question mark is a letter of a name.
        rest, mark, query = rest.partition("?") if self._scheme in ("http", "https") else (rest, "", "")
        self._place = PurePosixPath(rest.lstrip("/"))
        self._query = mark + query
        self._copy = copy

    @property
    def is_fetched(self) -> bool:
        """Whether it is read from a copy on the disk."""
        return self._copy is not None

    @property
    def name(self) -> str:
        """The last part."""
        return self._place.name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self._place.stem

    @property
    def suffix(self) -> str:
        """What the name ends with, from its last dot on."""
        return self._place.suffix

    @property
    def parent(self) -> "StorePath":
        """The folder that it is in."""
        return self._at(self._place.parent)

    def with_name(self, name: str) -> "StorePath":
        """The path of another name in the same folder."""
        return self._at(self._place.with_name(name))

    def __truediv__(self, name: str) -> "StorePath":
        return self._at(self._place / name)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._place}"

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __fspath__(self) -> str:
        return f"{self}{self._query}" if self._copy is None else str(self._copy)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __lt__(self, other: "StorePath") -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[str, str, str]:
        return self._scheme, str(self._place), self._query

    def _at(self, place: PurePosixPath) -> "StorePath":
        return StorePath(f"{self._scheme}://{place}")

    def expanduser(self) -> "StorePath":
        """The path itself; a store has no home directories."""
        return self

    def is_symlink(self) -> bool:
        """``False``; a store has no links."""
        return False

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing, as a folder is there when a file in it is."""

    def exists(self) -> bool:
        """Whether there is a file, or a folder with a file in it."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether there is a file."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Whether there is a folder with a file in it."""
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> Any:
        """Return an object with ``st_size``, the size in bytes."""
        if self._copy is not None:
            return self._copy.stat()
        return SimpleNamespace(st_size=self._run(lambda system, place: system.info(place))["size"])

    def iterdir(self) -> Iterator["StorePath"]:
        """The files and folders in it, by one listing.

        Raises:
            FileNotFoundError: There is no such folder.
        """

        def listed(system: Any, place: str) -> list[str]:
            here = PurePosixPath(place.lstrip("/"))
            names = (PurePosixPath(each["name"].lstrip("/")) for each in system.ls(place, detail=True))
            # Some consoles make a file of the folder's own name.
            return [each.name for each in names if each.parent == here]

        yield from (self / name for name in self._run(listed))

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        """The files and folders in it whose name is like a pattern; none where there is no such folder."""
        with contextlib.suppress(FileNotFoundError):
            yield from [each for each in self.iterdir() if fnmatch.fnmatchcase(each.name, pattern)]

    def rglob(self, pattern: str) -> Iterator["StorePath"]:
        """The files below it, at any depth, whose name is like a pattern."""

        def found(system: Any, place: str) -> list[str]:
            start = PurePosixPath(place.lstrip("/"))
            return [str(PurePosixPath(each.lstrip("/")).relative_to(start)) for each in system.find(place)]

        names = (self / name for name in self._run(found))
        yield from (each for each in names if fnmatch.fnmatchcase(each.name, pattern))

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        """Open it for reading: its copy, or the bytes on the store, of which no more are fetched than are read."""
        if self._copy is not None:
            return self._copy.open(mode, encoding=encoding, newline=newline)
        if mode != "rb":
            raise ValueError(f"{self} is read as bytes, or as text once it is fetched")
        return cast(IO[bytes], self._run(lambda system, place: system.open(place, "rb", cache_type="none")))

    def read_bytes(self) -> bytes:
        """Return the content, by one request."""
        if self._copy is not None:
            return self._copy.read_bytes()
        return cast(bytes, self._run(lambda system, place: system.cat_file(place)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the content as text."""
        return self.read_bytes().decode(encoding)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        with contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            self._run(lambda system, place: system.rm_file(place))

    def fetch(self, to: Path) -> "StorePath":
        """Copy the content to a file on the disk, and return the path that is read from there.

        Raises:
            FileNotFoundError: There is no such file.
        """
        self._run(lambda system, place: system.get_file(place, str(to)))
        return self.at_copy(to)

    def at_copy(self, copy: Path) -> "StorePath":
        """Return the path as one that is read from a copy."""
        return StorePath(f"{self}{self._query}", copy)

    def put(self, source: Path, *, exclusive: bool = False) -> None:
        """Give the name to a file's content, whole or not at all.

        A request that failed may have been carried out all the same. A file that is there already and has the same
        content is therefore taken for one that was just put.

        Args:
            source: The file, on the disk.
            exclusive: Only if the name is free. S3 and Google Cloud Storage decide that themselves, so that of several
                writers one succeeds.

        Raises:
            FileExistsError: ``exclusive``, and the name is taken.
            OSError: The store failed, again and again.
        """
        mode = "create" if exclusive else "overwrite"

        def put(system: Any, place: str) -> None:
            # Not every file system of fsspec's looks at the mode.
            if exclusive and self._scheme not in _CONDITIONAL and system.exists(place):
                raise FileExistsError
            system.put_file(str(source), place, mode=mode)

        try:
            with _in_memory if self._scheme == "memory" else contextlib.nullcontext():
                self._run(put)
        except FileExistsError:
            if not self._has(source):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self)) from None

    def _has(self, source: Path) -> bool:
        size = source.stat().st_size
        return bool(self.stat().st_size == size) and self.read_bytes() == source.read_bytes()

    def _info(self) -> dict[str, Any] | None:
        if self._copy is not None:
            return {"type": "file"}
        try:
            return cast(dict[str, Any], self._run(lambda system, place: system.info(place)))
        except FileNotFoundError:
            return None

    def _run(self, request: Callable[[Any, str], _T]) -> _T:
        """Carry out a request, and again while its error is one that passes."""
        waits = iter(WAITS)
        while True:
            try:
                return self._tried(request)
            except OSError as error:
                wait = next(waits, None)
                if wait is None or not _passes(error):
                    raise
            time.sleep(wait)

    def _tried(self, request: Callable[[Any, str], _T]) -> _T:
        try:
            # Looked up each time, as a forked process needs one of its own.
            system, place = url_to_fs(f"{self}{self._query}")
            system.invalidate_cache()  # other processes write
            return request(system, place)
        except Exception as error:
            whole = hide_secrets(str(error)) == str(error)
            raise _as_os_error(error) from error if whole else None


def _passes(error: OSError) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or error.errno in _PASSING


def _as_os_error(error: Exception) -> OSError:
    """Return what an error of a store's library is among those of the system, in one line without secrets."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = hide_secrets(" ".join(str(error).split())) or type(error).__name__
    if names & _NO_CREDENTIALS:
        return PermissionError(errno.EACCES, f"there are no credentials for it ({text})")
    if isinstance(error, OSError):
        # Its number may be missing, and says then as much as its kind.
        number = error.errno or next((n for kind, n in _NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        return OSError(number, hide_secrets(error.strerror) if error.strerror else text)
    return OSError(errno.EIO if names & _PASSING_NAMES else errno.EINVAL, f"{type(error).__name__}: {text[:300]}")


_NUMBERS: dict[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    ConnectionError: errno.ECONNRESET,
    TimeoutError: errno.ETIMEDOUT,
}
