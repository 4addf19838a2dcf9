"""Two views of each image: their pixels, where they lie, and how their colour will be changed.

Everything random about a sample is drawn from a generator that is a function of (seed, epoch,
index), on the CPU, by the worker that cuts it; colour itself is changed later, on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ..augment import DICE, VIEW_ONE, VIEW_TWO, Factors, Photometry
from ..views import Placement, lay_maps
from .crops import CroppedView, best_scale, cut_view
from .image import ImageError, LazyImage
from .sources import Source
from .statistics import Statistics

MAP_NUMBERS = 7
"""Numbers drawn for the map of one view."""
MAX_OPEN_VALUES = 2**25
"""Values of images whose files are held open at once, so that their maps are drawn together."""
ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


class SampleKey(NamedTuple):
    """One sample of a run.

    Attributes:
        epoch: How often all images have passed before it.
        position: Where it stands in its epoch.
        index: Which image of the source stands there.
    """

    epoch: int
    position: int
    index: int  # type: ignore[assignment]  # hides a method of tuples that nobody wants


class TwoViewBatch(NamedTuple):
    """A batch of samples.

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


class BrokenImage(NamedTuple):
    """An image that could not be used."""

    name: str
    reason: str

    @property
    def line(self) -> str:
        """Its line in a list of such images: a name and a reason, parted by a tab."""
        return "\t".join(part.translate(ESCAPES) for part in self) + "\n"


class TooManyBrokenError(RuntimeError):
    """More images are broken than a run allows.

    Args:
        message: The error message.
        broken: The broken images met so far.
    """

    def __init__(self, message: str, broken: Iterable[BrokenImage] = ()) -> None:
        super().__init__(message)
        self.broken = list(broken)


class LoadedBatch(NamedTuple):
    """What a worker sends: a batch, and the broken images it met on the way."""

    batch: TwoViewBatch
    broken: list[BrokenImage]


