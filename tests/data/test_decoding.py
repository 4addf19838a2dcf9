"""Any image file: its pixels, what its header tells, and the reason where it cannot be read."""

import io
import warnings
from math import prod
from threading import Event, Thread

import numpy as np
import pytest
import torch
from corpus.encoders import chunk, npy, picture, png, tiff
from PIL import Image
from torch import Tensor

from pixel_level_contrastive_learning.data import image
from pixel_level_contrastive_learning.data import picture as picture_module
from pixel_level_contrastive_learning.data.arrays import NODATA_TAG
from pixel_level_contrastive_learning.data.decoding import open_image
from pixel_level_contrastive_learning.data.image import ImageError, known_errors, to_rgb
from pixel_level_contrastive_learning.data.orientation import ORIENTATION_TAG, split_png

RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack((RAMP, RAMP[::-1], RAMP[:, ::-1]), axis=-1)


def decode(content: bytes, at_least: int | None = None) -> Tensor:
    """The upright pixels of a file."""
    return open_image(content).read(at_least)


def agrees(content: bytes, pixels: Tensor) -> None:
    """The header tells the size, channels and depth that the pixels have."""
    opened = open_image(content)
    assert opened.size == tuple(pixels.shape[1:])
    assert opened.channels == len(pixels)
    assert opened.high_depth == (pixels.dtype == torch.float32)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_gives_what_pillow_gives(mode, progressive) -> None:
    image = Image.linear_gradient("L").convert(mode)
    content = picture("JPEG", image, progressive=progressive)
    pixels = decode(content)
    expected = np.atleast_3d(np.array(Image.open(io.BytesIO(content))))
    assert (pixels.permute(1, 2, 0).int() - torch.from_numpy(expected).int()).abs().max() <= 1
    agrees(content, pixels)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        *(((9, 7), 1), ((3, 9, 7), 3), ((9, 7, 3), 3), ((7, 7, 20), 20), ((20, 7, 7), 20)),
        *(((9, 9, 9), 9), ((20, 9, 7), 7)),
    ],
)
def test_two_equal_sides_of_an_array_or_else_the_longer_ones_are_the_image(shape, channels) -> None:
    opened = open_image(npy(np.zeros(shape)))
    assert (opened.channels, opened.size[0] * opened.size[1]) == (channels, prod(shape) / channels)


def test_what_is_no_number_becomes_the_lowest() -> None:
    assert decode(npy([[np.nan, 3.0], [np.inf, -np.inf]])).tolist() == [[[3, 3], [3, 3]]]
    assert decode(npy([[np.nan, 3.0, 5.0, np.inf, -np.inf]])).tolist() == [[[3, 3, 5, 5, 3]]]
    with pytest.raises(ImageError, match=r"^none of its values is a finite number$"):
        decode(npy(np.full((2, 2), np.nan)))


