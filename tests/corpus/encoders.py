"""Arrays and pictures as the bytes of files."""

import io
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(kind: str, array: np.ndarray | Image.Image, **how: object) -> bytes:
    """An array as Pillow writes it."""
    stream = io.BytesIO()
    image = Image.fromarray(array) if isinstance(array, np.ndarray) else array
    image.save(stream, kind, **how)
    return stream.getvalue()


def tiff(array: np.ndarray, **how: object) -> bytes:
    """An array as tifffile writes it."""
    stream = io.BytesIO()
    opened = {
        name: how.pop(name) for name in ("bigtiff", "byteorder", "imagej", "ome") if name in how
    }
    tifffile.imwrite(stream, array, **opened, **how)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An array as NumPy writes it."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(array: np.ndarray, bits: int, colour: int, extra: bytes = b"", last: bytes = b"") -> bytes:
    """A PNG of any bits and colour type, written by hand."""
    height, width = array.shape[:2]
    rows = array.reshape(height, -1)
    if bits < 8:
        shifts = np.arange(bits - 1, -1, -1)
        packed = np.packbits((rows[..., None] >> shifts & 1).reshape(height, -1), axis=1)
    else:
        packed = rows.astype(f">u{bits // 8}").view(np.uint8).reshape(height, -1)
    body = b"".join(b"\0" + row.tobytes() for row in packed)
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    end = last + chunk(b"IEND", b"")
    return SIGNATURE + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(body)) + end
