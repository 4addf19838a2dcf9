"""Tables of every cell against every cell, walked in blocks and never held whole.

A map of ``n`` cells has ``n * n`` pairs an image: 16 million at 64 x 64. Whatever is summed over
pairs is therefore made block by block, and a block that a gradient needs is made again in the
backward pass instead of being kept, so that memory grows with ``n`` alone.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ENTRIES = 2**21
"""Entries of a table that are held at a time: 8 MiB in float32, which stays in a CPU's cache."""


class Block(NamedTuple):
    """A part of a ``(b, n1, n2)`` table: some images, and some of their rows."""

    images: slice
    rows: slice


def blocks(shape: tuple[int, ...]) -> Iterator[Block]:
    """The blocks that cover a ``(b, n1, n2)`` table, image by image, row by row.

    Small tables go several images at a time and large ones a few rows at a time, so that a block
    has at most `ENTRIES` entries (and at least one row).
    """
    images, rows, columns = shape
    images_a_time = max(1, ENTRIES // max(1, rows * columns))
    rows_a_time = max(1, min(rows, ENTRIES // max(1, columns)))
    for image in range(0, images, images_a_time):
        for row in range(0, rows, rows_a_time):
            yield Block(
                slice(image, min(image + images_a_time, images)),
                slice(row, min(row + rows_a_time, rows)),
            )


def by_blocks(table: Callable[[Block], Tensor], shape: tuple[int, ...]) -> Tensor:
    """What ``table`` gives for each block, put together and recomputed in backward.

    Args:
        table: Maps a block to a tensor ``(images of the block, rows of the block, ...)``. It is
            called again in the backward pass and must be a function of its block alone.
        shape: ``(b, n1, n2)`` of the table, of which no result keeps the columns.

    Returns:
        ``(b, n1, ...)``, differentiable in whatever ``table`` reads.
    """
    images_done: list[list[Tensor]] = []
    for block in blocks(shape):
        if block.rows.start == 0:
            images_done.append([])
        part: Tensor = checkpoint(table, block, use_reentrant=False, preserve_rng_state=False)
        images_done[-1].append(part)
    return torch.cat([torch.cat(rows_done, dim=1) for rows_done in images_done])


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves matrix products in the precision of their operands."""
    if not torch.amp.is_autocast_available(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
