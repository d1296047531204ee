"""Lists of rejected image-text pairs with reasons: one Parquet file per worker, read back without repeats."""

import enum
import uuid
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mimic.errors import MimicError
from lightning_mimic.files import atomic_write, fetched
from lightning_mimic.stores import hide_secrets, path_of


class Reason(enum.StrEnum):
    """Reason for skipping a pair or, in rows without a key, fault of a whole shard."""

    NO_CAPTION = "no caption"
    EMPTY_CAPTION = "empty caption"
    CAPTION_NOT_UTF8 = "caption not UTF-8"
    NO_IMAGE = "no image"
    UNDECODABLE_IMAGE = "undecodable image"
    TOO_MANY_PIXELS = "image above the pixel cap"
    #: The pair is skipped, because its key would be another id than its ``uid``.
    UNREADABLE_JSON = "json unreadable"
    UNUSABLE_ID = "uid is no id"
    #: With ``verify``.
    CHANGED_IMAGE = "image differs from its sha256"
    #: The files have more bytes than are kept in memory for one pair.
    TOO_BIG = "files above the size cap"
    #: Other pairs of the shard have a json, so that this pair is incomplete, or its id is missing.
    NO_JSON = "no json"
    DUPLICATE_FILE = "duplicate file in the shard"
    SPLIT_KEY = "files of one key lie apart in the shard"
    UNKNOWN_ID = "unknown to the manifest"
    CUT_OFF = "cut off with its shard"
    SHARD_ENDS_EARLY = "shard ends early"
    SHARD_UNREADABLE = "shard unreadable"
    SHARD_HAS_MORE = "shard has more than its count says"
    #: Notes on pairs that are accepted: one row per pair, and one row per shard with the number of pairs in ``found``.
    TRANSPARENT = "transparency dropped"
    NOT_VERIFIED = "not compared with a sha256"


#: Notes on pairs that are accepted.
_NOTES = (Reason.TRANSPARENT, Reason.NOT_VERIFIED)


_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),  # null in rows on a whole shard
        ("id", pa.string()),  # null if unknown
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("expected", pa.int64()),  # number of pairs, in rows on a shard
        ("found", pa.int64()),
    ]
)


