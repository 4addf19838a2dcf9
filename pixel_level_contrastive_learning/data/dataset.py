"""Samples: two views of one image, where they lie, and how their colour will be changed.

Everything about a sample is drawn from a generator that is a function of (seed, epoch, index), on
the CPU, by the worker that cuts it; colour itself is changed later, on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ..augment import DICE, VIEW_ONE, VIEW_TWO, Factors, Photometry
from ..views import Placement, lay_maps
from .crops import best_scale, cut
from .image import ImageError, LazyImage
from .sources import Source
from .statistics import Statistics


class SampleKey(NamedTuple):
    """One sample of the stream.

    Attributes:
        epoch: How often all images have passed before it.
        position: Where it stands in its epoch.
        index: Which image of the source stands there.
    """

    epoch: int
    position: int
    index: int  # type: ignore[assignment]  # hides a method of tuples that nobody wants


def dice(*numbers: int) -> torch.Generator:
    """A generator that is a function of these numbers: seed, epoch, index.

    Torch's generator of the CPU reads 32 bits of its seed, so of 100 000 samples about one meets
    the dice of another.
    """
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The images ``(count,)`` int64 in the order of an epoch."""
    return torch.randperm(count, generator=dice(seed, epoch))


MAP_DICE = 7
"""Numbers drawn for the map of one view."""
MOST_HELD = 2**25
"""Values of images whose files are held at once, so that their views are laid together."""


class TwoViewBatch(NamedTuple):
    """A batch of samples; of a single one, the same without the first side.

    Attributes:
        one: ``(b, c, h, w)`` first views: uint8 where the data is 8-bit, else float32 in [0, 1].
        two: Second views, likewise.
        map_one: ``(b, 2, 3)`` float32 maps from the first views' unit squares to pixels ``(x, y)``
            of the upright full-size image.
        map_two: Likewise of the second views.
        factors_one: What happens to the colour of the first views, each ``(b,)``.
        factors_two: Likewise of the second views.
        index: ``(b,)`` int64, which image of the source was cut.
    """

    one: Tensor
    two: Tensor
    map_one: Tensor
    map_two: Tensor
    factors_one: Factors
    factors_two: Factors
    index: Tensor  # type: ignore[assignment]  # hides a method of tuples that nobody wants


ONE_LINE = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


class Broken(NamedTuple):
    """An image that could not be used."""

    name: str
    reason: str

    @property
    def line(self) -> str:
        """A line of a list of such images, which keeps to its line and its columns."""
        return "\t".join(part.translate(ONE_LINE) for part in self) + "\n"


class TooManyBrokenError(RuntimeError):  # reads as what it says
    """More images are broken than a run puts up with.

    Args:
        message: What is told.
        broken: Those that were met.
    """

    def __init__(self, message: str, broken: Iterable[Broken] = ()) -> None:
        super().__init__(message)
        self.broken = list(broken)


class Made(NamedTuple):
    """What a worker sends: a batch, and the broken images it met on the way."""

    pairs: TwoViewBatch
    broken: list[Broken]


@dataclass(frozen=True)
class Cutting:
    """How two views are made of an image.

    Attributes:
        size: ``(height, width)`` of the views.
        placement: How views are laid over their images.
        photometry: How colour is changed, view one and view two.
    """

    size: tuple[int, int]
    placement: Placement
    photometry: tuple[Photometry, Photometry] = (VIEW_ONE, VIEW_TWO)


class Look(NamedTuple):
    """An image that was looked at, and the place in the batch that it is to take."""

    slot: int
    place: SampleKey
    ahead: int
    index: int  # type: ignore[assignment]  # hides a method of tuples that nobody wants
    opened: LazyImage


class Room(NamedTuple):
    """Where a batch is written, slot by slot."""

    views: Tensor
    """``(2, b, c, h, w)``."""
    maps: Tensor
    """``(2, b, 2, 3)``."""
    drawn: Tensor
    """``(b, 2, n)`` numbers of [0, 1)."""
    indices: Tensor
    """``(b,)``."""
    broken: dict[str, Broken]


