"""Decoding of image files to 8-bit RGB, for image-text pairs, folders and torchvision's data sets."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

from lightning_mimic.errors import MimicError, package_of_extra

#: Formats accepted for images from the web, regardless of file names. Some of PIL's other formats start programs (EPS).
WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
#: Formats accepted in image folders: those for which torchvision knows suffixes.
FOLDER_FORMATS = (*WEB_FORMATS, "PPM", "TIFF")
#: Default maximum number of pixels of an image, by its header.
MAX_PIXELS = 2**26
#: Key in the ``info`` of a decoded image that had transparent pixels.
TRANSPARENT = "transparency dropped"

# PIL's setting for truncated files is global to the process.
_STRICT = threading.RLock()


class ImageError(MimicError):
    """An image that cannot be decoded, or has too many pixels."""


class TooManyPixelsError(ImageError):
    """An image with too many pixels."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = WEB_FORMATS) -> Any:
    """Decode an image to upright 8-bit RGB.

    16-bit grey values are scaled to 8 bits. Transparency is dropped, as by torchvision and open_clip: a transparent
    pixel gets the colour stored for it, which is black in most files. The image is rotated according to its EXIF
    orientation. Checksums of PNG files are verified (JPEG, WebP, GIF and BMP have none).

    Args:
        data: Content of the file.
        max_pixels: Maximum number of pixels, by the file's header; PIL has another limit of its own.
        formats: Accepted formats, by PIL's names.

    Returns:
        PIL image of mode RGB; its ``info`` has the key :data:`TRANSPARENT` if transparency was dropped.

    Raises:
        TooManyPixelsError: The image has more pixels.
        ImageError: The image is damaged, truncated, of another format, or has values of unknown range.

    Example:
        >>> decode_image(b"<html>")
        Traceback (most recent call last):
        ...
        lightning_mimic.data.images.ImageError: cannot identify image file; begins b'<html>'
    """
    with package_of_extra("an image", "vision"):
        from PIL import Image, ImageOps, UnidentifiedImageError

    with warnings.catch_warnings(), _strict():
        warnings.simplefilter("ignore")  # about odd metadata, and about sizes, which are checked here
        try:
            with Image.open(BytesIO(data), formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise TooManyPixelsError(f"{image.width} x {image.height} pixels; expected at most {max_pixels}")
                if image.format == "PNG":
                    _check_png(data)
                image.load()
                with suppress(Exception):  # unreadable metadata; the image itself is valid
                    ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise TooManyPixelsError(
                f"more than the {most} pixels that PIL decodes (PIL.Image.MAX_IMAGE_PIXELS)"
            ) from error
        except Exception as error:  # damaged files raise all types of errors
            shown = str(error).splitlines()[0].split(" <_io.")[0] if str(error) else ""
            unknown = isinstance(error, UnidentifiedImageError) or not isinstance(error, OSError)
            begins = f"; begins {data[:16]!r}" if unknown else ""
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            raise ImageError(f"{kind}{shown[:80]}{begins}") from error


@contextmanager
def _strict() -> Iterator[None]:
    """Reject truncated images, whatever other libraries have set."""
    from PIL import ImageFile

    with _STRICT:
        given, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = given


def _check_png(data: bytes) -> None:
    """Verify the checksums of all chunks, because decoding skips those of pixel data."""
    from PIL import Image

    with Image.open(BytesIO(data), formats=("PNG",)) as image:
        image.verify()


def to_rgb(image: Any) -> Any:
    """Convert a PIL image of any mode to 8-bit RGB, as in :func:`decode_image`.

    Raises:
        ImageError: The range of its values is unknown.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> to_rgb(Image.fromarray(np.full((1, 1), 30_000, np.uint16))).getpixel((0, 0))
        (117, 117, 117)
    """
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        return _eight_bits(image).convert("RGB")
    if mode in ("I", "F"):
        raise ImageError(
            f"its values are {'floats' if mode == 'F' else '32-bit integers'}, whose range is unknown; save it with 8 "
            "or 16 bits"
        )
    transparent = image.has_transparency_data
    # Direct conversion of a palette with transparency would cause a warning.
    layers = image.convert("RGBA") if transparent else image
    rgb = layers.convert("RGB")
    rgb.info = {TRANSPARENT: True} if transparent and layers.getchannel("A").getextrema()[0] < 255 else {}
    return rgb


def _eight_bits(image: Any) -> Any:
    """Scale 16-bit grey values to 8 bits; PIL would clip them at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
