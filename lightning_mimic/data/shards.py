"""Webdataset shards: which there are, how many pairs each holds, and what comes out of one, whole or not at all."""

import contextlib
import json
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning_mimic.data.pairs import IMAGES, BrokenPairError, described, id_of
from lightning_mimic.data.rejects import Reason
from lightning_mimic.errors import MimicError

#: Tars of at most so many bytes together are counted by their headers where nothing else tells the number of pairs.
SCANNED_BYTES = 2**31
# So many pairs without a json in a row, from the start of a shard, mean that it has none.
_NO_JSON_AFTER = 64


def list_shards(shards: str | Sequence[str], argument: str = "shards") -> list[str]:
    """The shards that paths, brace ranges and commands stand for.

    Args:
        shards: One, or several: ``"{00000000..00000127}.tar"``, ``"pipe:aws s3 cp s3://bucket/0.tar -"``, a URL.
        argument: What they are called in an error.

    Raises:
        MimicError: None, missing files, a directory, or an address that cannot be opened.

    Example:
        >>> list_shards("pipe:cat {08..10}.tar")
        ['pipe:cat 08.tar', 'pipe:cat 09.tar', 'pipe:cat 10.tar']
    """
    from webdataset.gopen import gopen_schemes
    from webdataset.shardlists import expand_urls

    found: list[str] = []
    for each in [shards] if isinstance(shards, str) else shards:
        try:
            found += expand_urls(str(each))
        except ValueError as error:
            raise MimicError(f"`{argument}`: {each!r} cannot be expanded: {error}.") from error
    if not found:
        raise MimicError(f"`{argument}` is empty; give paths such as 'shards/{{00000000..00000127}}.tar'.")
    for url in found:
        if local_path(url) is None and (scheme := urlparse(url).scheme) not in gopen_schemes:
            known = ", ".join(f"{name}:" for name in gopen_schemes if name != "__default__")
            raise MimicError(
                f"`{argument}`: {url!r} begins with {scheme}:, which cannot be opened; a path, or one of {known} "
                f"(any command can stand after pipe:)."
            )
    paths = [path for url in found if (path := local_path(url)) is not None]
    folder = next((path for path in paths if path.is_dir()), None)
    if folder is not None:
        raise MimicError(f"`{argument}`: {folder} is a directory; name its shards. It holds {_tars_in(folder)}.")
    missing = [path for path in paths if not path.exists()]
    if missing:
        folder = missing[0].parent
        there = f"holds {_tars_in(folder)}" if folder.is_dir() else "is no directory"
        raise MimicError(
            f"`{argument}`: {len(missing)} of {len(found)} shards are not there: {', '.join(map(str, missing[:3]))}"
            f"{' and more' if len(missing) > 3 else ''}. "
            f"{folder} {there}. Ranges are written {{000..127}}; * is not expanded."
        )
    return found


def local_path(url: str) -> Path | None:
    """Where a shard lies on this machine, if it does.

    Example:
        >>> local_path("a/0.tar"), local_path("pipe:cat a/0.tar")
        (PosixPath('a/0.tar'), None)
    """
    parts = urlparse(url)
    return Path(url) if parts.scheme == "" else Path(parts.path) if parts.scheme == "file" else None


def _tars_in(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.tar*"))
    return f"{len(names)} of them, {names[0]} to {names[-1]}" if names else "none"


def stated_counts(shards: Sequence[str]) -> dict[str, int]:
    """Pairs of each shard, as far as files beside it tell: ``sizes.json``, else img2dataset's ``NAME_stats.json``."""
    counts, sizes = {}, {}
    for url in shards:
        path = local_path(url)
        if path is None:
            continue
        if path.parent not in sizes:
            sizes[path.parent] = _read_json(path.parent / "sizes.json")
        count = sizes[path.parent].get(path.name)
        if count is None:
            count = _read_json(path.with_name(f"{path.name.split('.')[0]}_stats.json")).get("successes")
        if isinstance(count, int):
            counts[url] = count
    return counts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # then nothing is known, which is no error
    return content if isinstance(content, dict) else {}


def scanned_ids(shards: Sequence[str]) -> dict[str, list[str]]:
    """Ids of the pairs in each shard that are whole by the names of their files, from headers and json files alone.

    Without those that are not local or compressed; empty, if they have more than :data:`SCANNED_BYTES` together.
    """
    paths = {url: path for url in shards if (path := local_path(url)) is not None and path.is_file()}
    if sum(path.stat().st_size for path in paths.values()) > SCANNED_BYTES:
        return {}
    return {url: list(_ids_in(url)) for url, path in paths.items() if not _is_compressed(path)}


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))


def _ids_in(url: str) -> Iterator[str]:
    groups = _Groups(url, lambda *_, **__: None)
    whole = True
    try:
        for key, suffix, content in _files(url, heads=True):
            groups.add(key, suffix, content)
    except _DamageError:
        whole = False
    for key, files in groups.end(whole):
        with contextlib.suppress(BrokenPairError):
            if ("txt" in files or "json" in files) and any(suffix in files for suffix in IMAGES):
                yield id_of(key, described(files))


class _DamageError(Exception):
    """A shard that does not end as a tar does, or is none."""