def test_what_is_no_number_becomes_the_lowest_of_its_channel() -> None:
    nan, inf = np.nan, np.inf
    bands = np.array([[[nan, 0, 1, inf]], [[280, 300, nan, -inf]], [[nan, nan, inf, nan]]])
    content = npy(bands.astype(np.float32).repeat(4, axis=1))
    filled = [[0, 0, 1, 1], [280, 300, 280, 280], [0, 0, 0, 0]]
    assert decode(content)[:, 0].tolist() == filled
    known = [[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert open_image(content).decode().known[:, 0].tolist() == known


@pytest.mark.parametrize(
    ("dtype", "text", "value"),
    [
        (np.float32, "-9999", -9999),
        (np.float32, "0.1 ", np.float32(0.1)),
        (np.float32, "-3.4028235e+38", np.finfo(np.float32).min),
        (np.float64, "-1.7976931348623157e+308", np.finfo(np.float64).min),
        (np.uint16, "0", 0),
        (np.int16, "-32768", -32768),
    ],
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_what_a_geotiff_says_was_not_measured_is_filled(dtype, text, value, compression) -> None:
    bands = np.arange(7, 31).reshape(2, 3, 4).astype(dtype)
    bands[:, 1] = value
    options = {"photometric": "minisblack", "planarconfig": "separate", "compression": compression}
    content = tiff(bands, extratags=[(NODATA_TAG, 2, 0, text, True)], **options)
    raster = open_image(content).decode()
    assert raster.known.all(dim=2).tolist() == [[True, False, True]] * 2
    bands[0, 1], bands[1, 1] = 7, 19
    assert raster.pixels.tolist() == bands.tolist()


def test_nodata_of_a_tiff_is_the_value_that_is_stored() -> None:
    ramp = np.arange(12, dtype=np.uint16).reshape(3, 4)
    tag = (NODATA_TAG, 2, 0, "5", True)
    image = open_image(tiff(ramp, extratags=[tag], photometric="miniswhite")).decode()
    assert (image.known[0].numpy() == (ramp != 5)).all()
    assert (image.pixels[0].numpy() == np.where(ramp == 5, 65535 - 11, 65535 - ramp)).all()


@pytest.mark.parametrize(
    ("photometric", "bits", "step"),
    [("minisblack", 8, 1), ("miniswhite", 8, 1), ("rgb", 8, 1), ("miniswhite", 4, 17)],
)
def test_nodata_of_an_8_bit_tiff_keeps_its_pixels(photometric, bits, step) -> None:
    ramp = np.arange(12, dtype=np.uint8).reshape(3, 4)
    stored = np.stack([ramp] * 3, -1) if photometric == "rgb" else ramp
    tag = (NODATA_TAG, 2, 0, "5", True)
    content = tiff(stored, extratags=[tag], photometric=photometric, bitspersample=bits)
    raster = open_image(content).decode()
    white = photometric == "miniswhite"
    assert (raster.pixels.numpy() == (255 - step * ramp if white else step * ramp)).all()
    assert (raster.known.numpy() == (ramp != 5)).all()


@pytest.mark.parametrize(("dtype", "text"), [(np.float32, "none"), (np.uint8, "-9999")])
def test_a_nodata_tag_that_no_value_can_be_changes_nothing(dtype, text) -> None:
    ramp = np.arange(12, dtype=dtype).reshape(3, 4)
    raster = open_image(tiff(ramp, extratags=[(NODATA_TAG, 2, 0, text, True)])).decode()
    assert raster.known is None


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_any_channels_are_shown_as_three(channels, shown) -> None:
    pixels = torch.rand(2, channels, 4, 6)
    assert torch.equal(to_rgb(pixels), pixels[:, shown])
    assert torch.equal(to_rgb(pixels[0]), pixels[0, shown])


# Transparency.


@pytest.mark.parametrize(
    ("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (8, 2), (16, 0), (16, 2)]
)
def test_the_transparent_colour_of_a_png_is_black(bits, colour) -> None:
    white = 2**bits - 1
    values = np.arange(12).reshape(3, 4) % 2 * white
    array = np.stack([values, values // 2, values], -1) if colour else values
    key = array[0, 1].reshape(-1).astype(">u2").tobytes()
    content = png(array, bits, colour, chunk(b"tRNS", key))
    pixels = decode(content)
    agrees(content, pixels)
    assert not pixels.any()
    other = np.zeros_like(array[0, 1]).reshape(-1).astype(">u2").tobytes()
    assert decode(png(array, bits, colour, chunk(b"tRNS", other))).max() == max(white, 255)


# Scaled decoding.


@pytest.mark.parametrize(
    ("shortest", "height"), [(None, 603), (400, 603), (301, 302), (150, 151), (75, 76), (10, 76)]
)
def test_a_large_jpeg_is_decoded_no_smaller_than_asked(shortest, height) -> None:
    assert picture_module.SMALL < 603 * 1001
    content = picture("JPEG", Image.new("RGB", (1001, 603), (200, 100, 50)))
    pixels = decode(content, shortest)
    assert pixels.shape[1] == height  # rounded up
    assert (pixels[:, 3, 3].int() - torch.tensor([200, 100, 50])).abs().max() <= 2
    assert decode(picture("JPEG", Image.new("L", (90, 70))), 5).shape == (1, 70, 90)


def test_a_giant_that_has_to_be_decoded_whole_is_averaged_down(monkeypatch) -> None:
    content = picture("PNG", Image.fromarray(COLOUR).resize((64, 48), Image.Resampling.NEAREST))
    assert open_image(content).decode(4).scale == 1
    monkeypatch.setattr(picture_module, "GIANT", 1000)
    smaller = open_image(content).decode(4)
    assert (smaller.scale, smaller.pixels.size) == (4, (16, 12))


# What cannot be read.


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch) -> None:
    flat = picture("PNG", Image.new("L", (1000, 1000)))
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000), dtype=np.uint8)
    rich = picture("PNG", Image.fromarray(noise))
    webp = picture("WEBP", Image.new("RGB", (1000, 1000)))
    jpeg = picture("JPEG", Image.new("L", (1000, 1000)))
    assert decode(flat).shape == (1, 1000, 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    with pytest.raises(ImageError) as error:
        open_image(flat)
    assert str(error.value) == (
        f"a decompression bomb: 1000x1000 pixels in a file of {len(flat)} bytes, beyond the limit "
        "of 400000 pixels; if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS before the run, or "
        "cut it by `pixelcl prepare IMAGES --tile 512 --out SHARDS`, and pretrain on SHARDS"
    )
    with pytest.raises(ImageError, match=r"^a decompression bomb: Image size"):
        open_image(webp)
    assert decode(rich).shape == (1, 1000, 1000)  # large, and as large on disk
    assert decode(jpeg).shape == (1, 500, 500)  # what does not fit is decoded smaller
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(flat).shape == (1, 1000, 1000)


def test_no_file_may_take_more_than_the_memory_allowed(monkeypatch) -> None:
    monkeypatch.setattr(image, "MAX_BYTES", 1000)
    with pytest.raises(ImageError, match=r"^16x20 pixels would take more than 0 GiB; cut it by"):
        open_image(picture("PNG", Image.new("RGB", (20, 16))))
    with pytest.raises(ImageError, match=r"^16x20 pixels would take more than 0 GiB; cut it by"):
        open_image(tiff(np.zeros((16, 20), np.float32)))


def test_a_jpeg_of_twenty_thousand_squared_is_decoded_at_an_eighth() -> None:
    content = picture("JPEG", Image.new("L", (20000, 20000), 90))
    pixels = decode(content, 224)
    assert pixels.shape == (1, 2500, 2500)
    assert pixels.unique().tolist() == [90]


@pytest.mark.parametrize("more", [[], [(700, "B", 9, b"<x:xmpme>", True)]])
def test_a_tiff_is_turned_once(more) -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    turned = [[3, 0], [4, 1], [5, 2]]
    tags = [(274, "H", 1, 6, True), *more]
    gray = tiff(array, photometric="minisblack", extratags=tags)
    assert decode(gray).tolist() == [turned]
    rgb = tiff(np.stack([array] * 3, -1), photometric="rgb", extratags=tags)
    assert decode(rgb).tolist() == [turned] * 3


# Metadata.


TURNED = Image.Exif()
TURNED[ORIENTATION_TAG] = 6
NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)


def test_broken_exif_of_an_avif_costs_no_pixels() -> None:
    exif = Image.Exif()
    exif[305] = "a program"
    exif[ORIENTATION_TAG] = 6
    content = picture("AVIF", NOISE, exif=exif, quality=100)
    start = max(content.find(b"II*\0"), content.find(b"MM\0*"))
    broken = content[:start] + b"\0garbage" + content[start + 8 :]
    assert torch.equal(decode(broken), decode(content))
    assert decode(broken).shape == (3, 8, 6)  # the file says in two places how it is turned


def test_a_png_without_metadata_is_not_copied() -> None:
    plain = picture("PNG", NOISE)
    assert split_png(plain)[0] is plain
    bare, orientation = split_png(plain[:33] + chunk(b"tIME", bytes(7)) + plain[33:])
    assert (bare, orientation) == (plain, 1)
    assert split_png(plain[:60]) == (plain[:60], 1)
    content = picture("PNG", NOISE, exif=TURNED)
    with pytest.raises(ImageError, match="damaged"):  # cut off after its metadata
        decode(content[: len(content) // 2])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_deep_png_that_is_not_whole_does_not_end_the_process(share) -> None:
    """Torchvision's decoder reads past the end of such files, and the process with it."""
    whole = png(NOISE.astype(np.uint16), 16, 2)
    with pytest.raises(ImageError, match="damaged"):
        decode(whole[: int(share * len(whole))])
    wrong = bytearray(whole)
    wrong[-20] ^= 1  # in the pixels, under a checksum that was right
    with pytest.raises(
        ImageError, match=r"^damaged: the chunk b'IDAT' is cut off, or its checksum"
    ):
        decode(bytes(wrong))
    for place in (25, 26, 27, 28):  # colour type, compression, filter, interlacing
        header = bytearray(whole[16:29])
        header[place - 16] = 5
        with pytest.raises(ImageError):
            decode(whole[:8] + chunk(b"IHDR", bytes(header)) + whole[33:])


def test_threads_that_overlap_leave_warnings_as_they_were() -> None:
    before, entered, left = list(warnings.filters), Event(), Event()

    def decodes() -> None:
        with known_errors():
            entered.set()
            left.wait(9)

    thread = Thread(target=decodes)
    with known_errors():
        thread.start()
        entered.wait(9)
    assert warnings.filters[0][0] == "ignore"  # for the thread that decodes
    left.set()
    thread.join()
    assert list(warnings.filters) == before
