"""Open image files of any format, bit depth and number of bands, without decoding them yet.

Size, channels and bit depth come from the header, so that a large JPEG can then be decoded at a
half, a quarter or an eighth of its size. Pixels come back upright, as the EXIF orientation says.
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
    MAX_BYTES,
    SCALES,
    DecodedImage,
    ImageError,
    LazyImage,
    array_layout,
    array_to_pixels,
    bomb,
    check_memory,
    decoder_message,
    exceeds_pillow_limit,
    lazy_pixels,
    too_large,
)
from .orientation import (
    ORIENTATION_TAG,
    PNG,
    first_pixel,
    orientation_of,
    split_png,
    turn_picture,
    turn_upright,
    upright_size,
)

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = ".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .npy .gif .ppm .pgm .pbm .pnm .avif"
IMAGE_SUFFIXES = frozenset(re.findall(r"\.\w+", ENDINGS))
"""Files taken for images, in lower case; their content decides the format."""
SMALL = 2**19
"""Pixels up to which a JPEG is always decoded in full, because a smaller scale saves nothing."""
GIANT = 2**26
"""Pixels above which an image that had to be decoded in full is averaged down before it is cut."""
GRAY_MODES = ("1", "L", "LA", "La")
HIGH_DEPTH_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How a TIFF begins: both byte orders, classic and big."""
NODATA_TAG = 42113
"""GDAL's TIFF tag: the value, as text, that stands where nothing was measured."""


