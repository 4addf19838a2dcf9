"""Whatever holds more than 8 bits is read whole, or refused."""

import io
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from pixel_level_contrastive_learning.data.decoding import open_image
from pixel_level_contrastive_learning.data.image import ImageError

FINE = np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(np.uint16)


def tiff(array: np.ndarray, **how: object) -> bytes:
    """An array as a TIFF."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **how)
    return stream.getvalue()


def read(content: bytes) -> np.ndarray:
    """The pixels of a file, ``(h, w, c)``, after its header was compared with them."""
    opened = open_image(content)
    pixels = opened.read()
    assert (opened.size, opened.channels) == (tuple(pixels.shape[1:]), len(pixels))
    assert opened.high_depth == pixels.is_floating_point()
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("largest", [256, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", [2, 3, 5, 6])
def test_a_pnm_of_many_values_keeps_them(kind, largest) -> None:
    values = (FINE[..., :3] if kind in (3, 6) else FINE[..., :1]).astype(int) % (largest + 1)
    header = f"P{kind} # a remark\n7 5\n# another\n{largest}\n".encode()
    text = " ".join(map(str, values.flatten())).encode()
    body = text if kind in (2, 3) else values.astype(">u2").tobytes()
    assert (read(header + body) == values).all()
    with pytest.raises(ImageError, match=r"^damaged: .* of .* values are there$"):
        read(header + body[: len(body) // 2])


def test_a_pnm_of_few_values_fills_eight_bits() -> None:
    assert read(b"P5\n2 1\n3\n\0\3").flatten().tolist() == [0, 255]
    assert read(b"P2\n2 1\n255\n7 9").flatten().tolist() == [7, 9]


def test_a_pnm_that_would_not_fit_is_refused() -> None:
    with pytest.raises(ImageError, match="would take more than 4 GiB"):
        open_image(b"P6\n99999 99999\n65535\n")


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_inks_of_sixteen_bits_become_colours_of_sixteen_bits(planar) -> None:
    array = FINE if planar == "contig" else np.moveaxis(FINE, -1, 0)
    pixels = read(tiff(array, photometric="separated", planarconfig=planar))
    inks = FINE.astype(np.float64)
    expected = (65535 - inks[..., :3]) * (65535 - inks[..., 3:]) / 65535
    assert np.allclose(pixels, expected, atol=0.1)
    assert read(tiff(np.zeros((2, 2, 4), np.uint16), photometric="separated")).min() == 65535


def test_inks_of_eight_bits_become_colours_as_pillow_has_them() -> None:
    inks = Image.fromarray((FINE // 256).astype(np.uint8), "CMYK")
    stream = io.BytesIO()
    inks.save(stream, "TIFF")
    assert (read(stream.getvalue()) == np.array(inks.convert("RGB"))).all()


@pytest.mark.parametrize("photometric", ["cielab", "ycbcr"])
def test_colours_that_would_be_reduced_are_refused(photometric) -> None:
    content = tiff(FINE[..., :3], photometric=photometric)
    with pytest.raises(ImageError, match=r"^uint16 .* colours, of which only 8 bits would be kept"):
        open_image(content)


def test_an_avif_of_ten_bits_is_refused() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(stream, "AVIF")
    content = bytearray(stream.getvalue())
    assert open_image(bytes(content)).channels == 3
    content[content.index(b"av1C") + 6] |= 0x40
    with pytest.raises(ImageError, match="more than 8 bits"):
        open_image(bytes(content))


def test_a_palette_of_sixteen_bits_gives_its_colours() -> None:
    colours = np.random.default_rng(1).integers(0, 65536, (3, 65536)).astype(np.uint16)
    content = tiff(FINE[..., 0], photometric="palette", colormap=colours)
    assert (read(content) == colours[:, FINE[..., 0]].transpose(1, 2, 0)).all()


def test_white_may_be_zero() -> None:
    for dtype, white in ((np.uint8, 255), (np.uint16, 65535)):
        values = FINE[..., 0].astype(dtype)
        pixels = read(tiff(values, photometric="miniswhite"))
        assert (pixels[..., 0] == white - values.astype(int)).all()


def packed_tiff(values: np.ndarray, bits: int) -> bytes:
    """A gray TIFF of so many bits a value, written by hand."""
    rows = [
        np.packbits([[v >> (bits - 1 - b) & 1 for b in range(bits)] for v in map(int, row)])
        for row in values
    ]
    data = b"".join(row.tobytes() for row in rows)
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_twelve_bits_that_are_packed_are_read() -> None:
    values = FINE[:, :6, 0] >> 4
    assert (read(packed_tiff(values, 12))[..., 0] == values).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_of_a_tiff_fill_eight(bits) -> None:
    values = FINE[:, :4, 0] % 2**bits
    assert (read(packed_tiff(values, bits))[..., 0] == values * (255 // (2**bits - 1))).all()


def test_ten_bits_in_sixteen_keep_their_values() -> None:
    values = FINE[..., :3] % 1024
    assert (read(tiff(values, photometric="rgb")) == values).all()


def test_other_formats_of_pillow_are_no_images() -> None:
    for start in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"8BPS\0\1",
        b"\0\0\0\x0cjP  ",
    ):
        with pytest.raises(ImageError, match=r"^not an image that can be read"):
            open_image(start + bytes(64))