class TwoViewDataset(Dataset[LoadedBatch | TooManyBrokenError]):
    """Two views of each image, by whole batches: an item's index is a list of `SampleKey`.

    Where an image is broken, the next readable one of the epoch's order takes its place, with the
    random numbers of the broken one. `TooManyBrokenError` is returned, not raised, since torch puts
    a worker's traceback before what is raised there.

    Args:
        source: The images.
        statistics: What they are converted to.
        size: ``(height, width)`` of the views.
        placement: How views are laid over their images.
        photometry: How colour is changed, view one and view two.
        seed: Of the run.
        max_broken: Share of the images that may be broken.
    """

    def __init__(
        self,
        source: Source,
        statistics: Statistics,
        size: tuple[int, int],
        placement: Placement,
        photometry: tuple[Photometry, Photometry] = (VIEW_ONE, VIEW_TWO),
        *,
        seed: int,
        max_broken: float,
    ) -> None:
        self.source, self.statistics = source, statistics
        self.size, self.placement, self.photometry = size, placement, photometry
        self.seed, self.max_broken = seed, max_broken

    def __getitem__(self, keys: Sequence[SampleKey]) -> LoadedBatch | TooManyBrokenError:
        broken: dict[str, BrokenImage] = {}
        try:
            return LoadedBatch(self.load(keys, broken), list(broken.values()))
        except TooManyBrokenError as error:
            return error

    def load(self, keys: Sequence[SampleKey], broken: dict[str, BrokenImage]) -> TwoViewBatch:
        """A batch, its views written where they will be read, without a copy."""
        count, (h, w), channels = len(keys), self.size, self.statistics.channels
        dtype = torch.uint8 if self.statistics.low is None else torch.float32
        views = torch.empty(2, count, h, w, channels, dtype=dtype)
        if get_worker_info() is not None:
            views.share_memory_()  # type: ignore[no-untyped-call]  # the main process sees it
        views = views.movedim(-1, 2)  # channels last in memory, as the crops are
        maps, indices = torch.empty(2, count, 2, 3), torch.empty(count, dtype=torch.int64)
        drawn = torch.stack([self.draw(key) for key in keys])
        candidates = [self.usable_images(key, broken) for key in keys]
        opened: list[tuple[int, LazyImage]] = []
        for slot in range(count):
            opened.append(next(candidates[slot]))
            values = channels * sum(image.size[0] * image.size[1] for _, image in opened)
            if slot < count - 1 and values <= MAX_OPEN_VALUES:
                continue
            first = slot + 1 - len(opened)
            asked = self.lay_maps([image for _, image in opened], drawn[first : slot + 1])
            for i, (image, image_maps) in enumerate(zip(opened, asked, strict=True), first):
                index, cuts = self.cut(*image, image_maps, drawn[i], candidates[i], broken)
                indices[i] = index
                for view, cut in enumerate(cuts):
                    views[view, i] = self.statistics.convert(cut.pixels)
                    maps[view, i] = cut.to_image
            opened = []
        colour = rearrange(drawn[..., MAP_NUMBERS:], "b view number -> view number b")
        one, two = (
            photometry.factors(numbers, channels)
            for photometry, numbers in zip(self.photometry, colour, strict=True)
        )
        return TwoViewBatch(views[0], views[1], maps[0], maps[1], one, two, indices)

    def draw(self, key: SampleKey) -> Tensor:
        """All random numbers of a sample, ``(2, n)``: for each view its map, then its colour."""
        generator = seeded_generator(self.seed, key.epoch, key.index)
        return torch.rand(2, MAP_NUMBERS + DICE, generator=generator)

    def usable_images(
        self, key: SampleKey, broken: dict[str, BrokenImage]
    ) -> Iterator[tuple[int, LazyImage]]:
        """The usable images, with their indices, from a sample's on in the epoch's order."""
        count = len(self.source)
        for ahead in range(count):
            index = key.index
            if ahead:
                position = (key.position + ahead) % count
                index = int(epoch_order(self.seed, key.epoch, count)[position].item())
            try:
                image = self.source.open(index)
                self.statistics.check(image)
            except ImageError as error:
                self.note_broken(index, error, broken)
            else:
                yield index, image
        raise TooManyBrokenError(
            "no image can be read any more; check that the data is still there", broken.values()
        )

    def lay_maps(self, images: Sequence[LazyImage], drawn: Tensor) -> Tensor:
        """The maps ``(b, 2, 2, 3)`` of two views of each image, from numbers ``(b, 2, n)``."""
        sides = torch.tensor([image.size[::-1] for image in images], dtype=torch.float32)
        maps = lay_maps(
            rearrange(drawn[..., :MAP_NUMBERS], "b view number -> number (b view)"),
            repeat(sides, "b xy -> (b view) xy", view=2),
            self.placement,
        )
        return rearrange(maps, "(b view) row column -> b view row column", view=2)

    def cut(
        self,
        index: int,
        image: LazyImage,
        maps: Tensor,
        drawn: Tensor,
        candidates: Iterator[tuple[int, LazyImage]],
        broken: dict[str, BrokenImage],
    ) -> tuple[int, list[CroppedView]]:
        """Two views of an image, or of the next candidate that can be decoded, and its index."""
        while True:
            try:
                decoded = image.decode(best_scale(maps, self.size))
            except ImageError as error:
                self.note_broken(index, error, broken)
                index, image = next(candidates)
                [maps] = self.lay_maps([image], drawn[None])
            else:
                return index, [cut_view(decoded, image.size, view, self.size) for view in maps]

    def note_broken(self, index: int, error: ImageError, broken: dict[str, BrokenImage]) -> None:
        """Note a broken image, and raise `TooManyBrokenError` if it was one too many."""
        name = self.source.name(index)
        broken[name] = BrokenImage(name, str(error))
        check_broken(broken, len(self.source), self.max_broken)


def seeded_generator(*numbers: int) -> torch.Generator:
    """A generator that is a function of these numbers, such as seed, epoch and index.

    Torch's CPU generator reads 32 bits of its seed, so of 100 000 samples about one draws the
    numbers of another.
    """
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The images ``(count,)`` int64 in the order of an epoch."""
    return torch.randperm(count, generator=seeded_generator(seed, epoch))


def check_broken(broken: dict[str, BrokenImage], count: int, max_broken: float) -> None:
    """Refuse more broken images than allowed: that share of them, or one of a few.

    Raises:
        TooManyBrokenError: With the first reasons and what to do.
    """
    allowed = max(1, max_broken * count) if max_broken > 0 else 0
    if len(broken) <= allowed:
        return
    shown = "".join(f"\n  {name}: {reason}" for name, reason in list(broken.values())[:5])
    raise TooManyBrokenError(
        f"{len(broken)} of {count} images cannot be used, more than the {max_broken:.2%} that "
        "max_broken allows; fix or remove them, or continue with a larger max_broken. Among "
        f"them:{shown}",
        broken.values(),
    )
