"""Reading a ledger: intact parts only, rows of all ranks, each sample once per epoch."""

import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_mimic.errors import LedgerError
from lightning_mimic.files import TemporaryFolder, copied, fetched
from lightning_mimic.ledger.columns import FIRST_COLUMNS, nullable_columns, schema, summarised_columns
from lightning_mimic.ledger.completeness import listed, missing_rows, rows_in_doubt
from lightning_mimic.ledger.description import (
    META_FILE,
    batch_differences,
    class_names_in,
    differences,
    meaning,
    meta_path,
    read_meta,
)
from lightning_mimic.ledger.ids import unified
from lightning_mimic.ledger.writer import PART_NAME
from lightning_mimic.stores import as_store_path, path_of


class Ledger:
    """The recorded scores of one run.

    Args:
        directory: Directory of the ledger, as given to the callback.

    Raises:
        LedgerError: The directory holds no ledger.

    Example:
        >>> Ledger("nowhere")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.LedgerError: nowhere holds no ledger (no _meta.json in it).
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = path_of(directory, "ledger")
        meta = read_meta(self.directory)
        if meta is None:
            raise LedgerError(
                f"{self.directory} holds no ledger (no {META_FILE} in it).{_of_other_ranks(self.directory)}"
            )
        #: Description of the ledger: the run, and the configuration and first step of each attempt.
        self.meta: dict[str, Any] = meta
        self._copies: TemporaryFolder | None = None

    def _repr_html_(self) -> str:
        rows = {
            "ledger": self.directory.name,
            "run": self.meta["run"],
            "attempts": len(self.meta["attempts"]),
            "parts": sum(1 for _ in self.directory.glob("*.parquet")),
        }
        last = self.meta["attempts"][-1]
        rows |= {name: last["config"][name] for name in ("scorer", "weighting", "reweight") if name in last["config"]}
        rows |= {"score kind": last.get("score_kind"), "verdict": (last.get("diagnosis") or {}).get("verdict")}
        cells = (f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in rows.items() if v is not None)
        return f"<table>{''.join(cells)}</table>"

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Class names, indexed by ``label`` and ``predicted``; ``None`` if none were recorded."""
        return class_names_in(self.meta)

    def parts(
        self,
        columns: Sequence[str] | None = None,
        *,
        allow_partial: bool = False,
        advance: Callable[[int, int], None] | None = None,
    ) -> "Parts":
        """Return the intact files, after one complete reading that finds damaged pages.

        Files on an object store are copied to the local disk first, by one request each.

        Args:
            columns: Names of the columns whose pages are checked; ``None`` for all.
            allow_partial: Whether to read the intact rest if parts are damaged or rows are missing, instead of raising.
            advance: Function that is called with the number of checked parts and the number of all parts.

        Raises:
            LedgerError: There are no rows, parts are damaged, rows are missing, ids have two types, or the attempts
                differ in their configuration, so that their scores would not be comparable.

        Warns:
            UserWarning: The last attempt has not ended, so that its last rows may be missing; the first rows are in
                another directory; or the attempts differ in batch size, which affects weights but not scores.
        """
        return self.joined([self.checked(columns, advance=advance)], allow_partial=allow_partial)

    def checked(
        self,
        columns: Sequence[str] | None = None,
        share: int = 0,
        shares: int = 1,
        *,
        advance: Callable[[int, int], None] | None = None,
    ) -> "CheckedParts":
        """Check a share of the files by reading them completely, so that several processes can check one ledger.

        Args:
            columns: As for :meth:`parts`.
            share: Index of the share, from 0. The files are sorted by name and divided into consecutive shares.
            shares: Number of shares.
            advance: As for :meth:`parts`.

        Raises:
            LedgerError: There are parts of another run, or of attempts that are not in the description.
        """
        named = self._named()
        first, last = (len(named) * k // shares for k in (share, share + 1))
        whole, damaged = self._checked(self._on_disk(named[first:last]), columns, advance)
        return CheckedParts(tuple(path.name for path, _ in named), tuple(whole), tuple(damaged))

    def names(self) -> tuple[str, ...]:
        """Return the sorted names of all files, intact or not.

        Raises:
            LedgerError: There are parts of another run, or of attempts that are not in the description.
        """
        return tuple(path.name for path, _ in self._named())

    def joined(self, checked: Sequence["CheckedParts"], *, allow_partial: bool = False) -> "Parts":
        """Return the intact files of all shares.

        Args:
            checked: Results of :meth:`checked`, one for every share.
            allow_partial: As for :meth:`parts`.

        Raises:
            LedgerError: As for :meth:`parts`.
        """
        names = checked[0].names
        found = [match for match in map(PART_NAME.fullmatch, names) if match]
        written = [(int(match[2]), int(match[3]), int(match[4]), int(match[5])) for match in found]
        until, continued = self._lineage({attempt for attempt, *_ in written})
        whole = [part for share in checked for part in share.whole]
        damaged = [each for share in checked for each in share.damaged]
        attempts, ends = self.meta["attempts"], _ends(whole, until)
        missing = missing_rows(attempts, written, ends, continued)
        in_doubt = rows_in_doubt(attempts, ends)
        if (damaged or missing) and not allow_partial:
            faults = [f"{len(damaged)} of {len(names)} parts are damaged: {listed(damaged)}"] if damaged else []
            faults += [f"rows are missing: {listed(missing)}"] if missing else []
            absent = _absent_ranks(attempts, written)
            raise LedgerError(
                f"{self.directory}: {'; and '.join(faults)}. `allow_partial=True` reads the rest.{absent}"
            )
        if not whole:
            raise LedgerError(f"{self.directory} holds no rows.")
        if in_doubt and not allow_partial:
            warnings.warn(f"{self.directory}: {'; '.join(in_doubt)}.", stacklevel=3)
        left = self._left(whole, until)
        return self._parts(whole, until, left, (*missing, *damaged, *in_doubt))

    def share_parts(self, checked: "CheckedParts") -> "Parts | None":
        """Return the intact files of one share, without looking at other shares; ``None`` if there are none.

        Raises:
            LedgerError: The ids have two types.
        """
        until, _ = self._lineage({int(match[2]) for match in map(PART_NAME.fullmatch, checked.names) if match})
        parts = self._parts(checked.whole, until, (), ())
        return parts if parts.paths else None

    def _parts(
        self,
        whole: Sequence["CheckedPart"],
        until: Mapping[int, float],
        attempts: tuple[int, ...],
        lost: tuple[str, ...],
    ) -> "Parts":
        held = [part for part in whole if part.first_step < until[part.attempt]]
        return Parts(
            paths=tuple(part.path for part in held),
            id_type=self._id_type(held),
            until={number: int(step) for number, step in until.items() if step < math.inf},
            columns=tuple(each for each in schema(pa.string()).names if any(each in part.columns for part in held)),
            uniform=len({(part.names, part.id_type) for part in held}) == 1,
            recorded=frozenset().union(*(part.recorded for part in held)),
            attempts=attempts,
            lost=lost,
            copies=self._copies,
        )

    def behind(self, attempt: int, scored: tuple[int, int, int]) -> dict[int, str]:
        """Describe, by rank, where recorded rows end before the point at which a checkpoint was saved.

        Args:
            attempt: Number of the attempt that saved the checkpoint.
            scored: Epoch, step and batch of the last micro-batch that was scored before.

        Raises:
            LedgerError: The attempt is not in the ledger.
        """
        attempts = self.meta["attempts"]
        if attempt >= len(attempts):
            raise LedgerError(
                f"`ledger`: {self.directory} knows {len(attempts)} attempts of run {self.meta['run']}, and the "
                f"checkpoint is of attempt {attempt}: this is an older copy of its ledger. Give the one that the run "
                "wrote, or another directory."
            )
        found = {}
        for rank in range(attempts[attempt].get("ranks", 1)):
            ends = (_last_batch(path) for path in reversed(self.parts_without_gap(attempt, rank)))
            end = next((each for each in ends if each is not None), None)
            if end is None:
                found[rank] = f"rank {rank} has none"
            elif end < scored:
                found[rank] = f"those of rank {rank} end in step {end[1]} (epoch {end[0]}, batch {end[2]})"
        return found

    def parts_without_gap(self, attempt: int, rank: int) -> list[Path]:
        """Return the paths of a rank's parts in one attempt, in their order, up to the first that is missing."""
        places = ((path, tuple(map(int, match.group(2, 3, 4)))) for path, match in self._named())
        parts = {number: path for path, (*place, number) in places if place == [attempt, rank]}
        return [parts[number] for number in itertools.takewhile(parts.__contains__, itertools.count())]

    def _named(self) -> list[tuple[Path, re.Match[str]]]:
        """The parts by their names, all of this run and of attempts that its description knows."""
        paths = sorted(self.directory.glob("*.parquet"))
        named = [(path, match) for path in paths if (match := PART_NAME.fullmatch(path.name))]
        described = meta_path(self.directory).name
        foreign = sorted(path.name for path, match in named if match[1] != self.meta["run"])
        if foreign:
            raise LedgerError(f"{self.directory}: {foreign[0]} is of another run than its {described} describes.")
        latest = max((int(match[2]) for _, match in named), default=0)
        if latest >= len(self.meta["attempts"]):
            raise LedgerError(f"{self.directory}: parts of attempt {latest}, which its {described} does not know.")
        return named

    def _on_disk(self, named: Sequence[tuple[Path, re.Match[str]]]) -> Sequence[tuple[Path, re.Match[str]]]:
        """The parts, those on a store with a copy on the disk."""
        if as_store_path(self.directory) is None:
            return named
        try:
            folder = self._copies = self._copies or TemporaryFolder("lightning-mimic-ledger-")
            with ThreadPoolExecutor(_STORE_READERS) as pool:
                paths = list(pool.map(lambda each: copied(each[0], folder.path / each[0].name), named))
        except OSError as error:
            raise LedgerError(f"{self.directory} cannot be read: {error}.") from error
        return [(path, match) for path, (_, match) in zip(paths, named, strict=True)]

    def _checked(
        self,
        named: Sequence[tuple[Path, re.Match[str]]],
        columns: Sequence[str] | None,
        advance: Callable[[int, int], None] | None,
    ) -> tuple[list["CheckedPart"], list[str]]:
        """Return the intact parts, and descriptions of the damaged ones."""
        whole, damaged = list[CheckedPart](), list[str]()
        with ThreadPoolExecutor(_READERS) as pool:
            looks = []
            for path, match in named:
                declared = self.meta["attempts"][int(match[2])].get("columns")
                place = int(match[2]), int(match[3])
                looks.append(pool.submit(_look, path, place, int(match[5]), columns, declared))
            for done, ((path, match), look) in enumerate(zip(named, looks, strict=True), start=1):
                try:
                    whole.append(look.result())
                except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                    damaged.append(f"{path.name} ({match[5]} rows: {str(error).splitlines()[0]})")
                if advance is not None:
                    advance(done, len(named))
        return whole, damaged

    def _lineage(self, written: set[int]) -> tuple[dict[int, float], dict[int, int]]:
        """Find which steps of each attempt belong to the run that the last attempt with rows has continued.

        Args:
            written: Numbers of the attempts that have rows.

        Returns:
            By attempt, the first step whose rows are superseded (0 if all are), and the last step on which a later
            attempt relies.
        """
        attempts, until, continued = self.meta["attempts"], dict.fromkeys(sorted(written), 0.0), dict[int, int]()
        number, end, known = max(written, default=None), math.inf, False
        while number is not None:
            facts = attempts[number]
            if number in written or known:
                until[number] = end
                end = min(end, facts["start_step"])
            # Earlier releases did not record which attempt is continued.
            known = "continues" in facts
            before = facts.get("continues", number - 1 if number else None)
            if known and before is not None and "scored" in facts:
                continued[before] = int(min(facts["scored"][1], end - 1))
            number = before
        return until, {number: step for number, step in continued.items() if step >= 0}

    def _left(self, whole: Sequence["CheckedPart"], until: Mapping[int, float]) -> tuple[int, ...]:
        """Return the attempts with intact rows, after checking that their scores are comparable."""
        left = sorted({part.attempt for part in whole if part.first_step < until[part.attempt]})
        if not left:
            raise LedgerError(f"{self.directory} holds no rows that were not superseded by a later attempt.")
        attempts = [self.meta["attempts"][number] for number in left]
        differing = differences([meaning(attempt["config"]) for attempt in attempts])
        if differing:
            raise LedgerError(
                f"{self.directory}: its attempts differ in {differing}, so their scores are not comparable. Record a "
                "run with other settings in a directory of its own."
            )
        differing = batch_differences(attempts)
        if differing:
            warnings.warn(
                f"{self.directory}: its attempts differ in {differing}. Their scores are comparable, their weights are "
                "not.",
                stacklevel=4,
            )
        return tuple(left)

    def _id_type(self, whole: Sequence["CheckedPart"]) -> pa.DataType:
        """Return the type that can hold the ids of all parts."""
        kind = unified(part.id_type for part in whole) if whole else pa.int64()
        if kind is None:
            raise LedgerError(f"{self.directory} mixes int and str ids: its ranks used different kinds of ids.")
        for part in whole if kind == pa.uint64() else ():
            if part.id_type == pa.int64():
                with fetched(part.path) as content:
                    lowest = pc.min(pq.read_table(content, columns=["id"], partitioning=None)["id"]).as_py()
                if lowest < 0:
                    raise LedgerError(
                        f"{self.directory}: {part.path.name} has the id {lowest}, and other parts have unsigned 64-bit "
                        "ids; no integer type holds both."
                    )
        return kind

    def table(self, *, deduplicate: bool = True, allow_partial: bool = False) -> pa.Table:
        """Read all intact rows into memory, in order of epoch, step, batch, rank and position.

        Rows that a later attempt has superseded are left out. The columns are those of
        :data:`~lightning_mimic.ledger.COLUMNS`: columns that a part lacks are null, unknown ones are left out.

        Args:
            deduplicate: Whether to keep only the first row of a sample in each epoch. Rows repeat where a distributed
                sampler makes ranks even, where samples are drawn with replacement, and where a run was resumed within
                an epoch.
            allow_partial: Whether to read the intact rest if parts are damaged or rows are missing, instead of raising.

        Raises:
            LedgerError: As for :meth:`parts`.
        """
        parts = self.parts(allow_partial=allow_partial)
        form = schema(parts.id_type)
        table = pa.concat_tables(_rows(path, form) for path in parts.paths)
        for number, step in parts.until.items():
            superseded = pc.and_(pc.equal(table["attempt"], number), pc.greater_equal(table["step"], step))
            table = table.filter(pc.invert(superseded))
        order = ["epoch", "step", "batch", "rank", "position"]
        table = table.sort_by([(name, "ascending") for name in order])
        return _first_per_epoch(table) if deduplicate else table


@dataclass(frozen=True)
class Parts:
    """The intact files of a ledger, and which of their rows are valid.

    Attributes:
        paths: Paths of the files.
        id_type: ``int64``, ``uint64`` or ``string``.
        until: By attempt, the first step whose rows a later attempt has superseded.
        columns: Names of the known columns that at least one file has.
        uniform: Whether all files have the same columns, known or not.
        recorded: Names of the checked nullable columns that have a value in at least one row.
        attempts: Numbers of the attempts with valid rows.
        lost: Descriptions of damaged, missing or doubtful parts, with their numbers of rows where these are known.
        copies: Folder of local copies of files on a store; it is removed together with this object.
    """

    paths: tuple[Path, ...]
    id_type: pa.DataType
    until: Mapping[int, int]
    columns: tuple[str, ...]
    uniform: bool
    recorded: frozenset[str]
    attempts: tuple[int, ...]
    lost: tuple[str, ...]
    copies: TemporaryFolder | None = None

    @property
    def has_classes(self) -> bool:
        """Whether any row has a ``label`` or a ``predicted`` class."""
        return not self.recorded.isdisjoint(("label", "predicted"))


#: Threads help because reading waits for the disk and checksums are computed without the interpreter lock.
_READERS = 2
#: Concurrent requests to an object store.
_STORE_READERS = 16


@dataclass(frozen=True)
class CheckedPart:
    """A file that was read completely and is intact.

    Attributes:
        path: Path of the file.
        attempt: Number of the attempt that wrote it.
        rank: Process that wrote it.
        id_type: Type of its ids.
        first_step: Lowest step.
        last_step: Highest step.
        names: Names of all its columns.
        columns: Names of its known columns.
        recorded: As in :class:`Parts`.
    """

    path: Path
    attempt: int
    rank: int
    id_type: pa.DataType
    first_step: float
    last_step: float
    names: frozenset[str]
    columns: frozenset[str]
    recorded: frozenset[str]


@dataclass(frozen=True)
class CheckedParts:
    """A share of a ledger's files, read completely.

    Attributes:
        names: Names of all files of the ledger, including those of other shares.
        whole: Intact files of the share.
        damaged: Descriptions of the damaged files of the share.
    """

    names: tuple[str, ...]
    whole: tuple[CheckedPart, ...]
    damaged: tuple[str, ...]


def _of_other_ranks(directory: Path) -> str:
    """Return a hint for a folder with parts but no description, as on hosts without a shared folder."""
    matches = [match for path in directory.glob("*.parquet") if (match := PART_NAME.fullmatch(path.name))]
    if not matches:
        return ""
    ranks, runs = sorted({int(match[3]) for match in matches}), sorted({match[1] for match in matches})
    return (
        f" It holds parts of {_named_ranks(ranks)} of run {', '.join(runs)}, whose description the first rank wrote. "
        "Where hosts share no folder, copy the files of each host's folder into one."
    )


def _absent_ranks(attempts: Sequence[Mapping[str, Any]], written: Sequence[tuple[int, int, int, int]]) -> str:
    """Return a hint if ranks with rows have no parts here, as on a host that does not share their folder."""
    there = {(attempt, rank) for attempt, rank, _, _ in written}
    absent = {
        rank
        for attempt in {attempt for attempt, _ in there}
        for rank in range(attempts[attempt].get("ranks", 0))
        if (attempt, rank) not in there and attempts[attempt].get("rows", {rank: 1})[rank]
    }
    if not absent:
        return ""
    return (
        f" No part of {_named_ranks(sorted(absent))} is here: where hosts share no folder, copy the files of each "
        "host's folder into this one."
    )


def _named_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(list(map(str, ranks)))}"


