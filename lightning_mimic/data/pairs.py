"""One image-text pair: from the files of its shard to id, caption and image."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_mimic.data.images import ImageError, TooManyPixelsError
from lightning_mimic.data.images import decode_image as decode_any_image
from lightning_mimic.data.rejects import Reason
from lightning_mimic.errors import MimicError

#: Suffixes of a pair's image, in the order in which they are looked for.
IMAGES = ("jpg", "jpeg", "png", "webp")


class BrokenPairError(MimicError):
    """A pair that cannot train.

    Args:
        reason: What the rejects file says.
        detail: And more of it.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Origin(NamedTuple):
    """Where a pair lies, and whether its id comes from there, for want of a ``uid``."""

    shard: str
    key: str
    by_key: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair whose image is not decoded yet."""

    origin: Origin
    id: str
    image: bytes
    caption: str


def described(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What a pair's json says; empty, if it has none.

    Raises:
        BrokenPairError: It cannot be read.
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
    """The pair's id: ``uid`` of its json, else its key in the shard.

    Args:
        key: Its name among all shards, such as :func:`~lightning_mimic.data.shards.name_in_shards` makes it.
        description: Of :func:`described`.

    Raises:
        BrokenPairError: Its ``uid`` is neither a text nor an integer, is empty, or not UTF-8. The pair is not taken by
            its key instead, because it would have another id elsewhere.

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
    """The pair, whole.

    Args:
        shard: Where it lies.
        key: Its name there.
        id: Of :func:`id_of`.
        files: Contents by suffix.
        description: Of :func:`described`.

    Raises:
        BrokenPairError: It has no image, no caption, or an empty one.

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
        if not _is_text(written):  # json can hold half a character
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
    """Decode a pair's image, as :func:`lightning_mimic.data.images.decode_image` does.

    Raises:
        BrokenPairError: It cannot be decoded, or has more pixels.
    """
    try:
        return decode_any_image(data, max_pixels)
    except ImageError as error:
        too_many = isinstance(error, TooManyPixelsError)
        reason = Reason.TOO_MANY_PIXELS if too_many else Reason.UNDECODABLE_IMAGE
        raise BrokenPairError(reason, str(error)) from error


def is_verified(image: bytes, description: Mapping[str, Any]) -> bool:
    """Compare an image with the ``sha256`` of its json.

    It is that of the file as it was downloaded: where ``width`` or ``height`` differ from ``original_width`` or
    ``original_height``, the image in the shard is another file, made from that one.

    Args:
        image: Content of the image's file.
        description: Of :func:`described`.

    Returns:
        Whether they could be compared.

    Raises:
        BrokenPairError: The image is not the one that the json describes.

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
