"""Readers of more formats: functions from a file's bytes to an array with named axes.

A package of the user's names its readers as entry points of `GROUP`, each called by the ending of
its files; those of `formats` come through the same door, and only import their library when called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from importlib.metadata import EntryPoint, entry_points
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..checks import EXTRAS, not_installed
from .image import (
    ALL,
    MAX_BYTES,
    ImageError,
    LazyImage,
    Stack,
    array_to_pixels,
    channels_last,
    check_memory,
    decoder_message,
    lazy_pixels,
    too_large,
)
from .reading import in_time

GROUP = "pixel_level_contrastive_learning.readers"
"""Entry points of readers, each called by an ending: ``.abc`` of files, ``.abc/`` of folders."""
DICOM, DICOM_MARK = ".dcm", slice(128, 132)
"""The ending of a DICOM file; and where its bytes are ``DICM``, whatever its ending."""
FORMATS = {
    "read_dicom": (DICOM, ".dicom", ".ima"),
    "read_nifti": (".nii", ".nii.gz"),
    "read_heic": (".heic", ".heif"),
    "read_npz": (".npz",),
    "read_zarr": (".zarr/",),
}
"""The readers in `formats`, and the endings of their files."""
CHANNELS, SIDES = "CS", "YX"
"""Letters of axes; all others count images."""


class Deferred:
    """An array that is read as a whole when it is first indexed."""

    def __init__(self, shape: Sequence[int], dtype: Any, read: Callable[[], Any]) -> None:
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(dtype), read

    @cached_property
    def values(self) -> Any:
        """All of it."""
        if prod(self.shape) * self.dtype.itemsize > MAX_BYTES:
            raise ImageError(too_large(*self.shape[:2]))
        return self.read()

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]


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
                f"{type(found).__name__} in place of an array, or an array and its axes"
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
                f"an array of shape {shape} and axes {axes!r}, which must be a letter for each, "
                "Y and X among them"
            )
        if 0 in shape or np.dtype(dtype).kind not in "buif":
            raise ImageError(
                f"an array of shape {shape} and type {dtype}; it must hold whole numbers or floats"
            )
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


def open_named(named: NamedArray, image: int | None) -> LazyImage:
    """One of the images in an array, or all of them as the channels of one."""
    numbers = range(named.stack.images) if image == ALL else [image or 0]
    (height, width), itemsize = named.size, np.dtype(named.array.dtype).itemsize
    per_pixel = len(numbers) * named.channels * (itemsize + 4 * (itemsize > 1))
    check_memory(height, width, per_pixel, file_bytes=height * width * per_pixel)
    planes = np.concatenate([named.plane(number) for number in numbers])
    return lazy_pixels(array_to_pixels(planes, "CYX"))


@cache
def all_readers() -> dict[str, EntryPoint]:
    """The readers by ending, in lower case; one that is installed comes before ours."""
    ours = {
        ending: EntryPoint(ending, f"{__package__}.formats:{function}", GROUP)
        for function, endings in FORMATS.items()
        for ending in endings
    }
    return ours | {entry.name.lower(): entry for entry in entry_points(group=GROUP)}


def call_reader(ending: str, content: bytes | str, path: str) -> NamedArray:
    """What a reader makes of the bytes of a file, or of the path of a folder.

    Raises:
        ImageError: It is not installed, fails, does not answer, or returns something else.
    """
    entry = all_readers()[ending]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return NamedArray.of(in_time(partial(call_entry, entry, content), path))
    except (Exception, SystemExit) as error:  # a reader may raise anything at all
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            raise ImageError(not_installed(error.name)) from error
        ours = entry.module.startswith(f"{__package__}.")
        why = " ".join(f"{type(error).__name__}: {error}".split())
        if ours or isinstance(error, ImageError):
            why = str(error) if isinstance(error, ImageError) else decoder_message(error)
        raise ImageError(why if ours else f"its reader, {entry.value}, failed: {why}") from error


def call_entry(entry: EntryPoint, content: bytes | str) -> Any:
    """What an entry point returns, which is imported first."""
    return entry.load()(content)
