"""The data loader: batches of pairs by any number of workers, resumable at any batch."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..augment import VIEW_ONE, VIEW_TWO, Photometry
from ..checks import raise_together, ratio_range, whole, within
from ..views import Placement
from .dataset import (
    Broken,
    Cutting,
    Made,
    SampleKey,
    TooManyBrokenError,
    TwoViewBatch,
    TwoViewDataset,
    epoch_order,
    refuse_too_many,
)
from .sources import Source
from .statistics import Statistics


class StreamSampler(Sampler[list[SampleKey]]):
    """The batches of one process, in the order of the run.

    Batch ``k`` of all processes together is the stream's samples from ``k * batch_size * world``
    on, and each process takes its part of them in turn. An epoch of the loader is as many batches
    as fit into the images, at least one.

    Args:
        count: Images of the source.
        batch_size: Samples a batch of one process.
        seed: Of the run.
        rank: Which process this is.
        world: How many there are.

    Raises:
        ValueError: There is no image, or no such process.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        raise_together(
            whole("count", count, 1),
            whole("batch_size", batch_size, 1),
            whole("seed", seed, 0),
            whole("world", world, 1),
            whole("rank", rank, 0),
            None if rank < world else f"rank is {rank}; it must be below world ({world})",
        )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world = rank, world
        self.samples = 0

    @property
    def step(self) -> int:
        """Samples a batch of all processes together."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        return max(self.count // self.step, 1)

    def place(self, sample: int) -> SampleKey:
        """The stream's sample of this number."""
        epoch, position = divmod(sample, self.count)
        return SampleKey(
            epoch, position, int(epoch_order(self.seed, epoch, self.count)[position].item())
        )

    def batch(self, start: int) -> list[SampleKey]:
        """This process's part of the batch that begins at a sample of the stream."""
        first = start + self.rank * self.batch_size
        return [self.place(sample) for sample in range(first, first + self.batch_size)]

    @property
    def left(self) -> int:
        """Batches from where the clock stands to the end of the loader's epoch."""
        return len(self) - self.samples // self.step % len(self)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """The batches from where the clock stands on, without end.

        What is made ahead then reaches over the ends of epochs, which may be a single batch.
        """
        # The clock goes on while batches are made ahead.
        for start in count(self.samples, self.step):
            yield self.batch(start)

    def start_at(self, samples: int) -> None:
        """Set the clock: this many samples of the stream have been used, by all processes."""
        raise_together(whole("samples", samples, 0))
        self.samples = samples

    def state_dict(self) -> dict[str, int]:
        """Where the clock stands."""
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the clock to where it stood."""
        self.start_at(state["samples"])


log = logging.getLogger(__name__)

FEWEST_TO_HOLD_OUT = 200
LARGEST_HELD_OUT = 0.02
MOST_HELD_OUT = 256


class TwoViewLoader:
    """Batches of `TwoViewBatch` that know how far the run has come.

    One pass gives the batches from where the clock stands to the end of the epoch. The clock counts
    what was handed out, not what workers have made ahead.

    Args:
        loader: Makes batches in the order of ``order``.
        order: The clock.
        max_broken: Share of the images that may be broken.
        skipped_file: Where broken images are listed, a name and a reason a line; None for nowhere.

    Attributes:
        waited: Seconds spent waiting for batches so far.
        broken: The broken images met so far, by name.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        order: StreamSampler,
        *,
        max_broken: float,
        skipped_file: Path | None,
    ) -> None:
        self.loader, self.order = loader, order
        self.max_broken, self.skipped_file = max_broken, skipped_file
        self.waited = 0.0
        self.broken: dict[str, Broken] = {}
        self.under_way: Iterator[Made | TooManyBrokenError] | None = None

    def __len__(self) -> int:
        return len(self.order)

    @property
    def batch_size(self) -> int:
        """Samples a batch of this process."""
        return self.order.batch_size

    @property
    def samples(self) -> int:
        """Samples handed out so far, by all processes together."""
        return self.order.samples

    def __iter__(self) -> Iterator[TwoViewBatch]:
        for _ in range(self.order.left):
            begun = perf_counter()  # starting the workers is waiting too
            try:
                batches, self.under_way = self.under_way or iter(self.loader), None
                made = next(batches)
            finally:
                self.waited += perf_counter() - begun
            self.note(made.broken)
            if isinstance(made, TooManyBrokenError):
                raise made
            self.order.start_at(self.order.samples + self.order.step)
            self.under_way = batches  # in step with the clock again
            yield made.pairs

    def note(self, broken: list[Broken]) -> None:
        """Count and list broken images that were not met before.

        Raises:
            TooManyBrokenError: More than the allowed share of the images are.
        """
        new = {image.name: image for image in broken if image.name not in self.broken}
        if not new:
            return
        self.broken |= new
        for image in new.values():
            log.warning("skipped %s: %s", *image)
        if self.skipped_file is not None:
            self.list_skipped(list(new.values()))
        refuse_too_many(self.broken, self.order.count, self.max_broken)

    def list_skipped(self, new: list[Broken]) -> None:
        """Add images to the file, unless a run that was resumed has listed them already."""
        assert self.skipped_file is not None
        # A file's name may be no text: its bytes are kept as they are.
        with self.skipped_file.open("a+", encoding="utf-8", errors="surrogateescape") as file:
            file.seek(0)
            known = set(file)
            file.writelines(image.line for image in new if image.line not in known)

    def start_at(self, samples: int) -> None:
        """Set the clock: this many samples have been used, by all processes together."""
        self.under_way = None
        self.order.start_at(samples)

    def state_dict(self) -> dict[str, Any]:
        """Where the clock stands."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the clock to where it stood."""
        self.under_way = None
        self.order.load_state_dict(state)


