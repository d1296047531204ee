"""Tables that users bring, as Parquet or CSV: one type per column in all files, and ids and decisions that hold."""

import contextlib
import csv
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_mimic.database import Database, is_whole, quoted
from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.files import fetched
from lightning_mimic.stores import as_store_path
from lightning_mimic.user_files import first_line, open_parquet, plain_type, user_path

#: Rows that are in memory at once.
_ROWS = 1 << 17
#: A cell that a spreadsheet would take for a formula, with the apostrophes that are in front of it.
_FORMULA = r"'*[=+\-@\t\r]"
_YES_OR_NO = "expected booleans, 0 and 1, or the words true and false"


class Table:
    """A Parquet file, a directory of Parquet files, or a CSV file, whose columns are all text.

    In a CSV, an empty cell is a missing value, blank lines are skipped, and an apostrophe in front of a formula, which
    keeps spreadsheets from running it, does not belong to the cell.

    Args:
        path: Path of the file or directory. A column ``uid`` serves as ``id`` where there is none.
        kind: A file's format whatever its name; by default its suffix says it.

    Raises:
        CurationError: No such file, or another kind of file.

    Example:
        >>> Table("scores.txt")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: scores.txt is neither Parquet nor CSV by its name (.parquet, .csv).
    """

    def __init__(self, path: str | Path, kind: Literal["parquet"] | None = None) -> None:
        self.path = user_path(path, "path")
        try:
            self._find(kind)
        except OSError as error:
            raise CurationError(f"{self.path} cannot be read: {first_line(error)}.") from error
        self._schemas = {file: self._schema(file) for file in self._files}

    def _find(self, kind: Literal["parquet"] | None) -> None:
        """Find the files, and fetch what is on a store: once, for as long as the table is in use."""
        self.is_csv = kind is None and self.path.suffix == ".csv" and not self.path.is_dir()
        if self.path.is_dir():
            self._files = _files_in(self.path)
        elif kind is None and self.path.suffix not in (".parquet", ".csv"):
            raise CurationError(f"{self.path} is neither Parquet nor CSV by its name (.parquet, .csv).")
        elif not self.path.exists():
            raise CurationError(f"{self.path} is not there.")
        else:
            self._files = [self.path]
        if as_store_path(self.path):
            copies = contextlib.ExitStack()
            weakref.finalize(self, copies.close)
            self._files = [copies.enter_context(fetched(file)) for file in self._files]

    @property
    def names(self) -> list[str]:
        """Names of the columns that all files have."""
        first, *more = (form.names for form in self._schemas.values())
        return [name for name in first if all(name in names for names in more)]

    def read(self, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Read columns into memory.

        Args:
            columns: Names of columns.

        Returns:
            The values of each, ``None`` where one is missing.

        Raises:
            CurationError: A column that is not there or there twice, or a damaged file.
        """
        stored = {column: self._stored(column) for column in columns}
        values: dict[str, list[Any]] = {column: [] for column in columns}
        for file in self._files:
            for arrays in self._arrays(file, stored):
                for column, array in zip(columns, arrays, strict=True):
                    values[column] += array.to_pylist()
        return values

    def load(self, database: Database, name: str, columns: Mapping[str, str] | None = None, what: str = "") -> None:
        """Make a table of a database from columns.

        Args:
            database: The database.
            name: Name of its new table.
            columns: Name in it to the column's name; ``None``: all of them, under their own names. One that is named
                ``id`` must hold whole numbers or text, without gaps; ``keep`` becomes boolean; ``value`` must hold
                numbers, or text.
            what: What this is, for the progress.

        Raises:
            CurationError: A column that is not there or there twice, that has types which do not go together, or
                values that its name does not allow; a damaged file.
        """
        if columns is None:
            columns = self._all_columns()
        stored = {new: self._stored(column) for new, column in columns.items()}
        types = {new: self._type(new, column) for new, column in stored.items()}
        form = pa.schema([(new, pa.bool_() if new == "keep" else kind) for new, kind in types.items()])
        database.load(name, form, self._batches(stored, types, form), what)

    def _all_columns(self) -> dict[str, str]:
        (form,) = self._schemas.values()
        seen: dict[str, str] = {}
        for name in form.names:
            other = seen.setdefault(name.lower(), name)
            if other != name:
                raise CurationError(
                    f"{self.path} has columns {other!r} and {name!r}, which differ in their case alone."
                )
        return {name: name for name in form.names}

    def _schema(self, file: Path) -> pa.Schema:
        if self.is_csv:
            names = next(_csv_rows(file), None)
            if names is None:
                raise CurationError(f"{file} is empty; expected a line with the names of its columns.")
            return pa.schema([(name, pa.string()) for name in names])
        with open_parquet(file) as content:
            return content.schema_arrow

    def _stored(self, column: str) -> str:
        """The column's name in the files, each of which has it once."""
        names = {name for form in self._schemas.values() for name in form.names}
        stored = "uid" if column == "id" and "id" not in names and "uid" in names else column
        for file, form in self._schemas.items():
            count = form.names.count(stored)
            if count > 1:
                raise CurationError(f"{file} has {count} columns {stored!r}; expected one.")
            if not count:
                others = nearest_names(stored, form.names) if form.names else "it has none"
                place = file if stored in names else self.path
                raise CurationError(f"{place} has no column {stored!r}; {others}.")
        return stored

    def _type(self, role: str, column: str) -> pa.DataType:
        """The one type of a column of all files."""
        first: dict[pa.DataType, Path] = {}
        for file, form in self._schemas.items():
            first.setdefault(plain_type(form.field(column).type), file)
        if len(first) > 1:  # what holds no value has no type
            filled = {kind: next((f for f in self._files if self._has_values(f, column, kind)), None) for kind in first}
            first = {kind: file for kind, file in filled.items() if file is not None}
        for kind, file in first.items():
            _check_role(role, column, kind, file)
        kinds = set(first) - {pa.null()}
        if len(kinds) <= 1:
            return kinds.pop() if kinds else pa.string() if role == "id" else pa.null()
        if not kinds <= {pa.bool_(), pa.int64(), pa.uint64(), pa.float64()}:
            (one, here), (other, there), *_ = sorted(first.items(), key=lambda item: item[1])
            raise CurationError(
                f"{self.path}: column {column!r} is {one} in {here.name} and {other} in {there.name}; write both with "
                "one type."
            )
        if pa.float64() in kinds:
            return pa.float64()
        if {pa.int64(), pa.uint64()} <= kinds:
            return pa.decimal128(20)  # holds both
        return pa.uint64() if pa.uint64() in kinds else pa.int64()

    def _has_values(self, file: Path, column: str, kind: pa.DataType) -> bool:
        """Whether a file has that type for a column and a value in it."""
        if plain_type(self._schemas[file].field(column).type) != kind:
            return False
        with open_parquet(file) as content:
            return any(each[0].null_count < len(each[0]) for each in _columns_of(content, {column: column}))

    def _batches(
        self, stored: Mapping[str, str], types: Mapping[str, pa.DataType], form: pa.Schema
    ) -> Iterator[pa.RecordBatch]:
        for file in self._files:
            for found in self._arrays(file, stored):
                arrays = []
                for (role, kind), array in zip(types.items(), found, strict=True):
                    cast = _cast(array, kind, file, stored[role])
                    arrays.append(_CHECKS[role](cast, file) if role in _CHECKS else cast)
                yield pa.record_batch(arrays, schema=form)

    def _arrays(self, file: Path, stored: Mapping[str, str]) -> Iterator[list[pa.Array]]:
        """The columns of a file, piece by piece."""
        if self.is_csv:
            names = self._schemas[file].names
            places = [names.index(column) for column in stored.values()]
            pieces: list[list[str | None]] = [[] for _ in places]
            rows = _csv_rows(file)
            next(rows)
            for row in rows:
                for piece, place in zip(pieces, places, strict=True):
                    piece.append(row[place] or None)
                if len(pieces[0]) == _ROWS:
                    yield [pa.array(piece, pa.string()) for piece in pieces]
                    pieces = [[] for _ in places]
            yield [pa.array(piece, pa.string()) for piece in pieces]
            return
        with open_parquet(file) as content:
            yield from _columns_of(content, stored)


def settle_ids(database: Database, tables: Mapping[str, Table], like: str | None = None) -> None:
    """Give the ids of loaded tables one type: ``VARCHAR``, ``BIGINT``, or ``UBIGINT`` where that does not hold them.

    Args:
        database: Where the tables are.
        tables: Name in the database to the table that was loaded from.
        like: The type that ids have elsewhere; by default that of the first Parquet table, and where all are CSV, whole
            numbers if all ids are.

    Raises:
        CurationError: Some are whole numbers and others text; some are negative and others beyond 2^63.
    """
    types = {name: database.columns(name)["id"] for name in tables}
    filled = [name for name in tables if database.value(f"SELECT count(*) FROM {name}")]
    typed = [name for name in filled if not tables[name].is_csv]
    if like is None and typed:
        like = types[typed[0]]
    whole = like != "VARCHAR" if like is not None else not any(_not_whole(database, name)[0] for name in filled)
    for name in typed:
        if (types[name] != "VARCHAR") != whole:
            this, other = ("text", "whole numbers") if whole else ("whole numbers", "text")
            raise CurationError(f"{tables[name].path} has ids that are {this}, and elsewhere they are {other}.")
    kind = "VARCHAR"
    if whole:
        for name in filled:
            lost, example = _not_whole(database, name)
            if lost:
                raise CurationError(
                    f"{tables[name].path}: {lost} rows have no id, or one that is no whole number as the others are, "
                    f"such as {example!r}."
                )
        kind = _whole_type(database, {name: tables[name] for name in filled}, {like, *types.values()})
    for name in [name for name in tables if types[name] != kind]:
        database.run(f"ALTER TABLE {name} ALTER id TYPE {kind}")


def _not_whole(database: Database, name: str) -> tuple[int, Any]:
    """How many ids are no 64-bit whole numbers in the one way to write them, and one of these."""
    fits = f"{is_whole('id')} AND TRY_CAST(id AS HUGEINT) BETWEEN {-(2**63)} AND {2**64 - 1}"
    count, example = database.row(f"SELECT count(*), any_value(id) FROM {name} WHERE NOT coalesce({fits}, false)")
    return count, example


def _whole_type(database: Database, tables: Mapping[str, Table], types: set[str | None]) -> str:
    ranges = [database.row(f"SELECT min(id::HUGEINT), max(id::HUGEINT) FROM {name}") for name in tables]
    low, high = min((each[0] for each in ranges), default=0), max((each[1] for each in ranges), default=0)
    if high < 2**63 and ("UBIGINT" not in types or low < 0):
        return "BIGINT"
    if low < 0:
        raise CurationError(
            f"{', '.join(str(table.path) for table in tables.values())}: ids from {low} to {high} are neither signed "
            "nor unsigned 64-bit numbers; write them as text."
        )
    return "UBIGINT"


def decisions(array: Any, path: Path) -> Any:
    """Return a column ``keep`` as booleans, null where nothing was decided.

    Args:
        array: Booleans, 0 and 1, or the words true and false; an Arrow array, whole or in pieces.
        path: Path of its file, for the message.

    Raises:
        CurationError: Anything else, such as probabilities.

    Example:
        >>> decisions(pa.array([0.9, 0.02]), Path("soft.parquet"))
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: soft.parquet: column 'keep' holds 0.9 (double); expected booleans, ...
    """
    kind = plain_type(array.type)
    if kind == pa.bool_() or kind == pa.null():
        return pc.cast(array, pa.bool_())
    found = array.cast(kind) if kind != array.type else array
    if kind in (pa.int64(), pa.uint64()):
        yes, known = pa.array([1], kind), pa.array([0, 1], kind)
    elif kind == pa.string():
        found, yes, known = pc.utf8_lower(found), pa.array(["1", "true"]), pa.array(["0", "1", "false", "true"])
    else:
        yes, known = None, None
    bad = found.is_valid() if known is None else pc.and_not(found.is_valid(), pc.is_in(found, known))
    example = array.filter(bad).slice(0, 1)
    if known is None or len(example):
        shown = f"holds {example[0].as_py()!r} ({kind})" if len(example) else f"is of type {kind}"
        raise CurationError(f"{path}: column 'keep' {shown}; {_YES_OR_NO}.")
    return pc.if_else(found.is_valid(), pc.is_in(found, yes), None)


def checked_ids(array: Any, path: Path) -> Any:
    """Return a manifest's column of ids, none of which is missing, as whole numbers or text.

    One may be empty, which is a name like another; early ledgers have it.

    Args:
        array: An Arrow array, whole or in pieces.
        path: Path of its file, for the message.

    Raises:
        CurationError: Another type, or missing ids.

    Example:
        >>> checked_ids(pa.array(["a", "", ""]), Path("manifest.parquet"))
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: manifest.parquet: 2 rows have no id (it is missing or empty).
    """
    kind = plain_type(array.type)
    _check_role("id", "id", kind, path)
    return _without_gaps(array.cast(kind) if kind != array.type else array, path, empty=1)


def _without_gaps(ids: Any, path: Path, empty: int = 0) -> Any:
    found = pc.sum(pc.equal(ids, "")).as_py() or 0 if ids.type == pa.string() else 0
    if ids.null_count or found > empty:
        raise CurationError(f"{path}: {ids.null_count + found} rows have no id (it is missing or empty).")
    return ids


#: By the name of a column that is loaded.
_CHECKS: Mapping[str, Callable[[Any, Path], Any]] = {"id": _without_gaps, "keep": decisions}


def cell_text(text: str) -> str:
    """Return text for a cell of a CSV, with an apostrophe in front of what a spreadsheet would run.

    Example:
        >>> cell_text("=1+1"), cell_text("a=1")
        ("'=1+1", 'a=1')
    """
    return f"'{text}" if re.match(_FORMULA, text) else text


def without_formula(column: str) -> str:
    """SQL for the same of a column of text; :class:`Table` takes the apostrophe off again."""
    return f"CASE WHEN regexp_matches({column}, {quoted('^' + _FORMULA)}) THEN '''' || {column} ELSE {column} END"


def _check_role(role: str, column: str, kind: pa.DataType, path: Path) -> None:
    """Raise unless a type can be that of ids, or of values."""
    ids = (pa.int64(), pa.uint64(), pa.null(), pa.string())
    if role == "id" and kind not in ids:
        raise CurationError(f"{path} has ids of type {kind}; expected int64, uint64 or string. {_id_fix(kind)}")
    numbers = kind in (*ids, pa.bool_(), pa.float64()) or pa.types.is_decimal128(kind)
    if role == "value" and not numbers:
        raise CurationError(f"{path}: column {column!r} is of type {kind}; expected numbers.")


def _id_fix(kind: pa.DataType) -> str:
    if pa.types.is_floating(kind):
        return "Ids become floats in pandas where one is missing: remove those rows, and convert the rest."
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return "Write bytes as words, as in `ids.str.decode('ascii')`, or as hexadecimal digits."
    return "Convert them."


def _cast(array: pa.Array, kind: pa.DataType, file: Path, column: str) -> pa.Array:
    if array.type == kind:
        return array
    if array.null_count == len(array):  # of any type
        return pa.nulls(len(array), kind)
    try:
        return pc.cast(pc.cast(array, plain_type(array.type)), kind)
    except pa.ArrowInvalid as error:
        raise CurationError(
            f"{file}: column {column!r} is {array.type} here and {kind} in other files, which does not hold its values "
            f"exactly ({first_line(error)})."
        ) from error


def _files_in(directory: Path) -> list[Path]:
    """The Parquet files of a directory, which has none in directories below it."""
    found = sorted(path for path in directory.rglob("*") if path.suffix.lower() == ".parquet")
    found = [path for path in found if not path.name.startswith(".")]  # what is still being written
    deep = [path for path in found if path.parent != directory]
    if deep:
        raise CurationError(
            f"{directory} has Parquet files in directories below it, such as {deep[0]}, which are not read; give a "
            "directory that holds all of them itself."
        )
    if not found:
        raise CurationError(f"{directory} is a directory without Parquet files (*.parquet).")
    return found


def _columns_of(content: pq.ParquetFile, stored: Mapping[str, str]) -> Iterator[list[pa.Array]]:
    """Columns of an open Parquet file, piece by piece; no text in them is anything but UTF-8."""
    for batch in content.iter_batches(_ROWS, columns=list(dict.fromkeys(stored.values()))):
        # A nested column may have a field of the same dotted name.
        places = [batch.schema.get_all_field_indices(column) for column in stored.values()]
        arrays = [batch.column(place) for (place,) in places]
        for array in arrays:
            array.validate(full=True)
        yield arrays


def _csv_rows(file: Path) -> Iterator[list[str]]:
    """The lines of a CSV file, of as many cells as its first, without the apostrophes in front of formulas."""
    formula = re.compile("'" + _FORMULA)
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            rows = csv.reader(text, strict=True)
            width = None
            for row in rows:
                if not row:
                    continue
                width = len(row) if width is None else width
                if len(row) != width:
                    raise ValueError(f"line {rows.line_num} has {len(row)} cells, and the first has {width}")
                yield [cell[1:] if cell[:1] == "'" and formula.match(cell) else cell for cell in row]
    except (OSError, ValueError, csv.Error) as error:
        raise CurationError(f"{file} cannot be read: {first_line(error)}.") from error
