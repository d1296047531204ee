"""Read a ledger back: whole parts only, the rows of all ranks, each sample once per epoch."""

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
        directory: What was given to the callback as ``ledger``.

    Raises:
        LedgerError: There is no ledger.

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
        #: The description: the run, and per attempt its configuration and first step.
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
        """Names of the classes that ``label`` and ``predicted`` are indices of; ``None`` where not recorded."""
        return class_names_in(self.meta)

    def parts(
        self,
        columns: Sequence[str] | None = None,
        *,
        allow_partial: bool = False,
        advance: Callable[[int, int], None] | None = None,
    ) -> "Parts":
        """Return the files that hold, each read through once, so that no damaged page goes unnoticed.

        What is on a store is fetched first, each part by one request, and read from the disk from then on.

        Args:
            columns: Names of those whose pages are checked; ``None``: all.
            allow_partial: Read what there is, instead of refusing where parts are damaged or rows missing.
            advance: Called with how many parts of how many are checked.

        Raises:
            LedgerError: No rows; damaged parts; missing rows; ids of two types; or attempts whose configuration
                differs, which would mix scores of two meanings.

        Warns:
            UserWarning: The last attempt has not ended, so that its last rows may be missing; the first rows are in
                another directory; or attempts differ in the size of their batches, which weights depend on and scores
                do not.
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
        """Read a share of the files through, so that several processes can check a ledger together.

        Args:
            columns: As for :meth:`parts`.
            share: Index of the share, from 0; the shares are runs of the files in the order of their names.
            shares: Number of shares.
            advance: As for :meth:`parts`.

        Raises:
            LedgerError: Parts of another run, or of attempts that the description does not know.
        """
        named = self._named()
        first, last = (len(named) * k // shares for k in (share, share + 1))
        whole, damaged = self._checked(self._on_disk(named[first:last]), columns, advance)
        return CheckedParts(tuple(path.name for path, _ in named), tuple(whole), tuple(damaged))

    def names(self) -> tuple[str, ...]:
        """Return the names of the files, whole or not, in order.

        Raises:
            LedgerError: Parts of another run, or of attempts that the description does not know.
        """
        return tuple(path.name for path, _ in self._named())

    def joined(self, checked: Sequence["CheckedParts"], *, allow_partial: bool = False) -> "Parts":
        """Return the files that hold from all shares of the files.

        Args:
            checked: From :meth:`checked`, every share once.
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
        """Return the files of one share that hold, whatever the others are; ``None`` if there are none.

        Raises:
            LedgerError: Ids of two types.
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
        """Describe the ranks whose rows do not reach as far as a checkpoint has trained, by rank.

        Args:
            attempt: That saved the checkpoint.
            scored: Epoch, step and batch of the last micro-batch that it had scored.

        Raises:
            LedgerError: The ledger does not know the attempt.
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
        """The parts that hold, and descriptions of those that are damaged."""
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
        """How far each attempt belongs to the run as its last attempt with rows continued it.

        Args:
            written: Numbers of the attempts that have rows.

        Returns:
            By attempt, the step from which on its rows are superseded (0: all are); and the last of its steps that a
            later attempt relies on.
        """
        attempts, until, continued = self.meta["attempts"], dict.fromkeys(sorted(written), 0.0), dict[int, int]()
        number, end, known = max(written, default=None), math.inf, False
        while number is not None:
            facts = attempts[number]
            if number in written or known:
                until[number] = end
                end = min(end, facts["start_step"])
            # Earlier releases did not note which attempt another one continues.
            known = "continues" in facts
            before = facts.get("continues", number - 1 if number else None)
            if known and before is not None and "scored" in facts:
                continued[before] = int(min(facts["scored"][1], end - 1))
            number = before
        return until, {number: step for number, step in continued.items() if step >= 0}

    def _left(self, whole: Sequence["CheckedPart"], until: Mapping[int, float]) -> tuple[int, ...]:
        """The attempts with rows that hold, none of which differ in what their scores mean."""
        left = sorted({part.attempt for part in whole if part.first_step < until[part.attempt]})
        if not left:
            raise LedgerError(f"{self.directory} holds no rows that a later attempt did not go over again.")
        attempts = [self.meta["attempts"][number] for number in left]
        differing = differences([meaning(attempt["config"]) for attempt in attempts])
        if differing:
            raise LedgerError(
                f"{self.directory}: its attempts differ in {differing}; their scores are not mixed. Record a run "
                "with other settings in a directory of its own."
            )
        differing = batch_differences(attempts)
        if differing:
            warnings.warn(
                f"{self.directory}: its attempts differ in {differing}. Their scores mean the same; their weights are "
                "over batches of other sizes.",
                stacklevel=4,
            )
        return tuple(left)

    def _id_type(self, whole: Sequence["CheckedPart"]) -> pa.DataType:
        """The type that holds the ids of all parts."""
        kind = unified(part.id_type for part in whole) if whole else pa.int64()
        if kind is None:
            raise LedgerError(f"{self.directory} mixes int and str ids; its ranks were given different ones.")
        for part in whole if kind == pa.uint64() else ():
            if part.id_type == pa.int64():
                with fetched(part.path) as content:
                    lowest = pc.min(pq.read_table(content, columns=["id"], partitioning=None)["id"]).as_py()
                if lowest < 0:
                    raise LedgerError(
                        f"{self.directory}: {part.path.name} has the id {lowest}, and other parts have unsigned ids of "
                        "64 bits; no type of number holds both."
                    )
        return kind

    def table(self, *, deduplicate: bool = True, allow_partial: bool = False) -> pa.Table:
        """Read all rows that hold, in order of epoch, step, batch, rank and position, into memory.

        Rows of an attempt that a later one went over again are left out. The columns are those of
        :data:`~lightning_mimic.ledger.COLUMNS`; those that a part lacks are null, others that it has are left out.

        Args:
            deduplicate: Keep the first row of a sample in an epoch: a distributed sampler repeats some to
                make ranks even, sampling with replacement draws some several times, and a run resumed within an epoch
                starts that epoch's data again.
            allow_partial: Read what there is, instead of refusing where parts are damaged or rows missing.

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
    """A ledger's whole files, and which of their rows hold.

    Attributes:
        paths: Paths of the files.
        id_type: ``int64``, ``uint64`` or ``string``.
        until: By attempt, the step from which on its rows were gone over again by a later one.
        columns: Names of the known columns that some file has.
        uniform: All files have the same columns, known or not.
        recorded: Of the columns that were checked, names of the nullable ones with a value in some row.
        attempts: Numbers of those that have rows which hold.
        lost: Descriptions of what is damaged, missing or in doubt, with the rows it held where that is known.
        copies: Folder of the files' copies on the disk if they are on a store, for as long as this object is there.
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
        """Whether some row has a ``label`` or a ``predicted``."""
        return not self.recorded.isdisjoint(("label", "predicted"))


