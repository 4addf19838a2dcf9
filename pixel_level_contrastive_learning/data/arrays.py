"""Arrays as images: which of their sides are height and width, and which values they may hold."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .raster import UPRIGHT, Opened, Raster, Unreadable

EIGHT_BIT = ("uint8", "bool")
"""Types whose values stay 8-bit; all others become float32."""


def open_npy(content: bytes) -> Opened:
    """Look at a NumPy array (h, w), (c, h, w) or (h, w, c): channels are the shorter end."""
    import numpy as np

    array = np.load(BytesIO(content), allow_pickle=False)
    channels, height, width = layout(array.shape, "")
    deep = array.dtype.name not in EIGHT_BIT
    return Opened(
        (height, width), channels, deep, UPRIGHT, False, lambda _: Raster(as_pixels(array, ""), 1)
    )


def as_pixels(array: Any, axes: str = "") -> Tensor:
    """A NumPy array as pixels ``(c, h, w)``: uint8, or float32 raw values, which may be NaN.

    Raises:
        Unreadable: It has no shape or values that an image has.
    """
    import numpy as np

    layout(array.shape, axes)
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise Unreadable(f"values of type {array.dtype}; they must be whole numbers or floats")
    kept = np.uint8 if array.dtype == np.uint8 else np.float32
    pixels = torch.from_numpy(np.array(array, dtype=kept, order="C"))
    if pixels.ndim == 2:
        return pixels[None]
    return rearrange(pixels, "h w c -> c h w") if channels_last(array.shape, axes) else pixels


def layout(shape: tuple[int, ...], axes: str) -> tuple[int, int, int]:
    """Channels, height and width of an array whose axes may be named, as tifffile does.

    Raises:
        Unreadable: No image has this shape.
    """
    last = channels_last(shape, axes)
    if len(shape) == 2:
        shape = (1, *shape)
    elif last:
        shape = (shape[-1], *shape[:-1])
    if len(shape) != 3 or 0 in shape:
        raise Unreadable(
            f"an array of shape {shape}; it must be (h, w), (c, h, w) or (h, w, c), none of them 0"
        )
    return shape


def channels_last(shape: tuple[int, ...], axes: str) -> bool:
    """Whether the channels stand last: by name, or where the last side is the shorter end."""
    named = [axis for axis in axes if axis in "SC"]
    if len(named) == 1:
        return axes.endswith(named[0])
    return len(shape) == 3 and shape[-1] <= shape[0]
