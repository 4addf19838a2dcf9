"""What becomes of an image in a shard: its own bytes, a smaller copy, or a tile."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from .arrays import array_file
from .decoding import IMAGE_SUFFIXES, SIGNATURES, ending_of, open_image
from .image import ImageError, LazyImage, as_whole_numbers, largest_scale, to_tensor
from .rasters import Array
from .sources import NodataSource, Source, file_of
from .statistics import is_mask
from .tiles import Tiling


class ShardEntry(NamedTuple):
    """An image's file as it goes into a shard.

    Attributes:
        suffix: Of its format, without a dot.
        content: Its bytes.
        about: What its JSON says beside the name: upright size before, and place of a tile.
        original_bytes: Size of the file before; 0 for a tile.
    """

    suffix: str
    content: bytes
    about: Mapping[str, Any]
    original_bytes: int = 0


Entry = ShardEntry | ImageError | str
"""An image as it goes into a shard, why it cannot be used, or what alone an empty tile holds."""


def make_entry(source: Source, index: int, max_side: int, quality: int) -> ShardEntry | ImageError:
    """An image in the form it has in a shard; or why it cannot be used."""
    try:
        content = source.content(index)
        image = open_image(content)
        suffix = suffix_of(source.name(index), content)
        about = dict(zip(("height", "width"), image.size, strict=True))
        if max(image.size) <= max_side and suffix:
            image.decode()  # a damaged file is found now, and not in training
            return ShardEntry(suffix, content, about, len(content))
        pixels = read_smaller(image, max_side)
    except ImageError as error:
        return error
    array = pixels.numpy()
    return ShardEntry(*encode(as_whole_numbers(array), quality), about, len(content))


class Copies:
    """Images as they are, or made smaller, one by one."""

    def __init__(self, source: Source, max_side: int, quality: int) -> None:
        self.source, self.max_side, self.quality = source, max_side, quality
        self.settings = {"max_side": max_side}

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """The image's name."""
        return self.source.name(index)

    def file(self, index: int) -> str | None:
        """The path of the file that the image is in."""
        return file_of(self.source, index)

    def make(self, index: int) -> Entry:
        """The image as it goes into a shard."""
        return make_entry(self.source, index, self.max_side, self.quality)


class Tiles:
    """Tiles of large images, and small images as they are, one by one."""

    def __init__(self, tiling: Tiling, quality: int, keep_empty: bool) -> None:
        files, nodata = tiling.source, tiling.nodata
        self.source: Source = files if nodata is None else NodataSource(files, nodata)
        self.tiling, self.quality = tiling, quality
        self.keep_empty = keep_empty
        self.settings = {
            "max_side": tiling.tile,
            "tile": tiling.tile,
            "overlap": tiling.overlap,
            "level": tiling.level,
            "mpp": tiling.mpp,
            "keep_empty": keep_empty,
            "tiles": len(tiling),
        }

    def __len__(self) -> int:
        return len(self.tiling)

    def name(self, index: int) -> str:
        """The name of the image that a tile is of."""
        grid, _ = self.tiling.locate(index)
        files = self.tiling.source
        number = files.index(grid.file, grid.page)
        return files.file_name(grid.file) if grid.xs else files.name(number)

    def file(self, index: int) -> str | None:
        """The path of the file that a tile is of."""
        grid, _ = self.tiling.locate(index)
        return self.tiling.source.place(grid.file).path

    def make(self, index: int) -> Entry:
        """The tile, or small image, as it goes into a shard."""
        grid, number = self.tiling.locate(index)
        if grid.file in self.tiling.refused:
            return ImageError(self.tiling.refused[grid.file])
        if not grid.xs:
            number = self.tiling.source.index(grid.file, grid.page)
            return make_entry(self.source, number, self.tiling.tile, self.quality)
        try:
            tile = self.tiling.cut(grid, number)
        except ImageError as error:
            return error
        if tile.empty and not self.keep_empty:
            return tile.empty
        return ShardEntry(*encode(tile.pixels, self.quality, tile.nodata), tile.about)


def suffix_of(name: str, content: bytes) -> str:
    """The suffix of the format that content begins with, or else the file's; empty if unknown."""
    for start, kind in SIGNATURES.items():
        if content.startswith(start):
            return kind
    return ending_of(name, IMAGE_SUFFIXES).removeprefix(".")


def read_smaller(image: LazyImage, max_side: int) -> Tensor:
    """Upright pixels ``(c, h, w)`` of a longer side of ``max_side`` at most, without aliasing.

    Raw values are NaN where less than half of what they stand for was measured (or, if that is so
    everywhere, less than anywhere else). A fourth band that is a mask stays one.
    """
    longer = max(image.size)
    max_side = min(max_side, longer)
    size = tuple(max(1, round(side * max_side / longer)) for side in image.size)
    decoded = image.decode(largest_scale(min(longer / max_side, *image.size)))
    pixels = to_tensor(decoded.pixels)
    known = decoded.known if pixels.is_floating_point() else None
    whole_numbers = pixels.is_floating_point() and bool((pixels == pixels.round()).all())
    resize = partial(interpolate, size=size, mode="bilinear", antialias=True)
    smaller: Tensor = resize((pixels if known is None else pixels * known)[None])[0]
    if known is not None:
        share = resize(known[None].float())[0]
        smaller /= share
        smaller[share < share.max().clamp(max=0.5)] = torch.nan
    if is_mask(pixels.flatten(1), image.high_depth):
        nearest = interpolate(pixels[None, -1:], size=size, mode="nearest-exact")[0, 0]
        smaller[-1] = smaller[-1].where(smaller[-1].isnan(), nearest)
    return smaller.round() if whole_numbers else smaller


def encode(array: Array, quality: int, nodata: float | None = None) -> tuple[str, bytes]:
    """Pixels ``(c, h, w)``, some of them perhaps nodata, as a file: its suffix and its bytes."""
    from PIL import Image

    if array.dtype != np.uint8 or len(array) not in (1, 3):
        return array_file(array, nodata)
    file, shape = BytesIO(), "1 h w -> h w" if len(array) == 1 else "c h w -> h w c"
    picture = np.ascontiguousarray(rearrange(array, shape))
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return "jpg", file.getvalue()
