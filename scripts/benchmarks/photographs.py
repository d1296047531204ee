"""JPEGs that cost as much to decode as photographs."""

import io
import random

from PIL import Image


def jpeg(drawn: random.Random, width: int, height: int) -> bytes:
    """Draw coarse noise, enlarged: as many bytes as a photograph of that size."""
    small = width // 5, height // 5
    noise = Image.frombytes("RGB", small, drawn.randbytes(3 * small[0] * small[1]))
    file = io.BytesIO()
    noise.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()
