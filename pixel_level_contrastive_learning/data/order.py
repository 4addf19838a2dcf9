"""Which image stands where: the batch sampler, and the clock of a run, counted in samples.

All epochs, one after the other, are one stream of samples; a batch is the next piece of it. So no
image is left over at an epoch's end, fewer images than a batch wrap round by themselves, and where
a run stands is one number, whatever the batch size or the number of processes were before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..checks import raise_together, whole


class Place(NamedTuple):
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


class Order(Sampler[list[Place]]):
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

    def place(self, sample: int) -> Place:
        """The stream's sample of this number."""
        epoch, position = divmod(sample, self.count)
        return Place(
            epoch, position, int(epoch_order(self.seed, epoch, self.count)[position].item())
        )

    def batch(self, start: int) -> list[Place]:
        """This process's part of the batch that begins at a sample of the stream."""
        first = start + self.rank * self.batch_size
        return [self.place(sample) for sample in range(first, first + self.batch_size)]

    @property
    def left(self) -> int:
        """Batches from where the clock stands to the end of the loader's epoch."""
        return len(self) - self.samples // self.step % len(self)

    def __iter__(self) -> Iterator[list[Place]]:
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
