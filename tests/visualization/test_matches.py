"""The picture of matches: which pairs are joined, where lines end, what the caption says."""

import pytest
import torch
from PIL import Image
from torch import Tensor

from pixel_level_contrastive_learning.geometry import box_to_map, positive_mask
from pixel_level_contrastive_learning.visualization import matches
from pixel_level_contrastive_learning.visualization.matches import (
    Match,
    cell_position,
    count_words,
    pairs_picture,
    spread_matches,
)

GRID = (4, 4)


def box(x0: float, y0: float, x1: float, y1: float, mirrored: bool = False) -> Tensor:
    return box_to_map(torch.tensor([[x0, y0, x1, y1]]), torch.tensor([mirrored]))


def joined(one: Tensor, two: Tensor, count: int, grid: tuple[int, int] = GRID) -> list[Match]:
    return spread_matches(positive_mask(one, two, grid, grid, 0.7)[0], one, two, grid, count)


def test_equal_views_join_each_cell_with_itself() -> None:
    same = box(0, 0, 40, 40)
    lines = joined(same, same, 16)
    assert sorted(lines) == [(cell, cell) for cell in range(16)]


def test_a_mirrored_view_joins_the_columns_the_other_way_round() -> None:
    lines = joined(box(0, 0, 40, 40), box(0, 0, 40, 40, mirrored=True), 16)
    # Cell (row, column) of one lies at (row, 3 - column) of the other.
    assert sorted(lines) == [(4 * r + c, 4 * r + 3 - c) for r in range(4) for c in range(4)]


def test_of_several_matches_the_nearest_is_joined() -> None:
    # Cells of 10 pixels against cells of 5: several small cells lie in reach of a large one.
    lines = joined(box(0, 0, 40, 40), box(0, 0, 20, 20), 16)
    reached = dict(lines)
    assert set(reached) >= {0, 1, 4, 5}
    for cell, (row, column) in {0: (0.5, 0.5), 1: (0.5, 2.5), 4: (2.5, 0.5)}.items():
        place = divmod(reached[cell], 4)
        assert abs(place[0] - row) == abs(place[1] - column) == 0.5


def test_few_lines_are_spread_over_the_picture() -> None:
    same = box(0, 0, 80, 80)
    lines = joined(same, same, 5, grid=(8, 8))
    places = torch.tensor([divmod(line.one, 8) for line in lines], dtype=torch.float32)
    assert len(lines) == 5
    distance = torch.cdist(places, places) + 99 * torch.eye(5)
    assert distance.min() >= 4  # half a side


def test_there_are_no_more_lines_than_pairs_and_none_if_none_are_wanted() -> None:
    one, two = box(0, 0, 40, 40), box(30, 30, 70, 70)
    assert len(joined(one, two, 12)) < 12
    assert joined(one, one, 0) == []
    assert joined(one, box(100, 100, 140, 140), 12) == []


def test_a_cell_ends_in_the_middle_of_its_place() -> None:
    assert cell_position((10, 20, 50, 60), 0, (4, 4)) == (15, 25)
    assert cell_position((10, 20, 50, 60), 7, (4, 4)) == (45, 35)  # row 1, column 3


def test_the_caption_counts_the_pairs() -> None:
    matches = torch.zeros(49, 49, dtype=torch.bool)
    assert count_words(matches) == "no pairs: the views share no cell"
    matches[:36, :2] = True
    matches[:26, 2] = True
    assert count_words(matches) == "98 pairs; 73% of the left view's cells have one"


def test_the_picture_lights_matched_cells_and_dims_the_others() -> None:
    white = torch.ones(3, 64, 64)
    # The right half of view one is the left half of view two.
    one, two = box(0, 0, 40, 40), box(20, 0, 60, 40)
    picture = pairs_picture(white, white, one[0], two[0], GRID, 0.3, lines=0)
    left = matches.MARGIN + matches.VIEW_SIDE // 8
    far = matches.MARGIN + 7 * matches.VIEW_SIDE // 8
    row = matches.MARGIN + matches.VIEW_SIDE // 8
    dimmed, lit = picture.getpixel((left, row)), picture.getpixel((far, row))
    assert lit[:3] == (255, 255, 255)
    assert max(dimmed[:3]) == round(255 * matches.DIMMED)
    shift = matches.VIEW_SIDE + matches.GAP
    assert picture.getpixel((left + shift, row))[:3] == (255, 255, 255)
    assert max(picture.getpixel((far + shift, row))[:3]) == round(255 * matches.DIMMED)


def test_the_picture_is_transparent_around_the_views_and_holds_both() -> None:
    picture = pairs_picture(
        torch.zeros(3, 30, 60), torch.zeros(3, 60, 30), box(0, 0, 9, 9)[0], box(50, 0, 59, 9)[0],
        GRID, 0.7,
    )  # fmt: skip
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGBA"
    assert picture.getpixel((0, 0))[3] == 0
    wide, high = matches.VIEW_SIDE, matches.VIEW_SIDE
    assert picture.size == (
        wide + wide // 2 + matches.GAP + 2 * matches.MARGIN,
        high + matches.MARGIN + matches.CAPTION,
    )


def test_lines_end_where_the_cells_are() -> None:
    black = torch.zeros(3, 64, 64)
    same = box(0, 0, 40, 40)[0]
    without_line, with_line = (
        pairs_picture(black, black, same, same, (1, 1), 0.7, lines=n) for n in (0, 1)
    )
    row = matches.MARGIN + matches.VIEW_SIDE // 2
    for column in (matches.MARGIN + matches.VIEW_SIDE // 2, matches.MARGIN + matches.VIEW_SIDE):
        assert without_line.getpixel((column, row)) != with_line.getpixel((column, row))
    assert without_line.getpixel((matches.MARGIN + 20, row)) == with_line.getpixel(
        (matches.MARGIN + 20, row)
    )


def test_no_line_hides_the_end_of_another() -> None:
    black, same = torch.zeros(3, 64, 64), box(0, 0, 40, 40)[0]
    picture = pairs_picture(black, black, same, same, (1, 2), 0.3, lines=2)
    left = matches.MARGIN + matches.VIEW_SIDE + matches.GAP  # of view two, whose first cell is red
    row = matches.MARGIN + matches.VIEW_SIDE // 2
    red, _, blue, _ = picture.getpixel((left + matches.VIEW_SIDE // 4, row))
    assert red > blue


def test_anything_but_colour_images_is_refused() -> None:
    view, same = torch.zeros(3, 8, 8), box(0, 0, 9, 9)[0]
    with pytest.raises(ValueError) as error:
        pairs_picture(torch.zeros(1, 8, 8), view, same, same, GRID, 0.7, lines=-1)
    assert str(error.value) == (
        "view_one is (1, 8, 8); it must be a tensor (3, h, w), RGB in [0, 1]: choose three "
        "channels\nlines is -1; it must be a whole number of at least 0"
    )