class _Member(tarfile.TarInfo):
    """Keeps what ended the archive: tarfile itself stops at a damaged header as it does at a proper end."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ending = error
            raise


def _files(url: str, heads: bool = False) -> Iterator[tuple[str, str, bytes]]:
    """Key, suffix and content (with ``heads`` that of json files alone) of each file.

    Raises _DamageError where the shard breaks off.
    """
    from webdataset.gopen import gopen

    stream: Any = None
    try:
        stream = gopen(url, "rb")
        # A command's output itself: webdataset drops what is left of it once the command has failed.
        source = getattr(stream, "stream", stream)
        with tarfile.open(fileobj=source, mode="r:" if heads else "r|*", tarinfo=_Member) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]
                key, suffix = _named(member)
                content = None if key is None else tar.extractfile(member)
                if key is not None and content is not None:
                    yield key, suffix, content.read() if suffix == "json" or not heads else b""
            _check_ending(tar)
    except GeneratorExit:
        with contextlib.suppress(AttributeError):
            stream.proc.kill()  # a command that nobody listens to any more; closing waits for it
        raise
    except Exception as error:  # of tarfile, a decompressor, the system, the command
        raise _DamageError(f"{error}{_status(stream)}") from error
    finally:
        with contextlib.suppress(Exception):
            stream.close()


def _check_ending(tar: Any) -> None:
    ending = getattr(tar, "ending", None)
    if isinstance(ending, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
        raise _DamageError("it is cut between two files")
    if isinstance(ending, tarfile.TruncatedHeaderError):  # type: ignore[attr-defined]
        raise _DamageError("it is cut inside a header")
    if not isinstance(ending, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
        raise _DamageError(f"a damaged header ({ending})")
    while block := tar.fileobj.read(2**20):
        if block.strip(b"\0"):
            raise _DamageError("more follows after the end mark")


def _status(stream: Any) -> str:
    """How a command ended."""
    try:
        if stream is not None:
            stream.close()
    except Exception as error:
        return f"; {error}"
    return ""


def _named(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """Key and suffix, as webdataset splits a name: at the first dot after the last slash."""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    if not member.isreg() or not stem or not dot or (stem.startswith("__") and not folder):
        return None, ""
    return f"{folder}{slash}{stem}", suffix.lower()


def read_shard(
    url: str, reject: Callable[..., None], expected: int | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The pairs of a shard, each with all of its files; what is damaged is told to ``reject``.

    Args:
        url: One of :func:`list_shards`.
        reject: Takes what is not given.
        expected: Pairs that the shard should have, if that is known.

    Yields:
        Key, and content by suffix.
    """
    groups = _Groups(url, reject)
    damage = None
    try:
        for key, suffix, content in _files(url):
            groups.add(key, suffix, content)
            yield from groups.ready()
    except _DamageError as error:
        damage = str(error)
    yield from groups.end(whole=damage is None)
    found = len(groups.keys)
    if damage is not None:
        reason = Reason.SHARD_ENDS_EARLY if found else Reason.SHARD_UNREADABLE
        reject(url, reason, damage, expected=expected, found=found)
    elif expected is not None and found != expected:
        reason = Reason.SHARD_ENDS_EARLY if found < expected else Reason.SHARD_HAS_MORE
        reject(url, reason, "the tar itself is whole", expected=expected, found=found)


class _Groups:
    """Files of one key in a row become a pair."""

    def __init__(self, url: str, reject: Callable[..., None]) -> None:
        self.keys: set[str] = set()
        self._url = url
        self._reject = reject
        self._key: str | None = None
        self._files: dict[str, bytes] = {}
        self._fault: Reason | None = None
        # Until it is known whether this shard's pairs have a json, those without it wait: they may be halves.
        self._has_json: bool | None = None
        self._waiting: list[tuple[str, dict[str, bytes]]] = []
        self._ready: deque[tuple[str, dict[str, bytes]]] = deque()

    def add(self, key: str, suffix: str, content: bytes) -> None:
        if key != self._key:
            self._finish()
            self._key, self._files = key, {}
            self._fault = Reason.SPLIT_KEY if key in self.keys else None
            self.keys.add(key)
        if suffix in self._files:
            self._fault = self._fault or Reason.DUPLICATE_FILE
        self._files[suffix] = content

    def ready(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        while self._ready:
            yield self._ready.popleft()

    def end(self, whole: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
        if whole:
            self._finish()
        elif self._key is not None:
            self._reject(self._url, Reason.CUT_OFF, key=self._key)
        self._ready.extend(self._waiting)
        return self.ready()

    def _finish(self) -> None:
        if self._key is None:
            return
        group, names = (self._key, self._files), ", ".join(sorted(self._files))
        if self._fault is not None:
            self._reject(self._url, self._fault, f"files: {names}", key=self._key)
        elif "json" in self._files:
            self._has_json = True
            self._ready.append(group)
        elif self._has_json is False:
            self._ready.append(group)
        else:
            self._waiting.append(group)
        if self._has_json:
            for key, _ in self._waiting:
                self._reject(self._url, Reason.NO_JSON, "other pairs of the shard have one", key=key)
            self._waiting = []
        elif self._has_json is None and len(self._waiting) >= _NO_JSON_AFTER:
            self._has_json = False
            self._ready.extend(self._waiting)
            self._waiting = []
