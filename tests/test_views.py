"""Where views are laid over their images, and that their pixels are what lies there."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixel_level_contrastive_learning.geometry import cell_centres
from pixel_level_contrastive_learning.views import (
    Placement,
    averaged_down,
    cut_views,
    draw_maps,
    lay_maps,
    power_below,
    reductions,
)

HALF_A_PIXEL = 0.5
IMAGE = (61, 97)  # odd, so that no reduction divides it
ANYTHING = Placement((0.1, 1.0), prob_hflip=0.5, prob_vflip=0.5, max_rotation=180)


def coordinates(size: tuple[int, int], count: int = 1) -> Tensor:
    """Images ``(count, 2, h, w)`` float64 whose pixels hold the ``(x, y)`` of their own centres."""
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in size)
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack(grid[::-1]).repeat(count, 1, 1, 1)


def misread(to_image: Tensor, image: tuple[int, int], view: tuple[int, int], mode: str) -> float:
    """How far, in source pixels, views of `coordinates` lie from where their maps say they look."""
    seen = cut_views(coordinates(image, len(to_image)), to_image, view, mode).flatten(2).mT
    return (seen - cell_centres(to_image.double(), view)).abs().max().item()


def crop(image: tuple[int, int], view: tuple[int, int], factor: float, **kinds: float) -> Tensor:
    """The map ``(1, 2, 3)`` of an upright crop whose view pixels cover ``factor`` of the image's.

    ``kinds`` may place it (x, y in pixels) and mirror or flip it.
    """
    x, y = kinds.get("x", 0.3), kinds.get("y", 0.8)
    width, height = view[1] * factor, view[0] * factor
    across, down = [width, 0.0, x], [0.0, height, y]
    if kinds.get("mirrored"):
        across = [-width, 0.0, x + width]
    if kinds.get("flipped"):
        down = [0.0, -height, y + height]
    assert x + width <= image[1]
    assert y + height <= image[0]
    return torch.tensor([[across, down]])


# Drawing maps.


def test_every_image_of_a_batch_gets_its_own_map() -> None:
    maps = draw_maps(64, IMAGE, Placement((0.6, 0.8)))
    assert maps.shape == (64, 2, 3)
    assert maps.dtype == torch.float32
    assert len(maps.flatten(1).unique(dim=0)) == 64


def test_maps_take_six_numbers_an_image_whatever_the_placement() -> None:
    states = []
    for placement in (Placement((1.0, 1.0)), ANYTHING):
        torch.manual_seed(3)
        draw_maps(5, IMAGE, placement)
        states.append(torch.get_rng_state())
    torch.manual_seed(3)
    torch.rand(6, 5)
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)


@pytest.mark.parametrize("placement", [Placement((0.6, 0.8)), ANYTHING])
def test_maps_are_drawn_on_the_cpu_whatever_the_default_device(placement) -> None:
    torch.manual_seed(0)
    expected = draw_maps(4, IMAGE, placement)
    torch.manual_seed(0)
    with torch.device("meta"):
        drawn = draw_maps(4, IMAGE, placement)
    assert drawn.device.type == "cpu"
    assert torch.equal(drawn, expected)


def test_maps_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        drawn = draw_maps(4, IMAGE, ANYTHING)
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("ratios", [(0.6, 0.8), (0.05, 0.1), (0.5, 1), (0.5, 0.5), (1, 1)])
def test_a_crop_is_a_share_of_the_side_and_keeps_the_aspect(ratios) -> None:
    height, width = IMAGE
    maps = draw_maps(500, IMAGE, Placement(ratios))
    shares = torch.stack((maps[:, 0, 0] / width, maps[:, 1, 1] / height))
    assert torch.allclose(shares[0], shares[1], atol=1e-6)
    assert ratios[0] - 1e-6 <= shares.min()
    assert shares.max() <= ratios[1] + 1e-6
    assert maps[:, [0, 1], [1, 0]].abs().max() == 0  # upright
    # Uniform over the range: its mean lies within five standard errors of the middle.
    span = ratios[1] - ratios[0]
    assert abs(shares[0].mean() - sum(ratios) / 2) <= 5 * span / math.sqrt(12 * 500) + 1e-6
    assert shares[0].max() - shares[0].min() >= 0.95 * span - 1e-6


@pytest.mark.parametrize(
    "placement", [Placement((0.6, 0.8)), Placement((0.3, 0.5), max_rotation=45)]
)
def test_a_crop_may_lie_anywhere_in_its_image_and_nowhere_else(placement) -> None:
    maps = draw_maps(2000, IMAGE, placement)
    boxes = maps[..., :2].abs().sum(dim=2)  # upright, around the crops
    place = (cell_centres(maps, (1, 1))[:, 0] - boxes / 2) / (torch.tensor(IMAGE[::-1]) - boxes)
    assert place.min() >= -1e-5
    assert place.max() <= 1 + 1e-5
    assert place.amin(dim=0).max() < 0.01
    assert place.amax(dim=0).min() > 0.99
    assert (place.mean(dim=0) - 0.5).abs().max() < 5 / math.sqrt(12 * 2000)
    # Place, turn and size are drawn for themselves.
    turned, size = torch.atan2(maps[:, 1, 0], maps[:, 0, 0]), maps[:, :, 0].norm(dim=1)
    figures = torch.stack((*place.T, size, turned))[: 4 if placement.max_rotation else 3]
    assert (torch.corrcoef(figures) - torch.eye(len(figures))).abs().max() < 5 / math.sqrt(2000)


def test_a_crop_may_be_a_share_of_the_area_of_any_aspect() -> None:
    height, width = 300, 400
    placement = Placement(area_range=(0.08, 0.5), aspect_range=(3 / 4, 4 / 3))
    torch.manual_seed(1)
    maps = draw_maps(4000, (height, width), placement)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    torch.rand(7, 4000)  # seven numbers an image
    assert torch.equal(state, torch.get_rng_state())
    across, down = maps[:, 0, 0], maps[:, 1, 1]
    share, aspect = across * down / (height * width), torch.log(across / down)
    assert share.min() >= 0.08 - 1e-6
    assert share.max() <= 0.5 + 1e-6
    assert abs(share.mean() - 0.29) < 5 * 0.42 / math.sqrt(12 * 4000)  # even
    assert aspect.abs().max() <= math.log(4 / 3) + 1e-5
    assert abs(aspect.mean()) < 5 * 2 * math.log(4 / 3) / math.sqrt(12 * 4000)  # even in its log
    assert torch.corrcoef(torch.stack((share, aspect)))[0, 1].abs() < 5 / math.sqrt(4000)


def test_a_crop_that_is_wider_than_its_image_shrinks_and_keeps_its_aspect() -> None:
    maps = draw_maps(500, (10, 1000), Placement(area_range=(0.5, 1.0), aspect_range=(2.0, 2.0)))
    assert torch.allclose(maps[:, 0, 0], torch.tensor(20.0))
    assert torch.allclose(maps[:, 1, 1], torch.tensor(10.0))
    assert maps[:, 1, 2].abs().max() < 1e-4
    assert maps[:, 0, 2].max() > 900


def test_maps_of_images_of_different_sizes_are_laid_at_once() -> None:
    drawn = torch.rand(7, 3)
    sizes = torch.tensor([[90.0, 60], [10, 200], [400, 400]])
    placement = Placement(area_range=(0.1, 1), prob_hflip=0.5, max_rotation=30)
    alone = [lay_maps(drawn[:, i : i + 1], sizes[i], placement) for i in range(3)]
    assert torch.allclose(lay_maps(drawn, sizes, placement), torch.cat(alone))


@pytest.mark.parametrize("prob", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("way", ["prob_hflip", "prob_vflip"])
def test_flips_come_as_often_as_asked(way, prob) -> None:
    count = 4000
    maps = draw_maps(count, IMAGE, Placement((0.6, 0.8), **{way: prob}))
    flips = {"prob_hflip": maps[:, 0, 0] < 0, "prob_vflip": maps[:, 1, 1] < 0}
    # Five standard deviations of a binomial; none at all where the share is 0 or 1.
    slack = 5 * math.sqrt(count * prob * (1 - prob))
    assert abs(flips.pop(way).sum().item() - count * prob) <= slack
    (other,) = flips.values()
    assert not other.any()


def test_the_two_flips_hang_together_with_nothing() -> None:
    maps = draw_maps(4000, IMAGE, Placement((0.6, 0.8), prob_hflip=0.5, prob_vflip=0.5))
    extent = maps[:, [0, 1], [0, 1]]
    places = cell_centres(maps, (1, 1))[:, 0]  # the middle of a crop does not tell its flips
    figures = torch.cat((extent.sign(), extent[:, :1].abs(), places), dim=1)
    assert (torch.corrcoef(figures.T) - torch.eye(5)).abs().max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("image", [(480, 360), (61, 97), (200, 1000)])
@pytest.mark.parametrize("ratios", [(0.6, 0.8), (1.0, 1.0), (0.05, 1.0)])
@pytest.mark.parametrize("degrees", [5.0, 45.0, 180.0])
def test_a_turned_view_stays_in_its_image(image, ratios, degrees) -> None:
    height, width = image
    maps = draw_maps(500, image, Placement(ratios, max_rotation=degrees))
    turned = torch.rad2deg(torch.atan2(maps[:, 1, 0], maps[:, 0, 0]))
    assert turned.abs().max() <= degrees + 1e-3
    assert turned.max() > 0.9 * degrees
    assert turned.min() < -0.9 * degrees
    assert abs(turned.mean()) < 5 * degrees / math.sqrt(3 * 500)

    flipped = draw_maps(500, image, Placement(ratios, 0.5, 0.5, degrees))
    for some in (maps, flipped):
        corners = torch.tensor([[0.0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
        x, y = (some @ corners.T).unbind(dim=1)
        assert min(x.min(), y.min()) >= -1e-3
        assert x.max() <= width + 1e-3
        assert y.max() <= height + 1e-3

        sides = some[..., :2].norm(dim=1)  # of u and v, in pixels
        assert torch.allclose(sides[:, 0] / width, sides[:, 1] / height, rtol=1e-4)
        assert (sides[:, 0] / width).max() <= ratios[1] + 1e-5
        right_angle = (some[..., 0] * some[..., 1]).sum(dim=1) / sides.prod(dim=1)
        assert right_angle.abs().max() < 1e-5


def test_a_turned_view_shrinks_no_more_than_it_must() -> None:
    height, width = IMAGE
    maps = draw_maps(500, IMAGE, Placement((1.0, 1.0), max_rotation=90))
    boxes = maps[..., :2].abs().sum(dim=2)  # of the upright box around the view, (x, y)
    touching = (boxes / torch.tensor([width, height])).amax(dim=1)
    assert torch.allclose(touching, torch.ones(500), atol=1e-5)
    small = draw_maps(500, IMAGE, Placement((0.3, 0.3), max_rotation=45))  # fits, however turned
    assert torch.allclose(small[:, :, 0].norm(dim=1), torch.full((500,), 0.3 * width), rtol=1e-5)


# Cutting: a view's pixels are what its map says.


def test_convention_a_whole_view_is_its_image() -> None:
    images = torch.rand(2, 3, 5, 8)
    whole = torch.tensor([[8.0, 0, 0], [0, 5, 0]]).repeat(2, 1, 1)
    assert torch.allclose(cut_views(images, whole, (5, 8)), images, atol=1e-6)


def test_convention_a_crop_of_whole_pixels_is_those_pixels() -> None:
    images = torch.rand(2, 3, 9, 8)
    x0, y0, x1, y1 = 2, 3, 7, 9
    box = torch.tensor([[5.0, 0, 2], [0, 6, 3]]), torch.tensor([[-5.0, 0, 7], [0, -6, 9]])
    expected = images[0, :, y0:y1, x0:x1], images[1, :, y0:y1, x0:x1].flip(1, 2)
    cut = cut_views(images, torch.stack(box), (6, 5))
    assert torch.allclose(cut, torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("factor", [0.37, 0.5, 1.0, 1.7, 2.0, 3.0, 4.0, 5.5])
def test_a_view_reads_the_places_its_map_names(factor, mirrored, flipped) -> None:
    for view in ((7, 11), (10, 9), (1, 1)):
        for x, y in ((0.0, 0.0), (0.3, 0.8), (12.45, 3.21)):
            to_image = crop(IMAGE, view, factor, x=x, y=y, mirrored=mirrored, flipped=flipped)
            assert misread(to_image, IMAGE, view, "bilinear") < HALF_A_PIXEL
            at_the_end = (IMAGE[1] - view[1] * factor, IMAGE[0] - view[0] * factor)
            to_image = crop(IMAGE, view, factor, x=at_the_end[0] - 1e-3, y=at_the_end[1] - 1e-3)
            assert misread(to_image, IMAGE, view, "bilinear") < HALF_A_PIXEL


@pytest.mark.parametrize("across", [0.5, 2.5, 8.0])
@pytest.mark.parametrize("down", [0.5, 3.5, 6.0])
def test_a_view_may_be_reduced_more_one_way_than_the_other(across, down) -> None:
    view = (9, 10)
    to_image = torch.tensor([[[10 * across, 0, 2.3], [0, 9 * down, 1.6]]])
    assert misread(to_image, IMAGE, view, "bilinear") < HALF_A_PIXEL


@given(
    image=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    view=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    degrees=st.sampled_from([0.0, 30.0, 180.0]),
    seed=st.integers(0, 99),
)
def test_any_view_that_is_drawn_reads_the_places_its_map_names(image, view, degrees, seed) -> None:
    torch.manual_seed(seed)
    maps = draw_maps(6, image, Placement((0.1, 1.0), 0.5, 0.5, degrees))
    assert misread(maps, image, view, "bilinear") < HALF_A_PIXEL


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_every_mode_reads_the_places_its_map_names(mode) -> None:
    maps = draw_maps(20, IMAGE, Placement((0.3, 0.6), 0.5, 0.5, 30))
    # Rounding to the nearest pixel is off by half a pixel at most.
    assert misread(maps, IMAGE, (40, 70), mode) < HALF_A_PIXEL + 1e-4


def test_modes_differ_as_their_names_say() -> None:
    step = torch.tensor([0.0, 0, 0, 1, 1, 1]).repeat(1, 1, 6, 1)
    larger = torch.tensor([[[6.0, 0, 0], [0, 6, 0]]])
    cut = {
        mode: cut_views(step, larger, (6, 30), mode)[0, 0, 3]
        for mode in ("bilinear", "nearest", "bicubic")
    }
    assert cut["nearest"].unique().tolist() == [0, 1]
    assert (cut["nearest"][15:] == 1).all()
    # Five view pixels to a pixel: the bilinear ramp climbs from 0 to 1 in steps of 0.2.
    ramp = torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert torch.allclose(cut["bilinear"][12:18], ramp, atol=1e-5)
    assert cut["bicubic"].max() > 1.01  # it overshoots beside an edge
    assert cut["bicubic"].min() < -0.01


def test_images_are_cut_in_at_least_float32() -> None:
    whole = torch.tensor([[[8.0, 0, 0], [0, 8, 0]]])
    for dtype, expected in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert cut_views(torch.rand(1, 1, 8, 8).to(dtype), whole, (4, 4)).dtype == expected


def test_coordinates_far_out_are_exact() -> None:
    # A view at the far end of an image as wide as a slide: bilinear weights keep their digits.
    image = torch.arange(20000, dtype=torch.float64).add(0.5).expand(1, 1, 4, -1)
    to_image = torch.tensor([[[8.0, 0, 19990.0], [0, 4, 0]]])
    seen = cut_views(image, to_image, (4, 16))[0, 0, 0]
    assert torch.allclose(seen, torch.arange(19990.25, 19998, 0.5, dtype=torch.float64), atol=0.01)


# Cutting smaller: averaged down first, image by image.


def test_convention_how_far_an_image_is_averaged() -> None:
    by_pixels = {0.1: 1, 1: 1, 1.99: 1, 2.01: 2, 3.99: 2, 4: 4, 5.5: 4, 8: 8, 100: 64}
    assert {pixels: power_below(pixels) for pixels in by_pixels} == by_pixels


def test_a_view_of_exactly_half_the_resolution_is_averaged() -> None:
    # Views of less than twice the pixels are sampled at once, smaller ones averaged: at 2, halved.
    assert power_below(2.0) == 2
    image = patterns((68, 68))["columns"]
    to_image = torch.tensor([[[64.0, 0, 0.5], [0, 64, 0.5]]])
    assert (cut_views(image, to_image, (32, 32)) - 0.5).abs().max() < 1e-5


def test_convention_each_way_is_averaged_for_itself() -> None:
    wide = torch.tensor([[40.0, 0, 0], [0, 10, 0]])  # 5 pixels a view pixel across, 1 down
    turned = torch.tensor([[0.0, -40, 40], [10, 0, 0]])
    assert reductions(torch.stack((wide, -wide, turned)), (10, 8)) == [(1, 4), (1, 4), (1, 4)]
    diagonal = reference.view_map((80, 80), 0.7, degrees=45)[None].float()
    assert reductions(diagonal, (10, 10)) == [(4, 4)]  # 5.6 pixels a view pixel, either way


def test_convention_averaging_keeps_the_edges() -> None:
    image = torch.arange(8.0).repeat(1, 1, 4, 1)
    assert averaged_down(image, (2, 4))[0, 0].tolist() == [[1.5, 5.5], [1.5, 5.5]]
    odd = torch.arange(9.0).repeat(1, 1, 9, 1)
    assert averaged_down(odd, (4, 4)).shape == (1, 1, 3, 3)  # no pixel is dropped
    assert averaged_down(odd, (4, 4))[0, 0, 0].tolist() == [1, 4, 7]
    assert averaged_down(image, (1, 1)) is image


def patterns(size: tuple[int, int]) -> dict[str, Tensor]:
    """Images ``(1, 1, h, w)`` of the finest patterns there are, 0 and 1, of mean 0.5."""
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
    shapes = {"checkerboard": rows + columns, "columns": columns + 0 * rows, "rows": rows}
    return {
        name: (shape % 2).expand(size).float()[None, None].clone() for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", ["checkerboard", "columns", "rows"])
def test_fine_patterns_do_not_alias(name) -> None:
    # Half a pixel off, so that the centres of the view's pixels are centres of the image's.
    to_image = torch.tensor([[[64.0, 0, 0.5], [0, 64, 0.5]]])
    # 66 is no multiple of 4: averages over five pixels are 2 / 5 or 3 / 5 at worst.
    for side, error in ((68, 1e-5), (66, 0.1 + 1e-5)):
        image = patterns((side, side))[name]
        assert (cut_views(image, to_image, (16, 16)) - 0.5).abs().max() < error
        grid = (2 * cell_centres(to_image / side, (16, 16)) - 1).view(1, 16, 16, 2)
        bare = functional.grid_sample(image, grid, align_corners=False)
        assert (bare - 0.5).abs().min() > 0.49  # what a single sampling call would make of it


def test_no_view_of_fine_patterns_strays_far_from_their_mean() -> None:
    for image in patterns((64, 64)).values():
        images = image.expand(50, -1, -1, -1)
        maps = draw_maps(50, (64, 64), Placement((0.6, 1.0), 0.5, 0.5, 180))
        for view in ((4, 4), (9, 9)):
            assert (cut_views(images, maps, view) - 0.5).abs().max() < 0.11


def test_a_view_of_the_right_size_keeps_fine_patterns() -> None:
    image = patterns((16, 16))["checkerboard"]
    to_image = torch.tensor([[[8.0, 0, 4], [0, 8, 4]]])
    assert torch.allclose(cut_views(image, to_image, (8, 8)), image[..., 4:12, 4:12], atol=1e-5)


def test_each_image_is_cut_as_if_it_were_alone() -> None:
    images = torch.rand(9, 3, 64, 96)
    shares = [0.08, 0.9, 0.25, 0.5, 1.0, 0.1, 0.7, 0.04, 0.3]
    maps = torch.stack(
        [reference.view_map((64, 96), ratio, degrees=0 if ratio > 0.6 else 20) for ratio in shares]
    ).float()
    view = (8, 12)
    assert len(set(reductions(maps, view))) > 3  # pixels from 0.3 to 8 a view pixel
    together = cut_views(images, maps, view)
    alone = [cut_views(images[i : i + 1], maps[i : i + 1], view) for i in range(9)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    order = torch.randperm(9)
    assert torch.allclose(cut_views(images[order], maps[order], view), together[order], atol=1e-6)


def test_cutting_changes_neither_images_nor_maps() -> None:
    images, maps = torch.rand(6, 3, 64, 64), draw_maps(6, (64, 64), Placement((0.05, 1.0)))
    before = images.clone(), maps.clone()
    cut_views(images, maps, (8, 8))
    assert torch.equal(images, before[0])
    assert torch.equal(maps, before[1])


def test_cutting_does_not_hang_on_the_default_device() -> None:
    images, maps = torch.rand(12, 3, 96, 80), draw_maps(12, (96, 80), Placement((0.05, 1.0)))
    expected = cut_views(images, maps, (16, 8))
    with torch.device("meta"):
        assert torch.equal(cut_views(images, maps, (16, 8)), expected)
