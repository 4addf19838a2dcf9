"""Odd files, made by small functions: each with its right pixels, or the start of its refusal."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from corpus.encoders import SIGNATURE, chunk, npy, picture, png, tiff
from PIL import Image

RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (24, 32)).astype(np.uint8)
RGB = RANDOM.integers(0, 256, (24, 32, 3)).astype(np.uint8)
FINE = RANDOM.integers(0, 65536, (24, 32, 4)).astype(np.uint16)
ROWS, COLUMNS = np.mgrid[0:24, 0:32]
SMOOTH = np.dstack([10 * ROWS, 8 * COLUMNS, 4 * ROWS + 4 * COLUMNS]).astype(np.uint8)
TURNED = Image.Exif()
TURNED[274] = 6
LONG = zlib.compress(b"a" * 2**21)


class Odd(NamedTuple):
    """An odd file.

    Attributes:
        name: Its name, which says what is odd.
        content: Its bytes.
        images: ``(c, h, w)`` pixels of each image in it; none where it is refused.
        refusal: What the reason begins with; a regular expression.
        near: How far pixels may lie from those right: 0 unless the format loses some.
    """

    name: str
    content: bytes
    images: tuple[np.ndarray, ...] = ()
    refusal: str = ""
    near: float = 0


def first(array: np.ndarray) -> np.ndarray:
    """An array ``(h, w)`` or ``(h, w, c)`` with its channels first."""
    return np.atleast_3d(array).transpose(2, 0, 1)


def formats() -> Iterator[Odd]:
    """Each format with gray and with colour."""
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        for name, array in (("gray", GRAY), ("colour", RGB)):
            yield Odd(f"{name}.{kind}", picture(kind, array), (first(array),))
    yield Odd("lossless.webp", picture("WEBP", RGB, lossless=True), (first(RGB),))
    gray = picture("WEBP", GRAY, lossless=True)
    yield Odd("gray.webp", gray, (first(GRAY).repeat(3, axis=0),))
    yield Odd("gray.gif", picture("GIF", GRAY), (first(GRAY).repeat(3, axis=0),))
    yield Odd(
        "smooth.jpg", picture("JPEG", SMOOTH, quality=98, subsampling=0), (first(SMOOTH),), near=12
    )
    yield Odd(
        "progressive.jpg",
        picture("JPEG", SMOOTH, quality=98, progressive=True, subsampling=0),
        (first(SMOOTH),),
        near=12,
    )
    yield Odd("smooth.avif", picture("AVIF", SMOOTH, quality=100), (first(SMOOTH),), near=12)
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    expected = np.broadcast_to(np.array([255, 0, 0])[:, None, None], (3, 16, 16))
    yield Odd("inks.jpg", picture("JPEG", red, quality=100), (expected,), near=3)
    yield Odd("png called jpg.jpg", picture("PNG", RGB), (first(RGB),))
    yield Odd("tiff called png.png", picture("TIFF", RGB), (first(RGB),))


def modes() -> Iterator[Odd]:
    """Bits, palettes and alpha."""
    for bits in (1, 2, 4):
        values = GRAY % 2**bits
        yield Odd(
            f"{bits} bits.png", png(values, bits, 0), (first(values * (255 // (2**bits - 1))),)
        )
        palette = RGB[0, : 2**bits]
        content = png(values, bits, 3, chunk(b"PLTE", palette.tobytes()))
        yield Odd(f"palette of {bits} bits.png", content, (first(palette[values]),))
    for name, colour, channels in (("gray", 0, 1), ("colour", 2, 3)):
        values = FINE[..., :channels]
        yield Odd(f"16 bits {name}.png", png(values, 16, colour), (first(values),))
    for alpha in (255, 51, 0):  # over black
        share, off = alpha / 255, alpha == 51
        for name, array, colour in (("gray ", GRAY, 4), ("", RGB, 6)):
            values = np.dstack([array, np.full((24, 32), alpha, np.uint8)])
            over = first(array * share)
            yield Odd(f"{name}alpha {alpha}.png", picture("PNG", values), (over,), near=off)
            deep = values.astype(np.uint16) * 257
            content = png(deep, 16, colour)
            yield Odd(f"16 bits {name}alpha {alpha}.png", content, (over * 257,), near=off / 8)
    clear = Image.fromarray(GRAY % 2, "P")
    clear.putpalette([10, 20, 30, 40, 50, 60])
    over = first(np.array([[0, 0, 0], [40, 50, 60]])[GRAY % 2])
    yield Odd("a clear colour.png", picture("PNG", clear, transparency=0), (over,))
    yield Odd(
        "one bit.tif", picture("TIFF", Image.fromarray(GRAY > 99)), (first((GRAY > 99) * 255),)
    )
    yield Odd("one pixel.png", picture("PNG", RGB[:1, :1]), (first(RGB[:1, :1]),))
    yield Odd("one row.png", picture("PNG", RGB[:1]), (first(RGB[:1]),))


def orientations() -> Iterator[Odd]:
    """Each orientation in each place that may tell it."""
    turns: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1),
        lambda a: a.swapaxes(0, 1)[:, ::-1],
        lambda a: a[::-1, ::-1].swapaxes(0, 1),
        lambda a: a.swapaxes(0, 1)[::-1],
    ]
    for tag, turn in enumerate(turns, 1):
        exif = Image.Exif()
        exif[274] = tag
        for kind in ("PNG", "WEBP", "TIFF", "JPEG"):
            how = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}}.get(kind, {})
            content = picture(kind, SMOOTH, exif=exif, **how)
            near = 12 * (kind == "JPEG")
            yield Odd(f"turned {tag}.{kind}", content, (first(turn(SMOOTH)),), near=near)
        deep = FINE[..., 0]
        for name, content in {
            "deep": tiff(deep, extratags=[(274, "H", 1, tag, True)]),
            "packed": picture("TIFF", deep, exif=exif, compression="tiff_lzw"),
        }.items():
            yield Odd(f"turned {name} {tag}.tif", content, (first(turn(deep)),))
    texts = {
        b"tEXt": b"Raw profile type exif\0\nexif\n      32\n" + TURNED.tobytes().hex().encode(),
        b"iTXt": b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>',
    }
    for kind, text in texts.items():
        yield Odd(
            f"turned by {kind}.png", png(RGB, 8, 2, chunk(kind, text)), (first(turns[5](RGB)),)
        )


METADATA = {
    "no tiff": chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
    "cut": chunk(b"eXIf", b"II*\0\x08\0\0\0\x05\0"),
    "far": chunk(b"eXIf", b"MM\0*\x7f\xff\xff\xff"),
    "none": chunk(b"eXIf", b""),
    "false tag": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01abcd"),
    "no exif": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n9\nzz"),
    "long plain text": chunk(b"tEXt", b"k\0" + b"a" * 2**21),
    "suggested palette": chunk(b"sPLT", b"x"),
    "long text": chunk(b"zTXt", b"k\0\0" + LONG),
    "long xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "long profile": chunk(b"iCCP", b"icc\0\0" + LONG),
    "garbled text": chunk(b"zTXt", b"k\0\0garbage"),
    "wrong sum": chunk(b"tEXt", b"k\0v")[:-4] + bytes(4),
    "private": chunk(b"prVt", bytes(2**20)),
}


def metadata() -> Iterator[Odd]:
    """Metadata that are broken or long, before the pixels and after."""
    for name, extra in METADATA.items():
        yield Odd(f"{name} before.png", png(RGB, 8, 2, extra), (first(RGB),))
        yield Odd(f"{name} after.png", png(RGB, 8, 2, last=extra), (first(RGB),))
        yield Odd(f"{name} deep.png", png(FINE[..., :3], 16, 2, extra), (first(FINE[..., :3]),))
        turned = png(RGB, 8, 2, extra, last=chunk(b"eXIf", TURNED.tobytes()[6:]))
        yield Odd(f"{name} turned.png", turned, (first(RGB.swapaxes(0, 1)[:, ::-1]),))
    packer = zlib.compressobj(1)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(200)) + packer.flush()
    yield Odd("200 MB text.png", png(RGB, 8, 2, chunk(b"zTXt", b"k\0\0" + bomb)), (first(RGB),))
    broken = (
        b"Exif\0\0garbage",
        bytes(4),
        b"II*\0\x08\0\0\0\x05\0",
        b"Exif\0\0MM\0*\x7f\xff\xff\xff",
    )
    for number, exif in enumerate(broken):
        content = picture("WEBP", RGB, lossless=True, exif=exif)
        yield Odd(f"broken exif {number}.webp", content, (first(RGB),))
        content = picture("JPEG", SMOOTH, quality=98, exif=exif)
        yield Odd(f"broken exif {number}.jpg", content, (first(SMOOTH),), near=12)
    long = picture("WEBP", RGB, lossless=True, xmp=bytes(2**21), icc_profile=bytes(2**21))
    yield Odd("long.webp", long, (first(RGB),))


def packed_tiff(values: np.ndarray, bits: int) -> bytes:
    """A gray TIFF of so many bits a value, written by hand."""
    data = np.packbits(values[..., None] >> np.arange(bits)[::-1] & 1, axis=None).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiffs() -> Iterator[Odd]:
    """Types, bands and layouts of TIFF."""
    for dtype in ("uint8", "uint16", "int16", "uint32", "float16", "float32", "float64"):
        for bands in (1, 2, 3, 5):
            values = RANDOM.integers(0, 200, (24, 32, bands)).astype(dtype)
            for planar in ("contig", "separate"):
                array = values if planar == "contig" else values.transpose(2, 0, 1)
                how = {"photometric": "minisblack", "planarconfig": planar, "metadata": None}
                content = tiff(array, **how) if bands > 1 else tiff(values[..., 0])
                yield Odd(f"{dtype} {bands} {planar}.tif", content, (first(values),))
    for order in "<>":
        for large in (False, True):
            for tile in (None, (16, 16)):
                how = {"byteorder": order, "bigtiff": large, "tile": tile, "photometric": "rgb"}
                name = f"{order == '<'} {large} {tile is not None}.tif"
                yield Odd(f"layout {name}", tiff(FINE[..., :3], **how), (first(FINE[..., :3]),))
    yield Odd("zlib.tif", tiff(FINE[..., 0], compression="zlib"), (first(FINE[..., 0]),))
    for how in ("tiff_lzw", "packbits", "tiff_adobe_deflate"):
        yield Odd(f"{how}.tif", picture("TIFF", RGB, compression=how), (first(RGB),))
    for gray in (FINE[..., 0], FINE[..., 0].astype(np.float32)):
        content = picture("TIFF", gray, compression="tiff_lzw")
        yield Odd(f"packed {gray.dtype}.tif", content, (first(gray),))
    for white, gray in ((65535, FINE[..., 0]), (255, GRAY)):
        content = tiff(gray, photometric="miniswhite")
        yield Odd(f"white is 0 of {white}.tif", content, (first(white - gray),))
    inks = FINE.astype(np.float64)
    colours = first((65535 - inks[..., :3]) * (65535 - inks[..., 3:]) / 65535)
    for planar, array in (("contig", FINE), ("separate", first(FINE))):
        content = tiff(array, photometric="separated", planarconfig=planar)
        yield Odd(f"inks {planar}.tif", content, (colours,), near=0.1)
    cmyk = Image.fromarray((FINE >> 8).astype(np.uint8), "CMYK")
    yield Odd("inks 8.tif", picture("TIFF", cmyk), (first(np.array(cmyk.convert("RGB"))),))
    table = RANDOM.integers(0, 65536, (3, 65536)).astype(np.uint16)
    content = tiff(FINE[..., 0], photometric="palette", colormap=table)
    yield Odd("palette of 16 bits.tif", content, (table[:, FINE[..., 0]],))
    for bits in (2, 4, 12):
        values = FINE[..., 0] >> 16 - bits
        full = values * (255 // (2**bits - 1)) if bits < 8 else values
        yield Odd(f"{bits} bits.tif", packed_tiff(values, bits), (first(full),))
    nodata = FINE[..., 0].astype(np.float32)
    nodata[:4] = -9999
    filled = np.where(nodata == -9999, nodata[4:].min(), nodata)
    content = tiff(nodata, extratags=[(42113, 2, 0, "-9999", True)])
    yield Odd("nodata.tif", content, (first(filled),))


def arrays() -> Iterator[Odd]:
    """NumPy arrays of any type and order."""
    for dtype in (
        "uint8",
        "int8",
        "uint16",
        ">u2",
        "int32",
        "int64",
        "float16",
        "float32",
        "float64",
    ):
        values = RANDOM.integers(0, 100, (24, 32)).astype(dtype)
        yield Odd(f"{dtype.replace('>', 'big ')}.npy", npy(values), (first(values),))
    yield Odd("bool.npy", npy(GRAY > 99), (first((GRAY > 99) * 255),))
    yield Odd("columns.npy", npy(np.asfortranarray(RGB)), (first(RGB),))
    yield Odd("bands first.npy", npy(first(FINE)), (first(FINE),))
    holes = GRAY.astype(np.float32)
    holes[0], filled = np.nan, holes.copy()
    filled[0] = GRAY[1:].min()
    yield Odd("holes.npy", npy(holes), (first(filled),))


def pnms() -> Iterator[Odd]:
    """PNM of any kind and largest value."""
    for largest in (255, 1023, 65535):
        for kind, channels in ((2, 1), (3, 3), (5, 1), (6, 3)):
            values = FINE[..., :channels].astype(int) % (largest + 1)
            header = f"P{kind}\n# made by hand\n32 24\n{largest}\n".encode()
            text = " ".join(map(str, values.flatten())).encode()
            body = text if kind < 4 else values.astype(">u2" if largest > 255 else "u1").tobytes()
            yield Odd(f"P{kind} {largest}.pnm", header + body, (first(values),))
    yield Odd("of 3.pgm", b"P5\n2 1\n3\n\0\3", (np.array([[[0, 255]]]),))
    yield Odd("bits.pbm", b"P4\n8 1\n\x0f", (first(np.array([[255] * 4 + [0] * 4])),))


def stacks() -> Iterator[Odd]:
    """Several images in a file."""
    pages = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]])
    each, joined = tuple(page[None] for page in pages), (pages,)
    for dtype in (np.uint8, np.uint16, np.float32):
        typed, kind = pages.astype(dtype), np.dtype(dtype).name
        how = {"photometric": "minisblack"}
        yield Odd(f"unnamed {kind}.tif", tiff(typed, **how), joined)
        yield Odd(f"depth {kind}.tif", tiff(typed, **how, metadata={"axes": "ZYX"}), each)
        yield Odd(f"time {kind}.tif", tiff(typed, imagej=True, metadata={"axes": "TYX"}), each)
        yield Odd(
            f"bands {kind}.tif", tiff(typed, **how, ome=True, metadata={"axes": "CYX"}), joined
        )
    frames = [
        np.full((8, 8, 3), value, np.uint8) * np.array([1, 0, 2], np.uint8) for value in (9, 99)
    ]
    right = tuple(map(first, frames))
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        how = {"lossless": True} if kind == "WEBP" else {}
        others = [Image.fromarray(frames[1])]
        content = picture(kind, frames[0], save_all=True, append_images=others, **how)
        yield Odd(f"frames.{kind}", content, right)
    copy = Image.fromarray(SMOOTH[::2, ::2])
    small = picture("MPO", SMOOTH, save_all=True, append_images=[copy], quality=98)
    yield Odd("preview.jpg", small, (first(SMOOTH),), near=12)


def huge(kind: str, height: int = 20000, width: int = 20000) -> bytes:
    """A file whose header names more pixels than it holds."""
    if kind == "png":
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9)))
    if kind == "gif":
        return (
            b"GIF89a"
            + struct.pack("<HH", width, height)
            + bytes(3)
            + b","
            + bytes(9)
            + b"\2\2L\1\0;"
        )
    if kind == "bmp":
        return b"BM" + struct.pack(
            "<IIIIiiHHIIiiII", 99, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0
        )
    if kind == "pnm":
        return f"P6 {width} {height} 255\n".encode()
    if kind == "deep pnm":
        return f"P6 {width} {height} 65535\n".encode()
    entries = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 9}
    if kind == "float tif":
        entries |= {258: 32, 339: 3}
    body = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items())
    )
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


def refusals() -> Iterator[Odd]:
    """What is no image, is damaged, or would not be read right."""
    damaged = {
        "png": picture("PNG", RGB),
        "jpg": picture("JPEG", RGB),
        "bmp": picture("BMP", RGB),
        "tif": tiff(FINE),
        "webp": picture("WEBP", RGB),
        "gif": picture("GIF", GRAY),
        "npy": npy(FINE),
        "pnm": b"P6 32 24 65535\n" + FINE[..., :3].tobytes(),
    }
    for kind, content in damaged.items():
        for share in (0.1, 0.5):
            text = content[: int(share * len(content))]
            reason = r"damaged: .* of .* values are present$" if kind == "pnm" else "damaged: "
            yield Odd(f"cut at {share}.{kind}", text, refusal=reason if share == 0.5 else "")
    for start in (b"\xff\xd8\xff", b"II*\0"):
        yield Odd(f"{start[:2].hex()} alone.tif", start, refusal="damaged: ")
    yield Odd("empty.png", b"", refusal=r"the file is empty \(0 bytes\)")
    diary = "not an image that can be read: it begins with b'Dear diary'"
    yield Odd("text.jpg", b"Dear diary", refusal=diary)
    for start in (b"8BPS\0\1", b"\0\0\0\x0cjP  "):  # other formats of Pillow
        yield Odd(f"{start[-3:].hex()}.png", start + bytes(64), refusal="not an image")
    yield Odd("html.jpg", b"<!DOCTYPE html><html>", refusal="not an image that can be read")
    yield Odd("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(99), refusal="not an image")
    for kind in ("png", "bmp", "pnm", "deep pnm", "tif", "float tif"):
        yield Odd(
            f"huge {kind}.{kind.split()[-1]}",
            huge(kind),
            refusal="(a decompression bomb|20000x20000 pix)",
        )
    axes = r"an array of shape \(2, 3, 4, 5\); it must be \(h, w\)"
    yield Odd("four axes.npy", npy(np.zeros((2, 3, 4, 5))), refusal=axes)
    yield Odd("no pixel.npy", npy(np.zeros((0, 5))), refusal="an array of shape")
    yield Odd("words.npy", npy(np.array([["a"]])), refusal="values of type")
    yield Odd("complex.npy", npy(np.zeros((4, 4), complex)), refusal="values of type")
    yield Odd("objects.npy", npy(np.array([[{}]])), refusal="damaged")
    yield Odd("nothing known.npy", npy(np.full((4, 4), np.nan)), refusal="none of its values")
    yield Odd("complex.tif", tiff(np.zeros((4, 4), np.complex64)), refusal="values of type")
    for kind in ("cielab", "ycbcr"):
        content = tiff(FINE[..., :3], photometric=kind)
        yield Odd(f"{kind}.tif", content, refusal="uint16 .* colours, of which only 8 bits")
    avif = bytearray(picture("AVIF", RGB))
    avif[avif.index(b"av1C") + 6] |= 0x40
    yield Odd("10 bits.avif", bytes(avif), refusal="more than 8 bits")


GROUPS = (formats, modes, orientations, metadata, tiffs, arrays, pnms, stacks, refusals)


def all_files() -> list[Odd]:
    """All of them."""
    return [odd for group in GROUPS for odd in group()]
