"""TIFF of any bit depth, number of bands and writer: which images a file holds, and their pixels.

Named axes count: C and S are channels, all others (Z, T and so on) count images. Pages without a
name are images, too, which `Stack.joinable` says may as well be the channels of one.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from io import BytesIO
from math import isnan, nan, prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .arrays import NODATA_TAG, NamedArray, array_to_pixels, one_image
from .image import (
    ALL,
    EIGHT_BIT,
    DecodedImage,
    ImageError,
    LazyImage,
    Stack,
    check_memory,
    pages_differ,
    to_tensor,
    without_value,
)
from .orientation import ORIENTATION_TAG, turn_upright, upright_size
from .picture import averaged, to_eight_bit, to_float
from .reading import Kept, version_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

# What tifffile says of a tag, image by image, helps nobody who has not asked for it.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

T = TypeVar("T")
IMAGEJ_CHANNELS = 7
"""Channels that ImageJ shows at most: with more, a writer has named an axis without being told."""
WEBP = 50001
"""The number of a TIFF's compression for which Pillow has a name, but rarely a decoder."""
NO_PAGE = "damaged: no page in it"
SMALLER_COPY = 0.02
"""Difference of two aspect ratios below which a smaller page is a copy of a larger one."""
ROWS = -1
"""In place of a plane's number: all pages, as the rows of an image."""
WIDEST_ROW = 16
"""Width of a page up to which it is no picture but a row of pixels, and its columns are channels:
what tifffile makes of an array ``(h, w, c)`` without being told."""
KEPT = Kept(16)
"""TIFFs of several images: their pages form a chain that is walked along when they are opened."""
SLIDE_KINDS = ("svs", "ndpi", "scn", "bif", "philips")
"""TIFFs that tifffile knows as slides, whatever their ending."""
GRAY = ("MINISBLACK", "MINISWHITE")
PILLOW_READS = frozenset(
    {(gray, 1) for gray in GRAY}
    | {("PALETTE", 1), ("RGB", 3), ("YCBCR", 3), ("CIELAB", 3), ("SEPARATED", 4)}
)
"""What 8-bit samples mean, and how many there are, where Pillow is asked for the pixels."""
REDUCED, TRANSPARENCY = 1, 4
"""Bits of a page's subfile type: a smaller copy, and a mask of what is transparent."""


class Plane(NamedTuple):
    """One page, or one stretch of a page that holds many: its series and its number in it.

    The number is `ROWS` where the pages are the rows of one image whose channels stand last.
    """

    series: int
    number: int


class TiffImages(NamedTuple):
    """The images of a TIFF, each a list of the planes that make its channels."""

    images: list[list[Plane]]
    stack: Stack


def tiff_images(file: Any) -> TiffImages:
    """What images a file holds, opened by tifffile; found once for as long as it is open."""
    if file not in FOUND:
        FOUND[file] = find_images(file)
    return FOUND[file]


FOUND: WeakKeyDictionary[Any, TiffImages] = WeakKeyDictionary()
"""What open files hold."""


def find_images(file: Any) -> TiffImages:
    """What images a file holds."""
    import numpy as np

    kept = full_size(file)
    if not kept:
        raise ImageError(NO_PAGE)
    images: list[list[Plane]] = []
    named, gray = False, len(kept) == 1
    for place in kept:
        series = file.series[place]
        page = series.keyframe
        axes = series.axes[: len(series.axes) - len(page.axes)]
        sides = series.shape[: len(axes)]
        if is_rows(series):
            images.append([Plane(place, ROWS)])
            gray = False
            continue
        many = file.is_imagej and dict(zip(axes, sides, strict=True)).get("C", 0) > IMAGEJ_CHANNELS
        channels = [i for i, axis in enumerate(axes) if axis == "C" and not many]
        numbers = np.arange(prod(sides)).reshape(sides)
        numbers = np.moveaxis(numbers, channels, range(len(axes) - len(channels), len(axes)))
        each = prod(sides[i] for i in channels)
        rows = numbers.reshape(-1, each).tolist()
        images += [[Plane(place, number) for number in row] for row in rows]
        named = named or many or not set(axes) <= set("CQI")
        gray = gray and each == page.samplesperpixel == 1 and photometric_of(page) in GRAY
    levels = sum(len(file.series[place].levels) - 1 for place in kept)
    reduced = len(file.series) - len(kept) + levels
    joinable = gray and not named and len(images) > 1
    return TiffImages(images, Stack(len(images), joinable=joinable, reduced=reduced))


def is_rows(series: Any) -> bool:
    """Whether a series' unnamed pages are rows of pixels rather than pictures."""
    if series.axes not in ("QYX", "IYX"):
        return False
    count, height, width = series.shape
    return bool(width <= WIDEST_ROW and width < min(count, height))


