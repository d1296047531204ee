"""Parallel curation by several processes or machines: partition a ledger's rows, then summarise each partition.

All processes use one shared folder, with a subfolder for each share of the ledger's files, which holds their rows by
partition, and a subfolder for each partition, which holds its summarised samples. A subfolder appears when it is
complete, so that an interrupted job can be run again. :func:`~lightning_mimic.curation.curate` reads the folder when
all subfolders exist.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_mimic.curation.partitions import (
    READ_COLUMNS,
    Partition,
    SampleColumns,
    partition_files,
    rows_in,
    rows_of,
    scored_rows,
    summarise,
    write_partitions,
)
from lightning_mimic.database import Database, Progress, database_version, require_space
from lightning_mimic.errors import CurationError
from lightning_mimic.files import atomic_directory
from lightning_mimic.ledger import CheckedPart, CheckedParts, Ledger, LedgerError, Parts, summarised_columns
from lightning_mimic.ledger.ids import unified
from lightning_mimic.stores import as_store_path
from lightning_mimic.user_files import first_line, user_path, writing

_FACTS = "facts.json"
_ID_TYPES = {str(kind): kind for kind in (pa.int64(), pa.uint64(), pa.string())}


def partition_share(  # noqa: PLR0913
    ledger: str | Path,
    out: str | Path,
    share: int = 0,
    shares: int = 1,
    partitions: int = 64,
    *,
    allow_partial: bool = False,
    memory: str = "2GB",
    progress: Progress | None = None,
) -> Path:
    """Check a share of a ledger's files, and write their rows to partitions by a hash of the ids.

    Args:
        ledger: Directory of the ledger with the recorded scores.
        out: Folder to which all shares are written.
        share: Index of the share, from 0.
        shares: Number of shares; the same for all jobs.
        partitions: Number of partitions; the same for all jobs.
        allow_partial: Whether to skip damaged files instead of raising an error; ``curate`` needs this setting, too.
        memory: Memory limit of the database, such as ``"2GB"``; larger data spill to disk.
        progress: Callback for progress, called with a description and the completed share.

    Returns:
        The folder of the share. An existing share with the same settings is left unchanged.

    Raises:
        CurationError: A number is out of range, the share exists with other settings, or the disk is too small.
        LedgerError: The ledger does not exist, or has damaged files.

    Example:
        >>> partition_share("scores", "partitions", share=4, shares=4)
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: `share` is 4, but there are 4 shares, numbered from 0.
    """
    for name, value, least in (("share", share, 0), ("shares", shares, 1), ("partitions", partitions, 1)):
        if type(value) is not int or value < least:
            raise CurationError(f"`{name}` is {value!r}; expected a whole number of {least} or more.")
    if share >= shares:
        raise CurationError(f"`share` is {share}, but there are {shares} shares, numbered from 0.")
    source, folder = Ledger(user_path(ledger, "ledger")), _folder(out, "out")
    final = _share(folder, share, shares)
    facts: dict[str, Any] = {"partitions": partitions, **_of_ledger(source)}
    if final.exists():
        _require_same(final, _facts(final), facts)
        return final
    with Database(memory, progress) as database:
        checked = source.checked(
            READ_COLUMNS, share, shares, advance=lambda done, of: database.report_progress("checking", done / of)
        )
        if checked.damaged and not allow_partial:
            raise LedgerError(
                f"{source.directory}: {len(checked.damaged)} parts are damaged: {'; '.join(checked.damaged[:3])}. "
                "`allow_partial=true` reads the rest."
            )
        held = source.share_parts(checked)
        facts |= {
            "id_type": None if held is None else str(held.id_type),
            "recorded": [] if held is None else sorted(held.recorded),
            "whole": [_as_json(part) for part in checked.whole],
            "damaged": list(checked.damaged),
        }
        with writing(final), atomic_directory(final) as made:
            if held is not None:
                require_space(made, sum(path.stat().st_size for path in held.paths), f"share {share}")
                columns = SampleColumns.among([each.name for each in summarised_columns()])
                write_partitions(database, rows_of(held, columns), made / "rows", partitions, "partitioning")
            _write_facts(made, facts)
    return final


def summarise_partition(
    partitioned: str | Path, partition: int = 0, *, memory: str = "2GB", progress: Progress | None = None
) -> Path:
    """Summarise the rows of a partition by sample; all shares must be complete.

    Args:
        partitioned: Folder to which :func:`partition_share` wrote.
        partition: Index of the partition, from 0.
        memory: Memory limit of the database, such as ``"2GB"``; larger data spill to disk.
        progress: Callback for progress, called with a description and the completed share.

    Returns:
        The folder of the partition. An existing one is left unchanged.

    Raises:
        CurationError: Shares are missing or inconsistent, a file is damaged, or the partition does not exist.

    Example:
        >>> summarise_partition("nowhere")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: nowhere holds no shares of a ledger; run mimic-partition first.
    """
    shared = SharedPartitions(partitioned)
    if type(partition) is not int or not 0 <= partition < shared.count:
        raise CurationError(f"`partition` is {partition!r}; expected a whole number from 0 to {shared.count - 1}.")
    final = shared.samples(partition)
    if final.exists():
        return final
    files = shared.rows(partition)
    with Database(memory, progress) as database, writing(final), atomic_directory(final) as made:
        database.report_progress("summarising", 0.0)
        rows = rows_in(files, shared.columns, shared.id_type, same_ids=shared.same_ids)
        query = scored_rows(rows, shared.columns, shared.id_type)
        summarise(database, query, shared.columns, made / "samples.parquet", made / "repeats.parquet")
        _write_facts(made, {})
        database.report_progress("summarising", 1.0)
    return final


class SharedPartitions:
    """Read a folder with all shares of a ledger's rows, by partition.

    Args:
        partitioned: Folder to which :func:`partition_share` wrote.

    Raises:
        CurationError: Shares are missing or inconsistent.

    Attributes:
        count: Number of partitions.
        columns: Columns that are summarised by sample.
        id_type: Common type of the ids of all shares.
        same_ids: Whether the ids have the same type in all shares.
    """

    def __init__(self, partitioned: str | Path) -> None:
        self._folder = folder = _folder(partitioned, "partitioned")
        found = sorted(folder.glob("share-*-of-*")) if folder.is_dir() else []
        if not found:
            raise CurationError(f"{folder} holds no shares of a ledger; run mimic-partition first.")
        count = found[0].name.rpartition("-")[2]
        others = [path for path in found if path.name.rpartition("-")[2] != count]
        if others:
            raise CurationError(
                f"{folder} mixes shares of two runs of mimic-partition, {found[0].name} and {others[0].name}; remove "
                "the shares of one of them."
            )
        self._shares = [_share(folder, number, int(count)) for number in range(int(count))]
        _require(folder, self._shares, "shares", "mimic-partition")
        self._facts = [_facts(path) for path in self._shares]
        for path, facts in zip(self._shares, self._facts, strict=True):
            _require_same(path, facts, self._facts[0])
        if self._facts[0]["database"] != database_version():
            raise CurationError(
                f"{folder} was written with DuckDB {self._facts[0]['database']}, but {database_version()} is "
                "installed, which may hash ids differently. Use the same version for all steps."
            )
        self.count: int = self._facts[0]["partitions"]
        types = {facts["id_type"] for facts in self._facts} - {None}
        kind = unified(_ID_TYPES[each] for each in types) if types else pa.int64()
        if kind is None:
            raise CurationError(f"{folder} mixes int and str ids, which the ledger's ranks recorded; use one type.")
        self.id_type: pa.DataType = kind
        self.same_ids = len(types) == 1
        self.columns = SampleColumns.among({name for facts in self._facts for name in facts["recorded"]})

    def samples(self, number: int) -> Path:
        """Return the folder with the summarised samples of a partition."""
        return self._folder / f"partition-{number}-of-{self.count}"

    def rows(self, number: int) -> tuple[Path, ...]:
        """Verify the checksums of the files with the rows of a partition, and return their paths.

        Raises:
            CurationError: A file is damaged.
        """
        files = [(share, path) for share in self._shares for path in partition_files(share / "rows", number)]
        for share, path in files:
            _verify(share, path, self._facts[self._shares.index(share)])
        return tuple(path for _, path in files)

    def parts(self, ledger: Ledger, *, allow_partial: bool) -> Parts:
        """Return the ledger's files, merging the checks made by all shares.

        Raises:
            CurationError: The shares belong to another ledger, or the ledger has changed since.
            LedgerError: As for :meth:`lightning_mimic.Ledger.parts`.
        """
        theirs = {name: self._facts[0].get(name) for name in ("run", "files")}
        if theirs != {name: _of_ledger(ledger)[name] for name in theirs}:
            raise CurationError(
                f"{self._folder} does not belong to {ledger.directory}, or that ledger has changed since. Partition "
                "the ledger again, into another folder."
            )
        names = ledger.names()
        checked = [
            CheckedParts(names, tuple(_from_json(part, ledger) for part in facts["whole"]), tuple(facts["damaged"]))
            for facts in self._facts
        ]
        return ledger.joined(checked, allow_partial=allow_partial)

    def partitions(self) -> list[Partition]:
        """Return all partitions with their summarised samples.

        Raises:
            CurationError: A partition has not been summarised, or a file is damaged.
        """
        folders = [self.samples(number) for number in range(self.count)]
        _require(self._folder, folders, "partitions", "mimic-summarise")
        made = []
        for number, folder in enumerate(folders):
            facts = _facts(folder)
            for name in facts["checksums"]:
                _verify(folder, folder / name, facts)
            repeats = folder / "repeats.parquet"
            made.append(Partition(self.rows(number), folder / "samples.parquet", repeats if repeats.exists() else None))
        return made


def _folder(path: str | Path, argument: str) -> Path:
    """Return the path of a folder on a file system; an object store cannot rename a complete folder into place."""
    folder = user_path(path, argument)
    if as_store_path(folder):
        raise CurationError(f"`{argument}` is {folder}, on an object store; expected a folder on a shared file system.")
    return folder


def _share(folder: Path, number: int, count: int) -> Path:
    return folder / f"share-{number}-of-{count}"


def _require(folder: Path, paths: Sequence[Path], kind: str, command: str) -> None:
    """Raise :class:`CurationError` unless all paths exist."""
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CurationError(
            f"{folder}: {len(missing)} of {len(paths)} {kind} are missing: {', '.join(missing[:3])}{more}. Run "
            f"{command} for them."
        )


def _of_ledger(ledger: Ledger) -> dict[str, Any]:
    """Return the facts that must be equal in all shares of a ledger."""
    names = "\n".join(ledger.names())
    return {
        "database": database_version(),
        "run": ledger.meta["run"],
        "files": hashlib.sha256(names.encode()).hexdigest(),
    }


def _require_same(path: Path, facts: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise :class:`CurationError` if an existing share has other settings than expected."""
    for name in ("run", "files", "database", "partitions"):
        if facts[name] != others[name]:
            raise CurationError(
                f"{path} already exists with another {_NAMES[name]}: {facts[name]} instead of {others[name]}. "
                "Partition into another folder, or remove it."
            )


