"""Rendering of samples for people: a thumbnail, a text, or both."""

import base64
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from numbers import Number, Real
from typing import Any, Protocol, runtime_checkable

from lightning_mimic.dataset_ids import row_ids, sample_ids
from lightning_mimic.errors import MimicError
from lightning_mimic.user_files import first_line

#: Function from a sample to a PIL image, a text, or a pair of them.
Render = Callable[[Any], Any]

#: Longest side of a thumbnail, in pixels; the page displays it at half this size.
THUMBNAIL = 192
#: Images whose longest side has at most this many pixels are stored losslessly.
_SMALL = 48
_MOST_TEXT = 600
_MOST_NUMBERS = 12
_THREADS = 4
#: Maximum number of samples that wait to be rendered.
_WAITING = 64


@dataclass(frozen=True)
class Encoded:
    """Hold an encoded image.

    Attributes:
        kind: File format, ``"png"`` or ``"webp"``.
        content: Bytes of the file.
    """

    kind: str
    content: bytes


@dataclass(frozen=True)
class View:
    """Hold the rendered image and text of a sample.

    Attributes:
        image: Thumbnail as a ``data:`` URL; ``None`` without an image.
        text: Caption, text or numbers; empty without any.
    """

    image: str | None
    text: str = ""


@runtime_checkable
class HasSamples(Protocol):
    """A data module or other object that returns samples by id."""

    def samples_by_id(self, ids: Sequence[int | str]) -> Iterable[tuple[int | str, Any]]:
        """Yield each id once, in any order, with its sample before any transform."""


def views(source: Any, ids: Sequence[int | str], render: Render | None = None) -> Iterator[tuple[int | str, View]]:
    """Yield the thumbnails and texts of samples; see :func:`drawn`.

    Example:
        >>> dict(views(["a cat", "a dog"], [1]))
        {1: View(image=None, text='a dog')}
    """
    for key, (image, text) in drawn(source, ids, render, size=THUMBNAIL):
        shown = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
        yield key, View(None if image is None else _address(image), shown)


def drawn(
    source: Any, ids: Sequence[int | str], render: Render | None = None, size: int | None = None
) -> Iterator[tuple[int | str, tuple[Encoded | None, str]]]:
    """Yield the encoded image and the text of samples, reading each sample once.

    Samples are read one at a time, because a data set need not be thread-safe; rendering runs in parallel to that.

    Args:
        source: Object with :meth:`HasSamples.samples_by_id`, or a map-style data set, whose ids are those of
            :func:`~lightning_mimic.dataset_ids.sample_ids` or, without ids, row numbers.
        ids: Ids of the samples, in the order in which they should be read.
        render: Function from a sample to a PIL image, a text, or a pair of them; by default :func:`default_render`.
        size: Longest side of the images in pixels; ``None``: original size.

    Yields:
        Id, image and text of each sample that the source has; for an unreadable sample, the text is the error.

    Raises:
        MimicError: ``source`` is neither, or has none of the ids, or ``render`` returned something else.
    """
    draw = partial(_drawn, default_render if render is None else render, size)
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[tuple[int | str, Future[tuple[Encoded | None, str]]]] = deque()
        for key, sample in source.samples_by_id(ids) if isinstance(source, HasSamples) else _samples(source, ids):
            waiting.append((key, pool.submit(draw, sample, key)))
            while len(waiting) > _WAITING:
                first, done = waiting.popleft()
                yield first, done.result()
        for key, done in waiting:
            yield key, done.result()


def default_render(sample: Any) -> Any:
    """Return the first image and the first text of a sample, or its numbers if it has neither.

    Args:
        sample: PIL image, array or tensor, text, number, or a tuple, list or mapping of these. An array is an image if
            it has shape ``(C, H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels, or is uint8 of shape ``(H, W)``. An
            image that is not uint8 and exceeds 0 to 1, because it was normalised, is rescaled to that range.

    Raises:
        MimicError: The sample has another type.

    Example:
        >>> default_render(([0.5, 2.0], 1))
        '0.5, 2'
    """
    sample = getattr(sample, "sample", sample) if type(sample).__name__ == "SampleWithId" else sample
    parts = list(_parts(sample))
    image = next((found for part in parts if (found := _as_image(part)) is not None), None)
    text = next((part for part in parts if isinstance(part, str)), None)
    if image is not None or text is not None:
        return text if image is None else image if text is None else (image, text)
    # The last of several parts is usually the label, which is shown anyway.
    numbers = [each for part in parts[: max(1, len(parts) - 1)] for each in _numbers(part)]
    if not numbers:
        raise MimicError(
            f"a sample is a {type(sample).__name__}, which the report cannot show. Give `render`, a function from a "
            "sample to a PIL image, a text, or a pair of them."
        )
    shown = ", ".join(f"{number:.4g}" for number in numbers[:_MOST_NUMBERS])
    return f"{shown}, … ({len(numbers)} numbers)" if len(numbers) > _MOST_NUMBERS else shown


