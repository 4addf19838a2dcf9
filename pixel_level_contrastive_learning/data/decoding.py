"""From the bytes of an image file to its pixels: any format, any depth, any number of bands.

The file is looked at first, so that size, channels and depth are known before anything is decoded,
and a large JPEG can then be decoded at a half, a quarter or an eighth of its size.
"""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from io import BytesIO
from math import isnan, nan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .image import (
    EIGHT_BIT,
    MOST_BYTES,
    ORIENTATION_TAG,
    ORIENTATIONS,
    SCALES,
    UPRIGHT,
    DecodedImage,
    ImageError,
    LazyImage,
    Orientation,
    allowed,
    as_pixels,
    bomb,
    layout,
    open_npy,
    reason,
    too_large,
    too_many,
    upright,
)

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = ".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .npy .gif .ppm .pgm .pbm .pnm .avif"
SUFFIXES = frozenset(re.findall(r"\.\w+", ENDINGS))
"""Files that are taken for images, in capitals or not; the content decides the format."""
SMALL = 2**19
"""Pixels up to which a JPEG is decoded whole, whatever is asked for: nothing would be gained."""
GIANT = 2**26
"""Pixels above which an image that had to be decoded whole is averaged down before it is cut."""
GRAY_MODES = ("1", "L", "LA", "La")
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How a TIFF begins: both byte orders, classic and big."""
NODATA_TAG = 42113
"""GDAL's: the value, as text, that stands where nothing was measured."""


def decode(content: bytes, name: str = "", *, shortest: int | None = None) -> Tensor:
    """The upright pixels of an encoded image.

    Transparent images are laid over black, palettes and CMYK become RGB. All bands of a TIFF are
    kept, and what is not 8-bit keeps its values; what was not measured (NaN, or GDAL's nodata)
    becomes the lowest of its channel. A file that has to be decoded whole (any format but JPEG)
    takes at most `MOST_BYTES` on the way.

    Args:
        content: The bytes of the file.
        name: The file's name, for the reason.
        shortest: The least that the shorter side must measure: a JPEG may then be decoded at a
            half, a quarter or an eighth of its size.

    Returns:
        ``(c, h, w)`` uint8, or float32 raw values of 16-bit and float images.

    Raises:
        ImageError: The reason in words, after the name.
    """
    try:
        opened = open_image(content)
        fitting = [s for s in SCALES if shortest and min(opened.size) >= shortest * s]
        return upright(opened.raster(max(fitting, default=1)).pixels, opened.orientation)
    except ImageError as error:
        raise ImageError(f"{name}: {error}" if name else str(error)) from error


