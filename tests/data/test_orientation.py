"""Metadata never costs pixels, and says how they are turned wherever it can be read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pixel_level_contrastive_learning.data.decoding import open_image
from pixel_level_contrastive_learning.data.image import ImageError
from pixel_level_contrastive_learning.data.orientation import ORIENTATION_TAG, split_png

COLOUR = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
TURNED = Image.Exif()
TURNED[ORIENTATION_TAG] = 6


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def encoded(kind: str, **how: object) -> bytes:
    """The picture as a file."""
    stream = io.BytesIO()
    Image.fromarray(COLOUR).save(stream, kind, **how)
    return stream.getvalue()


def read(content: bytes) -> np.ndarray:
    """The pixels of a file, ``(h, w, c)``."""
    opened = open_image(content)
    pixels = opened.read()
    assert opened.size == tuple(pixels.shape[1:])
    return pixels.permute(1, 2, 0).numpy()


def test_broken_exif_of_an_avif_costs_no_pixels() -> None:
    exif = Image.Exif()
    exif[305] = "a program"
    exif[ORIENTATION_TAG] = 6
    content = encoded("AVIF", exif=exif, quality=100)
    start = max(content.find(b"II*\0"), content.find(b"MM\0*"))
    broken = content[:start] + b"\0garbage" + content[start + 8 :]
    assert (read(broken) == read(content)).all()
    assert read(broken).shape == (8, 6, 3)  # the file says in two places how it is turned


def test_a_png_without_metadata_is_not_copied() -> None:
    plain = encoded("PNG")
    assert split_png(plain)[0] is plain
    bare, orientation = split_png(plain[:33] + chunk(b"tIME", bytes(7)) + plain[33:])
    assert (bare, orientation) == (plain, 1)
    assert split_png(plain[:60]) == (plain[:60], 1)


def test_a_cut_off_png_is_damaged_all_the_same() -> None:
    content = encoded("PNG", exif=TURNED)
    with pytest.raises(ImageError, match="damaged"):
        read(content[: len(content) // 2])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_deep_png_that_is_not_whole_does_not_end_the_process(share) -> None:
    """Torchvision's decoder reads past the end of such files, and the process with it."""
    rows = b"".join(b"\0" + row.tobytes() for row in COLOUR.astype(">u2"))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0))
    whole = encoded("PNG")[:8] + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert (read(whole) == COLOUR).all()
    with pytest.raises(ImageError, match="damaged"):
        read(whole[: int(share * len(whole))])
    wrong = bytearray(whole)
    wrong[-20] ^= 1  # in the pixels, under a checksum that was right
    with pytest.raises(
        ImageError, match=r"^damaged: the chunk b'IDAT' is cut off, or its checksum"
    ):
        read(bytes(wrong))
    for place in (25, 26, 27, 28):  # colour type, compression, filter, interlacing
        header = bytearray(head)
        header[place - 8] = 5
        content = encoded("PNG")[:8] + chunk(b"IHDR", bytes(header[8:-4])) + whole[33:]
        with pytest.raises(ImageError):
            read(content)
