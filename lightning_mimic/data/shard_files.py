"""Opening of shards: local files, output of commands, and URLs, which are resumed after connection errors."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning_mimic.errors import MimicError
from lightning_mimic.stores import hide_secrets

#: Number of retries of a URL without receiving a byte before its shard is given up.
RETRIES = 5
#: Seconds to wait before the first retry; the time doubles for each further retry.
WAIT = 1.0
# Exit status of curl for errors of the server that curl does not retry, such as 403 or 404.
_HTTP_ERROR = 22
_BLOCK = 2**20


def local_path(url: str) -> Path | None:
    """Return the path of a local shard, or ``None`` for other shards.

    Example:
        >>> local_path("a/0.tar"), local_path("pipe:cat a/0.tar")
        (PosixPath('a/0.tar'), None)
    """
    parts = urlparse(url)
    return Path(url) if parts.scheme == "" else Path(parts.path) if parts.scheme == "file" else None


def is_on_store(url: str) -> bool:
    """Return whether a shard is opened by fsspec: it is not a local file, and webdataset does not handle its scheme.

    Example:
        >>> is_on_store("s3://bucket/0.tar"), is_on_store("pipe:cat 0.tar"), is_on_store("0.tar")
        (True, False, False)
    """
    from webdataset.gopen import gopen_schemes

    return local_path(url) is None and urlparse(url).scheme not in gopen_schemes


def check_scheme(url: str, argument: str) -> None:
    """Raise ``MimicError`` for a URL whose scheme is not supported, without contacting the store."""
    import fsspec
    from webdataset.gopen import gopen_schemes

    scheme = urlparse(url).scheme
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        known = ", ".join(f"{name}:" for name in gopen_schemes if name != "__default__")
        raise MimicError(
            hide_secrets(
                f"`{argument}`: {url!r} has the unknown scheme {scheme}:; expected a path, one of {known} (pipe: is "
                "followed by a command), or a scheme of fsspec such as s3:."
            )
        ) from error
    except ImportError as error:
        raise MimicError(
            hide_secrets(f"`{argument}`: {url!r} needs a package that is not installed: {error}.")
        ) from error


def missing_on_store(urls: Sequence[str], argument: str) -> list[str]:
    """Return the URLs that do not exist on their stores, by listing each folder once.

    Raises:
        MimicError: A folder cannot be listed for another reason than missing permission.
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
            continue  # reading may be allowed even if listing is not
        except Exception as error:  # of the store's package
            raise MimicError(hide_secrets(f"`{argument}`: {folder} cannot be listed: {_shown(error)}.")) from error
        missing += [url for url in inside if url.rpartition("/")[2] not in names]
    return missing


def contents(names: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of the small files that can be read, reading all files of a store at once.

    Raises:
        MimicError: A store does not respond, so that other ranks might find files that this one does not.
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

    Reading a URL is resumed after connection errors, up to :data:`RETRIES` times in a row. Missing files and missing
    permissions are not retried; neither are commands and local files.

    Returns:
        A file; webdataset's ``Pipe`` for a command; an object with ``read`` and ``close`` for a URL.
    """
    from webdataset.gopen import gopen

    return gopen(url, "rb") if local_path(url) is not None or url.startswith("pipe:") else _Resumed(url)


class _Resumed:
    """Read a URL, opening it again after errors."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._file: Any = None
        # webdataset's Pipe around a command such as curl.
        self._pipe: Any = None
        self._position = 0

    def read(self, size: int) -> bytes:
        for failed in range(RETRIES + 1):
            try:
                block = self._read(size)
            except Exception as error:  # of the network, the store's package, or a command
                refused = self._pipe is not None and self._pipe.status == _HTTP_ERROR
                self.close()
                if refused or isinstance(error, FileNotFoundError | PermissionError):
                    raise
                if failed == RETRIES:
                    tries = f"{RETRIES + 1} attempts in a row failed at byte {self._position}"
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
        """Read from the current position, opening the URL if necessary."""
        if self._file is None:
            self._open()
        block: bytes = self._file.read(size)
        if not block and self._pipe is not None:
            self._pipe.wait_for_child()  # raises an error if the command has failed
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
        # Read the stream directly, because Pipe.read drops the remaining output once the command has failed.
        self._file = self._pipe.stream
        for start in range(0, self._position, _BLOCK):
            self._file.read(min(_BLOCK, self._position - start))


def _shown(error: BaseException) -> str:
    """Return an error as one line."""
    lines = str(error).strip().splitlines()
    return hide_secrets(f"{type(error).__name__}: {lines[0] if lines else 'no details'}")
