"""Tables that need not fit into memory, on DuckDB, which nothing else in the package imports."""

import contextlib
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mimic.errors import CurationError, nearest_names

#: Told what is being done, and which share of it is.
Progress = Callable[[str, float], None]


#: DuckDB's types of ids that are numbers.
_WHOLE = {"BIGINT", "INTEGER", "SMALLINT", "TINYINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}


class Database:
    """One DuckDB connection, which spills to disk what its memory cannot hold.

    Args:
        memory: How much it may hold, as DuckDB writes sizes (``"2GB"``).
        progress: Told what is being done.

    Raises:
        CurationError: DuckDB is not installed, or does not know such a size.

    Example:
        >>> with Database() as database:
        ...     database.run("CREATE TABLE three AS SELECT * FROM range(3)")
        ...     print(database.value("SELECT count(*) FROM three"))
        3
    """

    def __init__(self, memory: str = "2GB", progress: Progress | None = None) -> None:
        try:
            import duckdb
        except ModuleNotFoundError as error:
            raise CurationError("curation needs DuckDB: pip install 'lightning-mimic[curation]'.") from error
        self._progress = progress
        self._errors, self._memory = duckdb.Error, memory
        self._spill = tempfile.mkdtemp(prefix="mimic-curate-")
        self.connection = duckdb.connect()
        # Order costs memory; where it matters, a query says so.
        self.connection.execute("SET preserve_insertion_order = false")
        self.connection.execute(f"SET temp_directory = {quoted(self._spill)}")
        try:
            self.connection.execute(f"SET memory_limit = {quoted(memory)}")
        except duckdb.Error as error:
            self.close()
            raise CurationError(f"`memory` is {memory!r}; say it like '2GB' ({first_line(error)}).") from error

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and removes what it has spilled."""
        self.connection.close()
        shutil.rmtree(self._spill, ignore_errors=True)

    def report_progress(self, what: str, share: float) -> None:
        """Report the progress of a task to the callback."""
        if self._progress is not None:
            self._progress(what, share)

    def run(self, sql: str, what: str = "") -> None:
        """Runs a statement; one that may take long says what it does."""
        with self._progress_of(what):
            self._answer(sql)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of a short answer."""
        return list(self._answer(sql).fetchall())

    def row(self, sql: str) -> tuple[Any, ...]:
        """The first row of an answer that has one."""
        return self.rows(sql)[0]

    def value(self, sql: str) -> Any:
        """The one value of a query."""
        return self.row(sql)[0]

    def column(self, sql: str) -> list[Any]:
        """The first column of a short answer."""
        return [row[0] for row in self.rows(sql)]

    def arrays(self, sql: str) -> dict[str, Any]:
        """An answer as NumPy arrays by column."""
        return dict(self._answer(sql).fetchnumpy())

    def _answer(self, sql: str) -> Any:
        try:
            return self.connection.execute(sql)
        except self._errors as error:
            hint = f"; it may hold {self._memory}, which `memory` sets" if "Memory" in type(error).__name__ else ""
            raise CurationError(f"the database gave up: {first_line(error)}{hint}.") from error

    @contextlib.contextmanager
    def reader(self, sql: str, what: str = "") -> Iterator[pa.RecordBatchReader]:
        """An answer piece by piece, in its order."""
        with self._progress_of(what):
            yield self.connection.sql(sql).to_arrow_reader(1 << 17)

    def columns(self, table: str) -> dict[str, str]:
        """Names and DuckDB's types of a table's columns."""
        return {row[0]: row[1] for row in self.rows(f"DESCRIBE SELECT * FROM {table}")}

    def file(self, path: str | Path, needed: Sequence[str]) -> str:
        """A Parquet or CSV file as something to select from; a CSV's columns are all text.

        Args:
            path: Of the file, or of a directory with Parquet files of one kind, as DataComp's metadata are. A column
                ``uid`` serves as ``id`` where there is none.
            needed: Columns that it must have; a Parquet file's pages of these are read through, so that no damage that
                a checksum tells goes unnoticed.

        Raises:
            CurationError: No such file, another kind of file, one that cannot be read, or a column that it lacks.
        """
        path = Path(path).expanduser()
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise CurationError(f"{path} is a directory without Parquet files (*.parquet).")
        if not path.is_dir() and path.suffix not in (".parquet", ".csv"):
            raise CurationError(f"{path} is neither Parquet nor CSV by its name (.parquet, .csv).")
        if not path.exists():
            raise CurationError(f"{path} is not there.")
        is_csv = path.suffix == ".csv" and not path.is_dir()
        table = _csv(path) if is_csv else parquet(*files)
        try:
            there = [row[0] for row in self.connection.execute(f"DESCRIBE SELECT * FROM {table}").fetchall()]
            by_uid = "id" not in there and "uid" in there
            stored = ["uid" if by_uid and name == "id" else name for name in needed]
            for name in stored:
                if name not in there:
                    raise CurationError(f"{path} has no column {name!r}; {nearest_names(name, there)}.")
            for file in [] if is_csv else files:
                with pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False) as content:
                    for _ in content.iter_batches(columns=stored):
                        pass
        except (self._errors, OSError, pa.ArrowException) as error:
            raise CurationError(f"{path} cannot be read: {first_line(error)}") from error
        return f"(SELECT uid AS id, * EXCLUDE (uid) FROM {table})" if by_uid else table

    def ids(self, path: str | Path, kind: str, column: str = "id") -> str:
        """A file's ids as something to select ``id`` from, of the type that they have elsewhere.

        Args:
            path: Parquet or CSV.
            kind: ``BIGINT`` or ``VARCHAR``.
            column: That holds them.

        Raises:
            CurationError: As for :meth:`file`; missing ids, or ids of another type.
        """
        table, name = self.file(path, (column,)), named(column)
        text = Path(path).suffix == ".csv"
        typed = f"CASE WHEN {is_whole(name)} THEN TRY_CAST({name} AS BIGINT) END" if kind == "BIGINT" else name
        is_number = self.columns(table)[column] in _WHOLE
        if not text and is_number != (kind == "BIGINT"):
            kinds = {True: "whole numbers", False: "text"}
            raise CurationError(
                f"{path} has ids that are {kinds[is_number]}, and elsewhere they are {kinds[not is_number]}."
            )
        lost, example = self.row(f"SELECT count(*), any_value({name}::VARCHAR) FROM {table} WHERE {typed} IS NULL")
        if lost:
            raise CurationError(
                f"{path}: {lost} rows have no id, or one that is no whole number as the others are"
                f"{'' if example is None else f', such as {example!r}'}."
            )
        return f"(SELECT {typed} AS id, * EXCLUDE ({name}) FROM {table})"

    @contextlib.contextmanager
    def _progress_of(self, what: str) -> Iterator[None]:
        """Report the progress of the running query, from another thread."""
        if self._progress is None or not what:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                self.report_progress(what, max(0.0, self.connection.query_progress()) / 100)

        watcher = threading.Thread(target=watch, daemon=True)
        self.report_progress(what, 0.0)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
        self.report_progress(what, 1.0)


