"""A view's pixels are what its map says, at any scale, orientation, and of any raster."""

import io

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from pixel_level_contrastive_learning.data.crops import best_scale, cut_view, span
from pixel_level_contrastive_learning.data.decoding import open_image
from pixel_level_contrastive_learning.data.image import DecodedImage
from pixel_level_contrastive_learning.data.orientation import (
    ORIENTATION_TAG,
    first_pixel,
    turn_upright,
)
from pixel_level_contrastive_learning.geometry import cell_centres
from pixel_level_contrastive_learning.views import Placement, cut_views, draw_maps

HALF_A_PIXEL = 0.5
ANYWHERE = Placement(area_range=(0.02, 1.0), prob_hflip=0.5, prob_vflip=0.5)


def coordinates(size: tuple[int, int]) -> Tensor:
    """An image ``(2, h, w)`` float32 whose pixels hold the ``(x, y)`` of their own centres."""
    y, x = (torch.arange(side) + 0.5 for side in size)
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1])


def stored(upright: Tensor, orientation: int) -> Tensor:
    """The image as a camera stores it that was held so: the reverse of setting it upright."""
    return turn_upright(upright, {6: 8, 8: 6}.get(orientation, orientation))


def decoded(upright: Tensor, scale: int, orientation: int = 1) -> DecodedImage:
    """An image as if it had been decoded at a scale: blocks averaged, the last ones cut short."""
    pixels = stored(upright, orientation)
    h, w = pixels.shape[1:]
    padded = torch.nn.functional.pad(pixels, (0, -w % scale, 0, -h % scale), mode="replicate")
    smaller = turn_upright(torch.nn.functional.avg_pool2d(padded, scale), orientation)
    return DecodedImage(smaller, scale, first_pixel(upright.shape[1:], scale, orientation))


