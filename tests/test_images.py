"""Odd but real image files: each shows two colours, left and right, as any viewer shows them."""

import struct
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image as pil

from mgp5.errors import Mgp5Error
from mgp5.images import read_image
from mgp5.messages import Image

RED, BLUE, DARK, LIGHT = (220, 30, 30), (30, 30, 220), (51, 51, 51), (204, 204, 204)
COLOURS = pil.new("RGB", (32, 32), RED)
COLOURS.paste(BLUE, (16, 0, 32, 32))
GREY = np.repeat(np.float32([[0.2, 0.8]]), 16, axis=1).repeat(32, axis=0)
JUNK = b"Exif\0\0\x00\x08\x00\x02\x01\x12\x00\x03"  # no EXIF data


def saved(picture: pil.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(scale: float, dtype: type) -> bytes:
    return saved(pil.fromarray((GREY * scale).astype(dtype)), "TIFF")


def with_chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """A PNG with one more chunk."""
    data, chunk = saved(COLOURS, "PNG"), name + body
    checksum = zlib.crc32(chunk) if checksum is None else checksum
    return data[:33] + len(body).to_bytes(4, "big") + chunk + checksum.to_bytes(4, "big") + data[33:]


def ycbcr(across: int, down: int) -> bytes:
    """A TIFF without compression, with one pair of colour differences for so many pixels; Pillow writes (1, 1) only."""
    values = np.asarray(COLOURS.convert("YCbCr"))
    blocks = [
        (*values[y : y + down, x : x + across, 0].flat, *values[y, x, 1:])
        for y in range(0, 32, down)
        for x in range(0, 32, across)
    ]
    body = np.uint8(blocks).tobytes()
    bits, longs = 8 + len(body), {273: 8, 279: len(body)}
    shorts = {256: 32, 257: 32, 259: 1, 262: 6, 277: 3, 278: 32, 284: 1, 530: across | down << 16}
    tags = {key: (3, 2 if key == 530 else 1, value) for key, value in shorts.items()} | {258: (3, 3, bits)}
    tags |= {key: (4, 1, value) for key, value in longs.items()}
    rows = b"".join(struct.pack("<HHII", key, *value) for key, value in sorted(tags.items()))
    head = struct.pack("<2sHI", b"II", 42, bits + 6)
    return head + body + struct.pack("<3H", 8, 8, 8) + struct.pack("<H", len(tags)) + rows + bytes(4)


def noise() -> bytes:
    picture = pil.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8))
    picture.paste(RED, (32, 64, 96, 192))
    picture.paste(BLUE, (160, 64, 224, 192))
    return saved(picture, "JPEG", quality=95)


FILES = {
    "EXIF of a PNG": (saved(COLOURS, "PNG", exif=JUNK), RED, BLUE),
    "EXIF of a WebP": (saved(COLOURS, "WEBP", exif=JUNK), RED, BLUE),
    "wrong checksum": (with_chunk(b"pHYs", bytes(9), 7), RED, BLUE),
    "large text": (with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(70_000_000), 1)), RED, BLUE),
    "large profile": (with_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000), 9)), RED, BLUE),
    "no end": (noise()[:-2], RED, BLUE),
    "cut at 95 %": (noise()[: len(noise()) * 95 // 100], RED, BLUE),
    "floats to 1": (grey(1, np.float32), DARK, LIGHT),
    "floats to 255": (grey(255, np.float32), DARK, LIGHT),
    "8 bits in 32": (grey(255, np.int32), DARK, LIGHT),
    "12 bits in 16": (grey(4095, np.uint16), DARK, LIGHT),
    "16 bits": (saved(pil.fromarray((GREY * 65535).astype(np.uint16)), "PNG"), DARK, LIGHT),
    "CMYK": (saved(COLOURS.convert("CMYK"), "TIFF"), RED, BLUE),
    "Lab": (saved(COLOURS.convert("LAB"), "TIFF"), RED, BLUE),
    "YCbCr": (saved(COLOURS.convert("YCbCr"), "TIFF"), RED, BLUE),
    "YCbCr of every pixel": (ycbcr(1, 1), RED, BLUE),
    "YCbCr of four pixels": (ycbcr(2, 2), RED, BLUE),
    "YCbCr, LZW": (saved(COLOURS.convert("YCbCr"), "TIFF", compression="tiff_lzw"), RED, BLUE),
}


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize("name", FILES)
def test_an_image_is_read_as_viewers_show_it(name):
    data, left, right = FILES[name]
    picture = Image(data=data).load()
    height = picture.height // 2
    found = picture.getpixel((picture.width // 4, height)), picture.getpixel((picture.width * 3 // 4, height))
    assert np.abs(np.subtract(found, (left, right))).max() <= 3


def test_a_damaged_image_is_told_by_its_name():
    with pytest.warns(UserWarning, match=r"a\.jpg is damaged"):
        read_image(BytesIO(noise()[:-2]), "a.jpg")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (noise()[: len(noise()) // 2], "truncated"),
        (b"nothing", "is not an image"),
        (
            saved(COLOURS, "TIFF").replace(b"\x06\x01\x03\0\x01\0\0\0\x02", b"\x06\x01\x03\0\x01\0\0\0\x20"),
            "TIFF of a kind",
        ),
        (saved(pil.new("RGB", (4000, 1)), "PNG"), "4000x1 pixels, sides of more than 100 to 1"),
        (saved(pil.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"), "not finite"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC"),
    ],
)
def test_what_shows_nothing_is_refused(data, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(Mgp5Error, match=message):
        Image(data=data).load()


def test_pixels_of_a_strip_are_refused_too():
    with pytest.raises(Mgp5Error, match="100 to 1"):
        Image(pixels=pil.new("RGB", (4000, 1))).load()
