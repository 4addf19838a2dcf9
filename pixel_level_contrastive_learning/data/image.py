"""Decoded images: pixels as they are stored, the way to turn them upright, what they may take."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SCALES = (1, 2, 4, 8)
"""By how much a file may be decoded smaller."""
MOST_BYTES = 4 * 2**30
"""What one decoded image may take; a file that would take more is not read."""
BOMB_RATIO = 200
"""Decoded bytes a byte of the file; above it, and above Pillow's limit, a file is a bomb."""


class ImageError(Exception):  # reads as what it says
    """An image that cannot be used; its text is the reason, and names no file."""


class Orientation(NamedTuple):
    """How a stored image is turned so that it stands upright: flipped, then its sides swapped."""

    swapped: bool = False
    left_right: bool = False
    upside_down: bool = False


UPRIGHT = Orientation()
ORIENTATIONS = {
    2: Orientation(left_right=True),
    3: Orientation(left_right=True, upside_down=True),
    4: Orientation(upside_down=True),
    5: Orientation(swapped=True),
    6: Orientation(swapped=True, upside_down=True),
    7: Orientation(swapped=True, left_right=True, upside_down=True),
    8: Orientation(swapped=True, left_right=True),
}
"""The values of the EXIF tag 274; all others stand for an upright image."""
ORIENTATION_TAG = 274


class DecodedImage(NamedTuple):
    """Decoded pixels as they are stored, that is: not yet upright.

    Attributes:
        pixels: ``(c, h, w)`` uint8, or float32 raw values; or an 8-bit Pillow image, L or RGB.
        scale: Source pixels a pixel, each way; the last row and column may stand for fewer.
        known: ``(c, h, w)`` bool, which values were measured; None where all were.
    """

    pixels: Tensor | Image.Image
    scale: int
    known: Tensor | None = None


@dataclass(frozen=True)
class LazyImage:
    """A file that was looked at: what it holds, and the way to its pixels.

    Attributes:
        size: ``(height, width)`` of the full image, upright.
        channels: How many channels its pixels will have.
        deep: Whether values are 16-bit or float (raw, float32) rather than 8-bit.
        orientation: How to turn the stored image upright.
        scaled: Whether it can be decoded at `SCALES`; else it is always decoded whole.
        load: Decodes at a scale. May return a smaller scale than asked for, and a larger one where
            memory would not do. What was not measured is NaN.
    """

    size: tuple[int, int]
    channels: int
    deep: bool
    orientation: Orientation
    scaled: bool
    load: Callable[[int], DecodedImage]

    @property
    def values(self) -> int:
        """How many numbers its pixels are."""
        return self.size[0] * self.size[1] * self.channels

    @property
    def stored_size(self) -> tuple[int, int]:
        """``(height, width)`` of the full image as it is stored."""
        return self.size[::-1] if self.orientation.swapped else self.size

    def raster(self, scale: int = 1) -> DecodedImage:
        """The pixels at a scale, all of them finite.

        Raises:
            ImageError: The file is damaged, or there is no number in it.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a decoder's remarks on a file help nobody
                return filled(self.load(scale))
        except ImageError:
            raise
        except Exception as error:  # rotten bytes make decoders raise anything at all
            raise ImageError(reason(error)) from error


def filled(raster: DecodedImage) -> DecodedImage:
    """Pixels whose NaNs are their channel's lowest value; infinities the extremes.

    A channel without any number becomes 0.

    Raises:
        ImageError: There is no number in any channel.
    """
    pixels = raster.pixels
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        return raster
    known = pixels.isfinite()
    if known.all():
        return raster
    if not known.any():
        raise ImageError("not one of its values is a finite number")
    low = pixels.where(known, torch.inf).amin((1, 2), keepdim=True)
    high = pixels.where(known, -torch.inf).amax((1, 2), keepdim=True)
    within = pixels.where(~pixels.isnan(), low).clamp(low, high)
    return raster._replace(pixels=within.where(low <= high, 0), known=known)


def upright(pixels: Tensor | Image.Image, orientation: Orientation) -> Tensor:
    """Stored pixels as an upright tensor ``(c, h, w)``."""
    stored = pixels if isinstance(pixels, Tensor) else tensor_of(pixels)
    sides = [-1] * orientation.left_right + [-2] * orientation.upside_down
    stored = stored.flip(sides) if sides else stored
    return stored.mT if orientation.swapped else stored


def tensor_of(image: Image.Image) -> Tensor:
    """An L or RGB Pillow image as ``(c, h, w)`` uint8, channels last in memory."""
    import numpy as np

    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else rearrange(pixels, "h w c -> c h w")


def too_many(pixels: int) -> bool:
    """Whether Pillow would call this many pixels a decompression bomb: 179 million by default."""
    from PIL import Image

    return Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS


def allowed(height: int, width: int, bytes_each: int, length: int) -> None:
    """Refuse to decode what would fill the memory.

    Args:
        height: Of the image.
        width: Of the image.
        bytes_each: What one of its pixels takes while it is decoded.
        length: Bytes of the file.

    Raises:
        ImageError: More than `MOST_BYTES`; or, beyond Pillow's limit, more than `BOMB_RATIO` times
            the bytes of the file.
    """
    grown = height * width * bytes_each
    if grown > MOST_BYTES:
        raise ImageError(too_large(height, width))
    if too_many(height * width) and grown > BOMB_RATIO * length:
        raise ImageError(bomb(f"{height}x{width} pixels in a file of {length} bytes"))


def bomb(found: str) -> str:
    """The reason that names a decompression bomb and the way past the limit."""
    from PIL import Image

    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return (
        f"a decompression bomb: {found}, beyond the limit of {limit} pixels; if you trust it, set "
        "PIL.Image.MAX_IMAGE_PIXELS higher before the run, or save it as JPEG or in tiles"
    )


def too_large(height: int, width: int) -> str:
    """The reason that names an image which does not fit."""
    return (
        f"{height}x{width} pixels would take more than {MOST_BYTES // 2**30} GiB; save it as "
        "baseline JPEG or in tiles"
    )


def reason(error: Exception, content: bytes = b"") -> str:
    """In one line, what a decoder complained about."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"not an image that can be read: it begins with {content[:12]!r}"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = " ".join(str(error).split())
    return f"damaged: {text or type(error).__name__}"


