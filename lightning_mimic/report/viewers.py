"""Exports of samples and decisions for external viewers: Renumics Spotlight and FiftyOne."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mimic.database import Database
from lightning_mimic.errors import CurationError
from lightning_mimic.files import atomic_path
from lightning_mimic.manifest import Manifest
from lightning_mimic.report.facts import ManifestFacts, class_name
from lightning_mimic.report.samples import THUMBNAIL, Render, drawn
from lightning_mimic.user_files import user_path, writing

#: Default maximum number of samples; from a larger manifest the most suspicious, borderline and best ones are chosen.
MOST = 10_000
_CLASSES = {"label": "given_label", "predicted": "predicted_label", "corrected_label": "corrected_label"}


def write_spotlight(
    manifest: Manifest, dataset: Any, path: str | Path, *, most: int = MOST, render: Render | None = None
) -> Path:
    """Write a Parquet table with thumbnails for Renumics Spotlight.

    Show it with ``spotlight.show(path, dtype={"image": spotlight.Image})``.

    Args:
        manifest: Manifest whose samples are exported.
        dataset: Data set with the samples, as for :func:`~lightning_mimic.curation.report`.
        path: Path of the table, which must not exist.
        most: Maximum number of samples.
        render: Function from a sample to a PIL image, a text, or a pair of them.

    Returns:
        Path of the table.

    Raises:
        CurationError: The manifest is damaged, or the table cannot be written.
        MimicError: The data set has none of the samples, or a sample cannot be shown.
    """
    path = user_path(path, "spotlight")
    rows = _rows(manifest, most)
    pictures = dict(drawn(dataset, list(rows), render, size=THUMBNAIL))
    pairs = [pictures.get(key, (None, "")) for key in rows]
    images = [None if image is None else image.content for image, _ in pairs]
    texts = [text or None for _, text in pairs]
    table = pa.Table.from_pylist([{"id": str(key), **row} for key, row in rows.items()])
    for name, kind, values in (("text", pa.string(), texts), ("image", pa.binary(), images)):
        if any(value is not None for value in values):
            table = table.append_column(name, pa.array(values, kind))
    with writing(path), atomic_path(path, exclusive=True) as temporary:
        pq.write_table(table, temporary)
    return path


def fiftyone_samples(
    manifest: Manifest, dataset: Any, folder: str | Path, *, most: int = MOST, render: Render | None = None
) -> list[Any]:
    """Write images and return samples for a FiftyOne data set.

    Add them with ``fiftyone.Dataset("noisy").add_samples(fiftyone_samples(...))``. Each sample has a tag, ``kept`` or
    ``dropped``, its labels as classifications, and the fields ``sample_id_in_run``, ``score`` and ``posterior``.

    Args:
        manifest: Manifest whose samples are exported.
        dataset: Data set with the samples, as for :func:`~lightning_mimic.curation.report`; samples without an image
            are left out.
        folder: Directory for the images as PNG files, created if missing.
        most: Maximum number of samples.
        render: Function from a sample to a PIL image, or a pair of an image and a text.

    Returns:
        A list of ``fiftyone.Sample``.

    Raises:
        CurationError: FiftyOne is not installed, the manifest is damaged, or an image cannot be written.
        MimicError: The data set has none of the samples, or a sample cannot be shown.
    """
    try:
        import fiftyone
    except ModuleNotFoundError as error:
        raise CurationError("fiftyone_samples needs FiftyOne: pip install fiftyone.") from error
    folder = user_path(folder, "folder")
    rows, samples = _rows(manifest, most), []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for place, (key, (image, text)) in enumerate(drawn(dataset, list(rows), render)):
        if image is None:
            continue
        path = folder / f"{place:06d}.{image.kind}"
        with writing(path), atomic_path(path) as temporary:
            temporary.write_bytes(image.content)
        row = dict(rows[key])
        tags = ["kept" if row.pop("keep") else "dropped"]
        labels = {
            name: fiftyone.Classification(label=row.pop(name))
            for name in _CLASSES.values()
            if row.get(name) is not None
        }
        fields = {name: value for name, value in row.items() if value is not None}
        if text:
            fields["caption"] = text
        samples.append(fiftyone.Sample(str(path.absolute()), tags=tags, sample_id_in_run=str(key), **labels, **fields))
    return samples


def _rows(manifest: Manifest, most: int) -> dict[int | str, dict[str, Any]]:
    """Return the columns to export for each sample, by id, with class names instead of indices."""
    with Database() as database:
        shown = ManifestFacts(manifest, database).shown(most)
    columns = {_CLASSES.get(name, name): column for name, column in shown.columns.items()}
    for name in _CLASSES.values():
        if name in columns:
            columns[name] = [None if each is None else class_name(manifest.class_names, each) for each in columns[name]]
    rows = zip(shown.keep, *columns.values(), strict=True)
    return {
        key: {"keep": bool(keep), **dict(zip(columns, row, strict=True))}
        for key, (keep, *row) in zip(shown.ids, rows, strict=True)
    }
