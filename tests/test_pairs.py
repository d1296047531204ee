"""One pair: its picture has the right colours whatever the file's mode, and its id and caption are its own."""

import hashlib
import json
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lightning_mimic.data.pairs import BrokenPairError, decode_image, described, id_of, is_verified, pair_of
from lightning_mimic.data.rejects import Reason
from support.cases import for_each
from support.pair_shards import encoded, picture_of

GREY = [[0, 51], [102, 255]]
COLOURS = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (40, 80, 120)]]


def of_mode(mode):
    if mode == "I;16":
        return Image.fromarray((np.array(GREY) * 257).astype(np.uint16))
    if mode == "1":
        return Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    grey = Image.fromarray(np.array(GREY, dtype=np.uint8))
    if mode == "L":
        return grey
    if mode == "LA":
        image = grey.convert("LA")
        image.putalpha(128)
        return image
    image = Image.fromarray(np.array(COLOURS, dtype=np.uint8))
    if mode == "RGBA":
        image.putalpha(128)
    if mode in ("P", "P with transparency"):
        return image.quantize(4)
    return image


TRUE = {"1": [[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]]}
TRUE |= {mode: [[[value] * 3 for value in row] for row in GREY] for mode in ("L", "LA", "I;16")}
TRUE |= {mode: [[list(value) for value in row] for row in COLOURS] for mode in ("RGB", "RGBA", "P")}
TRUE["P with transparency"] = TRUE["P"]


@for_each("mode", TRUE)
def test_every_mode_becomes_rgb_with_its_own_colours(mode):
    options = {"transparency": b"\x80\xff"} if "transparency" in mode else {}
    data = encoded(of_mode(mode), **options)
    with_mode = Image.open(BytesIO(data)).mode
    assert with_mode == mode.partition(" ")[0]
    image = decode_image(data, 100)
    assert (image.mode, image.size) == ("RGB", (2, 2))
    assert np.asarray(image).tolist() == TRUE[mode]


def test_sixteen_bits_are_scaled_and_not_cut_off():
    values = np.array([[0, 128, 129, 300], [32768, 65279, 65407, 65535]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(values)), 100)
    assert np.asarray(image)[..., 0].tolist() == [[0, 0, 1, 1], [128, 254, 255, 255]]


@for_each(("kind", "near"), [("JPEG", 6), ("WEBP", 6), ("GIF", 0), ("BMP", 0)])
def test_other_formats_are_decoded_whatever_the_name_says(kind, near):
    image = np.asarray(decode_image(encoded(Image.new("RGB", (16, 16), (200, 100, 50)), kind), 1000)).astype(int)
    assert abs(image - [200, 100, 50]).max() <= near


def test_a_cmyk_jpeg_has_the_colours_it_was_made_of():
    data = encoded(Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK"), "JPEG", quality=98)
    assert Image.open(BytesIO(data)).mode == "CMYK"
    assert abs(np.asarray(decode_image(data, 1000)).astype(int) - [200, 100, 50]).max() <= 6


def huge(width, height):
    """A PNG whose header speaks of more pixels than there are."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = encoded(picture_of(1))
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@for_each("size", [(11, 10), (8192, 8193), (10**4, 10**4), (2**30, 2**30)])
def test_pixels_are_counted_before_they_are_decoded(size):
    with pytest.raises(BrokenPairError) as caught:
        decode_image(huge(*size), 109 if size == (11, 10) else 2**26)
    assert caught.value.reason == Reason.TOO_MANY_PIXELS
    with pytest.raises(BrokenPairError) as caught:
        decode_image(huge(11, 10), 110)
    assert caught.value.reason == Reason.UNDECODABLE_IMAGE


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@for_each("data", [b"", b"<html>", POSTSCRIPT, encoded(picture_of(1))[:40], b"\xff\xd8\xff\xe0" + b"x" * 99])
def test_what_is_no_picture_is_said_to_be_none(data):
    with pytest.raises(BrokenPairError) as caught:
        decode_image(data, 100)
    assert caught.value.reason == Reason.UNDECODABLE_IMAGE
    assert caught.value.detail


def test_a_jpeg_cut_short_is_not_filled_with_grey():
    data = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    assert decode_image(data, 10**4).size == (64, 64)
    with pytest.raises(BrokenPairError, match="undecodable image"):
        decode_image(data[: len(data) // 2], 10**4)


@for_each(
    ("description", "name"),
    [({"uid": "u"}, "u"), ({"uid": 12}, "12"), ({"uid": None}, "k"), ({}, "k")],
)
def test_the_id_is_the_uid_and_else_the_key(description, name):
    assert id_of("k", description) == name


@for_each("uid", ['""', '" "', "NaN", "Infinity", "1.5", "[]", '["a"]', "{}", "true", "false"])
def test_a_uid_that_could_be_that_of_many_is_no_id(uid):
    with pytest.raises(BrokenPairError, match=r"uid is no id.*the uid is ") as caught:
        id_of("k", described({"json": f'{{"uid": {uid}}}'.encode()}))
    assert caught.value.reason == Reason.UNUSABLE_ID


def test_an_image_is_compared_with_the_hash_of_what_was_downloaded():
    stated = {"sha256": hashlib.sha256(b"image").hexdigest(), "width": 2, "height": 3}
    assert is_verified(b"image", stated | {"original_width": 2, "original_height": 3})
    assert is_verified(b"image", stated | {"sha256": stated["sha256"].upper()})
    for other in ({}, {"sha256": None}, stated | {"original_width": 2, "original_height": 4}):
        assert not is_verified(b"other", other)
    for other in (stated, {"sha256": 7}, {"sha256": ""}):
        with pytest.raises(BrokenPairError, match="image differs from its sha256"):
            is_verified(b"imagf", other)


def test_the_caption_is_the_text_and_else_that_of_the_json():
    files = {"png": b"p", "txt": "ä dog\n".encode(), "json": json.dumps({"caption": "a cat"}).encode()}
    assert pair_of("s", "k", "i", files, described(files)).caption == "ä dog"
    del files["txt"]
    assert pair_of("s", "k", "i", files, described(files)).caption == "a cat"


@for_each("suffix", ["jpg", "jpeg", "png", "webp"])
def test_an_image_may_have_any_of_its_suffixes(suffix):
    assert pair_of("s", "k", "i", {suffix: b"image", "txt": b"a"}, {}).image == b"image"