def _look(
    path: Path, place: tuple[int, int], rows: int, asked: Sequence[str] | None, declared: Sequence[str] | None
) -> CheckedPart:
    """Read a part completely and verify the checksum of every page, without keeping the content."""
    with (
        fetched(path) as content,
        pq.ParquetFile(content, page_checksum_verification=True, pre_buffer=False) as file,
    ):
        form = file.schema_arrow
        known = _known_columns(form, declared)
        if file.metadata.num_rows != rows:
            raise ValueError(f"holds {file.metadata.num_rows} rows")
        needed = {"step", *(each.name for each in summarised_columns()), *(known if asked is None else asked)}
        wanted = [name for name in known if name in needed]
        read, first_step, last_step, recorded = 0, math.inf, -math.inf, set[str]()
        for batch in file.iter_batches(batch_size=1 << 16, columns=wanted, use_threads=False):
            read += batch.num_rows
            first_step = min(first_step, pc.min(batch["step"]).as_py())
            last_step = max(last_step, pc.max(batch["step"]).as_py())
            recorded |= {name for name in wanted if batch[name].null_count < batch.num_rows}
    if read != rows:
        raise ValueError(f"holds {read} rows")
    found = frozenset(recorded).intersection(nullable_columns())
    names = frozenset(form.names)
    return CheckedPart(path, *place, form.field("id").type, first_step, last_step, names, frozenset(known), found)


