"""Webdataset shards: expanding lists of them, counting their pairs, and reading complete pairs."""

import contextlib
import json
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning_mimic.data.pairs import IMAGES, BrokenPairError, described, id_of, shown
from lightning_mimic.data.rejects import Reason
from lightning_mimic.data.shard_files import (
    check_scheme,
    contents,
    is_on_store,
    local_path,
    missing_on_store,
    open_shard,
)
from lightning_mimic.errors import MimicError
from lightning_mimic.stores import hide_secrets

#: Maximum number of shards in a list.
MAX_SHARDS = 2**22
#: Maximum total size of local tars whose pairs are counted by reading their headers.
SCANNED_BYTES = 2**31
# After this number of pairs without a json from the start of a shard, its pairs are assumed to have none.
_NO_JSON_AFTER = 64
#: Maximum number of bytes of the files of a pair; a compressed shard can expand to a thousand times its size.
MAX_PAIR_BYTES = 2**28
# Maximum number of bytes of a caption or a json, and of a header or long name in a tar.
_MAX_TEXT_BYTES = 2**24
_MAX_HEADER_BYTES = 2**20
# Largest file size that the header of an ordinary tar can express.
_MAX_MEMBER_BYTES = 2**33
_HEADER_TYPES = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


def list_shards(shards: str | Sequence[str], argument: str = "shards") -> list[str]:
    """Expand paths, brace ranges, commands and URLs to a list of shards, and check that they exist.

    Args:
        shards: One entry or several, such as ``"{00000000..00000127}.tar"``, ``"pipe:aws s3 cp s3://bucket/0.tar -"``,
            or a URL.
        argument: Name of the argument, for messages.

    Raises:
        MimicError: The list is empty or too long, files are missing, an entry is a directory, or has an unknown scheme.

    Example:
        >>> list_shards("pipe:cat {08..10}.tar")
        ['pipe:cat 08.tar', 'pipe:cat 09.tar', 'pipe:cat 10.tar']
    """
    if not isinstance(shards, str | Sequence):
        raise MimicError(f"`{argument}` is {shards!r}; expected paths such as 'shards/{{00000000..00000127}}.tar'.")
    found: list[str] = []
    for each in [shards] if isinstance(shards, str) else shards:
        found += _expanded(str(each), MAX_SHARDS - len(found), argument)
    if not found:
        raise MimicError(f"`{argument}` is empty; give paths such as 'shards/{{00000000..00000127}}.tar'.")
    on_store = [url for url in found if is_on_store(url)]
    for url in {urlparse(url).scheme: url for url in on_store}.values():
        check_scheme(url, argument)
    paths = [path for url in found if (path := local_path(url)) is not None]
    folder = next((path for path in paths if path.is_dir()), None)
    if folder is not None:
        raise MimicError(f"`{argument}`: {folder} is a directory; give its shards. It contains {_tars_in(folder)}.")
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        folder = Path(missing[0]).parent
        where = f" {folder} contains {_tars_in(folder)}." if folder.is_dir() else f" {folder} is not a directory."
    else:
        missing, where = missing_on_store(on_store, argument), ""
    if missing:
        raise MimicError(
            hide_secrets(
                f"`{argument}`: {len(missing)} of {len(found)} shards do not exist: {', '.join(missing[:3])}"
                f"{' and more' if len(missing) > 3 else ''}.{where} Ranges are written {{000..127}}; * is not expanded."
            )
        )
    return found


def _expanded(text: str, most: int, argument: str) -> list[str]:
    """Expand the ranges of one entry to at most ``most`` shards."""
    from webdataset.shardlists import envsubst, expand_urls

    try:
        text = envsubst(text)
        # Checked before the expansion, which holds all shards in memory.
        count = _at_most(text)
        found: list[str] = expand_urls(text) if count <= most else []
    except (ValueError, AssertionError) as error:  # an AssertionError means that a variable is not set
        raise MimicError(hide_secrets(f"`{argument}`: {text!r} cannot be expanded: {error}.")) from error
    if count > most:
        raise MimicError(
            hide_secrets(
                f"`{argument}`: {text!r} expands to up to {count:,} shards; at most {MAX_SHARDS:,} are allowed in "
                "total. Check its ranges, or make larger shards."
            )
        )
    return found