def _rows(dataset: Any, ids: Sequence[int | str]) -> dict[int | str, int]:
    """Return the row numbers of ids in a data set."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise MimicError(
            f"`dataset` is a {type(dataset).__name__}; expected a map-style data set, such as WithIds(dataset), or a "
            "data module of lightning_mimic.data."
        )
    known = sample_ids(dataset)
    wanted = set(ids)
    found: dict[int | str, int] = {}
    for row, key in enumerate(row_ids(dataset) if known is None else known):
        if key in wanted:
            found.setdefault(key, row)
    if wanted and not found:
        example = next(iter(ids))
        raise MimicError(
            f"`dataset` has none of the {len(wanted)} samples to show, such as id {example!r}. Give the data set that "
            "was scored, with the same ids."
        )
    return found


def _samples(dataset: Any, ids: Sequence[int | str]) -> Iterator[tuple[int | str, Any]]:
    """Yield the samples of a data set; an unreadable sample is replaced by the error."""
    rows = _rows(dataset, ids)
    for key in ids:
        if key in rows:
            try:
                sample = dataset[rows[key]]
            except Exception as error:  # data sets and decoders raise all kinds of errors
                sample = _Unreadable(f"cannot be read: {first_line(error)}")
            yield key, sample


class _Unreadable(str):
    """Error message that replaces an unreadable sample."""


def _drawn(render: Render, size: int | None, sample: Any, key: int | str) -> tuple[Encoded | None, str]:
    shown = str(sample) if isinstance(sample, _Unreadable) else render(sample)
    image, text = shown if isinstance(shown, tuple) and len(shown) == 2 else (shown, None)
    if isinstance(image, str):
        image, text = None, image
    picture = None if image is None else _as_image(image)
    if (image is not None and picture is None) or not isinstance(text, str | None):
        kind = type(shown).__name__
        raise MimicError(
            f"`render` returned a {kind} for sample {key!r}; expected a PIL image, a text, or a pair of them."
        )
    return None if picture is None else _encoded(picture, size), text or ""


def _parts(sample: Any) -> Iterator[Any]:
    if isinstance(sample, Mapping):
        for name, part in sample.items():
            if name not in ("id", "ids", "label", "labels"):
                yield from _parts(part)
    elif isinstance(sample, tuple | list) and not all(isinstance(part, Number) for part in sample):
        for part in sample:
            yield from _parts(part)
    else:
        yield sample


def _as_image(part: Any) -> Any:
    """Return a PIL image of mode RGB or L, or ``None`` if the part is not an image."""
    from PIL import Image

    if isinstance(part, Image.Image):
        return part if part.mode in ("RGB", "L") else part.convert("RGB")
    array = _array(part)
    if array is None:
        return None
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    byte = array.dtype.name == "uint8"
    if not ((array.ndim == 3 and array.shape[2] in (1, 3, 4)) or (array.ndim == 2 and byte)) or not array.size:
        return None
    if not byte:
        array = array.astype("float64")
        low, high = array.min(), array.max()
        if low < 0 or high > 1:
            array = (array - low) / max(high - low, 1e-12)
        array = (array * 255).round().astype("uint8")
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    image = Image.fromarray(array)
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _array(part: Any) -> Any:
    """Return a tensor or array as a NumPy array, or ``None`` for other types."""
    if hasattr(part, "detach"):
        part = part.detach().cpu()
        part = part.float() if part.is_floating_point() else part
        return part.numpy()
    return part if hasattr(part, "dtype") and hasattr(part, "ndim") else None


def _numbers(part: Any) -> list[float]:
    array = _array(part)
    if array is not None:
        return [float(each) for each in array.reshape(-1).tolist() if not isinstance(each, str)]
    if isinstance(part, tuple | list):
        return [float(each) for each in part if isinstance(each, Real)]
    return [float(part)] if isinstance(part, Real) else []


def _encoded(image: Any, size: int | None) -> Encoded:
    """Encode an image: losslessly if it is small or ``size`` is ``None``, otherwise as a thumbnail."""
    content = io.BytesIO()
    if size is None or max(image.size) <= _SMALL:
        image.save(content, "PNG")
        return Encoded("png", content.getvalue())
    image = image.copy()
    image.thumbnail((size, size))
    image.convert("RGB").save(content, "WEBP", quality=75)
    return Encoded("webp", content.getvalue())


def _address(image: Encoded) -> str:
    return f"data:image/{image.kind};base64,{base64.b64encode(image.content).decode()}"
