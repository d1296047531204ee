"""Tables that need not fit into memory, on DuckDB, which nothing else in the package imports."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_mimic.errors import CurationError
from lightning_mimic.files import TemporaryFolder
from lightning_mimic.user_files import first_line, writing

#: Told what is being done, and which share of it is.
Progress = Callable[[str, float], None]


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
        if not isinstance(memory, str):
            raise CurationError(f"`memory` is {memory!r}; say it like '2GB'.")
        self._memory = memory
        self._errors: type[Exception] = duckdb.Error
        with writing("the folder for temporary files"):
            self._spill = TemporaryFolder("mimic-curate-")
        #: For files that are only needed as long as the database is open.
        self.folder = self._spill.path
        self.connection = duckdb.connect()
        # Order costs memory; where it matters, a query says so.
        self.connection.execute("SET preserve_insertion_order = false")
        # DuckDB would draw its own bar in a notebook; without ipywidgets it cannot, and refuses the setting.
        with contextlib.suppress(duckdb.InvalidInputException):
            self.connection.execute("SET enable_progress_bar_print = false")
        self.connection.execute(f"SET temp_directory = {quoted(str(self.folder))}")
        try:
            self.connection.execute(f"SET memory_limit = {quoted(memory)}")
            if not re.match(r"\s*[0-9]", memory):  # DuckDB takes a negative size for no limit
                raise ValueError("no size")
        except (duckdb.Error, ValueError) as error:
            self.close()
            raise CurationError(f"`memory` is {memory!r}; say it like '2GB' ({first_line(error)}).") from error

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and removes what it has spilled."""
        self.connection.close()
        self._spill.close()

    def report_progress(self, what: str, share: float) -> None:
        """Report the progress of a task to the callback."""
        if self._progress is not None:
            self._progress(what, share)

    def run(self, sql: str, what: str = "") -> None:
        """Runs a statement; one that may take long says what it does."""
        with self._progress_of(what), self._own_errors():
            self.connection.execute(sql)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of a short answer."""
        with self._own_errors():
            return list(self.connection.execute(sql).fetchall())

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
        with self._own_errors():
            return dict(self.connection.execute(sql).fetchnumpy())

    @contextlib.contextmanager
    def _own_errors(self, *more: type[Exception]) -> Iterator[None]:
        kinds: tuple[type[Exception], ...] = (self._errors, UnicodeEncodeError, *more)
        try:
            yield
        except kinds as error:
            hint = f"; it may hold {self._memory}, which `memory` sets" if "Memory" in type(error).__name__ else ""
            raise CurationError(f"the database gave up: {first_line(error)}{hint}.") from error

    @contextlib.contextmanager
    def reader(self, sql: str, what: str = "") -> Iterator[pa.RecordBatchReader]:
        """An answer piece by piece, in its order."""
        with self._progress_of(what), self._own_errors():
            answer = self.connection.sql(sql).to_arrow_reader(1 << 17)
            yield pa.RecordBatchReader.from_batches(answer.schema, self._batches(answer))

    def _batches(self, answer: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        # A failure of the query is not one of the file that its rows are written to.
        with self._own_errors(OSError, pa.ArrowException):
            yield from answer

    def copy(self, query: str, path: Path, what: str = "") -> None:
        """Write the answer of a query to a Parquet file."""
        self.run(f"COPY ({query}) TO {quoted(str(path))} ({_PARQUET}, USE_TMP_FILE false)", what)

    def copy_by(self, query: str, key: str, values: int, folder: Path, what: str = "") -> None:
        """Write the answer of a query to Parquet files, those of each value of a column into a folder of their own.

        Args:
            query: The query.
            key: Name of the column, which is not written; the folders are called ``key=value``.
            values: About how many different values it has.
            folder: Made for the folders.
            what: What this is, for the progress.
        """
        self.run(f"SET partitioned_write_max_open_files = {max(values, 100)}")
        self.run(f"COPY ({query}) TO {quoted(str(folder))} ({_PARQUET}, PARTITION_BY ({named(key)}))", what)

    def memory_bytes(self) -> int:
        """Return how much the database may hold."""
        number, unit = str(self.value("SELECT current_setting('memory_limit')")).split()
        return int(float(number) * 1024 ** _UNITS.index(unit))

    def columns(self, table: str) -> dict[str, str]:
        """Names and DuckDB's types of a table's columns."""
        return {row[0]: row[1] for row in self.rows(f"DESCRIBE SELECT * FROM {table}")}

    def load(self, table: str, form: pa.Schema, batches: Iterable[pa.RecordBatch], what: str = "") -> None:
        """Make a table of Arrow's batches.

        Args:
            table: Name of the table.
            form: Names and types of its columns.
            batches: Its rows.
            what: What this is, for the progress, which has no shares.
        """
        if what:
            self.report_progress(what, 0.0)
        self._insert(f"CREATE TABLE {table} AS", form.empty_table())
        for batch in batches:
            self._insert(f"INSERT INTO {table}", pa.Table.from_batches([batch]))
        if what:
            self.report_progress(what, 1.0)

    def _insert(self, statement: str, rows: pa.Table) -> None:
        self.connection.register("incoming", rows)
        self.run(f"{statement} SELECT * FROM incoming")
        self.connection.unregister("incoming")

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


def database_version() -> str:
    """Return DuckDB's version, on which the hashes of ids depend."""
    return importlib.metadata.version("duckdb")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise :class:`CurationError` if a folder's disk has no room.

    Args:
        folder: Path of the folder.
        needed: Bytes, as far as they can be known beforehand.
        what: What needs them.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CurationError(
            f"{what} needs about {needed / 1e9:.3g} GB of disk in {folder.parent}, which has {free / 1e9:.3g} GB left. "
            "Free some, or use a larger disk (the environment variable TMPDIR names the folder for temporary files)."
        )


#: Fast to write and to read, for files that only this package reads.
_PARQUET = "FORMAT parquet, PARQUET_VERSION v2, COMPRESSION lz4_raw"
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


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


def _literal(path: Path) -> str:
    return quoted(re.sub(r"[\[*?]", r"[\g<0>]", os.fspath(path)))


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
    pa.uint64(): "UBIGINT",
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
