"""Images that are opened but not yet decoded, their pixels, and how much memory they may take."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..checks import Pages

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

SCALES = (1, 2, 4, 8)
"""How many times smaller a JPEG can be decoded."""
MAX_BYTES = 4 * 2**30
"""Memory that decoding one image may take; an image that would take more is refused."""
MAX_COMPRESSION, LARGE_BYTES = 200, 2**30
"""Decoded bytes per byte of a file, above which an image beyond Pillow's limit, or one that takes
so much memory, is refused."""
CUT = "cut it by `pixelcl prepare IMAGES --tile 512 --out SHARDS`, and pretrain on SHARDS"
"""What to do with an image that is too large."""
EIGHT_BIT = ("uint8", "bool")
"""Types of values that stay 8-bit; all others become float32."""


class ImageError(Exception):
    """An image cannot be used; the message is the reason, without the file's name."""


class Silence:
    """A context without warnings, for many threads: the last one puts back the filters of all."""

    def __init__(self) -> None:
        self.lock, self.threads, self.filters = Lock(), 0, warnings.catch_warnings()
        if hasattr(os, "register_at_fork"):
            ends = self.lock.release
            os.register_at_fork(before=self.lock.acquire, after_in_parent=ends, after_in_child=ends)

    def __enter__(self) -> None:
        with self.lock:
            if not self.threads:
                self.filters = warnings.catch_warnings()
                self.filters.__enter__()
                warnings.simplefilter("ignore")
            self.threads += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.threads -= 1
            if not self.threads:
                self.filters.__exit__(None, None, None)


NO_WARNINGS = Silence()


@contextmanager
def known_errors(*, content: object = b"", but: type[Exception] = ImageError) -> Iterator[None]:
    """Let whatever a decoder raises become an `ImageError`, and its warnings be silent."""
    try:
        with NO_WARNINGS:  # a decoder's warnings about a file help nobody
            yield
    except (ImageError, but):
        raise
    except Exception as error:  # damaged bytes make decoders raise all kinds of errors
        start = content if isinstance(content, bytes) else b""
        raise ImageError(decoder_message(error, start)) from error


class DecodedImage(NamedTuple):
    """The upright pixels of an image, perhaps decoded at a fraction of its size.

    Attributes:
        pixels: ``(c, h, w)`` uint8, or float32 raw values; or an 8-bit Pillow image, L or RGB.
        scale: Source pixels per pixel, each way; the outermost ones may stand for fewer.
        origin: ``(x, y)`` in source pixels where the first pixel begins: 0, or less where it is the
            first pixel that stands for fewer.
        known: ``(c, h, w)`` bool, which values were measured; None where all were.
    """

    pixels: Tensor | Image.Image
    scale: int = 1
    origin: tuple[int, int] = (0, 0)
    known: Tensor | None = None


@dataclass(frozen=True)
class LazyImage:
    """An image whose header was read, and which is decoded when its pixels are asked for.

    Attributes:
        size: ``(height, width)`` of the full image, upright.
        channels: How many channels its pixels will have.
        high_depth: Whether values are 16-bit or float (raw, float32) rather than 8-bit.
        load: Decodes at one of `SCALES`. The image may come back larger than asked for, and smaller
            where memory would not suffice. What was not measured is NaN.
    """

    size: tuple[int, int]
    channels: int
    high_depth: bool
    load: Callable[[int], DecodedImage]

    def decode(self, scale: int = 1) -> DecodedImage:
        """The upright pixels at a scale, all of them finite.

        Raises:
            ImageError: The file is damaged, or holds no number.
        """
        with known_errors():
            return fill_missing(self.load(scale))

    def read(self, at_least: int | tuple[int, int] | None = None) -> Tensor:
        """The upright pixels ``(c, h, w)``: uint8, or float32 raw values.

        Args:
            at_least: The shorter side, or ``(height, width)``, that must be left when a large JPEG
                is decoded at a half, a quarter or an eighth of its size; None for the full size.

        Raises:
            ImageError: The file is damaged, or holds no number.
        """
        h, w = at_least if isinstance(at_least, tuple) else (at_least, at_least)
        factor = min(self.size[0] / h, self.size[1] / w) if h and w else 1
        return to_tensor(self.decode(largest_scale(factor)).pixels)


MOST_JOINED = 16
"""Gray pages without a name that are taken for the channels of one image, at most."""
ALL = -1
"""In place of an image's number in its file: all of them, as the channels of one."""


class Stack(NamedTuple):
    """What a file holds beside its first image.

    Attributes:
        images: Those of full size.
        joinable: Whether they are gray pages without a name, and so perhaps channels of one image.
        reduced: Smaller copies of them, such as previews, which are no images.
    """

    images: int
    joinable: bool = False
    reduced: int = 0

    @property
    def joined(self) -> bool:
        """Whether they are the channels of one image, as far as this file alone tells."""
        return self.joinable and self.images <= MOST_JOINED

    def chosen(self, pages: Pages | None) -> Sequence[int]:
        """The images to read, by their numbers; `ALL` for the channels of one."""
        if pages == "channels" or (pages is None and self.joined):
            return [ALL]
        return range(1 if pages == "first" else self.images)