def _at_most(text: str) -> int:
    """Return an upper bound on the number of shards: the product of the lengths of all ranges and lists in braces.

    Example:
        >>> _at_most("{a,b}/{000..127}.tar"), _at_most("{0..10..5}.tar")
        (256, 3)
    """
    count = 1
    for inside in re.findall(r"\{([^{}]*)\}", text):
        if match := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", inside):
            first, last, step = (int(each or 1) for each in match.groups())
            count *= abs(last - first) // (step or 1) + 1
        else:
            count *= inside.count(",") + 1
    return count


def shard_name(url: str) -> str:
    """Return the name of a shard without folder and suffix.

    Example:
        >>> shard_name("pool/train.00.tar.gz"), shard_name("pipe:aws s3 cp s3://bucket/00000007.tar -")
        ('train.00', '00000007')
    """
    path = local_path(url)
    names = [path.name] if path is not None else re.findall(r"[^\s'\"=/\\]+\.tar\b", url)
    name = names[-1] if names else url.rpartition("/")[2]
    return name.partition(".tar")[0] or name


def name_in_shards(shard: str, key: str) -> str:
    """Return a name of a pair that is unique among all shards: its key, with the shard's name in front if needed.

    Keys of img2dataset and DataComp begin with the name of the shard; many other tools restart the numbers in every
    shard.

    Example:
        >>> name_in_shards("pool/00000.tar", "000000007"), name_in_shards("pool/train-0.tar", "0007")
        ('000000007', 'train-0/0007')
    """
    name = shard_name(shard)
    return key if key.startswith(name) and key != name else f"{name}/{key}"


class PairSources:
    """Record the pair of each id, to detect an id that names two pairs.

    Up to :data:`MOST` ids are recorded, which take 40 MB. Beyond that, only ids with the lowest hashes are recorded, so
    that ids which repeat in bulk are found in data of any size.

    Args:
        shards: All shards. Pairs named by their keys have the same ids in two shards of the same name.

    Example:
        >>> sources = PairSources(["0.tar", "1.tar"])
        >>> sources.add("a", "0.tar", "7", by_key=False)
        >>> sources.add("a", "1.tar", "7", by_key=False)
        Traceback (most recent call last):
        ...
        lightning_mimic.errors.MimicError: `shards`: the id 'a' names two pairs: 7 in 0.tar and 7 in 1.tar...
    """

    MOST = 2**17

    def __init__(self, shards: Sequence[str]) -> None:
        self._pairs: dict[str, tuple[str, str]] = {}
        self._limit = 2**61  # of hashes
        #: Shards by name.
        self._shards: dict[str, list[str]] = {}
        for shard in dict.fromkeys(shards):
            self._shards.setdefault(shard_name(shard), []).append(shard)
        self._lengths = {len(name) for name in self._shards}

    def add(self, id: str, shard: str, key: str, *, by_key: bool) -> None:
        """Record a pair, which may be added repeatedly.

        Args:
            id: Id of the pair.
            shard: Shard of the pair.
            key: Key of the pair in the shard.
            by_key: Whether the id is made from shard and key, because there is no ``uid``.

        Raises:
            MimicError: The id also names another pair.
        """
        if by_key and (others := self._others(shard, key)):
            raise MimicError(
                hide_secrets(
                    f"`shards`: the pair {key} in {shard} has no `uid`, and its id {id!r}, made from its name, could "
                    f"also be that of a pair in {others[0]}. Give the shards different names of equal length, or add a "
                    "`uid` to the json files."
                )
            )
        if hash(id) & (2**61 - 1) >= self._limit:
            return
        found = self._pairs.setdefault(id, (shard, key))
        if found != (shard, key):
            raise MimicError(
                hide_secrets(
                    f"`shards`: the id {id!r} names two pairs: {found[1]} in {found[0]} and {key} in {shard}. Scores "
                    "and decisions are stored by id. Give each pair a unique `uid` in its json, or leave it out: then "
                    "its id is made from shard and key."
                )
            )
        if len(self._pairs) > self.MOST:
            self._limit //= 2
            self._pairs = {each: pair for each, pair in self._pairs.items() if hash(each) & (2**61 - 1) < self._limit}

    def _others(self, shard: str, key: str) -> list[str]:
        """Return other shards in which a pair could have the same id."""
        name = shard_name(shard)
        # A pair named by its key alone could be in any shard whose name is a prefix of the key.
        begins = [key[:length] for length in self._lengths] if name_in_shards(shard, key) == key else [name]
        return [other for each in begins for other in self._shards.get(each, []) if other != shard]