def misread(
    image: DecodedImage, size: tuple[int, int], maps: Tensor, view: tuple[int, int]
) -> float:
    """How far, in source pixels, views of `coordinates` lie from where their maps say they look."""
    worst = 0.0
    for to_image in maps:
        pixels, adjusted = cut_view(image, size, to_image, view)
        assert pixels.shape[1:] == view
        assert adjusted.dtype == torch.float32
        expected = cell_centres(adjusted[None].double(), view)[0]
        seen = rearrange(pixels.double(), "xy h w -> (h w) xy")
        worst = max(worst, (seen - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_view_reads_the_places_its_map_names(scale, orientation) -> None:
    size = (203, 331)  # divided by no scale
    image = decoded(coordinates(size), scale, orientation)
    maps = draw_maps(30, size, ANYWHERE)
    for view in ((16, 24), (3, 2), (1, 1)):
        fitting = [to_image for to_image in maps if best_scale(to_image[None], view) >= scale]
        assert len(fitting) > 3 or view == (16, 24)
        assert misread(image, size, fitting, view) < HALF_A_PIXEL


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_view_reads_the_places_its_map_names(orientation) -> None:
    # Sides that are divided by all powers met; else the learner's own rule is half a pixel off.
    for scale, size in ((1, (203, 331)), (2, (224, 352))):
        maps = draw_maps(20, size, Placement((0.1, 0.9), 0.5, 0.5, max_rotation=180))
        image = decoded(coordinates(size), scale, orientation)
        for view in ((16, 24), (40, 40)):
            fitting = [to_image for to_image in maps if best_scale(to_image[None], view) >= scale]
            assert misread(image, size, fitting, view) < HALF_A_PIXEL


def test_a_turned_view_is_moved_out_of_the_last_pixels_that_stand_for_fewer() -> None:
    # Eleven whole pixels, and one of one: the last, or the first of an image turned by 180 degrees.
    # A square on its corner touches the right edge and the lower one, or the left and the upper.
    for orientation, corner, moved in ((1, (25.0, 5.0), -1), (3, (20.0, 0.0), 1)):
        image = decoded(coordinates((45, 45)), 4, orientation)
        to_image = torch.tensor([[20.0, -20, corner[0]], [20, 20, corner[1]]])
        adjusted = cut_view(image, (45, 45), to_image, (5, 5)).to_image
        assert torch.equal(adjusted[:, :2], to_image[:, :2])
        assert (adjusted - to_image)[:, 2].tolist() == [moved, moved]


def test_a_small_image_is_enlarged() -> None:
    image = decoded(coordinates((9, 5)), 1)
    assert misread(image, (9, 5), draw_maps(20, (9, 5), ANYWHERE), (40, 30)) < HALF_A_PIXEL


@pytest.mark.parametrize("size", [(1, 10000), (10000, 1), (1, 1), (2, 3)])
def test_any_strip_can_be_cut(size) -> None:
    image = decoded(coordinates(size), 1)
    for rotation in (0, 30):
        placement = Placement(area_range=(0.08, 1), prob_hflip=0.5, max_rotation=rotation)
        assert misread(image, size, draw_maps(20, size, placement), (8, 8)) <= HALF_A_PIXEL


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("tag", [1, 3, 6])
def test_a_scaled_jpeg_reads_the_places_its_map_names(tag, scale) -> None:
    # Eight bits hold 256 steps: nine for ten pixels, from pixel 300 on.
    height, width = 1203, 1003
    for axis in (0, 1):
        y, x = np.mgrid[:height, :width]
        slope = (0.9 * ((x, y)[axis] - 300)).round().clip(0, 255).astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(stored_array(slope, tag)))
        exif = image.getexif()
        exif[ORIENTATION_TAG] = tag
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=100, exif=exif)
        opened = open_image(stream.getvalue())
        assert opened.size == (height, width)
        raster = opened.decode(scale)
        assert raster.scale == scale
        for start in (311.2, 314.9):
            to_image = torch.tensor([[224.7, 0, start], [0, -225.3, start + 225.3]])
            pixels, adjusted = cut_view(raster, opened.size, to_image, (28, 27))
            expected = cell_centres(adjusted[None].double(), (28, 27))[0, :, axis].view(28, 27)
            error = pixels[0].double() / 0.9 + 300.5 - expected
            # Pillow rounds halves up: half a step more where eight pixels are averaged at once.
            assert error.mean().abs() < HALF_A_PIXEL + 0.5 / 0.9
            assert error.abs().max() < HALF_A_PIXEL + 1.5 / 0.9  # rounded three times


def stored_array(array: np.ndarray, tag: int) -> np.ndarray:
    """An upright array as it is stored under an orientation."""
    return stored(torch.from_numpy(array.copy())[None], tag)[0].numpy()


# What was asked for, and what comes back.


