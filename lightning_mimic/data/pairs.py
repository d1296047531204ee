"""One image-text pair: from the files of its shard to id, caption and image."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from lightning_mimic.data.rejects import Reason
from lightning_mimic.errors import MimicError

#: Suffixes of a pair's image, in the order in which they are looked for.
IMAGES = ("jpg", "jpeg", "png", "webp")
# What the web calls .jpg. Other formats that PIL knows start programs (EPS) or have no business here.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


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


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair whose image is not decoded yet."""

    shard: str
    key: str
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

    Raises:
        BrokenPairError: It is no text that a ledger could hold.

    Example:
        >>> id_of("000000007", {"uid": "9f8e"}), id_of("000000007", {})
        ('9f8e', '000000007')
    """
    uid = description.get("uid")
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
            raise BrokenPairError(Reason.NO_CAPTION, f"files: {', '.join(sorted(files))}")
        if not _is_text(written):  # json can hold half a character
            raise BrokenPairError(Reason.CAPTION_NOT_UTF8, f"{written!a} in the json")
        caption = written
    if not caption.strip():
        raise BrokenPairError(Reason.EMPTY_CAPTION)
    image = next((files[suffix] for suffix in IMAGES if suffix in files), None)
    if image is None:
        raise BrokenPairError(Reason.NO_IMAGE, f"files: {', '.join(sorted(files))}")
    return Pair(shard, key, id, image, caption.strip())


def decode_image(data: bytes, max_pixels: int) -> Any:
    """Decode an image to 8-bit RGB.

    Args:
        data: A JPEG, PNG, WebP, GIF or BMP file.
        max_pixels: Most pixels to decode, by the file's header; PIL has a limit of its own beyond that.

    Returns:
        PIL image of mode RGB. Grey values of 16 bits are scaled, transparency is dropped.

    Raises:
        BrokenPairError: It cannot be decoded, or has more pixels.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata, and sizes that are looked at right here
        try:
            with Image.open(BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise BrokenPairError(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height}")
                if image.mode.startswith("I"):
                    return _eight_bits(image).convert("RGB")
                # A palette with transparency warns on the direct way.
                return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        except BrokenPairError:
            raise
        except Image.DecompressionBombError as error:
            raise BrokenPairError(Reason.TOO_MANY_PIXELS, str(error)) from error
        except Exception as error:  # damaged files fail in every way there is
            shown = str(error).splitlines()[0] if str(error) else ""
            begins = "" if isinstance(error, OSError) and shown.startswith("image file") else f"; begins {data[:16]!r}"
            raise BrokenPairError(Reason.UNDECODABLE_IMAGE, f"{type(error).__name__}: {shown[:80]}{begins}") from error


def _eight_bits(image: Any) -> Any:
    """Grey values of 16 bits, which PIL itself would cut off at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