EIGHT_BIT = ("uint8", "bool")
"""Types whose values stay 8-bit; all others become float32."""


def open_npy(content: bytes) -> LazyImage:
    """Look at a NumPy array (h, w), (c, h, w) or (h, w, c): channels are the shorter end."""
    import numpy as np

    array = np.load(BytesIO(content), allow_pickle=False)
    channels, height, width = layout(array.shape, "")
    deep = array.dtype.name not in EIGHT_BIT
    return LazyImage(
        (height, width),
        channels,
        deep,
        UPRIGHT,
        False,
        lambda _: DecodedImage(as_pixels(array, ""), 1),
    )


def as_pixels(array: Any, axes: str = "") -> Tensor:
    """A NumPy array as pixels ``(c, h, w)``: uint8, or float32 raw values, which may be NaN.

    Raises:
        ImageError: It has no shape or values that an image has.
    """
    import numpy as np

    layout(array.shape, axes)
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise ImageError(f"values of type {array.dtype}; they must be whole numbers or floats")
    kept = np.uint8 if array.dtype == np.uint8 else np.float32
    pixels = torch.from_numpy(np.array(array, dtype=kept, order="C"))
    if pixels.ndim == 2:
        return pixels[None]
    return rearrange(pixels, "h w c -> c h w") if channels_last(array.shape, axes) else pixels


def layout(shape: tuple[int, ...], axes: str) -> tuple[int, int, int]:
    """Channels, height and width of an array whose axes may be named, as tifffile does.

    Raises:
        ImageError: No image has this shape.
    """
    last = channels_last(shape, axes)
    if len(shape) == 2:
        shape = (1, *shape)
    elif last:
        shape = (shape[-1], *shape[:-1])
    if len(shape) != 3 or 0 in shape:
        raise ImageError(
            f"an array of shape {shape}; it must be (h, w), (c, h, w) or (h, w, c), none of them 0"
        )
    return shape


def channels_last(shape: tuple[int, ...], axes: str) -> bool:
    """Whether the channels stand last: by name, or where the last side is the shorter end."""
    named = [axis for axis in axes if axis in "SC"]
    if len(named) == 1:
        return axes.endswith(named[0])
    return len(shape) == 3 and shape[-1] <= shape[0]
