"""The columns of a ledger, in the one table from which writing, reading and summarising follow."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

#: The type of ids, which a run chooses: int64, uint64 or string.
ID = pa.null()


@dataclass(frozen=True)
class Column:
    """One column of a ledger's part.

    Attributes:
        name: Name in the file.
        type: Arrow type; :data:`ID` stands for the type of the run's ids.
        unit: Unit of the values; empty for names, indices and shares.
        meaning: Content, in one phrase.
        nullable: Whether values may be missing, and parts may lack the column, which is then read as null.
        summary: How curation summarises a sample's values: by their mean or by the value of the last epoch; ``None``
            for columns that curation leaves out or treats by a rule of its own.
    """

    name: str
    type: pa.DataType
    unit: str
    meaning: str
    nullable: bool = False
    summary: Literal["mean", "last"] | None = None


#: Marks a missing class index in an integer array, which cannot hold NaN.
NO_CLASS = -(2**63)

#: Columns in the order of the file. New columns must be nullable, so that older ledgers stay readable.
COLUMNS = (
    Column("id", ID, "", "the sample's id, an int or a str"),
    Column("epoch", pa.int32(), "", "index of the epoch"),
    Column("step", pa.int64(), "steps", "optimizer steps done before the one that the row took part in"),
    Column("batch", pa.int64(), "", "index of the micro-batch within the epoch"),
    Column("rank", pa.int32(), "", "process that scored the row"),
    Column("position", pa.int32(), "", "row within this rank's micro-batch"),
    Column("attempt", pa.int32(), "", "0, and one more for each resumed or repeated fit"),
    Column("score", pa.float32(), "loss per unit of weight distance", "positive: towards the reference", True),
    Column("weight", pa.float32(), "", "sums to 1 over the micro-batches of all ranks", True),
    Column("loss", pa.float32(), "loss", "the sample's own loss, before the step", True),
    Column("batch_size", pa.int32(), "samples", "size of the micro-batches of all ranks together", True),
    Column("flag", pa.string(), "", "`ok`, or what was special about the row: a name of `Flag` in lower case"),
    Column("label", pa.int64(), "", "index of the given class", True, "last"),
    Column("predicted", pa.int64(), "", "index of the class that the model predicted", True, "last"),
    Column("posterior", pa.float32(), "", "probability that the label is right, by the reference", True, "mean"),
    Column("reference_predicted", pa.int64(), "", "index of the class that the reference predicted", True, "last"),
    Column("reference_confidence", pa.float32(), "", "its probability of that class, calibrated", True, "mean"),
    Column("reference_loss", pa.float32(), "loss", "its cross-entropy on the label, calibrated", True, "mean"),
)


def schema(id_type: pa.DataType) -> pa.Schema:
    """Return the schema of a part.

    Args:
        id_type: ``int64``, ``uint64`` or ``string``.

    Example:
        >>> schema(pa.string()).names[:3]
        ['id', 'epoch', 'step']
    """
    return pa.schema([(each.name, id_type if each.type == ID else each.type) for each in COLUMNS])


#: Names of the columns in the oldest ledgers, whose descriptions do not list them.
FIRST_COLUMNS = tuple(each.name for each in COLUMNS[: [each.name for each in COLUMNS].index("predicted") + 1])


def nullable_columns() -> tuple[str, ...]:
    """Return the names of the columns that a part may lack."""
    return tuple(each.name for each in COLUMNS if each.nullable)


def summarised_columns() -> tuple[Column, ...]:
    """Return the columns that curation summarises per sample, see ``Column.summary``."""
    return tuple(each for each in COLUMNS if each.summary is not None)


def columns_as_markdown() -> str:
    """Return the table of the columns in Markdown, for the documentation."""
    lines = ["| column | type | unit | meaning |", "| --- | --- | --- | --- |"]
    for each in COLUMNS:
        kind = "int64, uint64 or string" if each.type == ID else str(each.type)
        kind += ", may be null" if each.nullable else ""
        lines.append(f"| `{each.name}` | {kind} | {each.unit or '–'} | {each.meaning} |")
    return "\n".join(lines)