class RejectWriter:
    """Write the rejects of one worker in one epoch; leaving the context writes the remaining rows.

    A file gets its final, unique name when it is complete.

    Args:
        directory: Existing directory for the files.
        name: Name of run, epoch, rank and worker.
        every: Maximum number of rows in memory, which a crash would lose.
    """

    def __init__(self, directory: str | Path, name: str, every: int = 1000) -> None:
        self._directory = path_of(directory, "directory")
        self._name = name
        self._every = every
        self._rows: list[tuple[str | int | None, ...]] = []

    def __enter__(self) -> "RejectWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def __call__(
        self,
        shard: str,
        reason: Reason,
        detail: str = "",
        *,
        key: str | None = None,
        id: str | None = None,
        expected: int | None = None,
        found: int | None = None,
    ) -> None:
        """Add a row."""
        shard, detail = hide_secrets(shard), hide_secrets(detail)
        words = (_writable(each) for each in (shard, key, id, reason.value, detail))
        self._rows.append((*words, expected, found))
        if len(self._rows) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory; if that fails, warn and keep them for the next attempt."""
        if not self._rows:
            return
        path = self._directory / f"rejects-{self._name}-{uuid.uuid4().hex[:8]}.parquet"
        columns = [list(column) for column in zip(*self._rows, strict=True)]
        try:
            with atomic_write(path) as file:
                table = pa.Table.from_arrays(
                    [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
                )
                pq.write_table(table, file, compression="zstd", write_page_checksum=True, write_statistics=False)
        except OSError as error:
            self._every *= 2  # avoids an attempt for each further row
            warnings.warn(f"{len(self._rows)} rejects could not be written to {path.parent}: {error}", stacklevel=2)
            return
        self._rows.clear()


class Rejects:
    """Read all rejects in a directory; a pair that was skipped for one reason in several epochs is one row.

    Args:
        directory: Directory given to ``ImageTextDataModule(rejects=...)``.
        run: Name of the run whose rejects are read; ``None``: all runs.

    Raises:
        MimicError: A file cannot be read.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> with RejectWriter(directory, "run-e0-r0-w0") as reject:
        ...     reject("0.tar", Reason.NO_IMAGE, key="7", id="a")
        ...     reject("0.tar", Reason.SHARD_ENDS_EARLY, "cut inside a file", expected=10, found=8)
        >>> rejects = Rejects(directory)
        >>> rejects.pairs, rejects.shards
        ({'no image': 1}, {'shard ends early': 1})
        >>> rejects.counts.to_pylist()[0]
        {'shard': '0.tar', 'reason': 'no image', 'count': 1}
    """

    def __init__(self, directory: str | Path, run: str | None = None) -> None:
        parts = sorted(path_of(directory, "directory").glob(f"rejects-{run or ''}*.parquet"))
        tables = [_SCHEMA.empty_table()]
        for path in parts:
            try:
                with fetched(path) as content, pq.ParquetFile(content, page_checksum_verification=True) as file:
                    tables.append(file.read().select(_SCHEMA.names).cast(_SCHEMA))
            except (OSError, ValueError, KeyError) as error:
                raise MimicError(f"{path} is not a list of rejects: {str(error).splitlines()[0]}") from error
        rows = pa.concat_tables(tables).group_by(["shard", "key", "id", "reason"], use_threads=False)
        table = rows.aggregate([("detail", "min"), ("expected", "max"), ("found", "max")])
        names = {"detail_min": "detail", "expected_max": "expected", "found_max": "found"}
        table = table.rename_columns([names.get(name, name) for name in table.column_names])
        order = [(name, "ascending") for name in ("shard", "key", "reason")]
        #: Columns shard, key, id, reason, detail, expected, found, in the order of shard and key.
        self.table: pa.Table = table.select(_SCHEMA.names).sort_by(order)

    @property
    def counts(self) -> pa.Table:
        """Numbers of rows by shard and reason, with columns shard, reason, count."""
        counted = self.table.group_by(["shard", "reason"], use_threads=False).aggregate([([], "count_all")])
        order = [("shard", "ascending"), ("reason", "ascending")]
        return counted.rename_columns(["shard", "reason", "count"]).sort_by(order)

    @property
    def pairs(self) -> dict[str, int]:
        """Numbers of skipped pairs by reason, the most frequent first."""
        return self._by_reason(of_shards=False)

    @property
    def notes(self) -> dict[str, int]:
        """Numbers of accepted pairs by note."""
        found = dict.fromkeys(_NOTES, 0)
        for row in self.table.select(["reason", "found"]).to_pylist():
            if row["reason"] in found:
                found[Reason(row["reason"])] += 1 if row["found"] is None else row["found"]
        return {reason.value: count for reason, count in found.items() if count}

    @property
    def shards(self) -> dict[str, int]:
        """Numbers of damaged shards by fault, the most frequent first."""
        return self._by_reason(of_shards=True)

    def _by_reason(self, of_shards: bool) -> dict[str, int]:
        found: dict[str, int] = {}
        for row in self.table.select(["key", "reason"]).to_pylist():
            if (row["key"] is None) != of_shards or row["reason"] in _NOTES:
                continue
            found[row["reason"]] = found.get(row["reason"], 0) + 1
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def summary(rejects: Rejects) -> str:
    """Return a summary of the rejects as a sentence, empty if there are none.

    Example:
        >>> import tempfile
        >>> summary(Rejects(tempfile.mkdtemp()))
        ''
    """
    parts = []
    pairs, shards = rejects.pairs, rejects.shards
    if pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in pairs.items())
        total = sum(pairs.values())
        parts.append(f"{total} image-text {'pair was' if total == 1 else 'pairs were'} skipped ({reasons})")
    phrases = {
        Reason.SHARD_ENDS_EARLY: "ended early",
        Reason.SHARD_UNREADABLE: "could not be read",
        Reason.SHARD_HAS_MORE: "had more pairs than expected",
    }
    for reason, words in phrases.items():
        if count := shards.get(reason):
            parts.append(f"{count} {'shard' if count == 1 else 'shards'} {words}")
    phrases = {
        Reason.TRANSPARENT: "had transparency, which was dropped in favour of the stored colour",
        Reason.NOT_VERIFIED: "could not be compared with a sha256",
    }
    for reason, words in phrases.items():
        if count := rejects.notes.get(reason):
            parts.append(f"{count} {'image' if count == 1 else 'images'} {words}")
    return "; ".join(parts)


def examples(rejects: Rejects, most: int = 3) -> str:
    """Return the first rejects as a phrase, empty if there are none.

    Example:
        >>> import tempfile
        >>> examples(Rejects(tempfile.mkdtemp()))
        ''
    """
    rows = rejects.table.slice(0, most).to_pylist()
    shown = [
        f"{'' if row['key'] is None else row['key'] + ' in '}{row['shard']}: {row['reason']}"
        f"{', ' + row['detail'] if row['detail'] else ''}"
        for row in rows
    ]
    return f" ({'; '.join(shown)})" if shown else ""


def _writable(text: str | None) -> str | None:
    """Return text as UTF-8 for a column of strings; names in a tar may have another encoding."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
