"""Open image files of any format, bit depth and number of bands, without decoding them yet.

Size, channels and bit depth come from the header, so that a large JPEG can then be decoded at a
half, a quarter or an eighth of its size. Pixels come back upright, as the EXIF orientation says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Set
from functools import cache, partial
from io import BytesIO

import numpy as np
import torch
from einops import rearrange

from .arrays import NamedArray, array_to_pixels, lazy_pixels, open_named
from .image import (
    ALL,
    DecodedImage,
    ImageError,
    LazyImage,
    Stack,
    check_memory,
    join,
    known_errors,
)
from .picture import JPEG, frames_in, open_jpeg, open_picture
from .readers import all_readers
from .reading import in_time
from .tiff import open_tiff, stack_of_tiff

ENDINGS = (
    ".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .npy .gif .ppm .pgm .pbm .pnm .avif .mpo .apng"
)
IMAGE_SUFFIXES = frozenset(ENDINGS.split())
"""Files taken for images, in lower case, whose content decides the format."""
Content = bytes | str | NamedArray
"""The bytes of a file; the path of a TIFF, of which only a page is read; what a reader returned."""
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How a TIFF begins: both byte orders, classic and big."""
NPY = b"\x93NUMPY"
"""How a NumPy array begins."""
SIGNATURES = {
    JPEG: "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    NPY: "npy",
} | dict.fromkeys(TIFF, "tif")
"""How files begin, and the suffix of their format."""
PNM_STARTS = (b"P2", b"P3", b"P5", b"P6")
PNM = re.compile(rb"P([2356])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"\s")
"""The header of a PNM: its kind, width, height and largest value."""
PNM_HEADER = 4096
"""Bytes within which the header of a PNM ends."""


@cache
def image_suffixes() -> Set[str]:
    """All files taken for images: those of `IMAGE_SUFFIXES`, and those that have a reader."""
    return IMAGE_SUFFIXES | all_readers().keys()


def ending_of(name: str, known: Set[str] | None = None, *, folder: bool = False) -> str:
    """Which of the known endings a name has, by default one of images; an empty text for none.

    Args:
        name: Of a file, or of a ``folder``, whose endings are known with a slash after them.
        known: The endings.
        folder: Which of them is meant.
    """
    known = image_suffixes() if known is None else known
    stem, last = os.path.splitext(name.lower())
    double = os.path.splitext(stem)[1] + last
    candidates = (f"{last}/",) if folder else (double, last)
    return next((ending for ending in candidates if ending in known), "")


def ending_at(path: str) -> str:
    """The ending of an image, with a slash where a folder is there that has a reader."""
    as_folder = ending_of(path, folder=True)
    is_folder = bool(as_folder) and in_time(partial(os.path.isdir, path), path)
    return as_folder if is_folder else ending_of(path)


def open_image(content: Content, image: int | None = None) -> LazyImage:
    """Read the header of an encoded image.

    Transparent images are laid over black; palettes and CMYK become RGB. All bands of a TIFF are
    kept, and what is not 8-bit keeps its values; what was not measured (NaN, or GDAL's nodata)
    becomes the lowest value of its channel.

    Args:
        content: The file.
        image: Which of the images in the file; `ALL` for all of them as channels of one. None takes
            gray pages without a name as channels, and of other files the first image.

    Raises:
        ImageError: It is no image, damaged, a decompression bomb, or larger than `MAX_BYTES`.

    Example:
        >>> from io import BytesIO
        >>> from PIL import Image
        >>> file = BytesIO()
        >>> Image.new("L", (640, 480)).save(file, "PNG")
        >>> image = open_image(file.getvalue())
        >>> image.size, image.channels, image.read().shape
        ((480, 640), 1, torch.Size([1, 480, 640]))
    """
    with known_errors(content=not_empty(content)):
        if isinstance(content, NamedArray):
            return open_named(content, image)
        if isinstance(content, str) or content.startswith(TIFF):
            return open_tiff(content, image)
        if content.startswith(NPY):
            return lazy_pixels(array_to_pixels(np.load(BytesIO(content), allow_pickle=False)))
        header = PNM.match(content[:PNM_HEADER])
        if header and int(header[4]) > 255:
            return open_deep_pnm(content, header)
        read = open_jpeg if content.startswith(JPEG) else open_picture
        if image == ALL:
            return join([read(content, number) for number in range(frames_in(content).images)])
        return read(content, image or 0)


def stack_in(content: Content) -> Stack:
    """Which images a file holds.

    Raises:
        ImageError: It cannot be read.
    """
    with known_errors(content=not_empty(content)):
        if isinstance(content, NamedArray):
            return content.stack
        if isinstance(content, str) or content.startswith(TIFF):
            return stack_of_tiff(content)
        return Stack(1) if content.startswith((NPY, *PNM_STARTS)) else frames_in(content)


def not_empty(content: Content) -> Content:
    """A file that is not empty."""
    if not content:
        raise ImageError("the file is empty (0 bytes)")
    return content


def open_deep_pnm(content: bytes, header: re.Match[bytes]) -> LazyImage:
    """Open a PGM or PPM of more than 8 bits, which Pillow would scale or reduce."""
    kind, width, height, _ = map(int, header.groups())
    channels = 3 if kind in (3, 6) else 1
    check_memory(height, width, 6 * channels, len(content))

    def load(_: int) -> DecodedImage:
        count, start = height * width * channels, header.end()
        if kind in (2, 3):
            values = np.array(content[start:].split()[:count], np.float32)
        else:
            available = min(count, (len(content) - start) // 2)
            values = np.frombuffer(content, ">u2", available, start).astype(np.float32)
        if len(values) < count:
            raise ImageError(f"damaged: {len(values)} of {count} values are present")
        return DecodedImage(
            rearrange(torch.from_numpy(values), "(h w c) -> c h w", h=height, w=width)
        )

    return LazyImage((height, width), channels, True, load)
