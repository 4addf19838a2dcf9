"""Arrays of images whose axes have names, in memory or read when they are indexed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from math import prod
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .image import (
    ALL,
    MAX_BYTES,
    DecodedImage,
    ImageError,
    LazyImage,
    Stack,
    as_whole_numbers,
    check_memory,
    to_tensor,
)

T = TypeVar("T")

CHANNELS, SIDES = "CS", "YX"
"""Letters of axes; all others count images."""
NODATA_TAG = 42113
"""GDAL's TIFF tag: the value, as text, that stands where nothing was measured."""


class Once(Generic[T]):
    """What a call gives, made by the first thread that asks for it, for which others wait."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.call, self.lock = call, Lock()
        self.results: list[T] = []

    def __call__(self) -> T:
        with self.lock:
            if not self.results:
                self.results.append(self.call())
            return self.results[0]


class Deferred:
    """An array that is read when it is first indexed.

    Args:
        shape: Its shape.
        dtype: Its type of values.
        read: Reads or maps the whole of it.
        held: Whether it is held from then on, in memory.
    """

    def __init__(
        self, shape: Sequence[int], dtype: Any, read: Callable[[], Any], held: bool = True
    ) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.read, self.held = Once(read) if held else read, held

    def __getitem__(self, index: Any) -> Any:
        if self.held and prod(self.shape) * self.dtype.itemsize > MAX_BYTES:
            raise ImageError(
                f"an array of {'x'.join(map(str, self.shape))} values would take more than "
                f"{MAX_BYTES // 2**30} GiB; split it, or save it as OME-Zarr or TIFF"
            )
        return self.read()[index]


class NamedArray(NamedTuple):
    """Images as an array whose axes have names.

    Attributes:
        array: Has a shape, a dtype, and is indexed as NumPy's are, which may be when it is read.
        axes: A letter for each axis: Y and X, C or S for channels, others that count images.
    """

    array: Any
    axes: str

    @classmethod
    def of(cls, found: Any) -> NamedArray:
        """What a reader returned: an array and its axes, or an array alone, ``(h, w)`` and more.

        Raises:
            ImageError: It is nothing of the kind.
        """
        array, axes = found if isinstance(found, tuple) and len(found) == 2 else (found, "")
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if shape is None or dtype is None or not isinstance(axes, str):
            raise ImageError(
                f"it returned {type(found).__name__}; it must return an array, or an array and "
                "its axes"
            )
        if not axes and len(shape) in (2, 3, 4):
            last = len(shape) > 2 and channels_last(shape[-3:])
            axes = ("ZYXC" if last else "ZCYX")[-len(shape) :] if len(shape) > 2 else SIDES
        named = cls(array, axes.upper())
        if (
            len(axes) != len(shape)
            or len({*named.axes}) != len(axes)
            or not {*SIDES} <= {*named.axes}
        ):
            raise ImageError(
                f"an array of shape {shape} with axes {axes!r}; they must be one letter for each "
                "dimension, including Y and X"
            )
        if 0 in shape:
            raise ImageError(f"an array of shape {shape}; no dimension may be 0")
        if np.dtype(dtype).kind not in "buif":
            raise ImageError(f"values of type {dtype}; they must be whole numbers or floats")
        return named

    @property
    def counted(self) -> dict[int, int]:
        """How long each axis is that counts images, by its number."""
        sides = enumerate(zip(self.axes, self.array.shape, strict=True))
        return {i: side for i, (axis, side) in sides if axis not in SIDES + CHANNELS}

    @property
    def stack(self) -> Stack:
        """How many images it holds."""
        return Stack(prod(self.counted.values()))

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` of the images."""
        height, width = (self.array.shape[self.axes.index(axis)] for axis in SIDES)
        return int(height), int(width)

    @property
    def channels(self) -> int:
        """How many each image has."""
        return prod(n for a, n in zip(self.axes, self.array.shape, strict=True) if a in CHANNELS)

    def plane(self, number: int, rows: slice = slice(None), columns: slice = slice(None)) -> Any:
        """One of the images, or some rows and columns of it, as an array ``(c, h, w)``."""
        place = np.unravel_index(number, tuple(self.counted.values())) if self.counted else ()
        at = dict(zip(self.counted, map(int, place), strict=True))
        cut = {"Y": rows, "X": columns}
        index = (at.get(i, cut.get(axis, slice(None))) for i, axis in enumerate(self.axes))
        part = np.asarray(self.array[tuple(index)])
        left = [axis for i, axis in enumerate(self.axes) if i not in at]
        last = [left.index(axis) for axis in SIDES]
        part = part.transpose(*(i for i in range(len(left)) if i not in last), *last)
        return part.reshape(-1, *part.shape[-2:])