class TwoViewDataset(Dataset[TwoViewBatch]):
    """Two views of each image, asked for by `order.SampleKey`.

    Where an image is broken, the next readable one of the epoch's order takes its place, with the
    dice of that place.

    Args:
        source: The images.
        statistics: The form they are brought to.
        cutting: How views are made.
        seed: Of the run.
        max_broken: Share of the images that may be broken.
    """

    def __init__(
        self,
        source: Source,
        statistics: Statistics,
        cutting: Cutting,
        *,
        seed: int,
        max_broken: float = 0.01,
    ) -> None:
        self.source, self.statistics, self.cutting = source, statistics, cutting
        self.seed, self.max_broken = seed, max_broken

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: SampleKey) -> TwoViewBatch:
        return first_of(self.batch([place]).pairs)

    def batch(self, places: Sequence[SampleKey]) -> Made:
        """A whole batch at once: views are written where they will be read, without a copy."""
        count, (h, w), form = len(places), self.cutting.size, self.statistics
        kind = torch.uint8 if form.low is None else torch.float32
        views = torch.empty(2, count, h, w, form.channels, dtype=kind)
        if get_worker_info() is not None:
            views.share_memory_()  # type: ignore[no-untyped-call]  # what the main process sees
        room = Room(
            views.movedim(-1, 2),  # channels last in memory, as the crops are
            torch.empty(2, count, 2, 3),
            torch.stack([self.numbers(place) for place in places]),
            torch.empty(count, dtype=torch.int64),
            {},
        )
        held: list[Look] = []
        for slot, place in enumerate(places):
            held.append(self.look(slot, place, room))
            if slot == count - 1 or sum(look.opened.values for look in held) > MOST_HELD:
                self.cut(held, room)
                held = []
        drawn = rearrange(room.drawn[..., MAP_DICE:], "b view number -> view number b")
        one, two = (
            without_solarising(photometry.factors(numbers), form.channels)
            for photometry, numbers in zip(self.cutting.photometry, drawn, strict=True)
        )
        views, maps = room.views, room.maps
        pairs = TwoViewBatch(views[0], views[1], maps[0], maps[1], one, two, room.indices)
        return Made(pairs, list(room.broken.values()))

    def numbers(self, place: SampleKey) -> Tensor:
        """All that is random about a sample, ``(2, n)``: for each view its map, then its colour."""
        generator = dice(self.seed, place.epoch, place.index)
        return torch.rand(2, MAP_DICE + DICE, generator=generator)

    def look(self, slot: int, place: SampleKey, room: Room, ahead: int = 0) -> Look:
        """The first image that will do, from some places after this one on.

        Raises:
            TooManyBrokenError: More than the allowed share of images had to be passed over.
        """
        count = len(self.source)
        for further in range(ahead, count):
            index = place.index
            if further:
                position = (place.position + further) % count
                index = int(epoch_order(self.seed, place.epoch, count)[position].item())
            try:
                opened = self.source.open(index)
                self.statistics.accepts(opened)
            except ImageError as error:
                self.pass_over(index, error, room)
            else:
                return Look(slot, place, further, index, opened)
        raise TooManyBrokenError(
            "no image can be read any more; is the data still there?", room.broken.values()
        )

    def cut(self, looks: Sequence[Look], room: Room) -> None:
        """Lay the views of some images all at once, decode the images one by one, and cut."""
        drawn = torch.stack([room.drawn[look.slot, :, :MAP_DICE] for look in looks])
        sides = torch.tensor([look.opened.size[::-1] for look in looks], dtype=torch.float32)
        laid = lay_maps(
            rearrange(drawn, "b view number -> number (b view)"),
            repeat(sides, "b xy -> (b view) xy", view=2),
            self.cutting.placement,
        )
        by_image = rearrange(laid, "(b view) row column -> b view row column", view=2)
        size = self.cutting.size
        for look, asked in zip(looks, by_image, strict=True):
            try:
                raster = look.opened.raster(best_scale(asked, size))
            except ImageError as error:
                self.pass_over(look.index, error, room)
                self.cut([self.look(look.slot, look.place, room, look.ahead + 1)], room)
                continue
            room.indices[look.slot] = look.index
            for view in range(2):
                pixels, found = cut(raster, look.opened, asked[view], size)
                room.views[view, look.slot] = self.statistics.form(pixels)
                room.maps[view, look.slot] = found

    def pass_over(self, index: int, error: ImageError, room: Room) -> None:
        """Count a broken image.

        Raises:
            TooManyBrokenError: It was one too many.
        """
        name = self.source.name(index)
        room.broken[name] = Broken(name, str(error))
        refuse_too_many(room.broken, len(self.source), self.max_broken)


def without_solarising(factors: Factors, channels: int) -> Factors:
    """Factors for images of so many channels: inverting is for colour photographs."""
    if channels == 3:
        return factors
    return factors._replace(solarise=torch.zeros_like(factors.solarise))


def first_of(pairs: TwoViewBatch) -> TwoViewBatch:
    """The first sample of a batch, alone."""
    one, two = (
        Factors(*(factor[0] for factor in factors))
        for factors in (pairs.factors_one, pairs.factors_two)
    )
    views, maps = (pairs.one[0], pairs.two[0]), (pairs.map_one[0], pairs.map_two[0])
    return TwoViewBatch(*views, *maps, one, two, pairs.index[0])


def refuse_too_many(broken: dict[str, Broken], count: int, max_broken: float) -> None:
    """Stop where more images are broken than allowed: that share of them, or one of a few.

    Raises:
        TooManyBrokenError: With the first reasons and the ways out.
    """
    allowed = max(1, max_broken * count) if max_broken > 0 else 0
    if len(broken) <= allowed:
        return
    shown = "".join(f"\n  {name}: {reason}" for name, reason in list(broken.values())[:5])
    raise TooManyBrokenError(
        f"{len(broken)} of {count} images cannot be used, more than the {max_broken:.2%} that "
        "max_broken allows; mend or remove them, or go on with a larger max_broken. Among "
        f"them:{shown}",
        broken.values(),
    )