def build_loader(
    source: Source,
    statistics: Statistics,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    crop_area: tuple[float, float] = (0.08, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    prob_hflip: float = 0.5,
    prob_vflip: float = 0.0,
    max_rotation: float = 0.0,
    photometry: tuple[Photometry, Photometry] = (VIEW_ONE, VIEW_TWO),
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    max_broken: float = 0.01,
    skipped_file: Path | None = None,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> TwoViewLoader:
    """A loader of pairs: the same samples with the same changes on any workers and processes.

    Args:
        source: The images.
        statistics: The form they are brought to.
        image_size: ``(height, width)`` of the views.
        batch_size: Samples a batch of this process.
        crop_area: Smallest and largest share of the image's area.
        aspect_ratio: Smallest and largest width over height of a crop.
        prob_hflip: Share of views flipped left to right.
        prob_vflip: Share of views flipped upside down.
        max_rotation: Largest turn in degrees, either way.
        photometry: How colour is changed, view one and view two.
        seed: Of the run.
        workers: Processes that make batches; 0 for this one.
        rank: Which process of the run this is.
        world: How many there are.
        max_broken: Share of the images that may be broken, 0 to 1.
        skipped_file: Where broken images are listed; None for nowhere, as in all ranks but 0.
        prefetch: Batches that each worker makes ahead.
        pin_memory: Whether batches are made ready for a GPU.

    Raises:
        ValueError: A value is out of range.
    """
    raise_together(
        ratio_range("crop_area", crop_area),
        whole("workers", workers, 0),
        whole("prefetch", prefetch, 1),
        *(whole("image_size", side, 1) for side in image_size),
        within("prob_hflip", prob_hflip, 0, 1),
        within("prob_vflip", prob_vflip, 0, 1),
        within("max_rotation", max_rotation, 0, 180),
        within("max_broken", max_broken, 0, 1),
    )
    order = StreamSampler(len(source), batch_size, seed=seed, rank=rank, world=world)
    placement = Placement(
        prob_hflip=prob_hflip,
        prob_vflip=prob_vflip,
        max_rotation=max_rotation,
        area_range=crop_area,
        aspect_range=aspect_ratio,
    )
    dataset = TwoViewDataset(
        source,
        statistics,
        Cutting(image_size, placement, photometry),
        seed=seed,
        max_broken=max_broken,
    )
    loader: DataLoader[Any] = DataLoader(
        Batches(dataset),
        sampler=order,
        batch_size=None,  # the data set makes whole batches
        num_workers=workers,
        collate_fn=as_made,
        worker_init_fn=leave_ctrl_c_to_the_run if workers else None,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each pass would draw from the run's generator
    )
    return TwoViewLoader(loader, order, max_broken=max_broken, skipped_file=skipped_file)


class Batches(Dataset[Made | TooManyBrokenError]):
    """The data set by whole batches, asked for by a list of places.

    That too many images are broken is handed on, not raised: what a worker raises, torch tells with
    the worker's traceback before it.
    """

    def __init__(self, pairs: TwoViewDataset) -> None:
        self.pairs = pairs

    def __getitem__(self, places: list[SampleKey]) -> Made | TooManyBrokenError:
        try:
            return self.pairs.batch(places)
        except TooManyBrokenError as error:
            return error


def as_made(made: Any) -> Any:
    """A batch as the data set made it."""
    return made


def leave_ctrl_c_to_the_run(_: int) -> None:
    """Let a worker live through Ctrl-C, which reaches the whole group of processes.

    The run ends its step first, and needs its workers to do so. SIGTERM stays: it is how a process
    that leaves in a hurry ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def split_held_out(source: Source, seed: int) -> tuple[Tensor, Tensor]:
    """Images to train on, and a few to look at that are never trained on.

    Args:
        source: All images.
        seed: Which are held out.

    Returns:
        Two int64 tensors of indices, sorted, which share nothing. The second is empty below 200
        images; else it has 2 % of them, 256 at most.
    """
    count = len(source)
    few = 0 if count < FEWEST_TO_HOLD_OUT else min(int(LARGEST_HELD_OUT * count), MOST_HELD_OUT)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return drawn[few:].sort().values, drawn[:few].sort().values