def parquet(*paths: Path, by_name: bool = False) -> str:
    """Parquet files as something to select from; nothing in their names means more than a name.

    Args:
        paths: Paths of the files.
        by_name: A file may lack a column that another has; it is null there.

    Example:
        >>> parquet(Path("run[1]/a.parquet"))
        "read_parquet(['run[[]1]/a.parquet'], hive_partitioning = false)"
    """
    how = "hive_partitioning = false" + (", union_by_name = true" if by_name else "")
    return f"read_parquet([{', '.join(_literal(path) for path in paths)}], {how})"


def _csv(path: Path) -> str:
    # Nothing is guessed: what looks like a number may be a name.
    form = "delim = ',', quote = '\"', escape = '\"', comment = '', allow_quoted_nulls = false"
    return f"read_csv({_literal(path)}, header = true, all_varchar = true, hive_partitioning = false, {form})"


def _literal(path: Path) -> str:
    return quoted(re.sub(r"[\[*?]", r"[\g<0>]", str(path)))


def sql_type(kind: pa.DataType) -> str:
    """DuckDB's name of an Arrow type.

    Example:
        >>> sql_type(pa.int64())
        'BIGINT'
    """
    return _SQL_TYPES[kind]


_SQL_TYPES = {
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.string(): "VARCHAR",
}


def is_whole(column: str) -> str:
    """SQL that is true where text is a whole number in the one way to write it."""
    return f"regexp_full_match({column}::VARCHAR, '0|-?[1-9][0-9]*')"


def quoted(text: str) -> str:
    """An SQL string.

    Example:
        >>> quoted("it's")
        "'it''s'"
    """
    return "'" + text.replace("'", "''") + "'"


def named(column: str) -> str:
    """An SQL name.

    Example:
        >>> named("clip score")
        '"clip score"'
    """
    return '"' + column.replace('"', '""') + '"'


def first_line(error: Exception) -> str:
    """What an error says, without its query."""
    return str(error).splitlines()[0]
