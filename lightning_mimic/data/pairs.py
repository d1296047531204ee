"""Image-text pairs: id, caption and image from the files of a shard."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_mimic.data.images import ImageError, TooManyPixelsError
from lightning_mimic.data.images import decode_image as decode_any_image
from lightning_mimic.data.rejects import Reason
from lightning_mimic.errors import MimicError

#: Suffixes of a pair's image, in order of precedence.
IMAGES = ("jpg", "jpeg", "png", "webp")


class BrokenPairError(MimicError):
    """A pair that cannot be used for training.

    Args:
        reason: Reason for the list of rejects.
        detail: Details for the list of rejects.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Origin(NamedTuple):
    """Hold shard and key of a pair, and whether its id is made from them because it has no ``uid``."""

    shard: str
    key: str
    by_key: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """Hold a pair whose image is not yet decoded."""

    origin: Origin
    id: str
    image: bytes
    caption: str


def described(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the content of a pair's json, or an empty dict without one.

    Raises:
        BrokenPairError: The json cannot be read.
    """
    if "json" not in files:
        return {}
    try:
        content = json.loads(files["json"])
    except (ValueError, RecursionError) as error:
        raise BrokenPairError(Reason.UNREADABLE_JSON, str(error)) from error
    if not isinstance(content, dict):
        raise BrokenPairError(Reason.UNREADABLE_JSON, f"a {type(content).__name__}, not an object")
    return content


def id_of(key: str, description: Mapping[str, Any]) -> str:
    """Return the id of a pair: ``uid`` in its json, otherwise its name.

    Args:
        key: Name of the pair among all shards, see :func:`~lightning_mimic.data.shards.name_in_shards`.
        description: Content of the json, see :func:`described`.

    Raises:
        BrokenPairError: ``uid`` is neither a str nor an int, is empty, or is not UTF-8. The name is not used instead,
            because the pair would have another id elsewhere.

    Example:
        >>> id_of("000000007", {"uid": "9f8e"}), id_of("000000007", {})
        ('9f8e', '000000007')
    """
    uid = description.get("uid")
    if uid is not None and (not isinstance(uid, str | int) or isinstance(uid, bool) or not str(uid).strip()):
        raise BrokenPairError(Reason.UNUSABLE_ID, f"the uid is {str(uid)[:80]!a}, a {type(uid).__name__}")
    name = key if uid is None else str(uid)
    if not _is_text(name):
        raise BrokenPairError(Reason.UNREADABLE_JSON, f"the id {name!a} is not UTF-8")
    return name


def pair_of(shard: str, key: str, id: str, files: Mapping[str, bytes], description: Mapping[str, Any]) -> Pair:
    """Return a pair from its files.

    Args:
        shard: Shard of the pair.
        key: Key of the pair in the shard.
        id: Id of the pair, see :func:`id_of`.
        files: Contents of the files by suffix.
        description: Content of the json, see :func:`described`.

    Raises:
        BrokenPairError: There is no image or no caption, or the caption is empty or not UTF-8.

    Example:
        >>> pair_of("0.tar", "7", "7", {"jpg": b"...", "txt": b" a dog "}, {}).caption
        'a dog'
    """
    if "txt" in files:
        try:
            caption = files["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BrokenPairError(Reason.CAPTION_NOT_UTF8, str(error)) from error
    else:
        written = description.get("caption")
        if not isinstance(written, str):
            raise BrokenPairError(Reason.NO_CAPTION, shown(files))
        if not _is_text(written):  # json can contain lone surrogates
            raise BrokenPairError(Reason.CAPTION_NOT_UTF8, f"{written!a} in the json")
        caption = written
    if not caption.strip():
        raise BrokenPairError(Reason.EMPTY_CAPTION)
    image = next((files[suffix] for suffix in IMAGES if suffix in files), None)
    if image is None:
        raise BrokenPairError(Reason.NO_IMAGE, shown(files))
    origin = Origin(shard, key, by_key=description.get("uid") is None)
    return Pair(origin, id, image, caption.strip())


def decode_image(data: bytes, max_pixels: int) -> Any:
    """Decode the image of a pair with :func:`lightning_mimic.data.images.decode_image`.

    Raises:
        BrokenPairError: The image cannot be decoded, or has more pixels.
    """
    try:
        return decode_any_image(data, max_pixels)
    except ImageError as error:
        too_many = isinstance(error, TooManyPixelsError)
        reason = Reason.TOO_MANY_PIXELS if too_many else Reason.UNDECODABLE_IMAGE
        raise BrokenPairError(reason, str(error)) from error


def is_verified(image: bytes, description: Mapping[str, Any]) -> bool:
    """Verify an image against the ``sha256`` in its json, if they are comparable.

    The ``sha256`` is that of the downloaded file. If ``width`` or ``height`` differ from ``original_width`` or
    ``original_height``, the image was resized, and cannot be compared.

    Args:
        image: Content of the image file.
        description: Content of the json, see :func:`described`.

    Returns:
        Whether the image could be compared.

    Raises:
        BrokenPairError: The image differs from the ``sha256``.

    Example:
        >>> is_verified(b"image", {}), is_verified(b"image", {"sha256": hashlib.sha256(b"image").hexdigest()})
        (False, True)
    """
    stated = description.get("sha256")
    sizes = [(description.get(f"original_{side}"), description.get(side)) for side in ("width", "height")]
    if stated is None or any(None not in size and size[0] != size[1] for size in sizes):
        return False
    found = hashlib.sha256(image).hexdigest()
    if not isinstance(stated, str) or stated.lower() != found:
        raise BrokenPairError(Reason.CHANGED_IMAGE, f"its sha256 is {found}; the json says {str(stated)[:80]!a}")
    return True


def shown(files: Iterable[str]) -> str:
    """Return the suffixes of a pair's files, as a phrase."""
    names = sorted(files)
    return f"files: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
