"""The data loader: batches of two views by any number of workers, resumable at any batch."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import count
from math import ceil
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Sampler

from ..augment import VIEW_ONE, VIEW_TWO, Photometry
from ..checks import check_limits, raise_together, whole
from ..views import Placement
from .dataset import (
    BrokenImage,
    LoadedBatch,
    SampleKey,
    TooManyBrokenError,
    TwoViewBatch,
    TwoViewDataset,
    check_broken,
    epoch_order,
)
from .sources import Source
from .statistics import Statistics

T = TypeVar("T")

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux states the limits of a container."""
log = logging.getLogger(__name__)


class StreamSampler(Sampler[list[SampleKey]]):
    """The batches of one process, in the order of the run.

    The epochs' samples follow each other as one stream. Batch ``k`` of all processes together is
    the stream's samples from ``k * batch_size * world`` on, and each process takes its part of them
    in turn. An epoch of the loader is as many batches as fit into the images, at least one.

    Args:
        images: How many there are.
        batch_size: Samples a batch of one process.
        seed: Of the run.
        rank: Which process this is.
        world: How many there are.

    Attributes:
        samples: How many samples of the stream have been used, by all processes together.

    Raises:
        ValueError: There is no image, or no such process.
    """

    def __init__(
        self, images: int, batch_size: int, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        raise_together(
            whole("images", images, 1),
            whole("batch_size", batch_size, 1),
            whole("seed", seed, 0),
            whole("world", world, 1),
            whole("rank", rank, 0),
            None if rank < world else f"rank is {rank}; it must be below world ({world})",
        )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world = rank, world
        self.samples = 0

    @property
    def samples_per_step(self) -> int:
        """Samples a batch of all processes together."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        return max(self.images // self.samples_per_step, 1)

    @property
    def batches_left(self) -> int:
        """Batches to the end of the loader's epoch."""
        return len(self) - self.samples // self.samples_per_step % len(self)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """The batches after the samples used so far, without end.

        Batches that are loaded ahead then reach over the ends of epochs, which may be one batch.
        """
        for start in count(self.samples, self.samples_per_step):
            first = start + self.rank * self.batch_size
            yield [self.key(sample) for sample in range(first, first + self.batch_size)]

    def key(self, sample: int) -> SampleKey:
        """The stream's sample of this number."""
        epoch, position = divmod(sample, self.images)
        index = int(epoch_order(self.seed, epoch, self.images)[position].item())
        return SampleKey(epoch, position, index)

    def start_at(self, samples: int) -> None:
        """Go on after so many samples of the stream, used by all processes together."""
        raise_together(whole("samples", samples, 0))
        self.samples = samples


class TwoViewLoader:
    """Batches of two views, which can start at any sample of the run.

    One pass gives the batches to the end of the epoch. `StreamSampler.samples` counts what was
    handed out, not what workers have loaded ahead.

    Args:
        loader: Loads batches in the order of the sampler.
        sampler: Counts the samples.
        max_broken: Share of the images that may be broken.
        skipped_file: Where broken images are listed, a name and a reason a line; None for nowhere.

    Attributes:
        waited: Seconds spent waiting for batches so far.
        broken: The broken images met so far, by name.
    """

    def __init__(
        self,
        loader: DataLoader[LoadedBatch | TooManyBrokenError],
        sampler: StreamSampler,
        *,
        max_broken: float,
        skipped_file: Path | None,
    ) -> None:
        self.loader, self.sampler = loader, sampler
        self.max_broken, self.skipped_file = max_broken, skipped_file
        self.waited = 0.0
        self.broken: dict[str, BrokenImage] = {}
        self.ahead: Iterator[LoadedBatch | TooManyBrokenError] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[TwoViewBatch]:
        for _ in range(self.sampler.batches_left):
            started = perf_counter()  # starting the workers is waiting too
            try:
                batches, self.ahead = self.ahead or iter(self.loader), None
                loaded = next(batches)
            finally:
                self.waited += perf_counter() - started
            self.note_broken(loaded.broken)
            if isinstance(loaded, TooManyBrokenError):
                raise loaded
            self.sampler.start_at(self.sampler.samples + self.sampler.samples_per_step)
            self.ahead = batches  # in step with the sampler again
            yield loaded.batch

    def note_broken(self, broken: list[BrokenImage]) -> None:
        """Log and list broken images that were not met before.

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
            # A file's name may not be valid text: its bytes are kept as they are.
            with self.skipped_file.open("a+", encoding="utf-8", errors="surrogateescape") as file:
                file.seek(0)
                listed = set(file)  # listed by the run that is resumed
                file.writelines(image.line for image in new.values() if image.line not in listed)
        check_broken(self.broken, self.sampler.images, self.max_broken)

    def start_at(self, samples: int) -> None:
        """Go on after so many samples, used by all processes together."""
        self.ahead = None
        self.sampler.start_at(samples)


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
    """A loader of two views: the same samples and changes with any workers and processes.

    Args:
        source: The images.
        statistics: What they are converted to.
        image_size: ``(height, width)`` of the views.
        batch_size: Samples a batch of this process.
        crop_area: Smallest and largest share of the image's area.
        aspect_ratio: Smallest and largest width over height of a crop.
        prob_hflip: Share of views flipped left to right.
        prob_vflip: Share of views flipped upside down.
        max_rotation: Largest turn in degrees, either way.
        photometry: How colour is changed, view one and view two.
        seed: Of the run.
        workers: Processes that load batches; 0 for this one.
        rank: Which process of the run this is.
        world: How many there are.
        max_broken: Share of the images that may be broken, 0 to 1.
        skipped_file: Where broken images are listed; None for nowhere, as in all ranks but 0.
        prefetch: Batches that each worker loads ahead.
        pin_memory: Whether batches are put into pinned memory, for a GPU.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> from pixel_level_contrastive_learning.data.sources import open_source
        >>> from pixel_level_contrastive_learning.data.statistics import measure
        >>> source = open_source([torch.rand(3, 40, 60) for _ in range(8)])
        >>> loader = build_loader(source, measure(source), image_size=(24, 32), batch_size=4)
        >>> len(loader), [batch.one.shape for batch in loader][0]
        (2, torch.Size([4, 3, 24, 32]))
    """
    own_checks = whole("workers", workers, 0), whole("prefetch", prefetch, 1)
    raise_together(*check_limits(locals()), *own_checks)
    sampler = StreamSampler(len(source), batch_size, seed=seed, rank=rank, world=world)
    placement = Placement(
        prob_hflip=prob_hflip,
        prob_vflip=prob_vflip,
        max_rotation=max_rotation,
        area_range=crop_area,
        aspect_range=aspect_ratio,
    )
    dataset = TwoViewDataset(
        source, statistics, image_size, placement, photometry, seed=seed, max_broken=max_broken
    )
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # the dataset loads whole batches
        num_workers=workers,
        worker_init_fn=follow_the_run if workers else None,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each pass would draw from the run's generator
    )
    return TwoViewLoader(loader, sampler, max_broken=max_broken, skipped_file=skipped_file)


def follow_the_run(_: int) -> None:
    """Let a worker live through Ctrl-C, and end without a word when its run has left.

    Ctrl-C reaches the whole group of processes, but the run ends its step first and needs its
    workers to do so. SIGTERM stays: it is how a process that leaves in a hurry ends its workers. A
    run that leaves while it takes a batch hangs up on the thread that sends the batch's memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = report_unless_hung_up


def report_unless_hung_up(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an exception as Python does, unless it says that the other end has left."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


def cores() -> int:
    """Cores that this process may use, within the limits of a container."""
    affine = hasattr(os, "sched_getaffinity")
    available = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    limit = CGROUP / "cpu.max"
    quota, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
    return available if quota == "max" else min(available, max(1, ceil(int(quota) / int(period))))


def in_order(
    make: Callable[[int], T], indices: Iterable[int], workers: int, threads: Executor
) -> Iterator[tuple[int, T]]:
    """What is made of each index, by threads that are never far ahead: memory is bounded."""
    waiting: deque[tuple[int, Future[T]]] = deque()
    for index in indices:
        waiting.append((index, threads.submit(make, index)))
        if len(waiting) > 2 * workers:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()