def open_image(content: bytes) -> LazyImage:
    """Read the header of an encoded image.

    Transparent images are laid over black; palettes and CMYK become RGB. All bands of a TIFF are
    kept, and what is not 8-bit keeps its values; what was not measured (NaN, or GDAL's nodata)
    becomes the lowest value of its channel.

    Args:
        content: The bytes of the file.

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
        raise ImageError(decoder_message(error, content)) from error


def open_npy(content: bytes) -> LazyImage:
    """Open a NumPy array."""
    import numpy as np

    return lazy_pixels(array_to_pixels(np.load(BytesIO(content), allow_pickle=False)))


def open_jpeg(content: bytes) -> LazyImage:
    """Open a JPEG, the one format that decodes at a smaller scale."""
    from PIL.JpegImagePlugin import JpegImageFile

    # Image.open refuses by the size of the full image; here the decoded size counts.
    image = JpegImageFile(BytesIO(content))
    width, height = image.size
    plain, orientation = image.mode in ("L", "RGB"), orientation_of(image)
    if image.info.get("progressive") and 6 * height * width > MAX_BYTES:
        raise ImageError(too_large(height, width))  # all its coefficients are held at once

    def load(scale: int) -> DecodedImage:
        from torchvision.io import decode_jpeg

        if height * width <= SMALL:
            scale = 1
        while scale < SCALES[-1] and exceeds_pillow_limit(height * width // scale**2):
            scale *= 2
        if scale == 1 and plain:
            return DecodedImage(turn_upright(decode_jpeg(as_bytes(content)), orientation))
        draft: JpegImageFile = JpegImageFile(BytesIO(content))
        if scale > 1:
            draft.draft(None, (max(width // scale, 1), max(height // scale, 1)))
        scale = next(s for s in SCALES if draft.size == (-(-width // s), -(-height // s)))
        return DecodedImage(to_eight_bit(draft), scale, first_pixel(size, scale, orientation))

    size = upright_size(height, width, orientation)
    return LazyImage(size, 1 if image.mode == "L" else 3, False, load)


def open_picture(content: bytes) -> LazyImage:
    """Open what Pillow reads: PNG, WebP, BMP, 8-bit TIFF and more."""
    from PIL import Image
    from PIL.PngImagePlugin import PngImageFile
    from PIL.TiffImagePlugin import TiffImageFile

    png, orientation = content.startswith(PNG), 1
    if png:
        content, orientation = split_png(content)
    kind: Any = PngImageFile if png else TiffImageFile if content.startswith(TIFF) else Image.open
    try:
        # Not by Image.open: a large PNG or TIFF is a bomb by what it grows to, not by its size.
        image = kind(BytesIO(content))
    except Image.DecompressionBombError as error:
        raise ImageError(bomb(str(error))) from None
    except ValueError:
        if b"ftypavi" not in content[:16]:
            raise
        image = Image.open(BytesIO(content.replace(b"Exif", b"free")))  # its EXIF may be broken
    if not png:
        orientation = orientation_of(image)
    size = upright_size(image.height, image.width, orientation)
    deep_png = png and content[24] == 16  # bits per channel
    check_memory(*size, 6 * len(image.getbands()) if deep_png else 4, len(content))

    def load_deep_png(_: int) -> DecodedImage:
        from torchvision.io import decode_png

        pixels = decode_png(as_bytes(content)).float()  # Pillow reads 16-bit colour as 8 bits
        if len(pixels) not in (1, 3):
            pixels = pixels[:-1] * (pixels[-1:] / 65535)  # over black
        return DecodedImage(turn_upright(pixels, orientation))

    def load_eight_bit(scale: int) -> DecodedImage:
        pixels = to_eight_bit(image, orientation)
        if scale > 1 and pixels.width * pixels.height > GIANT:
            return DecodedImage(pixels.reduce(scale), scale)
        return DecodedImage(pixels)

    if deep_png:
        channels = 1 if content[25] in (0, 4) else 3  # colour type: gray, with or without alpha
        return LazyImage(size, channels, True, load_deep_png)
    if image.mode in HIGH_DEPTH_MODES:
        return LazyImage(size, 1, True, lambda _: DecodedImage(to_float(image, orientation)))
    return LazyImage(size, 1 if image.mode in GRAY_MODES else 3, False, load_eight_bit)


def open_tiff(content: bytes) -> LazyImage:
    """Open a TIFF of any bit depth and number of bands; of a stack, its first page."""
    from tifffile import TiffFile

    def planes_of(file: Any) -> Any:
        series = file.series[0]
        return series if set(series.axes) <= set("YXSCQI") else file.pages[0]

    with TiffFile(BytesIO(content)) as file:
        page: Any = file.pages[0]
        planes = planes_of(file)
        shape, axes, dtype = planes.shape, planes.axes, planes.dtype
        high_depth = dtype is None or dtype.name not in EIGHT_BIT
        colours = 1 if axes == "YX" else page.samplesperpixel if "S" in axes else 0
        photometric = getattr(page.photometric, "name", "")
        tag = page.tags.get(ORIENTATION_TAG)
        orientation, missing = int(tag.value) if tag else 1, nodata(page)
    if photometric in ("YCBCR", "SEPARATED", "CIELAB") or (not high_depth and colours in (1, 3)):
        return open_picture(content)  # Pillow knows colours, and more compressions

    def load(_: int) -> DecodedImage:
        try:
            with TiffFile(BytesIO(content)) as file:
                pixels = array_to_pixels(planes_of(file).asarray(), axes)
        except (KeyError, ValueError) as error:
            if "imagecodecs" not in str(error):
                raise
            if colours != 1:
                raise ImageError(f"{error.args[0]}: pip install imagecodecs") from error
            from PIL import Image

            pixels = to_float(Image.open(BytesIO(content)))
        else:
            pixels = turn_upright(pixels, orientation)
        if high_depth and not isnan(missing):
            rounded = torch.tensor(missing, dtype=pixels.dtype)  # as they are
            pixels.masked_fill_(pixels == rounded, torch.nan)
        return DecodedImage(pixels)

    channels, height, width = array_layout(shape, axes)
    check_memory(height, width, channels * (dtype.itemsize + 4 * high_depth), len(content))
    return LazyImage(upright_size(height, width, orientation), channels, high_depth, load)


def nodata(page: Any) -> float:
    """The value of a TIFF where nothing was measured; NaN if it names no number."""
    tag = page.tags.get(NODATA_TAG)
    with suppress(TypeError, ValueError):
        return float(tag.value) if tag else nan
    return nan


def as_bytes(content: bytes) -> Tensor:
    """A file as torchvision's decoders take it."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# Pillow images.


def to_eight_bit(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """A Pillow image of any 8-bit mode, upright, as L or RGB; transparent parts over black."""
    from PIL import Image

    image = turn_picture(image, orientation)
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        over = Image.alpha_composite(ground, image.convert("RGBA"))
        return over.convert("L" if image.mode in GRAY_MODES else "RGB")
    return image.convert("RGB")


def to_float(image: Image.Image, orientation: int | None = None) -> Tensor:
    """The values ``(1, h, w)`` float32 of a 16-bit, 32-bit or float Pillow image, upright."""
    import numpy as np

    return torch.from_numpy(np.array(turn_picture(image, orientation), dtype=np.float32))[None]
