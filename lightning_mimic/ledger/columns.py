"""The columns of a ledger: everything that writes, reads or sums them up follows from this table."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

#: The type of ids, which a run chooses: int64, uint64 or string.
ID = pa.null()


@dataclass(frozen=True)
class Column:
    """One column of a part.

    Attributes:
        name: Name in the file.
        type: Arrow's type; :data:`ID` stands for that of the run's ids.
        unit: Unit of the values; empty for names, indices and shares.
        meaning: Content, in one phrase.
        nullable: A row may have no value, and a part may lack the column: a reader takes it as null.
        summary: How curation sums up a sample's values: their mean, or the one of its last epoch; ``None``: it is not
            in curation's tables, or has a rule of its own there.
    """

    name: str
    type: pa.DataType
    unit: str
    meaning: str
    nullable: bool = False
    summary: Literal["mean", "last"] | None = None


#: Stands for null in an array of class indices, which has no NaN.
NO_CLASS = -(2**63)

#: In the order of the file. A new column is nullable, so that ledgers that lack it stay readable.
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


#: Names of the columns of the first ledgers, whose descriptions do not list them.
FIRST_COLUMNS = tuple(each.name for each in COLUMNS[: [each.name for each in COLUMNS].index("predicted") + 1])


def nullable_columns() -> tuple[str, ...]:
    """Return the names of the columns that a part may lack."""
    return tuple(each.name for each in COLUMNS if each.nullable)


def summarised_columns() -> tuple[Column, ...]:
    """Return the columns that curation sums up by sample, as their ``summary`` says."""
    return tuple(each for each in COLUMNS if each.summary is not None)


def columns_as_markdown() -> str:
    """Return the table of the columns as the documentation shows it."""
    lines = ["| column | type | unit | meaning |", "| --- | --- | --- | --- |"]
    for each in COLUMNS:
        kind = "int64, uint64 or string" if each.type == ID else str(each.type)
        kind += ", may be null" if each.nullable else ""
        lines.append(f"| `{each.name}` | {kind} | {each.unit or '–'} | {each.meaning} |")
    return "\n".join(lines)
