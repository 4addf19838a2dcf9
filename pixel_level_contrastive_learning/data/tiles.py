"""Cut large images into tiles: where each tile lies, and which hold nothing to learn from.

Tiles are numbered through all images, row by row, from the images' sizes alone. So the same call
cuts the same tiles again, and work that was cut off goes on at any of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from ..checks import Pages, above, raise_together, whole
from .arrays import Once
from .image import ImageError
from .pages import settle_pages
from .raster_files import is_larger, open_rasters
from .rasters import Array, Box, Raster, Window, with_nodata
from .reading import in_time
from .shards import is_shards
from .sources import EMPTY, FileSource, not_seen, open_path
from .statistics import PERCENTILES

PLAIN_SHARE = 0.99
"""Share of a tile's pixels that must hold nothing for it to be empty."""
PLAIN_CONTRAST = 1 / 16
"""Share of the image's range of values within which a band is plain background."""
LOOKS, LOOK_SIDE = 16, 32
"""The range is found in 16 x 16 windows of 32 pixels, where the file has no small copy."""
OVERVIEW_SIDE, MAX_OVERVIEW = 512, 2**24
"""Longer side of the small copy in which the range is found, and pixels of the level it is from."""


class Grid(NamedTuple):
    """How an image is cut.

    Attributes:
        file: Which file.
        page: Which of the file's images, or None if it has one.
        full_size: ``(height, width)`` of the full image, upright.
        size: ``(height, width)`` of a tile.
        xs: Where tiles begin, to the right, in pixels of the scaled image; none if it is not cut.
        ys: The same, down.
        scale: Pixels of the full image per pixel of a tile, each way.
        tile_bytes: What a tile takes in memory.
    """

    file: int
    page: int | None = None
    full_size: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    xs: Sequence[int] = ()
    ys: Sequence[int] = ()
    scale: float = 1.0
    tile_bytes: int = 0

    @property
    def tiles(self) -> int:
        """Tiles, or 1 for an image that is not cut."""
        return max(1, len(self.xs) * len(self.ys))

    def box(self, index: int) -> Box:
        """Where a tile lies, in pixels of the full image."""
        row, column = divmod(index, len(self.xs))
        (height, width), (h, w) = self.full_size, self.size
        x, y = self.xs[column], self.ys[row]
        x0, y0, x1, y1 = (round(edge * self.scale) for edge in (x, y, x + w, y + h))
        return x0, y0, min(x1, width), min(y1, height)


class Tile(NamedTuple):
    """A tile of an image.

    Attributes:
        pixels: ``(c, h, w)`` of the image's own type of values.
        nodata: The value in it that stands where nothing was measured; None if there is none.
        empty: ``nodata`` or ``background`` if it holds nothing else, else an empty text.
        about: The size of the full image and where the tile lies in it, for its JSON.
    """

    pixels: Array
    nodata: float | None
    empty: str
    about: dict[str, Any]


class Opened(NamedTuple):
    """A raster that is being cut, and per band the contrast ``(c,)`` that is still background."""

    raster: Raster
    contrast: Array


