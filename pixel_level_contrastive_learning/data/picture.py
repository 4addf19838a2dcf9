"""JPEG, and what Pillow reads: PNG, WebP, BMP, GIF, PNM of 8 bits, AVIF; with their frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .image import (
    MAX_BYTES,
    SCALES,
    DecodedImage,
    ImageError,
    LazyImage,
    Stack,
    bomb,
    check_memory,
    exceeds_pillow_limit,
    to_tensor,
    too_large,
)
from .orientation import (
    PNG,
    check_png,
    first_pixel,
    orientation_of,
    split_png,
    turn_picture,
    turn_upright,
    upright_size,
)
from .reading import Kept

if TYPE_CHECKING:
    from PIL import Image

SMALL = 2**19
"""Pixels up to which a JPEG is always decoded in full, because a smaller scale saves nothing."""
GIANT = 2**26
"""Pixels above which an image that had to be decoded in full is averaged down before it is cut."""
GRAY_MODES = ("1", "L", "LA", "La")
HIGH_DEPTH_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
JPEG = b"\xff\xd8\xff"
"""How a JPEG begins."""
FORMATS = ("WEBP", "BMP", "GIF", "PPM", "AVIF")
"""What Pillow may take a file for, beside PNG: some of its other formats start programs."""
AVIF = b"ftypavi"
"""Among the first bytes of an AVIF, with another letter for one image or for several."""
KEPT = Kept(16)
"""Animations, each at the frame that was read last."""
MP_ENTRIES = 0xB002
"""The tag of an MPO that lists its images."""


def open_jpeg(content: bytes, picture: int = 0) -> LazyImage:
    """Open a JPEG, the one format that decodes at a smaller scale, or one of several in a file."""
    from PIL.JpegImagePlugin import JpegImageFile

    if picture:
        content = mpo_images(content)[0][picture]
    # Image.open refuses by the size of the full image; here the decoded size counts.
    image = JpegImageFile(BytesIO(content))
    width, height = image.size
    plain, orientation = image.mode in ("L", "RGB"), orientation_of(image)
    if image.info.get("progressive") and 6 * height * width > MAX_BYTES:
        raise ImageError(too_large(height, width))  # all its coefficients are held at once

    def load(scale: int) -> DecodedImage:
        from torchvision.io import decode_jpeg

        if height * width <= SMALL:
            scale = 1
        while scale < SCALES[-1] and exceeds_pillow_limit(height * width // scale**2):
            scale *= 2
        if scale == 1 and plain:
            return DecodedImage(turn_upright(decode_jpeg(as_bytes(content)), orientation))
        draft: JpegImageFile = JpegImageFile(BytesIO(content))
        if scale > 1:
            draft.draft(None, (max(width // scale, 1), max(height // scale, 1)))
        scale = next(s for s in SCALES if draft.size == (-(-width // s), -(-height // s)))
        return DecodedImage(to_eight_bit(draft), scale, first_pixel(size, scale, orientation))

    size = upright_size(height, width, orientation)
    return LazyImage(size, 1 if image.mode == "L" else 3, False, load)


def open_picture(content: bytes, frame: int = 0) -> LazyImage:
    """Open a frame of what Pillow reads: PNG, WebP, BMP, GIF and more."""
    png, orientation = content.startswith(PNG), 1
    if png:
        content, orientation = split_png(content)
    elif AVIF in content[:16]:
        check_avif(content)
    with opened_picture(content, frame) as first:
        if not png:
            orientation = orientation_of(first)
        size, mode = upright_size(first.height, first.width, orientation), first.mode
        bands = len(first.getbands())
    deep_png = png and content[24] == 16  # bits per channel
    clear = transparent_colour(first, content) if png else None
    check_memory(*size, 6 * bands if deep_png else 4, len(content))

    def load_deep_png(_: int) -> DecodedImage:
        from torchvision.io import decode_png

        if frame:
            raise ImageError("a 16-bit animation, of which only the first frame can be read")
        check_png(content)
        pixels = decode_png(as_bytes(content)).float()  # Pillow reads 16-bit colour as 8 bits
        if len(pixels) not in (1, 3):
            pixels = pixels[:-1] * (pixels[-1:] / 65535)  # over black
        return DecodedImage(turn_upright(over_black(pixels, clear), orientation))

    if deep_png:
        channels = 1 if content[25] in (0, 4) else 3  # colour type: gray, with or without alpha
        return LazyImage(size, channels, True, load_deep_png)
    deep = mode in HIGH_DEPTH_MODES

    def load(scale: int) -> DecodedImage:
        with opened_picture(content, frame) if frame else nullcontext(first) as image:
            if deep:
                return DecodedImage(to_float(image, orientation))
            upright = to_eight_bit(image.copy() if frame else image, orientation)
        if clear is not None:
            return DecodedImage(over_black(to_tensor(upright), clear))
        return averaged(upright, scale)

    return LazyImage(size, 1 if deep or mode in GRAY_MODES else 3, deep, load)


def transparent_colour(image: Image.Image, png: bytes) -> Tensor | None:
    """The value, or values, of a PNG's pixels that are transparent; None for another kind of it."""
    transparency = image.info.get("transparency")
    if (
        transparency is None
        or isinstance(transparency, bytes)
        or image.mode not in ("1", "L", "RGB", "I", "I;16")
    ):
        return None
    white = 2 ** png[24] - 1  # bits per channel
    colour: Tensor = torch.tensor(transparency).reshape(-1, 1, 1) & white
    return colour * (255 // white) if white < 255 else colour


def over_black(pixels: Tensor, clear: Tensor | None) -> Tensor:
    """Pixels ``(c, h, w)``, of which those of the transparent colour, if there is one, are 0."""
    return pixels if clear is None else pixels.masked_fill((pixels == clear).all(0), 0)


@contextmanager
def opened_picture(content: bytes, frame: int) -> Iterator[Image.Image]:
    """A picture at one of its frames, to which all frames before it lead."""
    if not frame:
        yield open_by_pillow(content)
        return
    with KEPT.opened((len(content), hash(content)), lambda: open_by_pillow(content)) as image:
        image.seek(frame)
        yield image


def open_by_pillow(content: bytes) -> Image.Image:
    """A picture opened by Pillow, whatever its EXIF.

    Raises:
        ImageError: It is a decompression bomb.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngImageFile

    try:
        if content.startswith(PNG):  # a large PNG is a bomb by what it grows to, not by its size
            return PngImageFile(BytesIO(content))
        return Image.open(BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(bomb(str(error))) from None
    except ValueError:
        if AVIF not in content[:16]:
            raise
        return Image.open(BytesIO(content.replace(b"Exif", b"free")))


def check_avif(content: bytes) -> None:
    """Refuse an AVIF of more than 8 bits, which Pillow would reduce."""
    start = content.find(b"av1C")
    if start >= 0 and content[start + 6] & 0x40:  # AV1's high_bitdepth
        raise ImageError("more than 8 bits in an AVIF would be reduced; save it as PNG or TIFF")


def as_bytes(content: bytes) -> Tensor:
    """A file as torchvision's decoders take it."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# Frames.


def frames_in(content: bytes) -> Stack:
    """How many images of full size a JPEG or picture holds."""
    if content.startswith(JPEG):
        images, copies = mpo_images(content)
        return Stack(len(images), reduced=copies)
    image = open_by_pillow(split_png(content)[0] if content.startswith(PNG) else content)
    return Stack(getattr(image, "n_frames", 1))


def mpo_images(content: bytes) -> tuple[list[bytes], int]:
    """The JPEGs of full size in a multi-picture one, and how many others are in it.

    The others are previews, maps of gain or depth and the like.
    """
    from PIL.JpegImagePlugin import JpegImageFile

    first: Any = JpegImageFile(BytesIO(content))
    try:
        entries = first._getmp()[MP_ENTRIES]
        starts = [entry["DataOffset"] + first.info["mpoffset"] for entry in entries]
        parts = [content[start:] if i else content for i, start in enumerate(starts)]
        opened = [JpegImageFile(BytesIO(part)) for part in parts]
    except Exception:  # a broken list of images does not affect the first
        return [content], 0
    kinds = [(image.size, image.mode) for image in opened]
    full = [part for part, kind in zip(parts, kinds, strict=True) if kind == kinds[0]]
    return full, len(parts) - len(full)


# Pillow images.


def averaged(image: Image.Image, scale: int) -> DecodedImage:
    """A decoded 8-bit image, a giant one averaged down to the scale asked for."""
    if scale > 1 and image.width * image.height > GIANT:
        return DecodedImage(image.reduce(scale), scale)
    return DecodedImage(image)


def to_eight_bit(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """A Pillow image of any 8-bit mode, upright, as L or RGB; transparent parts over black."""
    from PIL import Image

    image = turn_picture(image, orientation)
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        over = Image.alpha_composite(ground, image.convert("RGBA"))
        return over.convert("L" if image.mode in GRAY_MODES else "RGB")
    return image.convert("RGB")


def to_float(image: Image.Image, orientation: int | None = None) -> Tensor:
    """The values ``(1, h, w)`` float32 of a 16-bit, 32-bit or float Pillow image, upright."""
    import numpy as np

    return torch.from_numpy(np.array(turn_picture(image, orientation), dtype=np.float32))[None]