def open_image(content: bytes) -> LazyImage:
    """Look at an encoded image without decoding it.

    Raises:
        ImageError: It is no image, damaged, or a decompression bomb.
    """
    if not content:
        raise ImageError("the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if content.startswith(b"\x93NUMPY"):
                return open_npy(content)
            if content.startswith(TIFF):
                return open_tiff(content)
            if content.startswith(b"\xff\xd8\xff"):
                return open_jpeg(content)
            return open_picture(content)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(reason(error, content)) from error


def open_jpeg(content: bytes) -> LazyImage:
    """Look at a JPEG: the one format that decodes at a smaller scale."""
    from PIL.JpegImagePlugin import JpegImageFile

    # Not by Image.open, which refuses by the size of the file's image; ours counts by what will
    # be decoded of it.
    image = JpegImageFile(BytesIO(content))
    height, width = image.height, image.width
    plain = image.mode in ("L", "RGB")
    if image.info.get("progressive") and 6 * height * width > MOST_BYTES:
        raise ImageError(too_large(height, width))  # all its coefficients are held at once

    def load(scale: int) -> DecodedImage:
        from torchvision.io import decode_jpeg

        if height * width <= SMALL:
            scale = 1
        while scale < SCALES[-1] and too_many(height * width // scale**2):
            scale *= 2
        if scale == 1 and plain:
            return DecodedImage(
                decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)), 1
            )
        draft: JpegImageFile = JpegImageFile(BytesIO(content))
        if scale > 1:
            draft.draft(None, (max(width // scale, 1), max(height // scale, 1)))
        done = next(s for s in SCALES if draft.size == (-(-width // s), -(-height // s)))
        return DecodedImage(eight_bit(draft), done)

    size, orientation = turned(image)
    return LazyImage(size, 1 if image.mode == "L" else 3, False, orientation, True, load)


def open_picture(content: bytes) -> LazyImage:
    """Look at whatever Pillow reads: PNG, WebP, BMP, 8-bit TIFF and more."""
    from PIL import Image
    from PIL.PngImagePlugin import PngImageFile
    from PIL.TiffImagePlugin import TiffImageFile

    png = content.startswith(b"\x89PNG\r\n\x1a\n")
    kind: Any = PngImageFile if png else TiffImageFile if content.startswith(TIFF) else Image.open
    try:
        # A large PNG or TIFF may be fine: it is a bomb by what it grows to, not by its size alone.
        image = kind(BytesIO(content))
    except Image.DecompressionBombError as error:
        raise ImageError(bomb(str(error))) from None
    size, orientation = turned(image)
    deep_png = png and content[24] == 16  # bits a channel
    allowed(*size, 6 * len(image.getbands()) if deep_png else 4, len(content))

    def load_deep_png(_: int) -> DecodedImage:
        from torchvision.io import decode_png

        # Pillow would squash 16-bit colour to 8 bits.
        pixels = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8)).float()
        return DecodedImage(
            pixels if len(pixels) in (1, 3) else pixels[:-1] * (pixels[-1:] / 65535), 1
        )

    if deep_png:
        channels = 1 if content[25] in (0, 4) else 3  # the colour type: gray, with or without alpha
        return LazyImage(size, channels, True, orientation, False, load_deep_png)
    if image.mode in DEEP_MODES:
        return LazyImage(size, 1, True, orientation, False, lambda _: DecodedImage(raw(image), 1))
    channels = 1 if image.mode in GRAY_MODES else 3
    return LazyImage(
        size, channels, False, orientation, False, lambda scale: shrunk(eight_bit(image), scale)
    )


def open_tiff(content: bytes) -> LazyImage:
    """Look at a TIFF of any depth and number of bands; of a stack the first page counts."""
    from tifffile import TiffFile

    def held(file: Any) -> Any:
        """The planes of one image: pages that are bands, or of a stack the first page."""
        series = file.series[0]
        return series if set(series.axes) <= set("YXSCQI") else file.pages[0]

    with TiffFile(BytesIO(content)) as file:
        page: Any = file.pages[0]
        planes = held(file)
        shape, axes, dtype = planes.shape, planes.axes, planes.dtype
        deep = dtype is None or dtype.name not in EIGHT_BIT
        colours = 1 if axes == "YX" else page.samplesperpixel if "S" in axes else 0
        photometric = getattr(page.photometric, "name", "")
        tag = page.tags.get(ORIENTATION_TAG)
        missing = nodata(page)
    if photometric in ("YCBCR", "SEPARATED", "CIELAB") or (not deep and colours in (1, 3)):
        return open_picture(content)  # Pillow knows colours, and more compressions

    def load(_: int) -> DecodedImage:
        try:
            with TiffFile(BytesIO(content)) as file:
                return DecodedImage(measured(as_pixels(held(file).asarray(), axes)), 1)
        except (KeyError, ValueError) as error:
            if "imagecodecs" not in str(error):
                raise
            if colours != 1:
                raise ImageError(f"{error.args[0]}: pip install imagecodecs") from error
        from PIL import Image

        return DecodedImage(measured(raw(Image.open(BytesIO(content)))), 1)

    def measured(pixels: Tensor) -> Tensor:
        """Raw values, NaN where the file says that nothing was measured."""
        if not deep or isnan(missing):
            return pixels
        rounded = torch.tensor(missing, dtype=pixels.dtype)  # as they are
        return pixels.masked_fill_(pixels == rounded, torch.nan)

    channels, height, width = layout(shape, axes)
    allowed(height, width, channels * (dtype.itemsize + 4 * deep), len(content))
    orientation = ORIENTATIONS.get(int(tag.value) if tag else 1, UPRIGHT)
    size = (width, height) if orientation.swapped else (height, width)
    return LazyImage(size, channels, deep, orientation, False, load)


def nodata(page: Any) -> float:
    """What stands in a TIFF where nothing was measured; NaN where it names no number."""
    tag = page.tags.get(NODATA_TAG)
    with suppress(TypeError, ValueError):
        return float(tag.value) if tag else nan
    return nan


def turned(image: Image.Image) -> tuple[tuple[int, int], Orientation]:
    """The upright size of a Pillow image, and how to get there."""
    tag = image.getexif().get(ORIENTATION_TAG) if may_be_turned(image) else None
    orientation = ORIENTATIONS.get(tag or 1, UPRIGHT)
    height, width = image.height, image.width
    return ((width, height) if orientation.swapped else (height, width)), orientation


def may_be_turned(image: Image.Image) -> bool:
    """Whether there is anything in the header that an orientation could stand in.

    A TIFF's was obeyed by Pillow already.
    """
    return image.format != "TIFF" and bool(
        {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"} & set(image.info)
    )


def eight_bit(image: Image.Image) -> Image.Image:
    """A Pillow image of any 8-bit mode as L or RGB; what is transparent is laid over black."""
    from PIL import Image

    image.load()
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        gray = image.mode in GRAY_MODES
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, layer).convert("L" if gray else "RGB")
    return image.convert("RGB")


def shrunk(image: Image.Image, scale: int) -> DecodedImage:
    """An image that had to be decoded whole, averaged down where it is a giant."""
    if scale > 1 and image.width * image.height > GIANT:
        return DecodedImage(image.reduce(scale), scale)
    return DecodedImage(image, 1)


def raw(image: Image.Image) -> Tensor:
    """The values ``(1, h, w)`` float32 of a 16-bit, 32-bit or float Pillow image."""
    import numpy as np

    return torch.from_numpy(np.array(image, dtype=np.float32))[None]
