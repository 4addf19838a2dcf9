"""Decoded images that stay in memory, shared by the workers of a loader."""

from __future__ import annotations

import mmap
import multiprocessing
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .image import SCALES, DecodedImage, LazyImage, to_tensor
from .sources import IndexedSource, Source

WORD = 8
"""Bytes of a number in the cache."""
PATIENCE = 1.0
"""Seconds to wait for another process that writes; it may have been killed meanwhile."""


def can_share(workers: int) -> bool:
    """Whether this many processes of a loader can share memory: forked ones can."""
    return not workers or start_method() == "fork"


def start_method() -> str:
    """How processes are started, which stays open where nobody has chosen yet."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or multiprocessing.get_all_start_methods()[0]


class Entry(NamedTuple):
    """The numbers that stand before the pixels of an image."""

    height: int  # of the full image
    width: int
    channels: int
    high_depth: int
    scale: int  # at which the pixels were decoded
    left: int  # where the first of them begins
    top: int
    rows: int
    columns: int
    is_float: int  # float32 (c, h, w), or else uint8 (h, w, c)

    @property
    def values(self) -> int:
        """How many pixel values follow."""
        return self.rows * self.columns * self.channels


class DecodedCache(IndexedSource):
    """A source whose images are decoded once at each scale, as long as there is room.

    They come back bit for bit. Images in which values are missing are decoded every time. Memory is
    taken as it fills. Processes that are forked later share what is there and what comes.

    Args:
        source: The images.
        capacity: Bytes, at most.

    >>> from pixel_level_contrastive_learning.data.sources import open_source
    >>> cache = DecodedCache(open_source([torch.zeros(3, 32, 48)]), 2**20)
    >>> cache.open(0).decode().pixels.shape, cache.used > 32 * 48 * 3
    (torch.Size([3, 32, 48]), True)
    """

    def __init__(self, source: Source, capacity: int) -> None:
        self.source = source
        table = len(source) * len(SCALES)
        self.memory = mmap.mmap(-1, (1 + table) * WORD + capacity)
        numbers = torch.frombuffer(self.memory, dtype=torch.int64, count=1 + table)
        self.end, self.places = numbers[:1], numbers[1:].view(len(source), len(SCALES))
        self.end[0] = (1 + table) * WORD
        self.lock = multiprocessing.get_context(start_method()).Lock()

    def __len__(self) -> int:
        return len(self.source)

    def locate(self, index: int) -> tuple[Source, int]:
        return self.source, index

    @property
    def used(self) -> int:
        """Bytes that images take."""
        return int(self.end) - (1 + self.places.numel()) * WORD

    def open(self, index: int) -> LazyImage:
        kept = next((place for place in self.places[index].tolist() if place), 0)
        if not kept:
            image = self.source.open(index)
            return replace(image, load=partial(self.load, index, image))
        entry = self.entry(kept)
        size, deep = (entry.height, entry.width), bool(entry.high_depth)
        return LazyImage(size, entry.channels, deep, partial(self.load, index, None))

    def load(self, index: int, image: LazyImage | None, scale: int) -> DecodedImage:
        """The pixels at a scale, from memory if they are there."""
        slot = SCALES.index(scale)
        if place := int(self.places[index, slot]):
            return self.kept(place)
        image = image or self.source.open(index)
        decoded = image.decode(scale)
        if decoded.known is None:
            at = SCALES.index(decoded.scale)  # small images come in full, whatever the scale
            place = int(self.places[index, at]) or self.keep(image, decoded)
            if place and self.lock.acquire(timeout=PATIENCE):  # complete before others find it
                self.places[index, slot] = self.places[index, at] = place
                self.lock.release()
        return decoded

    def entry(self, place: int) -> Entry:
        """What stands at a place in memory."""
        return Entry(*self.numbers(place).tolist())

    def numbers(self, place: int) -> Tensor:
        """The numbers of an entry, where they lie."""
        count = len(Entry._fields)
        return torch.frombuffer(self.memory, dtype=torch.int64, count=count, offset=place)

    def kept(self, place: int) -> DecodedImage:
        """An image out of memory, without a copy."""
        entry = self.entry(place)
        origin = entry.left, entry.top
        return DecodedImage(self.pixels(place, entry), entry.scale, origin)

    def pixels(self, place: int, entry: Entry) -> Tensor:
        """The pixels ``(c, h, w)`` of an entry, where they lie."""
        kind = torch.float32 if entry.is_float else torch.uint8
        start = place + len(Entry._fields) * WORD
        flat = torch.frombuffer(self.memory, dtype=kind, count=entry.values, offset=start)
        if entry.is_float:
            return flat.view(entry.channels, entry.rows, entry.columns)
        return flat.view(entry.rows, entry.columns, entry.channels).permute(2, 0, 1)

    def keep(self, image: LazyImage, decoded: DecodedImage) -> int:
        """Copy an image into memory; its place, 0 if there is no room."""
        pixels = to_tensor(decoded.pixels)
        channels, rows, columns = pixels.shape
        entry = Entry(
            *image.size,
            channels,
            image.high_depth,
            decoded.scale,
            *decoded.origin,
            rows,
            columns,
            pixels.is_floating_point(),
        )
        place = self.reserve(len(entry) * WORD + pixels.nbytes)
        if not place:
            return 0
        self.numbers(place).copy_(torch.tensor(entry))
        self.pixels(place, entry).copy_(pixels)
        return place

    def reserve(self, length: int) -> int:
        """A place of this length; 0 if there is none."""
        if not self.lock.acquire(timeout=PATIENCE):
            return 0
        try:
            place = int(self.end)
            end = place + -(-length // WORD) * WORD
            if end > len(self.memory):
                return 0
            self.end[0] = end
            return place
        finally:
            self.lock.release()
