"""Open a large file for reading by windows: which library reads it, and which images it holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .decoding import TIFF, open_image
from .image import ImageError, array_layout, decoder_message
from .orientation import ORIENTATION_TAG
from .pages import read_bytes
from .picture import GIANT
from .raster_drivers import gdal_raster, slide_raster
from .rasters import Array, Raster, decoded_raster, mapped_raster, npy_raster
from .sources import SLIDE_SUFFIXES

MAX_CHANNEL_PAGES = 16
"""Unnamed gray pages up to which a stack is one image of so many channels."""
MASK = 4
"""Bit of a TIFF page's type: it says where another page was measured."""
NO_RGB = ("SEPARATED", "CIELAB", "ICCLAB", "ITULAB")
SLIDE_KINDS = ("svs", "ndpi", "scn", "bif", "philips")
"""TIFFs that tifffile knows as slides, whatever their ending."""
DRIVERS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"\0\0\0\x0cjP": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"P5": "PNM",
    b"P6": "PNM",
}
"""How giant pictures begin, and what GDAL calls their format."""


def is_larger(path: str, side: int) -> bool:
    """Whether a side of a file's image is longer than that; unreadable ones are not."""
    from PIL import Image
    from tifffile import TiffFile

    if Path(path).suffix.lower() in SLIDE_SUFFIXES:
        return True
    try:
        start = read_bytes(path, 0, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if start.startswith(b"\x93NUMPY"):
                size = array_layout(np.load(path, "r", allow_pickle=False).shape)[1:]
            elif start.startswith(TIFF):
                with TiffFile(path) as file:
                    page: Any = file.pages[0]
                    size = page.imagelength, page.imagewidth
            else:
                with Image.open(path) as image:
                    size = image.size
    except Image.DecompressionBombError:
        return True
    except Exception:  # the reason is told when it is read
        return False
    return max(size) > side


def open_rasters(path: str) -> list[Raster]:
    """The images of a file, most often one; a stack of pages along Z or T has several.

    Raises:
        ImageError: It cannot be read, or not by windows.
        ModuleNotFoundError: The library that reads it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if Path(path).suffix.lower() in SLIDE_SUFFIXES - {".jp2"}:
                return [slide_raster(path)]
            start = read_bytes(path, 0, 8)
            if start.startswith(b"\x93NUMPY"):
                return [npy_raster(path)]
            return tiff_rasters(path) if start.startswith(TIFF) else [picture_raster(path, start)]
    except (ImageError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged bytes make decoders raise anything at all
        raise ImageError(decoder_message(error)) from error


def tiff_rasters(path: str) -> list[Raster]:
    """The images of a TIFF of any bit depth and number of bands, with its pages as its axes say."""
    from tifffile import TiffFile

    with TiffFile(path) as file:
        if any(getattr(file, f"is_{kind}") for kind in SLIDE_KINDS):
            return [slide_raster(path)]
        series = file.series[0]
        page: Any = series.keyframe
        photometric = getattr(page.photometric, "name", "")
        if photometric in NO_RGB:
            raise ImageError(f"its colours are {photometric}; save it as RGB")
        tag = page.tags.get(ORIENTATION_TAG)
        orientation = int(tag.value) if tag else 1
        others = [str(s.shape) for s in file.series[1:] if not s.keyframe.subfiletype & MASK]
        note = f"left out: images of other sizes, {', '.join(others)}" if others else ""
        pages: list[Any] = list(series.pages)
        if len(pages) == 1 and series.size == page.size:
            return [replace(gdal_raster([path], "GTiff", orientation), note=note)]
        if page.axes not in ("YX", "YXS", "SYX") or None in pages:
            raise ImageError(f"its axes are {series.axes}; save each image in a file of its own")
        outer = series.ndim - page.ndim
        axes, shape = series.axes[:outer], series.shape[:outer]
        choices = stacked(axes, shape, page.samplesperpixel == 1)
        if series.dataoffset is not None and orientation == 1:  # all of it lies in one piece
            dtype, offset = series.dtype.newbyteorder(file.byteorder), series.dataoffset

            def mapping(choice: tuple[int | slice, ...]) -> Callable[[], Array]:
                return lambda: np.memmap(path, dtype, "r", offset, series.shape)[choice]

            last = page.axes == "YXS"
            images = [mapped_raster(mapping(choice), last) for choice in choices]
        else:
            numbers = np.arange(len(pages)).reshape(shape)
            places = [
                [f"GTIFF_DIR:off:{pages[k].offset}:{path}" for k in numbers[choice].flat]
                for choice in choices
            ]
            images = [gdal_raster(image, "GTiff", orientation) for image in places]
    found = f"{len(pages)} pages along {axes}: {len(images)} images"
    return [replace(image, note="; ".join(filter(None, (found, note)))) for image in images]


def stacked(axes: str, shape: tuple[int, ...], gray: bool) -> list[tuple[int | slice, ...]]:
    """Which pages of a stack make up each of its images, as indices into its outer axes."""
    unnamed = gray and set(axes) <= set("QI") and np.prod(shape) <= MAX_CHANNEL_PAGES
    channels = "CSQI" if unnamed else "CS"
    each = [
        [slice(None)] if axis in channels else range(count)
        for axis, count in zip(axes, shape, strict=True)
    ]
    return list(product(*each))


def picture_raster(path: str, start: bytes) -> Raster:
    """A picture that is no TIFF: decoded as any other if it is not giant, else read by GDAL."""
    from PIL import Image

    driver = next((name for sign, name in DRIVERS.items() if start.startswith(sign)), None)
    if driver != "JP2OpenJPEG":
        with suppress(Image.DecompressionBombError), Image.open(path) as image:
            if image.width * image.height <= GIANT:
                return decoded_raster(open_image(read_bytes(path)))
    if driver is None:
        raise ImageError(f"it begins with {start!r} and is too large; save it as TIFF")
    return gdal_raster([path], driver)