def full_size(file: Any) -> list[int]:
    """The series of a file that are no masks and no smaller copies of another one."""
    kinds = [int(getattr(series.keyframe, "subfiletype", 0)) for series in file.series]
    flagged = {i for i, kind in enumerate(kinds) if kind & (REDUCED | TRANSPARENCY)}
    sizes = [(s.keyframe.imagelength, s.keyframe.imagewidth) for s in file.series]
    copies = {
        i
        for i, (h, w) in enumerate(sizes)
        for height, width in sizes
        if 2 * h <= height and abs(h * width - w * height) <= SMALLER_COPY * h * width
    }
    everything = range(len(sizes))
    return [i for i in everything if i not in flagged | copies] or list(everything)[:1]


def photometric_of(page: Any) -> str:
    """How a page's samples are meant, such as MINISBLACK or RGB."""
    return getattr(page.photometric, "name", "")


def nodata(page: Any) -> float:
    """The value of a TIFF where nothing was measured; NaN if it names no number."""
    tag = page.tags.get(NODATA_TAG)
    with suppress(TypeError, ValueError):
        return float(tag.value) if tag else nan
    return nan


def opened_tiff(content: bytes | str) -> AbstractContextManager[Any]:
    """A TIFF opened by tifffile, whose pages are looked for once where they stay in their file."""
    if isinstance(content, bytes):
        file: AbstractContextManager[Any] = parsed_tiff(BytesIO(content))
        return file
    return KEPT.opened(version_of(content), partial(parsed_tiff, content))


def parsed_tiff(file: BytesIO | str) -> Any:
    """A file opened by tifffile; of a TIFF in several files, this one."""
    from tifffile import TiffFile

    try:
        return TiffFile(file, _multifile=False)
    except struct.error as error:  # cut off before its first page
        raise ImageError(NO_PAGE) from error


def stack_of_tiff(content: bytes | str) -> Stack:
    """Which images a TIFF holds."""
    with opened_tiff(content) as file:
        return Stack(1) if is_slide(file) else tiff_images(file).stack


def is_slide(file: Any) -> bool:
    """Whether a file opened by tifffile is a slide, whose other pages are no images."""
    return any(getattr(file, f"is_{kind}") for kind in SLIDE_KINDS)


class Samples(NamedTuple):
    """How the numbers of a page become pixels.

    Attributes:
        photometric: What they mean, such as MINISBLACK or RGB.
        samples: How many a pixel has.
        white: The largest number that they may be, or 1 of floats.
        deep: Whether they are more than 8-bit.
        palette: ``(3, n)`` colours of whole numbers, or None.
    """

    photometric: str
    samples: int
    white: float
    deep: bool
    palette: NDArray[Any] | None

    @classmethod
    def of(cls, page: Any) -> Samples:
        """Those of a page.

        Raises:
            ImageError: They would be reduced to 8 bits, or are of an unknown type.
        """
        if page.dtype is None:
            raise ImageError(f"values of {page.bitspersample} bits in an unknown format")
        photometric, deep = photometric_of(page), page.dtype.name not in EIGHT_BIT
        if deep and photometric in ("YCBCR", "CIELAB", "ICCLAB", "ITULAB"):
            raise ImageError(
                f"{page.dtype} {photometric} colours, of which only 8 bits would be kept; save "
                "it as RGB"
            )
        white = 2.0**page.bitspersample - 1 if page.dtype.kind == "u" else 1.0
        palette = page.colormap if photometric == "PALETTE" else None
        return cls(photometric, page.samplesperpixel, white, deep, palette)

    @property
    def by_pillow(self) -> bool:
        """Whether Pillow reads them whole; it knows colours, and more compressions."""
        return not self.deep and (self.photometric, self.samples) in PILLOW_READS

    @property
    def channels(self) -> int | None:
        """Channels of the pixels; None for as many as there are numbers."""
        if self.by_pillow:
            return 1 if self.photometric in GRAY else 3
        return 3 if self.inks or self.palette is not None else None

    @property
    def inks(self) -> bool:
        """Whether they are four inks, which become colours."""
        return self.photometric == "SEPARATED" and self.samples == 4

    def to_pixels(self, pixels: Tensor) -> Tensor:
        """Numbers ``(count, h, w)`` as pixels ``(c, h, w)``."""
        if self.palette is not None:
            kept = self.palette.astype("f4") if self.deep else (self.palette >> 8).astype("u1")
            return torch.from_numpy(kept)[:, pixels[0].long()]
        if self.photometric == "MINISWHITE":
            return (self.white - pixels.float()).to(pixels.dtype)
        if self.inks:
            return (self.white - pixels[:3]) * (self.white - pixels[3:]) / self.white
        return pixels

    def gray_of(self, stored: float) -> float:
        """What one stored number, or the same in each sample, is in the pixels; of no palette."""
        value = self.white - stored if self.photometric == "MINISWHITE" else stored
        return value * 255 / self.white if self.by_pillow else value


