"""Finer maps: each cell is what the network itself gives for its spot."""

import pytest
import torch
from torch import nn

from pixel_level_contrastive_learning.evaluation.features import Reader
from pixel_level_contrastive_learning.pictures.detail import (
    MOST_CELLS,
    fine_map,
    mirrored,
    no_finer,
)


class Averages(nn.Module):
    """A layer whose cell is the mean of its 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(2, 2, 8, 8, bias=False, groups=2)
        nn.init.constant_(self.cells.weight, 1 / 64)
        self.head = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x))


@pytest.fixture
def averages() -> Reader:
    return Reader(Averages(), ["cells"], 2, (32, 32))


@pytest.mark.parametrize("stride", [8, None])
def test_a_finer_map_is_the_mean_around_each_finer_cell(averages, stride) -> None:
    pixels = torch.rand(2, 24, 32)
    fine = fine_map(averages, pixels, stride, cells=16)  # 4 cells across: 4 times finer
    assert fine.shape == (2, 12, 16)
    around = mirrored(pixels, 8, 8)
    for row, column in ((0, 0), (5, 6), (11, 15)):
        # The finer cell is 2 pixels wide, its middle at 2 i + 1; the window reaches 4 either way.
        top, left = 2 * row + 1 - 4 + 8, 2 * column + 1 - 4 + 8
        window = around[:, top : top + 8, left : left + 8]
        torch.testing.assert_close(fine[:, row, column], window.mean(dim=(1, 2)))


def test_a_map_that_is_fine_enough_is_left_as_it_is(averages) -> None:
    pixels = torch.rand(2, 24, 32)
    expected = averages(pixels[None])[0]
    torch.testing.assert_close(fine_map(averages, pixels, None, cells=4), expected)
    torch.testing.assert_close(fine_map(averages, pixels, 8, cells=4), expected)


def test_an_image_that_is_not_whole_cells_is_resized(averages) -> None:
    assert fine_map(averages, torch.rand(2, 21, 35), 8, cells=4).shape == (2, 3, 4)


def test_the_zeros_that_a_network_pads_with_are_kept_away() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.Conv2d(1, 1, 9, 4, padding=4, bias=False)
            nn.init.constant_(self.cells.weight, 1 / 81)
            self.head = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cells(x))

    reader = Reader(Padded(), ["cells"], 1, (32, 32))
    flat = torch.ones(1, 32, 32)
    assert reader(flat[None]).std() > 0.05
    assert fine_map(reader, flat, 4, cells=16).std() < 1e-6


def test_a_mirror_goes_on_beyond_the_image() -> None:
    row = torch.arange(3.0).expand(1, 1, 3)
    assert mirrored(row, 0, 4)[0, 0].tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0]


def test_a_map_too_fine_to_see_is_averaged() -> None:
    large = torch.rand(2, MOST_CELLS, 2 * MOST_CELLS)
    small = no_finer(large, MOST_CELLS)
    assert small.shape == (2, MOST_CELLS // 2, MOST_CELLS)
    torch.testing.assert_close(small[:, 0, 0], large[:, :2, :2].mean(dim=(1, 2)))
