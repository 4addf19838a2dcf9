"""Large images that are read by windows, in bounded memory, with their own type of values.

Those that lie in memory, or in their file as they are, are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import Deferred, NamedArray
from .image import LazyImage, as_whole_numbers, to_tensor

Box = tuple[int, int, int, int]
"""Edges ``(x0, y0, x1, y1)`` in pixels of the full image, upright."""
Array = NDArray[Any]
Read = Callable[[Box, tuple[int, int]], "Window"]


class Window(NamedTuple):
    """A part of a large image.

    Attributes:
        pixels: ``(c, h, w)`` of the image's type of values.
        known: ``(h, w)`` bool, where anything was measured or scanned.
    """

    pixels: Array
    known: NDArray[np.bool_]


@dataclass(frozen=True)
class Raster:
    """A large image that is read by windows.

    Attributes:
        size: ``(height, width)`` of the full image, upright.
        bands: How many channels its windows have.
        dtype: The type of their values; float32 for a picture of more than 8 bits, until it is
            decoded.
        read: From a box and the ``(height, width)`` that it is scaled down to, a `Window`.
        scales: Pixels of the full image per pixel of each level, each way, the full one first.
        mpp: Size of a pixel: metres where the file is georeferenced, else micrometres; None if it
            does not say.
        nodata: The value that stands where nothing was measured; None if there is none.
    """

    size: tuple[int, int]
    bands: int
    dtype: np.dtype[Any]
    read: Read
    scales: tuple[float, ...] = (1.0,)
    mpp: float | None = None
    nodata: float | None = None


def named_raster(named: NamedArray, numbers: Sequence[int] = (0,)) -> Raster:
    """Some of the images in an array with named axes, their channels joined."""

    def read(box: Box, size: tuple[int, int]) -> Window:
        x0, y0, x1, y1 = box
        planes = [named.plane(number, slice(y0, y1), slice(x0, x1)) for number in numbers]
        pixels = np.concatenate(planes)
        assert pixels.shape[1:] == size, "an array has one scale"
        return Window(pixels, is_known(pixels, None))

    bands = len(numbers) * named.channels
    return Raster(named.size, bands, np.dtype(named.array.dtype), read)


def is_known(pixels: Array, nodata: float | None) -> NDArray[np.bool_]:
    """Where a value of pixels ``(c, h, w)`` is neither the nodata value nor NaN, in any band."""
    known = np.isfinite(pixels)
    if nodata is not None:
        known &= pixels != nodata
    return np.asarray(known.any(axis=0))


def with_nodata(raster: Raster, value: float | None) -> Raster:
    """A raster in which a value says, beside its own, that nothing was measured.

    It has one level: those in the file mixed the value into its neighbours.
    """
    if value is None or raster.nodata == value:
        return raster
    nodata = value if raster.nodata is None else raster.nodata

    def read(box: Box, size: tuple[int, int]) -> Window:
        pixels, known = raster.read(box, size)
        if nodata != value:
            pixels[pixels == value] = nodata
        return Window(pixels, known & is_known(pixels, nodata))

    return replace(raster, read=read, scales=raster.scales[:1], nodata=nodata)


def inverted(raster: Raster, white: float) -> Raster:
    """A raster of values of which 0 is white and ``white`` is black, brighter where more is."""

    def read(box: Box, size: tuple[int, int]) -> Window:
        pixels, known = raster.read(box, size)
        return Window((white - pixels).astype(raster.dtype), known)

    nodata = None if raster.nodata is None else white - raster.nodata
    return replace(raster, read=read, nodata=nodata)


def decoded_raster(image: LazyImage) -> Raster:
    """A picture that is decoded whole, when its first window is read."""

    def read() -> Array:
        return as_whole_numbers(to_tensor(image.decode().pixels).numpy())

    dtype = np.float32 if image.high_depth else np.uint8
    return named_raster(NamedArray(Deferred((image.channels, *image.size), dtype, read), "CYX"))