class Tiling:
    """All tiles of some files, by number; images that fit into a tile are left whole.

    Args:
        paths: The files.
        tile: Side of the tiles, in pixels.
        overlap: How far neighbours overlap, in pixels.
        level: Which level of pyramids is cut, 0 for the full image.
        mpp: Size of a tile's pixels, as `Raster.mpp`, in place of a level.
        pages: What several images in a file are read as, see `settle_pages`.
        nodata: The value that stands where nothing was measured, beside the file's own.

    Raises:
        ValueError: A value out of range, or a file without that level or resolution.
    """

    def __init__(
        self,
        paths: Sequence[str],
        tile: int,
        overlap: int = 0,
        level: int | None = None,
        mpp: float | None = None,
        pages: Pages | None = None,
        nodata: float | None = None,
    ) -> None:
        both = f"level is {level} and mpp is {mpp}; give one of them"
        raise_together(
            whole("tile", tile, 1),
            whole("overlap", overlap, 0),
            None if level is None else whole("level", level, 0),
            None if mpp is None else above("mpp", mpp, 0),
            both if level is not None and mpp is not None else None,
        )
        if overlap >= tile:
            raise ValueError(f"overlap is {overlap}; it must be less than the tile, {tile}")
        if nodata is not None and (level or mpp is not None):
            raise ValueError(
                f"nodata is {nodata}, level is {level} and mpp is {mpp}; scaling down would mix "
                "that value into its neighbours: write it into the files (gdal_edit.py -a_nodata "
                f"{nodata:g} FILE) in place of nodata, or cut the full image"
            )
        self.paths, self.tile, self.overlap, self.level, self.mpp = paths, tile, overlap, level, mpp
        self.nodata, self.source = nodata, FileSource(paths)
        settle_pages([self.source], pages)
        self.refused: dict[int, str] = {}
        """Why files too large to be left whole cannot be cut, by their numbers."""
        self.grids = [grid for index in range(len(paths)) for grid in self.plan(index)]
        self.ends = list(accumulate(grid.tiles for grid in self.grids))
        self.opened: dict[int, tuple[Once[list[Raster]], dict[int, Once[Opened]]]] = {}
        """Of a file that is being cut, what its images are, and each of them by its number."""
        self.lock = Lock()

    def __len__(self) -> int:
        return self.ends[-1]

    @cached_property
    def tile_bytes(self) -> int:
        """What the largest tile takes in memory."""
        return max(grid.tile_bytes for grid in self.grids)

    def plan(self, index: int) -> list[Grid]:
        """How the images of a file are cut."""
        path = self.paths[index]
        if not is_larger(path, self.tile):
            images = self.source.split.get(index)
            return [Grid(index, page) for page in range(images)] if images else [Grid(index)]
        try:
            rasters = self.rasters(index)
        except ImageError as error:
            self.refused[index] = str(error)
            return [Grid(index)]
        return [
            self.grid(index, raster, page if len(rasters) > 1 else None)
            for page, raster in enumerate(rasters)
        ]

    def rasters(self, file: int) -> list[Raster]:
        """The images of a file."""
        path, pages = self.paths[file], self.source.pages_of(file)
        return in_time(partial(open_rasters, path, pages), path)

    def grid(self, index: int, raster: Raster, page: int | None) -> Grid:
        """How a raster is cut."""
        scale = self.scale(self.paths[index], raster)
        scaled = [max(1, int(side / scale)) for side in raster.size]
        h, w = (min(self.tile, side) for side in scaled)
        ys, xs = (starts(side, self.tile, self.tile - self.overlap) for side in scaled)
        tile_bytes = h * w * raster.bands * raster.dtype.itemsize
        return Grid(index, page, raster.size, (h, w), xs, ys, scale, tile_bytes)

    def scale(self, path: str, raster: Raster) -> float:
        """Pixels of the full image per pixel of a tile."""
        if self.level is not None:
            if self.level >= len(raster.scales):
                raise ValueError(
                    f"level is {self.level}, but the last one of {path!r} is "
                    f"{len(raster.scales) - 1}; give another, or mpp"
                )
            return raster.scales[self.level]
        if self.mpp is None:
            return 1.0
        if raster.mpp is None:
            raise ValueError(
                f"mpp is {self.mpp}, but {path!r} does not record its pixel size; give a level"
            )
        scale = self.mpp / raster.mpp
        if scale < 0.95:
            raise ValueError(
                f"mpp is {self.mpp}, but the pixels of {path!r} are {raster.mpp:.4g}; give that or "
                "a larger one"
            )
        return max(scale, 1.0)

    def locate(self, index: int) -> tuple[Grid, int]:
        """The image that a tile is of, and its number there."""
        image = bisect_right(self.ends, index)
        return self.grids[image], index - (self.ends[image] - self.grids[image].tiles)

    def cut(self, grid: Grid, number: int) -> Tile:
        """A tile of an image that is cut.

        Raises:
            ImageError: It cannot be read.
        """
        box = grid.box(number)
        raster, contrast = self.open(grid)
        try:
            window = in_time(partial(raster.read, box, grid.size), self.paths[grid.file])
        except ImageError:
            raise
        except Exception as error:  # damaged bytes make decoders raise all kinds of errors
            text = " ".join(str(error.__cause__ or error).split())
            raise ImageError(f"damaged: {text} (tile at x {box[0]}, y {box[1]})") from error
        has_nodata = raster.nodata is not None and bool((window.pixels == raster.nodata).any())
        height, width = grid.full_size
        about: dict[str, Any] = {"height": height, "width": width, "box": box}
        if grid.page is not None:
            about["page"] = grid.page
        nodata = raster.nodata if has_nodata else None
        return Tile(window.pixels, nodata, emptiness(window, contrast), about)

    def open(self, grid: Grid) -> Opened:
        """The raster of an image; its file and the one before it stay open."""
        page = grid.page or 0
        with self.lock:
            if grid.file not in self.opened:
                kept = list(self.opened.items())[-1:]
                entry = Once(partial(self.rasters, grid.file)), dict[int, Once[Opened]]()
                self.opened = dict([*kept, (grid.file, entry)])
            rasters, pages = self.opened[grid.file]

            def opened() -> Opened:
                raster = with_nodata(rasters()[page], self.nodata)
                return Opened(raster, background_contrast(raster))

            once = pages.setdefault(page, Once(opened))
        return once()


