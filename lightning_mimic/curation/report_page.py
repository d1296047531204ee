"""The function :func:`report`, which writes one self-contained web page about a manifest."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_mimic.curation.scores import Scores
from lightning_mimic.database import Database, Progress
from lightning_mimic.errors import CurationError
from lightning_mimic.files import atomic_write
from lightning_mimic.manifest import Manifest
from lightning_mimic.report import (
    NAMES,
    Courses,
    ManifestFacts,
    Render,
    Shown,
    Views,
    first_rows,
    held_views,
    render_page,
    write_spotlight,
)
from lightning_mimic.user_files import user_path, writing

#: Largest number of rows that the page can search and filter without delay.
MOST_ROWS = 100_000
#: Default number of samples whose images or texts are in the page.
MOST_VIEWS = 1000


def report(  # noqa: PLR0913
    manifest: str | Path | Manifest,
    dataset: Any = None,
    out: str | Path = "report",
    *,
    render: Render | None = None,
    ledger: str | Path | None = None,
    against: str | Path | Manifest | None = None,
    names: tuple[str, str] = NAMES,
    spotlight: str | Path | None = None,
    title: str | None = None,
    most_views: int = MOST_VIEWS,
    megabytes: float = 25,
    memory: str = "2GB",
    progress: Progress | None = None,
) -> Path:
    """Write a web page that shows the decisions of a manifest and the samples.

    The page works without a network and sends no data. Its figures cover the whole manifest. It lists up to 100,000
    samples; of a larger manifest, the most suspicious samples, those nearest to the cut, and the best. It contains no
    file paths.

    Args:
        manifest: Manifest, its file, or the directory that ``mimic-curate`` wrote.
        dataset: Samples to show: a map-style data set with the ids that were scored, or a data module of
            ``lightning_mimic.data``; ``None``: the page has no images and no texts.
        out: Directory for the page, ``index.html``; an existing page is replaced.
        render: Function from a sample to a PIL image, a text, or a pair of them; by default the first image and the
            first text of a sample, or its numbers.
        ledger: Ledger with the scores behind the manifest, to show each sample's score by epoch.
        against: Another manifest of the same samples; the page then shows the samples that only one of the two keeps.
        names: Names of the two manifests on the page.
        spotlight: Path of a Parquet table to write for Renumics Spotlight, see
            :func:`~lightning_mimic.report.write_spotlight`.
        title: Headline of the page.
        most_views: Maximum number of samples whose images or texts are in the page.
        megabytes: Maximum size of the page, MB; further images and texts are left out.
        memory: Memory limit of the database, such as ``"2GB"``; larger data spill to disk.
        progress: Callback for progress, called with a description and the completed share.

    Returns:
        Path of the page.

    Raises:
        CurationError: The manifest does not exist or is damaged, or the page cannot be written.
        MimicError: The data set has none of the samples, or a sample cannot be shown.

    Example:
        >>> import tempfile, pyarrow as pa, pyarrow.parquet as pq
        >>> folder = tempfile.mkdtemp()
        >>> pq.write_table(pa.table({"id": [0, 1], "keep": [True, False]}), f"{folder}/manifest.parquet")
        >>> report(f"{folder}/manifest.parquet", ["a cat", "a dog"], f"{folder}/report").name
        'index.html'
    """
    if spotlight is not None and dataset is None:
        raise CurationError("`spotlight` needs the samples; give `dataset`, too.")
    found = opened_manifest(manifest)
    headline = title or (_TITLE if against is None else f"{names[0]} and {names[1]}")
    advance = progress or (lambda what, share: None)
    with Database(memory, progress) as database:
        advance("counting", 0.0)
        facts = ManifestFacts(found, database, None if against is None else opened_manifest(against))
        shown = facts.shown(MOST_ROWS)
        courses = {} if ledger is None else _courses(user_path(ledger, "ledger"), database, shown, most_views)
        page = render_page(facts, shown, Views(), courses, headline, names)
        advance("counting", 1.0)
        if dataset is not None:
            room = megabytes * 1e6 - len(page.encode())
            held = held_views(dataset, shown, most_views, room, render, advance)
            page = render_page(facts, shown, held, courses, headline, names)
    folder = user_path(out, "out")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "index.html", "w") as file:
            file.write(page)
    if spotlight is not None:
        write_spotlight(found, dataset, spotlight, render=render)
    return folder / "index.html"


_TITLE = "Which samples to trust"


def opened_manifest(given: str | Path | Manifest) -> Manifest:
    """Return a manifest given as an object, as its file, or as the directory that ``mimic-curate`` wrote.

    Raises:
        CurationError: The manifest does not exist.
    """
    if isinstance(given, Manifest):
        return given
    path = user_path(given, "manifest")
    return Manifest(path / "manifest.parquet" if path.is_dir() else path)


def _courses(ledger: Path, database: Database, shown: Shown, most: int) -> Courses:
    """Return the scores by epoch of the samples whose images or texts are shown, by row."""
    rows = {shown.ids[row]: row for row in first_rows(shown, most)}
    if not rows:
        return {}
    scorings = Scores(ledger, database, "course", allow_partial=True).scorings().name
    ids = pa.array(list(rows))
    database.load("wanted", pa.schema([("id", ids.type)]), [pa.RecordBatch.from_arrays([ids], ["id"])])
    found: dict[int, list[tuple[int, float]]] = {}
    for key, epoch, score in database.rows(
        f"SELECT id, epoch, score FROM {scorings} WHERE id IN (SELECT id FROM wanted) ORDER BY epoch"
    ):
        found.setdefault(rows[key], []).append((epoch, score))
    return found
