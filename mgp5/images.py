"""Reads image files as upright RGB of 8 bits: what viewers show is read, and no metadata costs an image."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .errors import Mgp5Error

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 100_000_000  # a larger image is taken for a decompression bomb
MAX_RATIO = 100  # of the sides: image processors scale the short one up, and the long one grows with it
# Largest values of grey by mode; the first that holds all values of an image is white.
WHITES = {"I;16": (255, 4095, 65535), "I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # at the 8th byte of a file
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes of a file
_tolerance = threading.Lock()


def read_image(
    file: Path | BinaryIO,
    path: Path | str = "",
    *,
    formats: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    least: int | None = None,
) -> PIL.Image.Image:
    """Read an image file, which an error calls `path`. An image that lacks its last rows is read with a warning.

    A JPEG may be decoded at a half, a quarter or an eighth of its size where its sides stay at `least` so many pixels.
    Raises Mgp5Error if it is missing, is none of Pillow's `formats`, is damaged, too large or too thin.
    """
    path = path or str(file)
    try:
        return _read(file, path, formats, max_pixels, least)
    except FileNotFoundError:
        link = f", where the link {path} leads" if os.path.islink(path) else ""
        raise Mgp5Error(f"no image at {os.readlink(path) if link else path}{link}", "check the path") from None
    except Mgp5Error:
        raise
    except Exception as error:  # decoders raise almost anything on damaged files
        if _register_heif(file, path):
            return read_image(file, path, formats=formats, max_pixels=max_pixels)
        with _tolerant():
            picture = _read_damaged(file, path, formats, max_pixels, error)
        warnings.warn(f"{path} is damaged ({error}): what is left of it is shown", stacklevel=2)
        return picture


def check_size(size: tuple[int, int], path: Path | str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise Mgp5Error if an image of `size`, width and height, has too many pixels or is too thin."""
    if size[0] * size[1] > max_pixels:
        raise Mgp5Error(f"{path} has {size[0]}x{size[1]} pixels, more than {max_pixels:,}", "make it smaller")
    if max(size) > MAX_RATIO * min(size):
        raise Mgp5Error(f"{path} has {size[0]}x{size[1]} pixels, sides of more than {MAX_RATIO} to 1", "crop it")


def upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Return an image in RGB, turned as its EXIF data says; transparency becomes white, deep grey 8 bits.
    Raises ValueError if its values are not finite."""
    from PIL import Image as pil
    from PIL import ImageOps

    kind = picture.format
    picture.load()
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:  # readers of EXIF data raise almost anything, and an image is right without
        picture = picture.copy()
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = _eight_bits(picture, kind)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = pil.alpha_composite(pil.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _eight_bits(picture: PIL.Image.Image, kind: str | None) -> PIL.Image.Image:
    """Scale deep grey to 0..255. A PNG says what white is; other files are read by the values that they hold."""
    high = max(picture.getextrema())
    if not math.isfinite(high):
        raise ValueError("its values are not finite")
    whites = WHITES[picture.mode[:4]] if kind != "PNG" else (65535,)
    scale = 255 / next((white for white in whites if high <= white), high)
    return picture.point(lambda value: value * scale).convert("L")


def _read(
    file: Path | BinaryIO, path: Path | str, formats: Sequence[str] | None, max_pixels: int, least: int | None = None
) -> PIL.Image.Image:
    from PIL import Image as pil
    from PIL import TiffImagePlugin, features

    # Pillow's own reader of TIFFs without compression takes YCbCr for RGB, and stops.
    TiffImagePlugin.READ_LIBTIFF = features.check("libtiff")
    if not isinstance(file, Path):
        file.seek(0)
    quiet = warnings.catch_warnings(action="ignore", category=pil.DecompressionBombWarning)
    try:
        with quiet, pil.open(file, formats=formats) as picture:
            check_size(picture.size, path, max_pixels)
            if least:
                picture.draft(None, (least, least))
            return upright(picture)
    except pil.DecompressionBombError:
        raise Mgp5Error(f"{path} is larger than {max_pixels:,} pixels", "make it smaller") from None


def _read_damaged(
    file: Path | BinaryIO, path: Path | str, formats: Sequence[str] | None, max_pixels: int, error: Exception
) -> PIL.Image.Image:
    """Read what is left of an image; raise Mgp5Error for the first error if that is nothing, or lacks a tenth."""
    from PIL import UnidentifiedImageError

    try:
        picture = _read(file, path, formats, max_pixels)
        width, height = picture.size
        tenths = ((0, height * 9 // 10, width, height), (0, 0, width, height // 10 or 1))  # turned by EXIF data, or not
        lost = any(all(low == high for low, high in picture.crop(box).getextrema()) for box in tenths)
        if not ("truncated" in str(error) and lost):
            return picture
    except UnidentifiedImageError:
        tiff = formats is None and _head(file)[:4] in TIFFS
        found = "a TIFF of a kind that is not read" if tiff else "not an image"
        raise Mgp5Error(f"{path} is {found}", "give a JPEG, PNG, WebP, GIF, BMP, AVIF or 8-bit TIFF file") from None
    except Mgp5Error:
        raise
    except Exception:  # as above
        pass
    raise Mgp5Error(f"{path} cannot be read as an image ({error})", "replace or remove the file") from None


def _head(file: Path | BinaryIO) -> bytes:
    """Return the first 12 bytes of a file."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return opened.read(12)
    file.seek(0)
    return file.read(12)


@contextmanager
def _tolerant() -> Iterator[None]:
    """Let Pillow pass over missing ends and wrong checksums."""
    from PIL import ImageFile

    with _tolerance:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _register_heif(file: Path | BinaryIO, path: Path | str) -> bool:
    """Let Pillow read HEIC if `file` is one, once in a process. Raises Mgp5Error if the package for it is missing."""
    from PIL import Image as pil

    head = _head(file)
    if head[4:8] != b"ftyp" or head[8:12] not in HEIF_BRANDS or "HEIF" in pil.OPEN:
        return False
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise Mgp5Error(f"{path} is a HEIC image", "pip install 'mgp5[heic]' to read it, or make it a JPEG") from None
    register_heif_opener()
    return True
