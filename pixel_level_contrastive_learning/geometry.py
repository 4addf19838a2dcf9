"""Where cells lie in the source image, and which cells of two views show the same spot.

A view is an affine map ``(2, 3)`` from its unit square (``u`` to the right, ``v`` down, 0 and 1 at
the edges) to source-image pixels ``(x, y)``, edges at 0 and at width and height. Crops, flips,
rotations and shears are all such maps, and nothing here knows which it was.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .blocks import Block, blocks
from .checks import LIMITS, raise_together


def box_to_map(boxes: Tensor, mirrored: Tensor) -> Tensor:
    """The view maps of upright crops.

    Args:
        boxes: ``(b, 4)`` crops ``(x0, y0, x1, y1)``, edges in source pixels.
        mirrored: ``(b,)`` bool, whether the crop was flipped left to right.

    Returns:
        ``(b, 2, 3)`` float maps from the view's unit square to source pixels.

    >>> box_to_map(torch.tensor([[10.0, 20, 110, 60]]), torch.tensor([True]))[0].tolist()
    [[-100.0, 0.0, 110.0], [0.0, 40.0, 20.0]]
    """
    floats = boxes if boxes.is_floating_point() else boxes.float()
    x0, y0, x1, y1 = floats.unbind(dim=-1)
    left, right = torch.where(mirrored, x1, x0), torch.where(mirrored, x0, x1)
    zero = torch.zeros_like(x0)
    across = torch.stack((right - left, zero, left), dim=-1)
    down = torch.stack((zero, y1 - y0, y0), dim=-1)
    return torch.stack((across, down), dim=-2)


def unit_centres(cells: int, like: Tensor) -> Tensor:
    """The centres ``(cells,)`` of equal cells along the unit interval."""
    return (torch.arange(cells, dtype=like.dtype, device=like.device) + 0.5) / cells


def cell_centres(to_image: Tensor, grid: tuple[int, int]) -> Tensor:
    """The centre of each cell of a feature map, in the source image.

    Args:
        to_image: ``(b, 2, 3)`` float maps from the view's unit square to source pixels.
        grid: Cells per view, ``(h, w)``.

    Returns:
        ``(b, h * w, 2)`` float centres ``(x, y)``, in source pixels, row by row.

    >>> to_image = box_to_map(torch.tensor([[10.0, 20, 110, 60]]), torch.tensor([False]))
    >>> cell_centres(to_image, (2, 1))[0].tolist()
    [[60.0, 30.0], [60.0, 50.0]]
    """
    h, w = grid
    v, u = torch.meshgrid(unit_centres(h, to_image), unit_centres(w, to_image), indexing="ij")
    points = rearrange(torch.stack((u, v)), "uv h w -> uv (h w) 1")
    # Sums, not a matrix product: autocast would round coordinates to eight bits.
    across, down, origin = rearrange(to_image, "b xy part -> part b 1 xy")
    centres: Tensor = origin + points[0] * across + points[1] * down
    return centres


def cell_diagonals(to_image: Tensor, grid: tuple[int, int]) -> Tensor:
    """The length of a cell's diagonal in the source image: the unit of every distance.

    Args:
        to_image: ``(b, 2, 3)`` float maps from the view's unit square to source pixels.
        grid: Cells per view, ``(h, w)``.

    Returns:
        ``(b,)`` float lengths in source pixels; for a sheared cell, whose two diagonals differ,
        their root mean square.

    >>> to_image = box_to_map(torch.tensor([[0.0, 0, 60, 80]]), torch.tensor([False]))
    >>> cell_diagonals(to_image, (2, 2)).tolist()
    [50.0]
    """
    h, w = grid
    width, height = to_image[..., 0] / w, to_image[..., 1] / h
    return (width.square() + height.square()).sum(dim=-1).sqrt()


class Positives:
    """Which cells of two views show the same spot, computed block by block.

    Cell ``i`` of view one and cell ``j`` of view two match if the distance between their centres,
    divided by the larger of the two views' cell diagonals, is below the threshold
    (arXiv:2011.10043, sec. 3.1, Eq. 1). The whole ``(b, n1, n2)`` table is never in memory.

    Args:
        one: ``(b, 2, 3)`` float view maps of view one.
        two: ``(b, 2, 3)`` float view maps of view two.
        grid_one: Cells ``(h, w)`` of view one, ``n1 = h * w``.
        grid_two: Cells ``(h, w)`` of view two, ``n2 = h * w``.
        threshold: Largest distance in cell diagonals, above 0; 0.7 in the paper.

    Raises:
        ValueError: The threshold is not above 0.

    >>> to_image = box_to_map(torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([False]))
    >>> Positives(to_image, to_image, (2, 2), (2, 2), threshold=0.7).count().tolist()
    [4]
    """

    def __init__(
        self,
        one: Tensor,
        two: Tensor,
        grid_one: tuple[int, int],
        grid_two: tuple[int, int],
        threshold: float,
    ) -> None:
        raise_together(LIMITS["distance_thres"]("threshold", threshold))
        diagonals = cell_diagonals(one, grid_one), cell_diagonals(two, grid_two)
        self.one = cell_centres(one, grid_one)
        self.two = cell_centres(two, grid_two)
        self.reach = threshold * torch.maximum(*diagonals)
        self._counted: list[Tensor] = []  # shared with the other direction, which counts the same

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(b, n1, n2)``, the shape of the whole table."""
        return self.one.shape[0], self.one.shape[1], self.two.shape[1]

    @property
    def mT(self) -> Positives:  # noqa: N802  # named as the tensor attribute it stands for
        """The other direction: view two's cells as rows."""
        other = Positives.__new__(Positives)
        other.one, other.two, other.reach = self.two, self.one, self.reach
        other._counted = self._counted
        return other

    def rows(self, start: int, stop: int) -> Tensor:
        """The matches ``(b, stop - start, n2)``, bool, of a range of cells of view one."""
        return self.block(Block(slice(None), slice(start, stop)))

    def block(self, block: Block) -> Tensor:
        """The matches ``(images, rows, n2)``, bool, of some cells of view one in some images."""
        one = rearrange(self.one[block.images, block.rows], "b i xy -> xy b i 1")
        two = rearrange(self.two[block.images], "b j xy -> xy b 1 j").contiguous()
        x_squared, y_squared = ((o - t).square_() for o, t in zip(one, two, strict=True))
        reach_squared = rearrange(self.reach[block.images], "b -> b 1 1").square()
        matches: Tensor = x_squared.add_(y_squared) < reach_squared
        return matches

    def count(self) -> Tensor:
        """Matches per image, ``(b,)`` int64. Costs ``n1 * n2`` comparisons once."""
        if not self._counted:
            counts = torch.zeros(self.shape[0], dtype=torch.int64, device=self.one.device)
            for block in blocks(self.shape):
                counts[block.images] += self.block(block).sum(dim=(1, 2))
            self._counted.append(counts)
        return self._counted[0]


def positive_mask(
    one: Tensor,
    two: Tensor,
    grid_one: tuple[int, int],
    grid_two: tuple[int, int],
    threshold: float,
) -> Tensor:
    """The whole table ``(b, n1, n2)``, bool, of `Positives`, for small maps."""
    positives = Positives(one, two, grid_one, grid_two, threshold)
    return positives.rows(0, positives.shape[1])


class PositiveTable(Positives):
    """`Positives` from an existing table ``(b, n1, n2)``, bool."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    @property
    def shape(self) -> tuple[int, int, int]:
        b, n1, n2 = self.table.shape
        return b, n1, n2

    @property
    def mT(self) -> Positives:  # noqa: N802
        return PositiveTable(self.table.mT)

    def block(self, block: Block) -> Tensor:
        return self.table[block.images, block.rows]

    def count(self) -> Tensor:
        return self.table.sum(dim=(1, 2))
