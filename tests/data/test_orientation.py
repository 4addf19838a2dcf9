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
LONG = zlib.compress(b"a" * 2**21)
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


def broken_check(data: bytes) -> bytes:
    """A chunk whose checksum is wrong."""
    return chunk(b"tEXt", data)[:-4] + bytes(4)


EXTRAS = {
    "EXIF that is no TIFF": chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
    "EXIF cut off": chunk(b"eXIf", b"II*\0\x08\0\0\0\x05\0"),
    "EXIF beyond its end": chunk(b"eXIf", b"MM\0*\x7f\xff\xff\xff"),
    "EXIF of no byte": chunk(b"eXIf", b""),
    "EXIF of a false tag": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01abcd"),
    "EXIF as a text that is none": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n9\nzz"),
    "long text": chunk(b"zTXt", b"k\0\0" + LONG),
    "long text not compressed": chunk(b"tEXt", b"k\0" + b"a" * 2**21),
    "long XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "long profile": chunk(b"iCCP", b"icc\0\0" + LONG),
    "text that does not unpack": chunk(b"zTXt", b"k\0\0" + b"garbage"),
    "text with a wrong checksum": broken_check(b"k\0v"),
    "a palette that is suggested": chunk(b"sPLT", b"x"),
    "a private chunk": chunk(b"prVt", bytes(2**21)),
}


@pytest.mark.parametrize("last", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("name", EXTRAS)
def test_no_metadata_of_a_png_costs_pixels(name, last) -> None:
    plain = encoded("PNG")
    place = len(plain) - 12 if last else 33
    content = plain[:place] + EXTRAS[name] + plain[place:]
    assert (read(content) == COLOUR).all()
    deep = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0))
    deep += EXTRAS[name] + chunk(b"IDAT", zlib.compress(b"\0\1\2\3\4")) + chunk(b"IEND", b"")
    assert read(plain[:8] + deep).flatten().tolist() == [258, 772]


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"\0\0\0\0", b"II*\0\x08\0\0\0\x05\0", b"Exif\0\0MM\0*\x7f\xff\xff\xff"],
)
def test_broken_exif_costs_no_pixels(kind, exif) -> None:
    how = {"lossless": True} if kind == "WEBP" else {"quality": 95}
    assert (read(encoded(kind, exif=exif, **how)) == read(encoded(kind, **how))).all()


def test_long_metadata_of_a_webp_costs_no_pixels() -> None:
    content = encoded("WEBP", lossless=True, xmp=b"a" * 2**21, icc_profile=bytes(2**21))
    assert (read(content) == COLOUR).all()


def test_broken_exif_of_an_avif_costs_no_pixels() -> None:
    exif = Image.Exif()
    exif[305] = "a program"
    exif[ORIENTATION_TAG] = 6
    content = encoded("AVIF", exif=exif, quality=100)
    start = max(content.find(b"II*\0"), content.find(b"MM\0*"))
    broken = content[:start] + b"\0garbage" + content[start + 8 :]
    assert (read(broken) == read(content)).all()
    assert read(broken).shape == (8, 6, 3)  # the file says in two places how it is turned


@pytest.mark.parametrize("name", EXTRAS)
def test_what_can_be_read_of_the_metadata_counts(name) -> None:
    plain = encoded("PNG")
    told = chunk(b"eXIf", TURNED.tobytes()[6:])  # after what cannot be read, and past the pixels
    content = plain[:33] + EXTRAS[name] + plain[33:-12] + told + plain[-12:]
    assert (read(content) == COLOUR.transpose(1, 0, 2)[:, ::-1]).all()


@pytest.mark.parametrize("kind", [b"tEXt", b"iTXt"])
def test_the_orientation_of_a_png_may_stand_in_a_text(kind) -> None:
    profile = TURNED.tobytes().hex()
    texts = {
        b"tEXt": b"Raw profile type exif\0\nexif\n      32\n" + profile.encode(),
        b"iTXt": b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>',
    }
    plain = encoded("PNG")
    content = plain[:33] + chunk(kind, texts[kind]) + plain[33:]
    assert read(content).shape == (8, 6, 3)


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
