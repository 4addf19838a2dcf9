"""Turn pixels upright, as the EXIF orientation says where it can be read.

Metadata never costs pixels: what is broken, or longer than Pillow takes, is passed over.
"""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO
from struct import unpack_from
from typing import TYPE_CHECKING, Any
from zlib import crc32

from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

ORIENTATION_TAG = 274
"""The EXIF tag of how a stored image is turned upright."""
SIDEWAYS, FLIPPED_X, FLIPPED_Y = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
"""EXIF orientations whose sides are swapped, and then those flipped left-right and up-down."""
PNG = b"\x89PNG\r\n\x1a\n"
"""How a PNG begins."""
IHDR_END = 33
"""Where the header of a PNG ends."""
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")
"""Chunks of a PNG that decide its pixels; all others are metadata."""
ORIENTATION_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG that may tell how it is turned, the most reliable ones first."""


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a Pillow image; 1 for a TIFF's, which Pillow applies itself."""
    from PIL import Image

    holders = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
    if image.format == "TIFF" or not holders & set(image.info):
        return 1
    with suppress(Exception):  # broken metadata makes Pillow raise all kinds of errors
        tag = Image.Image.getexif(image).get(ORIENTATION_TAG)  # that of a PNG decodes its pixels
        return tag if isinstance(tag, int) else 1
    return 1


def split_png(content: bytes) -> tuple[bytes, int]:
    """A PNG without its metadata, and the orientation that these tell."""
    start, last = len(PNG), 0
    kept: list[bytes] = []
    chunks: list[bytes] = []
    while start + 12 <= len(content):
        length, kind = unpack_from(">I4s", content, start)
        end = start + 12 + length
        if end > len(content):
            break  # cut off: the decoder says so
        if kind not in PIXEL_CHUNKS:
            kept.append(content[last:start])
            last = end
            if kind in ORIENTATION_CHUNKS:
                chunks.append(content[start:end])
        start = end
    if not kept:
        return content, 1
    chunks.sort(key=lambda chunk: ORIENTATION_CHUNKS.index(chunk[4:8]))
    orientations = (png_orientation(content[:IHDR_END], chunk) for chunk in chunks)
    return b"".join((*kept, content[last:])), next((o for o in orientations if o != 1), 1)


def check_png(content: bytes) -> None:
    """Refuse a 16-bit PNG that is not whole: torchvision's decoder would end the process.

    Raises:
        ValueError: What is wrong with it.
    """
    start, kind = len(PNG), b""
    while start + 12 <= len(content) and kind != b"IEND":
        length, kind = unpack_from(">I4s", content, start)
        end = start + 12 + length
        if end > len(content) or crc32(content[start + 4 : end - 4]) != int.from_bytes(
            content[end - 4 : end]
        ):
            raise ValueError(f"the chunk {kind!r} is cut off, or its checksum is wrong")
        start = end
    if kind != b"IEND":
        raise ValueError("the file is cut off")
    _, _, _, colour, *others = unpack_from(">IIBBBBB", content, len(PNG) + 8)
    if colour not in (0, 2, 4, 6) or others[:2] != [0, 0] or others[2] > 1:
        raise ValueError(f"a header of colour type {colour} and methods {others}")


def png_orientation(header: bytes, chunk: bytes) -> int:
    """The orientation that one chunk of a PNG tells, its header given."""
    from PIL.PngImagePlugin import PngImageFile

    with suppress(Exception):
        return orientation_of(PngImageFile(BytesIO(header + chunk + bytes(4) + b"IEND\xaeB`\x82")))
    return 1


def upright_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """The upright ``(height, width)`` of an image from that of the stored one."""
    return (width, height) if orientation in SIDEWAYS else (height, width)


def turn_upright(pixels: Tensor, orientation: int) -> Tensor:
    """Stored pixels ``(c, h, w)`` turned upright."""
    pixels = pixels.mT if orientation in SIDEWAYS else pixels
    flipped = [-1] * (orientation in FLIPPED_X) + [-2] * (orientation in FLIPPED_Y)
    return pixels.flip(flipped) if flipped else pixels


def turn_array(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Stored values ``(..., h, w)`` of any type turned upright, as a view."""
    values = values.swapaxes(-1, -2) if orientation in SIDEWAYS else values
    values = values[..., ::-1] if orientation in FLIPPED_X else values
    return values[..., ::-1, :] if orientation in FLIPPED_Y else values


def turn_picture(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """A decoded Pillow image turned upright; `exif_transpose` would also copy upright ones."""
    from PIL import Image

    image.load()
    tag = orientation_of(image) if orientation is None else orientation
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(tag)
    return image if turn is None else image.transpose(Image.Transpose(turn))


def first_pixel(size: tuple[int, int], scale: int, orientation: int) -> tuple[int, int]:
    """Where the first pixel ``(x, y)`` of a scaled image begins: flips bring the last one there."""
    x, y = -(-size[1] % scale), -(-size[0] % scale)
    return x * (orientation in FLIPPED_X), y * (orientation in FLIPPED_Y)