def _tars_in(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.tar*"))
    return f"{len(names)} of them, {names[0]} to {names[-1]}" if names else "none"


def stated_counts(shards: Sequence[str]) -> dict[str, int]:
    """Return the number of pairs of each shard that ``sizes.json`` or img2dataset's ``NAME_stats.json`` states.

    Raises:
        MimicError: A store does not respond.
    """
    places = {url: url.rpartition("/") for url in shards if is_on_store(url)}
    places |= {url: (str(path.parent), "/", path.name) for url in shards if (path := local_path(url)) is not None}
    sizes = _objects(f"{folder}/sizes.json" for folder, _, _ in places.values())
    counts: dict[str, Any] = {url: sizes[f"{folder}/sizes.json"].get(name) for url, (folder, _, name) in places.items()}
    unknown = {url: places[url] for url, count in counts.items() if count is None}
    beside = {url: f"{folder}/{name.split('.')[0]}_stats.json" for url, (folder, _, name) in unknown.items()}
    stats = _objects(beside.values())
    counts |= {url: stats[name].get("successes") for url, name in beside.items()}
    return {
        url: count
        for url, count in counts.items()
        if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**63
    }


def _objects(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the objects in json files; an empty dict for a file that is missing or contains something else."""
    names = list(dict.fromkeys(names))
    objects: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, content in contents(names).items():
        with contextlib.suppress(ValueError):  # the number of pairs is then unknown, which is not an error
            found = json.loads(content)
            objects[name] = found if isinstance(found, dict) else {}
    return objects


def scanned_ids(shards: Sequence[str]) -> dict[str, list[str]]:
    """Return the ids of the complete pairs in each shard, from tar headers and json files.

    Compressed shards and shards that are not local are left out. The result is empty if the local shards have more than
    :data:`SCANNED_BYTES` in total.

    Raises:
        MimicError: An id names two pairs.
    """
    paths = {url: path for url in shards if (path := local_path(url)) is not None and path.is_file()}
    if sum(path.stat().st_size for path in paths.values()) > SCANNED_BYTES:
        return {}
    sources = PairSources(shards)
    return {url: list(_ids_in(url, sources)) for url, path in paths.items() if not _is_compressed(path)}


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))


def _ids_in(url: str, sources: PairSources) -> Iterator[str]:
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
                description = described(files)
                name = id_of(name_in_shards(url, key), description)
                sources.add(name, url, key, by_key=description.get("uid") is None)
                yield name


class _DamageError(Exception):
    """A shard that is truncated or is not a tar file."""


class _Member(tarfile.TarInfo):
    """Record why reading an archive stopped, because tarfile treats a damaged header like a regular end.

    It also rejects invalid sizes. tarfile trusts them: with a negative size it reads the same header forever, with a
    huge one it looks for the next header far beyond the end, and it reads long names and extended headers of any length
    into memory.
    """

    @classmethod
    def frombuf(cls, *args: Any) -> Any:
        member = super().frombuf(*args)
        if member.type in _HEADER_TYPES and not 0 <= member.size <= _MAX_HEADER_BYTES:
            raise tarfile.InvalidHeaderError(f"a name or header of {member.size} bytes")  # type: ignore[attr-defined]
        return member

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            member = super().fromtarfile(tar)
            if not 0 <= member.size < _MAX_MEMBER_BYTES:
                raise tarfile.InvalidHeaderError(f"a size of {member.size}")  # type: ignore[attr-defined]
            return member
        except tarfile.HeaderError as error:
            tar.ending = error
            raise

    def _proc_gnusparse_10(self, *_: Any) -> None:
        # In a truncated file, tarfile would search forever for the end of the map of blocks.
        raise tarfile.InvalidHeaderError("a sparse file")  # type: ignore[attr-defined]


def _files(url: str, heads: bool = False) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield key, suffix and content of each file in a shard.

    The content is that of captions, images and json files (with ``heads`` of json files only), empty for other files,
    and ``None`` for files above the size limit.

    Raises:
        _DamageError: The shard is truncated or damaged.
    """
    stream: Any = None
    try:
        stream = open_shard(url)
        # The output of the command itself, because webdataset drops its remainder once the command has failed.
        source = getattr(stream, "stream", stream)
        with tarfile.open(fileobj=source, mode="r:" if heads else "r|*", tarinfo=_Member) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]
                key, suffix = _named(member)
                if key is None:
                    continue
                most = MAX_PAIR_BYTES if suffix in IMAGES else _MAX_TEXT_BYTES
                if suffix not in (*IMAGES, "txt", "json"):
                    yield key, suffix, b""
                elif member.size > most:
                    yield key, suffix, None
                elif (content := tar.extractfile(member)) is not None:
                    yield key, suffix, content.read() if suffix == "json" or not heads else b""
            _check_ending(tar)
    except GeneratorExit:
        with contextlib.suppress(AttributeError):
            stream.proc.kill()  # the output is no longer needed; closing would wait for the command
        raise
    except Exception as error:  # of tarfile, a decompressor, the operating system or the command
        raise _DamageError(f"{error}{_status(stream)}") from error
    finally:
        with contextlib.suppress(Exception):
            stream.close()


def _check_ending(tar: Any) -> None:
    ending = getattr(tar, "ending", None)
    if isinstance(ending, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
        raise _DamageError("it is truncated between two files")
    if isinstance(ending, tarfile.TruncatedHeaderError):  # type: ignore[attr-defined]
        raise _DamageError("it is truncated inside a header")
    if not isinstance(ending, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
        raise _DamageError(f"a damaged header ({ending})")
    while block := tar.fileobj.read(2**20):
        if block.strip(b"\0"):
            raise _DamageError("data follow after the end mark")


def _status(stream: Any) -> str:
    """Return the error of a command as a phrase, empty if it succeeded."""
    try:
        if stream is not None:
            stream.close()
    except Exception as error:
        return f"; {error}"
    return ""


def _named(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """Return key and suffix of a file, split like in webdataset: at the first dot after the last slash."""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    if not member.isreg() or not stem or not dot or (stem.startswith("__") and not folder):
        return None, ""
    return f"{folder}{slash}{stem}", suffix.lower()


def read_shard(
    url: str, reject: Callable[..., None], expected: int | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the pairs of a shard, each with all of its files, and pass faults to ``reject``.

    Args:
        url: Shard from :func:`list_shards`.
        reject: Function that records skipped pairs and faults of the shard.
        expected: Expected number of pairs; ``None`` if unknown.

    Yields:
        Key, and contents by suffix.
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
    """Collect consecutive files of the same key into pairs."""

    def __init__(self, url: str, reject: Callable[..., None]) -> None:
        self.keys: set[str] = set()
        self._url = url
        self._reject = reject
        self._key: str | None = None
        self._files: dict[str, bytes] = {}
        self._bytes = 0
        self._fault: Reason | None = None
        # Pairs without a json wait until it is known whether the pairs of this shard have one; they may be incomplete.
        self._has_json: bool | None = None
        self._waiting: list[tuple[str, dict[str, bytes]]] = []
        self._ready: deque[tuple[str, dict[str, bytes]]] = deque()

    def add(self, key: str, suffix: str, content: bytes | None) -> None:
        if key != self._key:
            self._finish()
            self._key, self._files, self._bytes = key, {}, 0
            self._fault = Reason.SPLIT_KEY if key in self.keys else None
            self.keys.add(key)
        if suffix in self._files:
            self._fault = self._fault or Reason.DUPLICATE_FILE
        self._files[suffix] = content or b""
        self._bytes += MAX_PAIR_BYTES + 1 if content is None else len(content)
        if self._bytes > MAX_PAIR_BYTES:
            self._fault = Reason.TOO_BIG
            self._files = dict.fromkeys(self._files, b"")

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
        group = (self._key, self._files)
        if self._fault is not None:
            self._reject(self._url, self._fault, shown(self._files), key=self._key)
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
        elif self._has_json is None and (
            len(self._waiting) >= _NO_JSON_AFTER or sum(map(_size, self._waiting)) > MAX_PAIR_BYTES
        ):
            self._has_json = False
            self._ready.extend(self._waiting)
            self._waiting = []


def _size(group: tuple[str, dict[str, bytes]]) -> int:
    return sum(map(len, group[1].values()))
