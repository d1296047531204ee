"""Read a manifest: decisions about samples, with their provenance."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lightning_mimic.errors import CurationError
from lightning_mimic.manifest.exports import export
from lightning_mimic.manifest.filter import kept_subset, read_decisions
from lightning_mimic.user_files import open_parquet, user_path

if TYPE_CHECKING:
    from torch.utils.data import Subset

#: Key of the provenance among a Parquet file's key-value metadata.
PROVENANCE = b"lightning_mimic"


class Manifest:
    """Decisions about samples, with their provenance.

    The file has a row per sample (or per listing of a sample, where a pool lists it more than once), the most
    suspicious first. A manifest made of others has ``id``, ``keep``, ``reason``, the recorded labels and
    predictions with their names, and ``corrected_label`` where one of them has it.

    - ``id``; ``keep``; ``reason``: why it goes or has no opinion, null where it is kept on its score;
    - ``score``: mean mimic score, loss per unit of weight distance, unbounded; lower is more suspicious, null: none;
    - ``scorings``: how many scores that is the mean of;
    - ``relative_weight``: mean of weight times batch size, 0 to B; 1 is the weight in a uniform batch;
    - ``votes_keep`` of ``votes``: null unless many voted;
    - ``label`` and ``predicted``: indices of classes, null where not recorded;
    - ``posterior``: mean probability that the label is right, by the calibrated reference, where recorded;
    - ``reference_predicted``: index of the class that the reference suggests, where recorded;
    - ``label_name``, ``predicted_name`` and ``reference_predicted_name``: the names of these classes, where the run
      recorded them;
    - ``corrected_label`` and its ``corrected_label_name``: what a person has put in place of ``label``, null elsewhere;
    - what else the ledger's table of columns sums up and the run recorded.

    Args:
        path: Path of a file with columns ``id`` and ``keep``.

    Raises:
        CurationError: No such file, or something else.

    Example:
        >>> Manifest("nowhere.parquet")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.CurationError: nowhere.parquet is no manifest: there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path, "path")
        with open_parquet(self.path, "is no manifest") as file:
            names, metadata = file.schema_arrow.names, file.schema_arrow.metadata or {}
            missing = [name for name in ("id", "keep") if names.count(name) != 1]
            if missing:
                raise CurationError(f"{self.path} is no manifest: its columns are {', '.join(names)}.")
            provenance = json.loads(metadata.get(PROVENANCE, b"{}"))
            if not isinstance(provenance, dict):
                raise CurationError(f"{self.path} is no manifest: its provenance is {provenance!r}.")
        #: Settings and sources of the decisions.
        self.provenance: dict[str, Any] = provenance

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes that ``label`` and ``predicted`` are indices of; ``None`` where not recorded."""
        names = self.provenance.get("class_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise CurationError(f"{self.path}: 'class_names' in its provenance is {names!r}; expected a list of names.")
        return None if names is None else tuple(names)

    def table(self) -> pa.Table:
        """Read all of it into memory; ``keep`` is null where nothing was decided, which counts as not kept.

        Raises:
            CurationError: The file is damaged, or its ids or decisions are something else.
        """
        return read_decisions(self.path, None)

    def subset(self, dataset: Any) -> "Subset":
        """Return the samples of a data set that are kept, in its order, with corrected labels where there are some.

        Args:
            dataset: A :class:`~lightning_mimic.WithIds`, or one whose row numbers are the ids; subsets of these and
                joined ones are looked through.

        Raises:
            MimicError: The manifest is of another data set, or the ids of this one cannot be known.
        """
        return kept_subset(dataset, self.path)

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV; text that a spreadsheet would run as a formula has an apostrophe in front of it."""
        export(self, "csv", path)

    def to_datacomp(self, path: str | Path) -> None:
        """Write the kept ids as DataComp's resharder reads them: ``.npy`` of ``u8,u8``, sorted, with repeats.

        Raises:
            CurationError: An id is not 32 hexadecimal digits.
        """
        export(self, "datacomp", path)

    def to_cleanlab(self, path: str | Path) -> None:
        """Write a table as cleanlab's ``find_label_issues`` returns it, as CSV in the order of ids.

        Its columns are ``is_label_issue`` (not kept), ``label_quality`` (share of the other scored samples with a lower
        mean score, 0 to 1; lower is worse, empty: never scored), ``given_label`` and ``predicted_label`` (names of
        classes where they are known), and ``reference_label``, which the reference suggests, where it is recorded.

        Raises:
            CurationError: No labels were recorded.
        """
        export(self, "cleanlab", path)
