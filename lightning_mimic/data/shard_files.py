"""Open shards: files of this machine, output of commands, and URLs, read on where a connection broke."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning_mimic.errors import MimicError
from lightning_mimic.stores import hide_secrets

#: Times that a URL is opened again, one after the other without a byte in between, before its shard is given up.
RETRIES = 5
#: Seconds before the first of them; each of the others waits twice as long as the one before.
WAIT = 1.0
# Of curl: the server's answer was an error that curl itself has not tried again, such as 403 or 404.
_HTTP_ERROR = 22
_BLOCK = 2**20


def local_path(url: str) -> Path | None:
    """Where a shard lies on this machine, if it does.

    Example:
        >>> local_path("a/0.tar"), local_path("pipe:cat a/0.tar")
        (PosixPath('a/0.tar'), None)
    """
    parts = urlparse(url)
    return Path(url) if parts.scheme == "" else Path(parts.path) if parts.scheme == "file" else None


def is_on_store(url: str) -> bool:
    """Whether fsspec opens a shard: all that is no local file and has no scheme of webdataset's.

    Example:
        >>> is_on_store("s3://bucket/0.tar"), is_on_store("pipe:cat 0.tar"), is_on_store("0.tar")
        (True, False, False)
    """
    from webdataset.gopen import gopen_schemes

    return local_path(url) is None and urlparse(url).scheme not in gopen_schemes


def check_scheme(url: str, argument: str) -> None:
    """Raise ``MimicError`` for a URL on a store that nothing can open; the store is not asked."""
    import fsspec
    from webdataset.gopen import gopen_schemes

    scheme = urlparse(url).scheme
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        known = ", ".join(f"{name}:" for name in gopen_schemes if name != "__default__")
        raise MimicError(
            hide_secrets(
                f"`{argument}`: {url!r} begins with {scheme}:, which cannot be opened; a path, one of {known} "
                f"(any command can stand after pipe:), or a scheme of fsspec's such as s3:."
            )
        ) from error
    except ImportError as error:
        raise MimicError(
            hide_secrets(f"`{argument}`: {url!r} needs a package that is not installed: {error}.")
        ) from error


def missing_on_store(urls: Sequence[str], argument: str) -> list[str]:
    """Return those that are not on their stores, by one listing of each folder.

    Raises:
        MimicError: A folder cannot be listed, for another reason than that listing is not allowed.
    """
    from fsspec.core import url_to_fs

    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(url.rpartition("/")[0], []).append(url)
    missing = []
    for folder, inside in folders.items():
        try:
            files, place = url_to_fs(folder)
            names = {name.rpartition("/")[2] for name in files.ls(place, detail=False)}
        except FileNotFoundError:
            names = set()
        except PermissionError:
            continue  # it may be allowed to read them all the same
        except Exception as error:  # of the store's own package
            raise MimicError(hide_secrets(f"`{argument}`: {folder} cannot be listed: {_shown(error)}.")) from error
        missing += [url for url in inside if url.rpartition("/")[2] not in names]
    return missing


def contents(names: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of those small files that can be read, on this machine or, all at once, on a store.

    Raises:
        MimicError: A store does not answer, so that another rank may find a file that is not found here.
    """
    from fsspec.core import url_to_fs

    found: dict[str, bytes] = {}
    stores: dict[str, dict[str, str]] = {}
    for name in names:
        if (path := local_path(name)) is None:
            stores.setdefault(urlparse(name).scheme, {})[url_to_fs(name)[1]] = name
            continue
        with contextlib.suppress(OSError):
            found[name] = path.read_bytes()
    for places in stores.values():
        files, _ = url_to_fs(next(iter(places.values())))
        for place, content in files.cat(list(places), on_error="return").items():
            if isinstance(content, bytes):
                found[places[place]] = content
            elif not isinstance(content, FileNotFoundError | PermissionError):
                raise MimicError(hide_secrets(f"{places[place]} cannot be read: {_shown(content)}.")) from content
    return found


def open_shard(url: str) -> Any:
    """Open a shard for reading.

    A URL, on a store or of the web, is read on where a connection broke, :data:`RETRIES` times in a row. What is not
    there, or not allowed to be read, is given up at once; so is the output of a command, and a file of this machine.

    Returns:
        A file; webdataset's ``Pipe`` for a command; an object with ``read`` and ``close`` for a URL.
    """
    from webdataset.gopen import gopen

    return gopen(url, "rb") if local_path(url) is not None or url.startswith("pipe:") else _Resumed(url)


class _Resumed:
    """A file behind a URL, opened again where reading it fails."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._file: Any = None
        # Webdataset's, around a command such as curl.
        self._pipe: Any = None
        self._position = 0

    def read(self, size: int) -> bytes:
        for failed in range(RETRIES + 1):
            try:
                block = self._read(size)
            except Exception as error:  # of the network, the store's own package, a command
                refused = self._pipe is not None and self._pipe.status == _HTTP_ERROR
                self.close()
                if refused or isinstance(error, FileNotFoundError | PermissionError):
                    raise
                if failed == RETRIES:
                    tries = f"{RETRIES + 1} tries in a row from byte {self._position} on"
                    raise OSError(f"{_shown(error)}; {tries}") from error
                time.sleep(WAIT * 2**failed)
            else:
                self._position += len(block)
                return block
        raise AssertionError

    def close(self) -> None:
        with contextlib.suppress(Exception):
            if self._pipe is not None:
                self._pipe.proc.kill()  # closing waits for it
                self._pipe.close()
            self._file.close()
        self._file = self._pipe = None

    def _read(self, size: int) -> bytes:
        """Read from the first byte that has not been read."""
        if self._file is None:
            self._open()
        block: bytes = self._file.read(size)
        if not block and self._pipe is not None:
            self._pipe.wait_for_child()  # raises, if the command has failed
        elif not block and self._position < (self._file.size or 0):
            raise EOFError("the connection was closed early")
        return block

    def _open(self) -> None:
        import fsspec
        from webdataset.gopen import gopen

        if is_on_store(self._url):
            self._file = fsspec.open(self._url, "rb").open()
            self._file.seek(self._position)
            return
        self._pipe = gopen(self._url, "rb")
        # Not the pipe's own method, which drops what is left of the output once the command has failed.
        self._file = self._pipe.stream
        for start in range(0, self._position, _BLOCK):
            self._file.read(min(_BLOCK, self._position - start))


def _shown(error: BaseException) -> str:
    """Return an error as one line."""
    lines = str(error).strip().splitlines()
    return hide_secrets(f"{type(error).__name__}: {lines[0] if lines else 'no more is known'}")
