"""Lists of images checked by a person: reading them, and matching them with the images of a data set."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from lightning_mimic.errors import CurationError, MimicError, join_names, nearest_names
from lightning_mimic.tables import Table
from lightning_mimic.user_files import user_path

#: Columns that identify an image; a table has exactly one of them.
_IMAGE = ("id", "path", "file", "filename")
#: Columns with the class name, in order of precedence; `label` is an index in tables written by this package.
_LABEL = ("label_name", "label")
#: Number of examples in a message.
_SHOWN = 3
#: Maximum number of ids among which the nearest one is searched.
_COMPARED = 5_000


@dataclass(frozen=True)
class TrustedImages:
    """Hold a list of images that a person has checked.

    Attributes:
        source: Path of the list, for messages.
        images: Paths or ids as written in the list.
        labels: Class names; ``None`` for images whose given label is right.
    """

    source: str
    images: Sequence[str]
    labels: Sequence[str | None]


def read_trusted_list(path: str | Path) -> TrustedImages:
    r"""Read a list of checked images.

    Args:
        path: A ``.csv`` or ``.parquet`` file with one column ``id``, ``path``, ``file`` or ``filename`` and, for
            corrected labels, a column ``label`` or ``label_name`` with class names, in which an empty cell means that
            the given label is right; or a ``.txt`` file with one path per line.

    Raises:
        MimicError: The file does not exist or has another format, has none or several of these columns, has a row
            without a path, or is empty.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "trusted.csv")
        >>> _ = path.write_text("file,label\ncat/1.jpg,\ncat/2.jpg,dog\n")
        >>> listed = read_trusted_list(path)
        >>> listed.images, listed.labels
        (['cat/1.jpg', 'cat/2.jpg'], [None, 'dog'])
    """
    file = user_path(path, "trusted")
    if not file.exists():
        near = nearest_names(file.name, [each.name for each in file.parent.glob("*.*")]) if file.parent.is_dir() else ""
        raise MimicError(
            f"`trusted`: there is no file {path}{near and f'; {near}'}. Expected a share of the images, or a list of "
            "checked images (.csv, .parquet or .txt)."
        )
    try:
        images, labels = _from_text(file) if file.suffix == ".txt" else _from_table(file)
    except CurationError as error:
        raise MimicError(f"`trusted`: {error}") from error
    if gaps := [row for row, image in enumerate(images, 1) if not image]:
        raise MimicError(f"`trusted`: {path} has {len(gaps)} rows without a path; the first is row {gaps[0]}.")
    if not images:
        raise MimicError(f"`trusted`: {path} lists no images.")
    return TrustedImages(str(path), images, labels)


def _from_text(file: Path) -> tuple[list[str], list[str | None]]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise MimicError(f"`trusted`: {file} cannot be read: {error}.") from error
    images = [line for line in lines if line]
    return images, [None] * len(images)


def _from_table(file: Path) -> tuple[list[str], list[str | None]]:
    table = Table(file)
    named = [name for name in _IMAGE if name in table.names]
    if len(named) != 1:
        raise MimicError(
            f"`trusted`: {file} has the columns {join_names(table.names)}; expected exactly one of "
            f"{', '.join(_IMAGE)}, with the paths of the images, and optionally label, with the checked class."
        )
    corrected = [name for name in _LABEL if name in table.names][:1]
    values = table.read([*named, *corrected])
    images = ["" if each is None else str(each) for each in values[named[0]]]
    if not corrected:
        return images, [None] * len(images)
    return images, [None if each in (None, "") else str(each) for each in values[corrected[0]]]


def find_trusted(
    listed: TrustedImages, ids: Sequence[str], files: Sequence[Path] | None, class_names: Sequence[str]
) -> Mapping[int, int | None]:
    """Find the listed images among those of a data set.

    An entry names the image with that id or, if there is none, the image whose path ends with the entry: a path
    relative to the root, a path that includes the root, or a file name.

    Args:
        listed: List of checked images.
        ids: Ids of the images, by row.
        files: Paths of the images, by row; ``None`` if they are not files.
        class_names: Names of the classes, in the order of the labels.

    Returns:
        Checked label by row; ``None`` if the given label is right.

    Raises:
        MimicError: An entry names no image or several, a label is not a class, or an image has two labels.

    Example:
        >>> listed = TrustedImages("trusted.csv", ["cat/1.jpg", "7.jpg"], [None, "cat"])
        >>> ids = ["cat/1.jpg", "cat/2.jpg", "dog/7.jpg"]
        >>> dict(find_trusted(listed, ids, [Path("images", each) for each in ids], ["cat", "dog"]))
        {0: None, 2: 0}
    """
    matches = _matches(listed.images, ids, files)
    if unknown := [image for image, rows in zip(listed.images, matches, strict=True) if not rows]:
        raise MimicError(
            f"`trusted`: {len(unknown)} of {len(listed.images)} entries of {listed.source} name no training image: "
            f"{join_names(unknown, _SHOWN)}; {nearest_names(_posix(unknown[0]), ids[:_COMPARED], count=2)}. Expected "
            "paths below `root`, or file names."
        )
    if several := [(image, rows) for image, rows in zip(listed.images, matches, strict=True) if len(rows) > 1]:
        image, rows = several[0]
        raise MimicError(
            f"`trusted`: {len(several)} of {len(listed.images)} entries of {listed.source} name more than one image: "
            f"{image!r} is {join_names([ids[row] for row in rows], _SHOWN)}. Write the paths below `root`."
        )
    numbers = {name: label for label, name in enumerate(class_names)}
    if wrong := [label for label in listed.labels if label is not None and label not in numbers]:
        raise MimicError(
            f"`trusted`: {len(wrong)} labels of {listed.source} are not classes, such as "
            f"{join_names(list(dict.fromkeys(wrong)), _SHOWN)}; {nearest_names(wrong[0], class_names)}. Expected the "
            "name of a class, or an empty cell if the given label is right."
        )
    found: dict[int, int | None] = {}
    for (row,), label in zip(matches, listed.labels, strict=True):
        number = None if label is None else numbers[label]
        if found.setdefault(row, number) != number:
            raise MimicError(f"`trusted`: {listed.source} has two different labels of {ids[row]!r}; remove one.")
    return found


def _matches(images: Sequence[str], ids: Sequence[str], files: Sequence[Path] | None) -> list[list[int]]:
    """Return the rows that each entry names."""
    rows = {each: row for row, each in enumerate(ids)}
    by_name: dict[str, list[int]] = defaultdict(list)
    for row, file in enumerate(files or ()):
        by_name[file.name].append(row)

    def named(image: str) -> list[int]:
        path = _posix(image)
        for exact in (image, path):
            if exact in rows:
                return [rows[exact]]
        if path.startswith("../"):
            path = _posix(os.path.abspath(path))
        parts = PurePath(path).parts
        same_name = by_name.get(PurePath(path).name, [])
        return [row for row in same_name if files and files[row].absolute().parts[-len(parts) :] == parts]

    return [named(image) for image in images]


def _posix(image: str) -> str:
    """Return a path in the form of ids, without backslashes and redundant parts."""
    return os.path.normpath(image.replace("\\", "/"))
