"""Windows of rasters by GDAL (rasterio), and of whole-slide images by OpenSlide.

Both come with an extra, and are imported when the first such file is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from threading import Lock
from typing import Any

import numpy as np
from einops import rearrange

from ..checks import import_extra
from .image import ImageError
from .orientation import FLIPPED_X, FLIPPED_Y, SIDEWAYS, turn_array, upright_size
from .rasters import Box, Raster, Window, is_known

CACHE_BYTES = 2**29
"""Decoded blocks that GDAL keeps: a row of strips or blocks serves a whole row of tiles."""
LOCK = Lock()
"""GDAL's files serve one thread at a time, and its cache has one size for all."""


def gdal_raster(places: Sequence[str], driver: str, orientation: int = 1) -> Raster:
    """An image whose bands lie in one place or several; a picture's alpha is laid over black."""
    rasterio = import_extra("rasterio")
    from rasterio.enums import ColorInterp, MaskFlags, Resampling
    from rasterio.windows import Window as Part

    # GDAL's own threads would keep a block that they failed to decode, and return it as valid.
    settings = {"GDAL_CACHEMAX": CACHE_BYTES, "GDAL_NUM_THREADS": 1}
    with LOCK, rasterio.Env(**settings):
        files = [rasterio.open(place, driver=driver) for place in places]
    first = files[0]
    stored, kinds, nodata = first.shape, first.colorinterp, first.nodata
    if any(file.shape != stored or file.dtypes[0] != first.dtypes[0] for file in files):
        raise ImageError("its pages differ in size or type of values")
    dtype = np.dtype(first.dtypes[0])
    if dtype.kind not in "uif":
        raise ImageError(f"values of type {dtype}; they must be whole numbers or floats")
    if driver != "GTiff":
        orientation = int(first.tags().get("EXIF_Orientation", 1))
    size = upright_size(first.height, first.width, orientation)
    structure = first.tags(ns="IMAGE_STRUCTURE")
    bits = int(first.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
    # GDAL also gives a palette to gray values that begin with white.
    palette = kinds[0] == ColorInterp.palette and structure.get("MINISWHITE") != "YES"
    alpha = kinds.index(ColorInterp.alpha) if ColorInterp.alpha in kinds else None
    masked = alpha is None and MaskFlags.per_dataset in first.mask_flag_enums[0]
    blend = alpha is not None and driver != "GTiff"
    table = np.zeros((0, 0), np.uint8)
    if palette:
        colours = first.colormap(1)
        table = np.array(
            [colours.get(k, (0, 0, 0))[:3] for k in range(max(colours) + 1)], dtype=np.uint8
        )
        if bits == 1 and (table == table[:, :1]).all():
            table = table[:, :1]
        nodata = None
    resampling = Resampling.nearest if palette else Resampling.average

    def read(box: Box, size: tuple[int, int]) -> Window:
        x0, y0, x1, y1 = stored_box(box, stored, orientation)
        h, w = size[::-1] if orientation in SIDEWAYS else size
        part = Part(x0, y0, x1 - x0, y1 - y0)
        with LOCK, rasterio.Env(**settings):
            bands = [
                file.read(window=part, out_shape=(file.count, h, w), resampling=resampling)
                for file in files
            ]
            if alpha is not None and not blend:  # averaged, it would be no mask any more
                bands[0][alpha] = first.read(alpha + 1, window=part, out_shape=(h, w))
            mask = first.read_masks(1, window=part, out_shape=(h, w)) if masked else np.ones((h, w))
        pixels = turn_array(np.concatenate(bands), orientation)
        known = is_known(pixels, nodata) & (turn_array(mask, orientation) > 0)
        if alpha is not None:
            known &= pixels[alpha] > 0
        if palette:
            pixels = rearrange(table[pixels], "n h w c -> (n c) h w")
        elif dtype == np.uint8 and bits < 8:
            pixels = pixels * np.uint8(255 // (2**bits - 1))
        if blend:
            share = pixels[-1:] / np.iinfo(dtype).max
            pixels = (pixels[:-1] * share).round().astype(dtype)
        return Window(pixels, known)

    return Raster(
        size,
        len(files) * table.shape[1] or sum(file.count for file in files) - blend,
        np.dtype(np.uint8) if palette else dtype,
        read,
        (1.0, *map(float, first.overviews(1))),
        pixel_size(first),
        nodata,
    )


def stored_box(box: Box, stored: tuple[int, int], orientation: int) -> Box:
    """An upright box in the pixels of the stored image ``(height, width)``."""
    height, width = upright_size(*stored, orientation)
    x0, y0, x1, y1 = box
    if orientation in FLIPPED_X:
        x0, x1 = width - x1, width - x0
    if orientation in FLIPPED_Y:
        y0, y1 = height - y1, height - y0
    return (y0, x0, y1, x1) if orientation in SIDEWAYS else (x0, y0, x1, y1)


def pixel_size(file: Any) -> float | None:
    """Metres a pixel of a projected map, micrometres by a TIFF's resolution, or None."""
    if file.crs and file.crs.is_projected:
        return hypot(file.transform.a, file.transform.d) * float(file.crs.linear_units_factor[1])
    tags = file.tags()
    unit = {"2": 25400, "3": 10000}.get(tags.get("TIFFTAG_RESOLUTIONUNIT", " ")[0])
    per_unit = float(tags.get("TIFFTAG_XRESOLUTION", 0))
    return None if file.crs or not unit or not per_unit else unit / per_unit


def slide_raster(path: str) -> Raster:
    """A whole-slide image, RGB; what was not scanned has the slide's background colour."""
    from PIL import Image

    openslide = import_extra("openslide")
    slide = openslide.OpenSlide(path)
    width, height = slide.dimensions
    ground = f"#{slide.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, 'ffffff')}"

    def read(box: Box, size: tuple[int, int]) -> Window:
        x0, y0, x1, y1 = box
        # Boxes are whole pixels of the full image, and so only nearly match a level's scale.
        level = slide.get_best_level_for_downsample(1.01 * (x1 - x0) / size[1])
        scale = slide.level_downsamples[level]
        w, h = (max(1, round(side / scale)) for side in (x1 - x0, y1 - y0))
        region = slide.read_region((x0, y0), level, (w, h))
        if region.size != size[::-1]:
            region = region.resize(size[::-1], Image.Resampling.BOX)
        known = np.asarray(region.getchannel("A")) > 0
        over = Image.alpha_composite(Image.new("RGBA", region.size, ground), region)
        return Window(rearrange(np.array(over.convert("RGB")), "h w c -> c h w"), known)

    mpp = slide.properties.get(openslide.PROPERTY_NAME_MPP_X)
    scales = tuple(map(float, slide.level_downsamples))
    return Raster((height, width), 3, np.dtype(np.uint8), read, scales, float(mpp) if mpp else None)