def starts(length: int, tile: int, step: int) -> Sequence[int]:
    """Where tiles begin along a side: step by step, and the last one ends where the side ends."""
    if length <= tile:
        return (0,)
    return (*range(0, length - tile, step), length - tile)


def find_rasters(data: Sequence[str | Path]) -> list[str]:
    """The files that are meant: images and slides in folders, single ones, or lists of paths."""
    paths: list[str] = []
    for place in map(str, data):
        files = None if is_shards(place) else open_path(place, slides=True)
        if not isinstance(files, FileSource):
            raise ValueError(f"data is {place!r}; tiles are cut from files: name their folder")
        paths += files.paths
    if not paths:
        raise ValueError(EMPTY)
    return not_seen(paths, set())


# Empty tiles.


def emptiness(window: Window, contrast: Array) -> str:
    """What alone a tile holds, ``nodata`` or ``background``; an empty text if there is more."""
    step = max(1, min(window.known.shape) // 128)
    known = window.known[::step, ::step]
    if known.mean() <= 1 - PLAIN_SHARE:
        return "nodata"
    edge = 50 * (1 - PLAIN_SHARE)
    low, high = value_range(window.pixels[:, ::step, ::step][:, known], (edge, 100 - edge))
    return "background" if bool((high - low <= contrast).all()) else ""


def value_range(values: Array, percentiles: tuple[float, float]) -> Array:
    """Two percentiles ``(2, c)`` of the finite ones of some values ``(c, n)``; 0 where none is."""
    bands = [band[np.isfinite(band)].astype(np.float64) for band in values]
    return np.stack(
        [np.percentile(band, percentiles) if band.size else np.zeros(2) for band in bands], axis=1
    )


def background_contrast(raster: Raster) -> Array:
    """Per band ``(c,)``, how far the values of a tile may lie apart that is plain background."""
    values = np.concatenate(list(looks(raster)), axis=1)
    low, high = value_range(values, PERCENTILES)
    return np.asarray((high - low) * PLAIN_CONTRAST)


def looks(raster: Raster) -> Iterator[Array]:
    """Measured values ``(c, n)`` from all over an image."""
    height, width = raster.size
    coarsest = raster.scales[-1]
    yield np.zeros((raster.bands, 0), raster.dtype)
    if coarsest > 1 and height * width / coarsest**2 <= MAX_OVERVIEW:
        scale = max(coarsest, max(raster.size) / OVERVIEW_SIDE)
        size = max(1, int(height / scale)), max(1, int(width / scale))
        boxes = [(0, 0, width, height)]
    else:
        h, w = size = min(LOOK_SIDE, height), min(LOOK_SIDE, width)
        ys, xs = (
            np.linspace(0, side - look, LOOKS, dtype=int).tolist()
            for side, look in ((height, h), (width, w))
        )
        boxes = [(x, y, x + w, y + h) for y in ys for x in xs]
    for box in boxes:
        with suppress(Exception):  # damage is reported where a tile meets it
            window = raster.read(box, size)
            yield window.pixels[:, window.known]
