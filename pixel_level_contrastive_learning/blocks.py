"""Tables of every cell against every cell, computed in blocks and never held whole.

A map of ``n`` cells has ``n * n`` pairs an image: 16 million at 64 x 64. Sums over pairs are
computed block by block, and again in the backward pass, so that memory grows with ``n`` alone. A
table no larger than a block is computed and kept as any other tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ENTRIES = 2**21
"""Entries of a table that are held at a time: 8 MiB in float32, which stays in a CPU's cache."""


class Block(NamedTuple):
    """A part of a ``(b, n1, n2)`` table: some images, and some of their rows."""

    images: slice
    rows: slice


def blocks(shape: tuple[int, ...]) -> Iterator[Block]:
    """The blocks of at most `ENTRIES` entries (or one row) that cover a ``(b, n1, n2)`` table."""
    images, rows, columns = shape
    images_a_time = max(1, ENTRIES // max(1, rows * columns))
    rows_a_time = max(1, ENTRIES // max(1, columns))
    for image in range(0, images, images_a_time):
        for row in range(0, rows, rows_a_time):
            yield Block(
                slice(image, min(image + images_a_time, images)),
                slice(row, min(row + rows_a_time, rows)),
            )


def by_blocks(table: Callable[..., Tensor], shape: tuple[int, ...], *given: Tensor) -> Tensor:
    """Reduce each row of a ``(b, n1, n2)`` table to ``(b, n1, ...)``, differentiable once in given.

    ``table`` maps a block and its images of the given ``(b, ...)`` to ``(images, rows, ...)``. It
    is called again in the backward pass, without autocast, and depends on its arguments alone.
    """
    walked = list(blocks(shape))
    if len(walked) > 1:
        found: Tensor = block_after_block(table, walked, *given)
        return found
    images, rows, _ = shape
    with full_precision(given[0]):
        return table(Block(slice(0, images), slice(0, rows)), *given)


# A gradient taken within a backward pass cannot be traced.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
def block_after_block(table: Callable[..., Tensor], walked: list[Block], *given: Tensor) -> Tensor:
    """`by_blocks` for more than one block."""
    whole: Tensor = _ByBlocks.apply(table, walked, *given)
    return whole


class _ByBlocks(torch.autograd.Function):
    """Keeps only its inputs and its result, which is one tensor from the first block on.

    Small results between large blocks would keep the C library from using freed blocks again.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Callable[..., Tensor], walked: list[Block], *given: Tensor
    ) -> Tensor:
        ctx.table, ctx.walked = table, walked
        ctx.save_for_backward(*given)
        last = walked[-1]
        with full_precision(given[0]):
            for block in walked:
                found = table(block, *(tensor[block.images] for tensor in given))
                if block is walked[0]:
                    whole = found.new_empty(last.images.stop, last.rows.stop, *found.shape[2:])
                whole[block.images, block.rows] = found
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        given: tuple[Tensor, ...] = ctx.saved_tensors
        learning = [i for i, learns in enumerate(ctx.needs_input_grad[2:]) if learns]
        gradients = {i: torch.zeros_like(given[i]) for i in learning}
        with full_precision(gradient):
            for block in ctx.walked:
                leaves = [tensor[block.images].detach() for tensor in given]
                wanted = [leaves[i].requires_grad_() for i in learning]
                with torch.enable_grad():
                    result = ctx.table(block, *leaves)
                found = torch.autograd.grad(result, wanted, gradient[block.images, block.rows])
                for i, share in zip(learning, found, strict=True):
                    gradients[i][block.images] += share
        return None, None, *(gradients.get(i) for i in range(len(given)))


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves matrix products in the precision of their operands."""
    if not torch.amp.is_autocast_available(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
