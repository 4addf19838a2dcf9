"""Where cells look, how far apart they are, and which of them match."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixel_level_contrastive_learning.geometry import (
    Positives,
    PositiveTable,
    box_to_map,
    cell_centres,
    cell_diagonals,
    positive_mask,
)

CELLS_3_BY_4 = torch.tensor([[0.0, 0, 12, 8]])
"""A box whose cells are 3 wide and 4 high in a grid of (2, 4): their diagonal is 5."""

grids = st.tuples(st.integers(1, 7), st.integers(1, 7))
dtypes = pytest.mark.parametrize("dtype", reference.TOLERANCE, ids=str)


@st.composite
def view_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """Two views ``(b, 2, 3)`` of each image, float64, and the longest side of the images."""
    size = draw(st.tuples(st.integers(16, 2048), st.integers(16, 2048)))

    def view() -> Tensor:
        return reference.view_map(
            size,
            ratio=draw(st.floats(0.1, 1)),
            x=draw(st.floats(0, 1)),
            y=draw(st.floats(0, 1)),
            mirrored=draw(st.booleans()),
            flipped=draw(st.booleans()),
            degrees=draw(st.sampled_from([0.0, 90.0]) | st.floats(-180, 180)),
            shear=draw(st.just(0.0) | st.floats(-1, 1)),
        )

    images = range(draw(st.integers(1, 3)))
    one, two = (torch.stack([view() for _ in images]) for _ in range(2))
    return one, two, float(max(size))


def straight(boxes: Tensor) -> Tensor:
    """The maps of boxes that are not mirrored."""
    return box_to_map(boxes, torch.zeros(len(boxes), dtype=torch.bool))


# Conventions, by hand.


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64])
def test_boxes_of_whole_numbers_have_maps_of_floats(dtype) -> None:
    boxes = torch.tensor([[10, 20, 110, 60]], dtype=dtype)
    found = box_to_map(boxes, torch.tensor([True]))
    assert found.tolist() == [[[-100.0, 0, 110], [0, 40, 20]]]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("mirrored", "expected"),
    [(False, [[100.0, 0, 10], [0, 40, 20]]), (True, [[-100.0, 0, 110], [0, 40, 20]])],
)
def test_convention_a_map_leads_from_the_unit_square_to_pixel_edges(mirrored, expected) -> None:
    to_image = box_to_map(torch.tensor([[10.0, 20, 110, 60]]), torch.tensor([mirrored]))
    assert to_image.tolist() == [expected]


@pytest.mark.parametrize(("mirrored", "xs"), [(False, (22.5, 97.5)), (True, (97.5, 22.5))])
def test_convention_centres_lie_half_a_cell_inside_the_box(mirrored, xs) -> None:
    to_image = box_to_map(torch.tensor([[10.0, 20, 110, 60]]), torch.tensor([mirrored]))
    centres = cell_centres(to_image, (2, 4))
    assert centres[0, 0].tolist() == [xs[0], 30.0]
    assert centres[0, -1].tolist() == [xs[1], 50.0]


def test_convention_cells_are_told_row_by_row() -> None:
    centres = cell_centres(straight(CELLS_3_BY_4), (2, 4))
    assert centres[0].tolist() == [
        *([1.5, 2], [4.5, 2], [7.5, 2], [10.5, 2]),
        *([1.5, 6], [4.5, 6], [7.5, 6], [10.5, 6]),
    ]


@pytest.mark.parametrize(
    ("to_image", "expected"),
    [
        ([[12.0, 0, 0], [0, 8, 0]], 5),
        ([[-12.0, 0, 12], [0, -8, 8]], 5),
        ([[0.0, -8, 8], [12, 0, 0]], 5),
        ([[12.0, 8, 0], [0, 8, 0]], math.sqrt(41)),
    ],
    ids=["as it is", "both flips", "quarter turn", "sheared: root mean square of both diagonals"],
)
def test_convention_a_diagonal_is_a_cells_extent(to_image, expected) -> None:
    diagonals = cell_diagonals(torch.tensor([to_image], dtype=torch.float64), (2, 4))
    assert diagonals.tolist() == pytest.approx([expected], rel=1e-15)


def test_convention_neighbours_match_within_the_threshold_and_not_beyond() -> None:
    # Cells of 3 by 4: a neighbour beside is 0.6 diagonals away, one below is 0.8.
    view = straight(CELLS_3_BY_4)
    rows = torch.kron(torch.eye(2), torch.ones(4, 4)).bool()
    near = (torch.arange(8)[:, None] - torch.arange(8)).abs() <= 1
    mask = positive_mask(view, view, (2, 4), (2, 4), 0.7)
    assert torch.equal(mask, (rows & near)[None])
    assert mask.sum() == 8 + 2 * 6
    assert positive_mask(view, view, (2, 4), (2, 4), 0.9).sum() == 8 + 2 * 6 + 2 * 4


def test_convention_a_pair_exactly_at_the_threshold_does_not_match() -> None:
    one, two = straight(torch.tensor([[0.0, 0, 3, 4]])), straight(torch.tensor([[2.5, 0, 5.5, 4]]))
    assert not positive_mask(one, two, (1, 1), (1, 1), 0.5).any()
    assert positive_mask(one, two, (1, 1), (1, 1), 0.5 + 1e-5).all()


@pytest.mark.parametrize(("threshold", "matches"), [(0.55, True), (0.45, False)])
def test_convention_the_larger_of_two_cells_is_the_unit(threshold, matches) -> None:
    # Diagonals 5 and 10, centres 5 apart: 0.5 of the larger, 1.0 of the smaller.
    small = straight(torch.tensor([[0.0, 0, 3, 4]]))
    large = straight(torch.tensor([[3.5, -2, 9.5, 6]]))
    for one, two in ((small, large), (large, small)):
        assert positive_mask(one, two, (1, 1), (1, 1), threshold).item() is matches


@pytest.mark.parametrize(
    ("size", "grid", "laid", "turn"),
    [
        ((8, 12), (2, 4), {"mirrored": True}, lambda cells: cells.flip(1)),
        ((8, 12), (2, 4), {"flipped": True}, lambda cells: cells.flip(0)),
        ((8, 12), (2, 4), {"mirrored": True, "flipped": True}, lambda cells: cells.flip(0, 1)),
        # Turned clockwise, the view's top row runs down the image's right edge.
        ((8, 8), (3, 3), {"degrees": 90}, torch.rot90),
    ],
    ids=["left-right", "up-down", "both", "a quarter"],
)
def test_flipped_and_turned_views_match_at_such_cells(size, grid, laid, turn) -> None:
    here, there = (reference.view_map(size, **settings)[None] for settings in ({}, laid))
    count = math.prod(grid)
    order = turn(torch.arange(count).view(grid)).flatten()
    mask = positive_mask(here, there, grid, grid, 0.5)
    assert torch.equal(mask, torch.eye(count)[:, order].bool()[None])


# Against the slow loops.


@dtypes
@given(
    edges=st.lists(
        st.tuples(*[st.floats(0, 1000, width=32)] * 2, *[st.floats(1, 1000, width=32)] * 2),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_boxes_agree_with_the_loops(dtype, edges, data) -> None:
    boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in edges], dtype=dtype)
    mirrored = torch.tensor(data.draw(st.tuples(*[st.booleans()] * len(edges))))
    to_image = box_to_map(boxes, mirrored)
    assert to_image.dtype == dtype
    atol = reference.TOLERANCE[dtype] * 2000
    expected = reference.box_to_map(boxes, mirrored)
    torch.testing.assert_close(to_image.double(), expected, rtol=0, atol=atol)


@dtypes
@given(pair=view_pairs(), grid=grids)
def test_centres_and_diagonals_agree_with_the_loops(dtype, pair, grid) -> None:
    one, _, scale = pair
    to_image = one.to(dtype)
    close = {"rtol": 0, "atol": reference.TOLERANCE[dtype] * scale}
    for function, loops in (
        (cell_centres, reference.cell_centres),
        (cell_diagonals, reference.cell_diagonals),
    ):
        measured = function(to_image, grid)
        assert measured.dtype == dtype
        torch.testing.assert_close(measured.double(), loops(to_image, grid), **close)


@dtypes
@given(pair=view_pairs(), grid_one=grids, grid_two=grids, threshold=st.floats(0.05, 3))
def test_matches_agree_with_the_loops(dtype, pair, grid_one, grid_two, threshold) -> None:
    one, two, _ = pair
    views = one.to(dtype), two.to(dtype), grid_one, grid_two
    mask = positive_mask(*views, threshold)
    expected = reference.positive_mask(*views, threshold)
    decided = (reference.distances(*views) - threshold).abs() > 1e-4  # rounding may tip the others
    assert mask.shape == expected.shape
    assert mask.dtype == torch.bool
    assert torch.equal(mask & decided, expected & decided)


# Matches that are never held whole.


@dtypes
@given(
    pair=view_pairs(),
    grid_one=grids,
    grid_two=grids,
    threshold=st.floats(0.05, 3),
    data=st.data(),
)
def test_positives_are_the_mask_in_slices(dtype, pair, grid_one, grid_two, threshold, data) -> None:
    views = pair[0].to(dtype), pair[1].to(dtype), grid_one, grid_two, threshold
    mask, positives = positive_mask(*views), Positives(*views)
    ways = [(mask, table) for table in (positives, PositiveTable(mask), positives.mT.mT)]
    for whole, slices in (*ways, *((mask.mT, table.mT) for _, table in ways)):
        stop = data.draw(st.integers(1, whole.shape[1]))
        start = data.draw(st.integers(0, stop - 1))
        assert torch.equal(slices.rows(start, stop), whole[:, start:stop])
        assert torch.equal(slices.rows(0, whole.shape[1]), whole)
        assert torch.equal(slices.count(), whole.sum(dim=(1, 2)))
        assert slices.count().dtype == torch.int64


def test_positives_of_large_maps_are_the_mask_too() -> None:
    views = torch.stack([reference.view_map((300, 400), 0.1 * k, degrees=k) for k in (6, 7, 8)])
    views = views, views.roll(1, dims=0), (36, 30), (33, 32), 0.7
    mask, positives = positive_mask(*views), Positives(*views)
    assert torch.equal(positives.count(), mask.sum(dim=(1, 2)))
    assert torch.equal(positives.mT.count(), mask.sum(dim=(1, 2)))
    assert torch.equal(positives.mT.rows(1000, 1056), mask.mT[:, 1000:])


@pytest.mark.parametrize("threshold", [0, -0.7])
def test_a_threshold_that_matches_nothing_is_refused(threshold) -> None:
    view = straight(CELLS_3_BY_4)
    with pytest.raises(ValueError, match=str(threshold)):
        Positives(view, view, (2, 4), (2, 4), threshold)


# Precision.


@given(pair=view_pairs(), grid=grids)
def test_autocast_leaves_geometry_alone(pair, grid) -> None:
    one, two = pair[0].float(), pair[1].float()

    def everything() -> tuple[Tensor, ...]:
        positives = Positives(one, two, grid, grid, 0.7)
        rows = positives.rows(0, grid[0] * grid[1])
        return cell_centres(one, grid), cell_diagonals(one, grid), rows, positives.count()

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = everything()
    for before, within in zip(expected, measured, strict=True):
        assert within.dtype == before.dtype
        assert torch.equal(within, before)
    assert measured[0].dtype == torch.float32


def test_float32_separates_cells_far_from_the_origin() -> None:
    # |a|^2 + |b|^2 - 2ab would round away a cell's width here.
    far = torch.tensor([[30_000.0, 40_000, 30_028, 40_028]])
    mask = positive_mask(straight(far), straight(far), (7, 7), (7, 7), 0.5)
    assert torch.equal(mask[0], torch.eye(49).bool())