def open_tiff(content: bytes | str, image: int | None = None) -> LazyImage:
    """Open one of the images in a TIFF, see `open_image`."""
    with opened_tiff(content) as file:
        images, stack = tiff_images(file)
        joined = image == ALL or (image is None and stack.joined)
        planes = [plane for one in images for plane in one] if joined else images[image or 0]
        layouts = [layout(file, plane) for plane in planes]
        page = file.series[planes[0].series].keyframe
        dtype, samples = page.dtype, Samples.of(page)
        tag = page.tags.get(ORIENTATION_TAG)
        orientation, missing = int(tag.value) if tag else 1, nodata(page)
        file_bytes = file.filehandle.size
    shapes = {named.array.shape for named in layouts}
    if len(shapes) > 1:
        raise ImageError(pages_differ(shapes))
    per_plane, (height, width) = layouts[0].channels, layouts[0].size
    rows = planes[0].number == ROWS
    channels = (per_plane if rows else samples.channels or per_plane) * len(planes)
    check_memory(height, width, channels * (dtype.itemsize + 4 * samples.deep), file_bytes)

    def load(scale: int) -> DecodedImage:
        with opened_tiff(content) as file:
            parts = [read_plane(file, plane, content, samples, orientation) for plane in planes]
        if len(parts) == 1 and not isinstance(parts[0], Tensor):
            return averaged(parts[0], scale)
        return DecodedImage(torch.cat([to_tensor(part) for part in parts]))

    size = upright_size(height, width, orientation)
    opened = LazyImage(size, channels, samples.deep, load)
    if isnan(missing) or samples.palette is not None:
        return opened
    return without_value(opened, samples.gray_of(missing))


def layout(file: Any, plane: Plane) -> NamedArray:
    """The shape of a plane and its axes."""
    series = file.series[plane.series]
    page = series.keyframe
    return one_image(series) if plane.number == ROWS else one_image(page, page.axes)


def read_plane(
    file: Any, plane: Plane, content: bytes | str, samples: Samples, orientation: int
) -> Tensor | Image.Image:
    """The upright pixels of one plane of a TIFF."""
    page = page_of(file, plane)
    if samples.by_pillow and page is not None and not pillow_lacks(page):
        return read_by_pillow(content, page.index, to_eight_bit)
    try:
        array = plane_array(file, plane)
    except MissingCodecError:
        by_pillow = samples.samples == 1 and samples.palette is None and not samples.by_pillow
        if page is None or not by_pillow:
            raise
        return samples.to_pixels(read_by_pillow(content, page.index, to_float))
    pixels = array_to_pixels(array, layout(file, plane).axes)
    return turn_upright(samples.to_pixels(pixels), orientation)


def pillow_lacks(page: Any) -> bool:
    """Whether tifffile alone reads the compression of a page.

    Raises:
        ImageError: Its colours would not become RGB then.
    """
    from PIL.TiffImagePlugin import COMPRESSION_INFO

    if page.compression in COMPRESSION_INFO and page.compression != WEBP:
        return False
    if (kind := photometric_of(page)) in ("YCBCR", "CIELAB"):
        name = getattr(page.compression, "name", page.compression)
        raise ImageError(f"{kind} colours in the compression {name}; save it as RGB")
    return True


class MissingCodecError(ImageError):
    """What is compressed so needs a library that is not installed."""


def page_of(file: Any, plane: Plane) -> Any:
    """The page that holds a plane and no other; None if there is none."""
    series = file.series[plane.series]
    if plane.number == ROWS or plane.number >= len(series.pages):
        return None
    if series.pages[plane.number] is None:
        raise ImageError(f"page {plane.number + 1} of it is in another file, or missing")
    return series.pages[plane.number]


def plane_array(file: Any, plane: Plane) -> NDArray[Any]:
    """The numbers of a plane, its axes as `layout` names them."""
    series, page = file.series[plane.series], page_of(file, plane)
    try:
        if plane.number == ROWS or page is not None:
            array: NDArray[Any] = (series if page is None else page).asarray()
            return array
    except (KeyError, ValueError) as error:
        if "imagecodecs" not in str(error):
            raise
        raise MissingCodecError(f"{error.args[0]}: pip install imagecodecs") from error
    # Planes lie one after the other behind a single page.
    page = series.keyframe
    start = series.dataoffset + plane.number * page.nbytes
    dtype = page.dtype.newbyteorder(file.byteorder)
    array = file.filehandle.read_array(dtype, page.size, start).reshape(page.shape)
    return array


def read_by_pillow(content: bytes | str, page: int, convert: Callable[[Image.Image], T]) -> T:
    """A page read by Pillow, which turns it upright itself, and converted."""
    from PIL.TiffImagePlugin import TiffImageFile

    if isinstance(content, bytes):
        image = TiffImageFile(BytesIO(content))
        image.seek(page)
        return convert(image)
    key = "Pillow", version_of(content)
    with KEPT.opened(key, lambda: TiffImageFile(open(content, "rb"))) as image:
        image.seek(page)
        return convert(image.copy())
