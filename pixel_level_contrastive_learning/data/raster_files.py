"""Open a large file for reading by windows: which library reads it, and which images it holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from struct import unpack_from
from typing import Any

import numpy as np

from ..checks import Pages
from .arrays import Deferred, NamedArray, one_image
from .decoding import NPY, SIGNATURES, TIFF, ending_at, open_image, stack_in
from .folders import SLIDE_SUFFIXES, is_dicom
from .image import ALL, ImageError, known_errors
from .orientation import ORIENTATION_TAG, PNG
from .picture import GIANT
from .raster_drivers import gdal_raster, slide_raster
from .rasters import Raster, decoded_raster, inverted, named_raster
from .readers import all_readers
from .reading import read_bytes
from .sources import FileSource
from .tiff import (
    ROWS,
    Plane,
    Samples,
    is_slide,
    layout,
    opened_tiff,
    page_of,
    photometric_of,
    tiff_images,
)

NO_RGB = ("SEPARATED", "CIELAB", "ICCLAB", "ITULAB")
DRIVERS = {start: {"jpg": "JPEG"}.get(kind, kind.upper()) for start, kind in SIGNATURES.items()}
DRIVERS |= {b"\0\0\0\x0cjP": "JP2OpenJPEG", b"\xff\x4f\xff\x51": "JP2OpenJPEG"}
DRIVERS |= {b"P5": "PNM", b"P6": "PNM"}
"""How giant pictures begin, and what GDAL calls their format."""


def is_larger(path: str, side: int) -> bool:
    """Whether a side of one of a file's images is longer than that; unreadable ones are not."""
    from PIL import Image

    if Path(path).suffix.lower() in SLIDE_SUFFIXES:
        return True
    try:
        with known_errors(but=Image.DecompressionBombError):
            if (named := from_reader(path)) is not None:
                sizes = [named.size]
            elif read_bytes(path, 0, 4) in TIFF:
                with opened_tiff(path) as file:
                    sizes = [layout(file, planes[0]).size for planes in tiff_images(file).images]
            else:
                sizes = [picture_size(path)]
    except Image.DecompressionBombError:
        return True
    except ImageError:  # the reason is reported when it is read
        return False
    return any(max(size) > side for size in sizes)


def picture_size(path: str) -> tuple[int, int]:
    """``(width, height)`` of what is no TIFF, which may be a bomb for Pillow."""
    from PIL import Image

    head = read_bytes(path, 0, 24)
    if head.startswith(PNG):  # whose texts may be longer than Pillow takes
        width, height = unpack_from(">II", head, 16)
        return width, height
    with Image.open(path) as image:
        return image.size


def open_rasters(path: str, pages: Pages | None = None) -> list[Raster]:
    """The images of a file, most often one; what several pages are is decided by `Stack.chosen`.

    Raises:
        ImageError: It cannot be read, or not by windows.
        ModuleNotFoundError: The library that reads it is not installed.
    """
    with known_errors(but=ModuleNotFoundError):
        if Path(path).suffix.lower() in SLIDE_SUFFIXES - {".jp2"}:
            return [slide_raster(path)]
        if (named := from_reader(path)) is not None:
            every = range(named.stack.images)
            chosen = named.stack.chosen(pages) if len(every) > 1 else [0]
            return [named_raster(named, every if n == ALL else [n]) for n in chosen]
        start = read_bytes(path, 0, 8)
        if start.startswith(TIFF):
            return tiff_rasters(path, pages)
        return picture_rasters(path, start, pages)


def from_reader(path: str) -> NamedArray | None:
    """What the reader of a file returns; None where it needs none."""
    ending = ending_at(path)
    if ending in all_readers() or (not ending and is_dicom(path)):
        content = FileSource([path]).file_content(0)
        return content if isinstance(content, NamedArray) else None
    if read_bytes(path, 0, 6) != NPY:
        return None
    array = np.load(path, "r", allow_pickle=False)
    # Mapped again for each window, so that the memory of earlier ones is freed.
    load = partial(np.load, path, "r", allow_pickle=False)
    return one_image(Deferred(array.shape, array.dtype, load, held=False))


def tiff_rasters(path: str, pages: Pages | None) -> list[Raster]:
    """The images of a TIFF of any bit depth and number of bands."""
    with opened_tiff(path) as file:
        if is_slide(file):
            return [slide_raster(path)]
        images, stack = tiff_images(file)
        chosen = stack.chosen(pages)
        return [
            planes_raster(path, file, list(chain(*images)) if number == ALL else images[number])
            for number in chosen
        ]


def planes_raster(path: str, file: Any, planes: Sequence[Plane]) -> Raster:
    """One image of a TIFF, whose channels lie in some planes."""
    series = file.series[planes[0].series]
    page = series.keyframe
    photometric = photometric_of(page)
    if photometric in NO_RGB:
        raise ImageError(f"its colours are {photometric}; save it as RGB")
    if photometric == "PALETTE" and page.dtype.itemsize > 1:
        raise ImageError("its colours are a palette of 16 bits; save it as RGB")
    tag = page.tags.get(ORIENTATION_TAG)
    orientation = int(tag.value) if tag else 1
    rows = planes[0].number == ROWS
    several = series.size > page.size and photometric != "PALETTE"
    in_one = len({plane.series for plane in planes}) == 1
    if several and in_one and series.dataoffset is not None and orientation == 1:
        dtype, offset = series.dtype.newbyteorder(file.byteorder), series.dataoffset
        shape = series.shape if rows else (series.size // page.size, *page.shape)
        load = partial(np.memmap, path, dtype, "r", offset, shape)
        axes = "YXS" if rows else f"Z{page.axes}"
        named = NamedArray.of((Deferred(shape, dtype, load, held=False), axes))
        raster = named_raster(named, [0] if rows else [plane.number for plane in planes])
    else:
        parts = [page_of(file, plane) for plane in planes]
        if None in parts or page.axes not in ("YX", "YXS", "SYX"):
            raise ImageError(f"its axes are {series.axes}; save each image in a file of its own")
        places = [f"GTIFF_DIR:off:{part.offset}:{path}" for part in parts]
        if len(parts) == 1 and parts[0].index == 0:  # with its smaller copies, and its mask
            places = [path]
        raster = gdal_raster(places, "GTiff", orientation)
    if photometric != "MINISWHITE":
        return raster
    return inverted(raster, 255 if raster.dtype == np.uint8 else Samples.of(page).white)


def picture_rasters(path: str, start: bytes, pages: Pages | None) -> list[Raster]:
    """What is no TIFF: decoded as any other picture if it is not giant, else read by GDAL."""
    from PIL import Image

    driver = next((name for sign, name in DRIVERS.items() if start.startswith(sign)), None)
    if driver != "JP2OpenJPEG":
        with suppress(Image.DecompressionBombError):
            if prod(picture_size(path)) <= GIANT:
                content = read_bytes(path)
                stack = stack_in(content)
                numbers = stack.chosen(pages) if stack.images > 1 else [None]
                return [decoded_raster(open_image(content, number)) for number in numbers]
    if driver is None:
        raise ImageError(f"it begins with {start!r} and is too large; save it as TIFF")
    return [gdal_raster([path], driver)]