def to_pixels(array: NDArray[Any]) -> Tensor:
    """Values ``(c, h, w)`` as pixels: uint8, or float32 that may be NaN."""
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    kept = np.uint8 if array.dtype == np.uint8 else np.float32
    return torch.from_numpy(np.array(array, dtype=kept, order="C"))


def one_image(array: Any, axes: str = "") -> NamedArray:
    """An array of one image, of which perhaps only the shape and the type are known.

    Raises:
        ImageError: It is none.
    """
    named = NamedArray.of((array, axes))
    if named.counted:
        raise ImageError(
            f"an array of shape {array.shape}; it must be (h, w), (c, h, w) or (h, w, c)"
        )
    return named


def array_to_pixels(array: NDArray[Any], axes: str = "") -> Tensor:
    """An array of one image, whose axes may be named, as pixels ``(c, h, w)``."""
    return to_pixels(one_image(array, axes).plane(0))


def lazy_pixels(pixels: Tensor) -> LazyImage:
    """Pixels ``(c, h, w)`` in memory as an image that needs no decoding."""
    channels, height, width = pixels.shape
    high_depth = pixels.dtype != torch.uint8
    return LazyImage((height, width), channels, high_depth, lambda _: DecodedImage(pixels))


def channels_last(shape: Sequence[int]) -> bool:
    """Whether the channels of an array without names stand last.

    Two neighbouring sides that alone are equal are height and width; else the shorter end counts
    channels.
    """
    if len(shape) != 3:
        return False
    first, middle, last = shape
    return first == middle if (first == middle) != (middle == last) else last <= first


def array_file(array: NDArray[Any], nodata: float | None = None) -> tuple[str, bytes]:
    """Pixels ``(c, h, w)``, some of them perhaps nodata, as a file: its suffix and its bytes."""
    file = BytesIO()
    if nodata is None and not channels_last(array.shape):
        np.save(file, np.ascontiguousarray(array))
        return "npy", file.getvalue()
    # In .npy, more bands than columns would be read as channels last, and nodata is not recorded.
    from tifffile import imwrite

    tags = [] if nodata is None else [(NODATA_TAG, "s", 0, f"{nodata:.17g}", True)]
    bands = array[0] if len(array) == 1 else array
    planes = None if len(array) == 1 else "separate"
    imwrite(file, bands, photometric="minisblack", planarconfig=planes, extratags=tags)
    return "tif", file.getvalue()


def to_array_file(image: LazyImage) -> bytes:
    """An image as the file of an array, NaN where nothing was measured; 8-bit ones stay 8-bit."""
    decoded = image.decode()
    pixels, known = to_tensor(decoded.pixels), decoded.known
    if known is not None and pixels.is_floating_point():
        pixels = pixels.where(known, torch.nan)
    return array_file(as_whole_numbers(pixels.numpy()))[1]


def open_named(named: NamedArray, image: int | None) -> LazyImage:
    """One of the images in an array, or all of them as the channels of one."""
    numbers = range(named.stack.images) if image == ALL else [image or 0]
    (height, width), itemsize = named.size, np.dtype(named.array.dtype).itemsize
    per_pixel = len(numbers) * named.channels * (itemsize + 4 * (itemsize > 1))
    check_memory(height, width, per_pixel, file_bytes=height * width * per_pixel)
    planes = np.concatenate([named.plane(number) for number in numbers])
    return lazy_pixels(to_pixels(planes))