def join(images: Sequence[LazyImage]) -> LazyImage:
    """Images of one size as the channels of one."""
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ImageError(pages_differ(sizes))

    def load(_: int) -> DecodedImage:
        parts = [to_tensor(image.load(1).pixels) for image in images]
        return DecodedImage(torch.cat([part.float() if deep else part for part in parts]))

    deep = any(image.high_depth for image in images)
    channels = sum(image.channels for image in images)
    return LazyImage(images[0].size, channels, deep, load)


def without_value(image: LazyImage, value: float) -> LazyImage:
    """An image in which a value means that nothing was measured, as NaN does.

    8-bit pixels keep it: there it is only known which values were measured.
    """
    if not image.high_depth and value not in range(256):
        return image

    def load(scale: int) -> DecodedImage:
        decoded = image.load(scale)
        pixels = to_tensor(decoded.pixels)
        gone = pixels == torch.tensor(value, dtype=pixels.dtype)  # rounded like them
        if pixels.is_floating_point():
            return decoded._replace(pixels=pixels.masked_fill(gone, torch.nan))
        known = ~gone if decoded.known is None else decoded.known & ~gone
        return decoded._replace(pixels=pixels, known=known)

    return replace(image, load=load)


def as_whole_numbers(array: NDArray[Any]) -> NDArray[Any]:
    """Float32 values as uint16 or int16 where all of them are whole and lie in its range."""
    import numpy as np

    if array.dtype == np.float32 and (array == array.round()).all():
        for kind in (np.uint16, np.int16):
            if np.iinfo(kind).min <= array.min() and array.max() <= np.iinfo(kind).max:
                return array.astype(kind)
    return array


def largest_scale(factor: float) -> int:
    """The largest of `SCALES` that is at most ``factor``, and at least 1."""
    return max((scale for scale in SCALES if scale <= factor), default=1)


def fill_missing(decoded: DecodedImage) -> DecodedImage:
    """Replace NaN by its channel's lowest value (or 0), and infinities by its extremes."""
    pixels = decoded.pixels
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        return decoded
    known = pixels.isfinite()
    if known.all():
        return decoded
    if not known.any():
        raise ImageError("none of its values is a finite number")
    low = pixels.where(known, torch.inf).amin((1, 2), keepdim=True)
    high = pixels.where(known, -torch.inf).amax((1, 2), keepdim=True)
    within = pixels.where(~pixels.isnan(), low).clamp(low, high)
    return decoded._replace(pixels=within.where(low <= high, 0), known=known)


def to_tensor(image: Tensor | Image.Image) -> Tensor:
    """An L or RGB Pillow image as ``(c, h, w)`` uint8, channels last in memory."""
    import numpy as np

    if isinstance(image, Tensor):
        return image
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else rearrange(pixels, "h w c -> c h w")


def to_rgb(pixels: Tensor) -> Tensor:
    """Images ``(..., c, h, w)`` of any channels as three, for the eye: the first ones, or gray."""
    return pixels[..., [0, 1, 2] if pixels.shape[-3] >= 3 else [0, 0, 0], :, :]


# What is refused.


def exceeds_pillow_limit(pixels: int) -> bool:
    """Whether Pillow calls so many pixels a decompression bomb: by default 179 million."""
    from PIL import Image

    return Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS


def check_memory(height: int, width: int, bytes_per_pixel: int, file_bytes: int) -> None:
    """Refuse an image that takes too much memory, or far more than its file suggests."""
    decoded_bytes = height * width * bytes_per_pixel
    if decoded_bytes > MAX_BYTES:
        raise ImageError(too_large(height, width))
    large = exceeds_pillow_limit(height * width) or decoded_bytes > LARGE_BYTES
    if large and decoded_bytes > MAX_COMPRESSION * file_bytes:
        raise ImageError(bomb(f"{height}x{width} pixels in a file of {file_bytes} bytes"))


def bomb(found: str) -> str:
    """The message about a decompression bomb."""
    from PIL import Image

    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return (
        f"a decompression bomb: {found}, beyond the limit of {limit} pixels; if you trust it, "
        f"raise PIL.Image.MAX_IMAGE_PIXELS before the run, or {CUT}"
    )


def too_large(height: int, width: int) -> str:
    """The message about an image that takes too much memory."""
    return f"{height}x{width} pixels would take more than {MAX_BYTES // 2**30} GiB; {CUT}"


def decoder_message(error: BaseException, content: bytes = b"") -> str:
    """A decoder's error in one line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"not an image that can be read: it begins with {content[:12]!r}"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = re.sub(r"^\w+, \S+\.cpp:\d+, ", "", " ".join(str(error).split()))  # of torchvision
    return f"damaged: {text or type(error).__name__}"


def pages_differ(sizes: Set[tuple[int, ...]]) -> str:
    """The message about pages that cannot be channels of one image."""
    listed = ", ".join("x".join(map(str, size)) for size in sorted(sizes))
    return (
        f"its pages differ in size ({listed}), so they are not the channels of one image; read "
        "them as images (--pages images)"
    )