#: Reading waits for the disk, and checksums are computed outside the interpreter's lock.
_READERS = 2
#: A store answers many requests at once.
_STORE_READERS = 16


@dataclass(frozen=True)
class CheckedPart:
    """A file that was read through and holds.

    Attributes:
        path: Path of the file.
        attempt: Number of the attempt that wrote it.
        rank: Process that wrote it.
        id_type: Type of its ids.
        first_step: The lowest of its steps.
        last_step: The highest of its steps.
        names: Names of all its columns.
        columns: Names of the known ones.
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
    """A share of a ledger's files, read through.

    Attributes:
        names: Names of all files of the ledger, also of the other shares.
        whole: Those of the share that hold.
        damaged: Descriptions of those of the share that are damaged.
    """

    names: tuple[str, ...]
    whole: tuple[CheckedPart, ...]
    damaged: tuple[str, ...]


def _of_other_ranks(directory: Path) -> str:
    """A hint, where a folder has parts and no description, as on hosts that do not share the first rank's folder."""
    matches = [match for path in directory.glob("*.parquet") if (match := PART_NAME.fullmatch(path.name))]
    if not matches:
        return ""
    ranks, runs = sorted({int(match[3]) for match in matches}), sorted({match[1] for match in matches})
    return (
        f" It holds parts of {_named_ranks(ranks)} of run {', '.join(runs)}, whose description the first rank wrote. "
        "Where hosts share no folder, copy the files of each host's folder into one."
    )


def _absent_ranks(attempts: Sequence[Mapping[str, Any]], written: Sequence[tuple[int, int, int, int]]) -> str:
    """A hint, where ranks that have rows have no parts, as on a host that does not share their folder."""
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
    """Reads a part through, verifying every page's checksum, without keeping it."""
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
    """Epoch, step and batch of a part's last row; ``None`` if it cannot be read."""
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
    """By attempt and rank, the last step of which rows hold."""
    ends: dict[tuple[int, int], float] = {}
    for part in whole:
        if part.first_step < until[part.attempt]:
            place, end = (part.attempt, part.rank), min(part.last_step, until[part.attempt] - 1)
            ends[place] = max(ends.get(place, end), end)
    return ends


def _known_columns(form: pa.Schema, declared: Sequence[str] | None) -> list[str]:
    """The names of the columns that this release knows, in the file's order.

    Args:
        form: The part's.
        declared: Names that its attempt's description has; ``None`` for a ledger of before there were any.

    Raises:
        ValueError: A column that must be there is not, or has another type. A damaged name shows as one that is missing
            and one that is unknown.
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
    """A part's rows with all known columns, null where it lacks one."""
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