def _last_batch(path: Path) -> tuple[int, int, int] | None:
    """Return epoch, step and batch of a part's last row; ``None`` if it cannot be read."""
    try:
        with fetched(path) as content:
            table = pq.read_table(
                content, columns=["epoch", "step", "batch"], partitioning=None, page_checksum_verification=True
            )
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    last = table.slice(table.num_rows - 1).to_pylist()
    return (last[0]["epoch"], last[0]["step"], last[0]["batch"]) if last else None


def _ends(whole: Sequence[CheckedPart], until: Mapping[int, float]) -> dict[tuple[int, int], float]:
    """Return the last step with valid rows, by attempt and rank."""
    ends: dict[tuple[int, int], float] = {}
    for part in whole:
        if part.first_step < until[part.attempt]:
            place, end = (part.attempt, part.rank), min(part.last_step, until[part.attempt] - 1)
            ends[place] = max(ends.get(place, end), end)
    return ends


def _known_columns(form: pa.Schema, declared: Sequence[str] | None) -> list[str]:
    """Return the names of the columns that this release knows, in the file's order.

    Args:
        form: Schema of the part.
        declared: Names of the columns in the description of the attempt; ``None`` for ledgers older than that list.

    Raises:
        ValueError: A required column is missing or has another type. A damaged name looks like a missing column
            together with an unknown one.
    """
    known, there = schema(form.field("id").type), set(form.names)
    must = set(known.names) - set(nullable_columns()) if declared is None else set(declared)
    damaged = declared is None and bool(there - set(known.names)) and bool(set(FIRST_COLUMNS) - there)
    types = all(form.field(name).type == known.field(name).type for name in known.names if name in there)
    types = types and form.field("id").type in (pa.int64(), pa.uint64(), pa.string())
    if damaged or not must <= there or not types or len(there) < len(form.names):
        raise ValueError(f"holds columns {', '.join(form.names)}")
    return [name for name in form.names if name in known.names]


def _rows(path: Path, form: pa.Schema) -> pa.Table:
    """Return a part's rows with all known columns; columns that it lacks are null."""
    with fetched(path) as content:
        there = set(pq.read_schema(content).names)
        table = pq.read_table(content, columns=[name for name in form.names if name in there], partitioning=None)
    columns = [
        table[field.name].cast(field.type) if field.name in there else pa.nulls(table.num_rows, field.type)
        for field in form
    ]
    return pa.Table.from_arrays(columns, schema=form)


def _first_per_epoch(table: pa.Table) -> pa.Table:
    numbered = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    first = numbered.group_by(["epoch", "id"]).aggregate([("row", "min")])["row_min"]
    return table.take(first.combine_chunks().sort())