def test_the_map_moves_by_less_than_a_pixel_of_the_view() -> None:
    size = (203, 331)
    for scale in (1, 4):
        image = decoded(coordinates(size), scale)
        for to_image in draw_maps(100, size, ANYWHERE):
            if best_scale(to_image[None], (8, 12)) < scale:
                continue
            adjusted = cut_view(image, size, to_image, (8, 12)).to_image
            pixel = to_image[:, :2].abs().sum(dim=1) / torch.tensor([12, 8])
            corners = torch.tensor([[0.0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
            moved = ((adjusted - to_image) @ corners).abs().amax(dim=1)
            assert (moved <= pixel.clamp(min=1) + 1e-3).all()
            x, y = adjusted @ corners
            assert min(x.min(), y.min()) >= 0
            assert x.max() <= size[1]
            assert y.max() <= size[0]


def test_convention_spans_by_hand() -> None:
    # 100 px from 10.4 on, for 40 px of view: whole pixels, resampled at once.
    assert span(10.4, 100.2, 500, 40, 1) == (11, 100, 1)
    # 10.2 source pixels a view pixel: eight are averaged, and the length is a multiple of eight.
    assert span(0.0, 410.0, 500, 40, 1) == (1, 408, 8)
    # At a half: 205 px of the raster, 5.1 a view pixel, so four are averaged.
    assert span(0.0, 410.0, 500, 40, 2) == (0, 204, 4)
    # At the end of a side of 501, whose last pixel at a half stands for one only: left out.
    assert span(300.0, 201.0, 501, 80, 2) == (150, 100, 1)
    # Less than a pixel is a pixel.
    assert span(0.3, 0.4, 1, 8, 1) == (0, 1, 1)


def test_convention_the_best_scale_enlarges_no_view() -> None:
    def crop(width: float, height: float) -> Tensor:
        return torch.tensor([[[width, 0.0, 0], [0, height, 0]]]).float()

    by_crop = {(10, 10): 1, (40, 40): 1, (79, 90): 1, (80, 80): 2, (900, 159): 2, (900, 160): 4}
    assert {side: best_scale(crop(*side), (40, 40)) for side in by_crop} == by_crop
    assert best_scale(crop(5000, 5000), (40, 40)) == 8
    both = torch.cat((crop(5000, 5000), crop(100, 100)))
    assert best_scale(both, (40, 40)) == 2  # the smaller of the two decides
    turned = torch.tensor([[[0.0, -80, 80], [80, 0, 0]]])
    assert best_scale(turned, (40, 40)) == 2


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_rasters_of_every_kind_agree_with_the_learners_own_views(channels) -> None:
    size, view = (120, 200), (12, 20)
    image = torch.nn.functional.interpolate(torch.rand(1, channels, 3, 5), size, mode="bicubic")
    image = (image[0].clamp(0, 1) * 255).round().to(torch.uint8)
    rasters = [DecodedImage(image), DecodedImage(image.float())]
    if channels in (1, 3):
        array = rearrange(image, "c h w -> h w c").numpy()
        rasters.append(DecodedImage(Image.fromarray(array.squeeze())))
    for rotation in (0, 20):
        placement = Placement(area_range=(0.3, 1), prob_hflip=0.5, max_rotation=rotation)
        for to_image in draw_maps(6, size, placement):
            cuts = [cut_view(raster, size, to_image, view) for raster in rasters]
            expected = cut_views(image[None].float(), cuts[0].to_image[None], view)[0]
            for raster, (pixels, adjusted) in zip(rasters, cuts, strict=True):
                deep = isinstance(raster.pixels, Tensor) and raster.pixels.is_floating_point()
                assert pixels.dtype == (torch.float32 if deep else torch.uint8)
                assert torch.equal(adjusted, cuts[0].to_image)
                assert (pixels - expected).abs().mean() < 3  # steps of 255


@pytest.mark.parametrize("factor", [2, 3.9, 4.1, 9])
def test_fine_patterns_do_not_alias(factor) -> None:
    side = round(20 * factor) + 3
    board = (torch.arange(side)[:, None] + torch.arange(side)) % 2 * 255
    to_image = torch.tensor([[20.0 * factor, 0, 0.4], [0, 20 * factor, 1.3]])
    image = DecodedImage(board[None].to(torch.uint8))
    pixels = cut_view(image, (side, side), to_image, (20, 20)).pixels
    assert (pixels[:, 1:-1, 1:-1].float() / 255 - 0.5).abs().max() < 0.15


def test_a_view_of_whole_pixels_is_those_pixels() -> None:
    image = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    for to_image, expected in (
        (torch.tensor([[10.0, 0, 5], [0, 8, 2]]), image[:, 2:10, 5:15]),
        (torch.tensor([[-10.0, 0, 15], [0, 8, 2]]), image[:, 2:10, 5:15].flip(2)),
        (torch.tensor([[10.0, 0, 5], [0, -8, 10]]), image[:, 2:10, 5:15].flip(1)),
    ):
        pixels, adjusted = cut_view(DecodedImage(image), (30, 40), to_image, (8, 10))
        assert torch.equal(pixels, expected)
        assert torch.equal(adjusted, to_image)
