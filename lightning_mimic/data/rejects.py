"""The pairs that could not train, and why: one Parquet part per worker, read back without repeats."""

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
    """Why a pair was skipped, or (with no key) what became of a whole shard."""

    NO_CAPTION = "no caption"
    EMPTY_CAPTION = "empty caption"
    CAPTION_NOT_UTF8 = "caption not UTF-8"
    NO_IMAGE = "no image"
    UNDECODABLE_IMAGE = "undecodable image"
    TOO_MANY_PIXELS = "image above the pixel cap"
    #: Its id would be another one, so the pair is not taken by its key instead.
    UNREADABLE_JSON = "json unreadable"
    UNUSABLE_ID = "uid is no id"
    #: With ``verify``.
    CHANGED_IMAGE = "image differs from its sha256"
    #: More bytes than are kept in memory for one pair.
    TOO_BIG = "files above the size cap"
    #: Other pairs of the shard have one; this is half a pair, or one whose id is lost.
    NO_JSON = "no json"
    DUPLICATE_FILE = "duplicate file in the shard"
    SPLIT_KEY = "files of one key lie apart in the shard"
    UNKNOWN_ID = "unknown to the manifest"
    CUT_OFF = "cut off with its shard"
    SHARD_ENDS_EARLY = "shard ends early"
    SHARD_UNREADABLE = "shard unreadable"
    SHARD_HAS_MORE = "shard has more than its count says"
    #: No faults, the pairs are taken. A note of a pair, and one of a shard, which counts its pairs as ``found``.
    TRANSPARENT = "transparency dropped"
    NOT_VERIFIED = "not compared with a sha256"


#: Reasons of pairs that are taken.
_NOTES = (Reason.TRANSPARENT, Reason.NOT_VERIFIED)


_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),  # null: of the whole shard
        ("id", pa.string()),  # null where it is not known
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("expected", pa.int64()),  # pairs, for shards
        ("found", pa.int64()),
    ]
)


class RejectWriter:
    """Writes what one worker rejects in one epoch; a context that commits the rest when it is left.

    A part gets its final name only when it is complete, and never that of another one.

    Args:
        directory: Of the parts; it is there.
        name: Of the run, epoch, rank and worker.
        every: Rows in memory at most, which a crash would lose.
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
        """Adds a row."""
        shard, detail = hide_secrets(shard), hide_secrets(detail)
        words = (_writable(each) for each in (shard, key, id, reason.value, detail))
        self._rows.append((*words, expected, found))
        if len(self._rows) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Commits what is in memory; what cannot be written stays there for the next time, with a warning."""
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
            self._every *= 2  # not at every row from here on
            warnings.warn(f"{len(self._rows)} rejects could not be written to {path.parent}: {error}", stacklevel=2)
            return
        self._rows.clear()


class Rejects:
    """All rejects in a directory; a pair that was skipped for one reason in several epochs is one row.

    Args:
        directory: As given to ``ImageTextDataModule(rejects=...)``.
        run: Only those of this run; of all, if left out.

    Raises:
        MimicError: A part cannot be read.

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
                raise MimicError(f"{path} is no list of rejects: {str(error).splitlines()[0]}") from error
        rows = pa.concat_tables(tables).group_by(["shard", "key", "id", "reason"], use_threads=False)
        table = rows.aggregate([("detail", "min"), ("expected", "max"), ("found", "max")])
        names = {"detail_min": "detail", "expected_max": "expected", "found_max": "found"}
        table = table.rename_columns([names.get(name, name) for name in table.column_names])
        order = [(name, "ascending") for name in ("shard", "key", "reason")]
        #: Columns shard, key, id, reason, detail, expected, found, in the order of shard and key.
        self.table: pa.Table = table.select(_SCHEMA.names).sort_by(order)

    @property
    def counts(self) -> pa.Table:
        """Rows by reason and shard: columns shard, reason, count."""
        counted = self.table.group_by(["shard", "reason"], use_threads=False).aggregate([([], "count_all")])
        order = [("shard", "ascending"), ("reason", "ascending")]
        return counted.rename_columns(["shard", "reason", "count"]).sort_by(order)

    @property
    def pairs(self) -> dict[str, int]:
        """Skipped pairs by reason, the most frequent first."""
        return self._by_reason(of_shards=False)

    @property
    def notes(self) -> dict[str, int]:
        """Pairs that were taken, by what was noted of them."""
        found = dict.fromkeys(_NOTES, 0)
        for row in self.table.select(["reason", "found"]).to_pylist():
            if row["reason"] in found:
                found[Reason(row["reason"])] += 1 if row["found"] is None else row["found"]
        return {reason.value: count for reason, count in found.items() if count}

    @property
    def shards(self) -> dict[str, int]:
        """Damaged shards by what befell them."""
        return self._by_reason(of_shards=True)

    def _by_reason(self, of_shards: bool) -> dict[str, int]:
        found: dict[str, int] = {}
        for row in self.table.select(["key", "reason"]).to_pylist():
            if (row["key"] is None) != of_shards or row["reason"] in _NOTES:
                continue
            found[row["reason"]] = found.get(row["reason"], 0) + 1
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def summary(rejects: Rejects) -> str:
    """What was rejected, in a sentence; empty, if nothing was.

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
        Reason.SHARD_HAS_MORE: "had more pairs than their counts say",
    }
    for reason, words in phrases.items():
        if count := shards.get(reason):
            parts.append(f"{count} {'shard' if count == 1 else 'shards'} {words}")
    phrases = {
        Reason.TRANSPARENT: "had transparency, which was dropped, so that it shows the colour stored below it",
        Reason.NOT_VERIFIED: "could not be compared with a sha256",
    }
    for reason, words in phrases.items():
        if count := rejects.notes.get(reason):
            parts.append(f"{count} {'image' if count == 1 else 'images'} {words}")
    return "; ".join(parts)


def examples(rejects: Rejects, most: int = 3) -> str:
    """Return the first rejects, as a phrase; empty, if nothing was rejected.

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
    """Names in a tar need not be UTF-8, a column of strings must be."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
