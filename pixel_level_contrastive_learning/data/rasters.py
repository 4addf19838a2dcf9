"""Large images that are read by windows, in bounded memory, with their own type of values.

Those that lie in memory, or in their file as they are, are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .image import ALL, ImageError, LazyImage, as_whole_numbers, channels_last, to_tensor
from .readers import NamedArray

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


def npy_raster(path: str) -> Raster:
    """A NumPy array, mapped anew for each window, so that what was read is let go."""
    shape = np.load(path, "r", allow_pickle=False).shape
    last = len(shape) == 3 and channels_last(shape)
    return mapped_raster(lambda: np.load(path, "r", allow_pickle=False), last)


def mapped_raster(load: Callable[[], Array], last: bool, planes: Sequence[int] = ()) -> Raster:
    """An image from a function that maps its array, or some planes of it, channels last or not."""
    array = load()
    count = 1
    if planes:
        array, count = array[0], len(planes)
    if array.dtype.kind not in "buif":
        raise ImageError(f"values of type {array.dtype}; they must be whole numbers or floats")
    height, width = array.shape[-3:-1] if last else array.shape[-2:]
    bands = count * array.size // (height * width)
    return Raster((height, width), bands, array.dtype, array_reader(load, last, planes))


def named_raster(named: NamedArray, number: int) -> Raster:
    """One of the images in an array with named axes, or all of them as the channels of one."""
    numbers = range(named.stack.images) if number == ALL else [number]

    def read(box: Box, size: tuple[int, int]) -> Window:
        x0, y0, x1, y1 = box
        planes = [named.plane(own, slice(y0, y1), slice(x0, x1)) for own in numbers]
        pixels = np.concatenate(planes)
        assert pixels.shape[1:] == size, "an array has one scale"
        return Window(pixels, is_known(pixels, None))

    bands = len(numbers) * named.channels
    return Raster(named.size, bands, np.dtype(named.array.dtype), read)


def array_reader(load: Callable[[], Array], last: bool, planes: Sequence[int] = ()) -> Read:
    """What reads windows of an array, or of some planes of it."""

    def read(box: Box, size: tuple[int, int]) -> Window:
        array = load()
        parts = [array[number] for number in planes] if planes else [array]
        pixels = np.concatenate([cut(part, box, last) for part in parts])
        assert pixels.shape[1:] == size, "an array has one scale"
        return Window(pixels, is_known(pixels, None))

    return read


def cut(array: Array, box: Box, last: bool) -> Array:
    """A copy ``(c, h, w)`` of a part of an array ``(..., h, w)`` or ``(..., h, w, c)``."""
    x0, y0, x1, y1 = box
    part = array[..., y0:y1, x0:x1, :] if last else array[..., y0:y1, x0:x1]
    part = np.moveaxis(part, -1, -3) if last else part
    return np.array(part.reshape(-1, *part.shape[-2:]))


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


def decoded_raster(image: LazyImage) -> Raster:
    """A picture that is decoded whole, when its first window is read."""
    lock, held = Lock(), list[Array]()

    def load() -> Array:
        with lock:
            if not held:
                held.append(as_whole_numbers(to_tensor(image.decode().pixels).numpy()))
        return held[0]

    dtype = np.dtype(np.float32 if image.high_depth else np.uint8)
    return Raster(image.size, image.channels, dtype, array_reader(load, last=False))