_NAMES = {
    "run": "run of the ledger",
    "files": "list of ledger files (by its SHA-256)",
    "database": "version of DuckDB",
    "partitions": "number of partitions",
}


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write facts to a folder, with the checksums of all its Parquet files."""
    files = sorted(path for path in folder.rglob("*.parquet"))
    sums = {str(path.relative_to(folder)): _sha256(path) for path in files}
    (folder / _FACTS).write_text(json.dumps({**facts, "checksums": sums}))


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
    except (OSError, ValueError) as error:
        raise CurationError(f"{folder / _FACTS} cannot be read: {first_line(error)}. Remove {folder}.") from error
    return facts


def _verify(folder: Path, path: Path, facts: Mapping[str, Any]) -> None:
    """Raise :class:`CurationError` unless a file has the recorded checksum."""
    if not path.exists() or _sha256(path) != facts["checksums"].get(str(path.relative_to(folder))):
        raise CurationError(
            f"{path} is missing or does not match its checksum; remove {folder}, and run its job again."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_json(part: CheckedPart) -> dict[str, Any]:
    sets = {name: sorted(getattr(part, name)) for name in _SETS}
    return asdict(part) | sets | {"path": part.path.name, "id_type": str(part.id_type)}


def _from_json(facts: Mapping[str, Any], ledger: Ledger) -> CheckedPart:
    sets = {name: frozenset(facts[name]) for name in _SETS}
    place = {"path": ledger.directory / facts["path"], "id_type": _ID_TYPES[facts["id_type"]]}
    return CheckedPart(**{**facts, **sets, **place})


_SETS = ("names", "columns", "recorded")
