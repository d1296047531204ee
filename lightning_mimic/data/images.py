"""Decode image files to 8-bit RGB; the same for image-text pairs, folders and torchvision's data sets."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

from lightning_mimic.errors import MimicError, package_of_extra

#: Formats of images from the web, whatever their names. Of PIL's others some start programs (EPS).
WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
#: Formats of an image folder: those whose suffixes torchvision looks for.
FOLDER_FORMATS = (*WEB_FORMATS, "PPM", "TIFF")
#: Most pixels of an image, by its header, unless another number is given.
MAX_PIXELS = 2**26
#: Key in the ``info`` of a decoded image that had transparent pixels.
TRANSPARENT = "transparency dropped"

# PIL's switches for truncated files are global to the process.
_STRICT = threading.RLock()


class ImageError(MimicError):
    """An image that cannot be decoded, or has too many pixels."""


class TooManyPixelsError(ImageError):
    """An image with more pixels than are decoded."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = WEB_FORMATS) -> Any:
    """Decode an image to 8-bit RGB, upright.

    Grey values of 16 bits are scaled to 8. Transparency is dropped, as torchvision and open_clip do: a transparent
    pixel has the colour that is stored for it, which is black in most files. The picture is turned as its EXIF
    orientation says. Checksums of a PNG are compared (JPEG, WebP, GIF and BMP have none).

    Args:
        data: Content of the file.
        max_pixels: Most pixels to decode, by the file's header; PIL has a limit of its own beyond that.
        formats: Formats that are tried, by PIL's names.

    Returns:
        PIL image of mode RGB; its ``info`` has the key :data:`TRANSPARENT` if transparency was dropped.

    Raises:
        TooManyPixelsError: It has more pixels.
        ImageError: It cannot be decoded: damaged, cut short, of another format, or of values without a known range.

    Example:
        >>> decode_image(b"<html>")
        Traceback (most recent call last):
        ...
        lightning_mimic.data.images.ImageError: cannot identify image file; begins b'<html>'
    """
    with package_of_extra("an image", "vision"):
        from PIL import Image, ImageOps, UnidentifiedImageError

    with warnings.catch_warnings(), _strict():
        warnings.simplefilter("ignore")  # odd metadata, and sizes that are looked at right here
        try:
            with Image.open(BytesIO(data), formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise TooManyPixelsError(f"{image.width} x {image.height} pixels; at most {max_pixels} are decoded")
                if image.format == "PNG":
                    _check_png(data)
                image.load()
                with suppress(Exception):  # unreadable metadata have no orientation, and the picture is a right one
                    ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise TooManyPixelsError(
                f"more than the {most} pixels that PIL decodes (PIL.Image.MAX_IMAGE_PIXELS)"
            ) from error
        except Exception as error:  # damaged files fail in every way there is
            shown = str(error).splitlines()[0].split(" <_io.")[0] if str(error) else ""
            unknown = isinstance(error, UnidentifiedImageError) or not isinstance(error, OSError)
            begins = f"; begins {data[:16]!r}" if unknown else ""
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            raise ImageError(f"{kind}{shown[:80]}{begins}") from error


@contextmanager
def _strict() -> Iterator[None]:
    """Have truncated images refused, whatever another library has set."""
    from PIL import ImageFile

    with _STRICT:
        given, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = given


def _check_png(data: bytes) -> None:
    """Compare the checksums of all chunks; decoding skips those of the pixels."""
    from PIL import Image

    with Image.open(BytesIO(data), formats=("PNG",)) as image:
        image.verify()


def to_rgb(image: Any) -> Any:
    """Convert a PIL image of any mode to 8-bit RGB, as :func:`decode_image` does.

    Raises:
        ImageError: Its values have no known range.

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
            f"its values are {'floats' if mode == 'F' else 'integers of 32 bits'}, whose range is not known; save it "
            "with 8 or 16 bits"
        )
    transparent = image.has_transparency_data
    # A palette with transparency warns on the direct way.
    layers = image.convert("RGBA") if transparent else image
    rgb = layers.convert("RGB")
    rgb.info = {TRANSPARENT: True} if transparent and layers.getchannel("A").getextrema()[0] < 255 else {}
    return rgb


def _eight_bits(image: Any) -> Any:
    """Scale grey values of 16 bits, which PIL itself would cut off at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
