"""Correspondence: hits and chance against slow loops and by hand."""

import math

import pytest
import torch
from small_nets import chain
from torch import nn
from torch.nn.functional import cosine_similarity

from pixel_level_contrastive_learning.evaluation.correspondence import (
    Correspondence,
    draw_pairs,
    hits,
    measure_correspondence,
)
from pixel_level_contrastive_learning.evaluation.features import Reader
from pixel_level_contrastive_learning.geometry import box_to_map, cell_centres, cell_diagonals
from pixel_level_contrastive_learning.views import cut_views

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def maps(*boxes: tuple[float, ...]) -> torch.Tensor:
    return box_to_map(torch.tensor(boxes), torch.zeros(len(boxes), dtype=torch.bool))


def slow_hits(one, two, map_one, map_two) -> list[float]:
    """The five sums, cell by cell."""
    sums = [0.0] * 5
    for image in range(len(one)):
        a, b = (m[image : image + 1] for m in (map_one, map_two))
        grids = [tuple(f.shape[-2:]) for f in (one, two)]
        centres = [cell_centres(m, g)[0] for m, g in zip((a, b), grids, strict=True)]
        unit = max(cell_diagonals(m, g).item() for m, g in zip((a, b), grids, strict=True))
        cells = [f[image].flatten(1).T for f in (one, two)]
        for i, at in enumerate(centres[0]):
            distances = [math.dist(at, other) / unit for other in centres[1]]
            if min(distances) >= 0.7:
                continue
            likeness = [cosine_similarity(cells[0][i], other, dim=0).item() for other in cells[1]]
            match = distances[likeness.index(max(likeness))]
            near = [distance < 1.5 for distance in distances]
            right = [distance < 0.7 for distance in distances]
            figures = [match < 0.7, match < 1.5, sum(right) / len(right)]
            figures += [sum(near) / len(near), 1]
            sums = [total + value for total, value in zip(sums, figures, strict=True)]
    return sums


def test_hits_equal_the_slow_loop() -> None:
    one, two = torch.randn(3, 5, 4, 6), torch.randn(3, 5, 3, 5)
    map_one = maps((0, 0, 60, 40), (5, 5, 50, 35), (0, 0, 20, 20))
    map_two = maps((10, 0, 60, 40), (0, 8, 40, 30), (40, 40, 60, 60))  # the last see nothing common
    sums = hits(one, two, map_one, map_two)
    assert sums.tolist() == pytest.approx(slow_hits(one, two, map_one, map_two))
    assert sums[4] > 0


def test_hits_are_the_same_in_small_blocks(monkeypatch) -> None:
    one, two = torch.randn(3, 5, 4, 6), torch.randn(3, 5, 3, 5)
    views = maps((0, 0, 60, 40), (5, 5, 50, 35), (0, 0, 20, 20))
    whole = hits(one, two, views, views)
    monkeypatch.setattr("pixel_level_contrastive_learning.blocks.ENTRIES", 17)
    torch.testing.assert_close(hits(one, two, views, views), whole)


def test_one_view_twice_is_always_found() -> None:
    features = torch.randn(1, 16, 4, 4)
    hit, near, chance, chance_near, cells = hits(
        features, features, maps((0, 0, 8, 8)), maps((0, 0, 8, 8))
    ).tolist()
    assert hit == near == cells == 16
    # Within 0.7 diagonals, 0.99 sides, lies the cell alone; within 1.5, 2.1 sides, its neighbours
    # and those two steps straight on: with itself 6 at corners, 8 at edges, 11 in the middle.
    assert chance == pytest.approx(16 / 16)
    assert chance_near == pytest.approx((4 * 6 + 8 * 8 + 4 * 11) / 16)


def test_a_match_across_the_view_is_no_hit() -> None:
    features = torch.eye(16).view(1, 16, 4, 4)
    sums = hits(features, features.flip(-1, -2), maps((0, 0, 8, 8)), maps((0, 0, 8, 8)))
    # Every cell is found at the opposite place: 1 or 3 cells off, each way. Only the four in the
    # middle, one cell off both ways, are near.
    assert sums[:2].tolist() == [0, 4]


def test_views_are_the_same_for_the_same_seed_and_no_generator_moves() -> None:
    images = [torch.rand(3, 40, 60), torch.rand(3, 50, 30)]
    state = torch.get_rng_state()
    first, again, other = (draw_pairs(images, (32, 32), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.one.shape == (2, 3, 32, 32)
    assert first.map_two.shape == (2, 2, 3)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.map_one, other.map_one)
    assert not torch.equal(first.map_one, first.map_two)


def test_colours_are_changed_or_kept_in_the_same_places() -> None:
    images = [torch.rand(3, 40, 60), torch.rand(3, 50, 30)]
    changed, kept = (draw_pairs(images, (16, 16), 3, recoloured=new) for new in (True, False))
    assert torch.equal(changed.map_one, kept.map_one)
    assert torch.equal(changed.map_two, kept.map_two)
    cut = cut_views(images[1][None], kept.map_two[1:], (16, 16))
    assert torch.equal(kept.two[1:], cut)
    assert (changed.two - kept.two).abs().mean() > 0.02


def test_the_blur_is_a_share_of_the_view() -> None:
    """What small views show is not wiped out by a blur that is meant for large ones."""
    left = []
    for side in (56, 224):
        squares = torch.arange(side) * 14 // side % 2
        board = (squares[:, None] + squares) % 2
        images = [board.float().expand(3, -1, -1)] * 40
        changed, kept = (draw_pairs(images, (side, side), 0, recoloured=new) for new in (1, 0))
        left.append(float(changed.one.std() / kept.one.std()))
    assert left[0] == pytest.approx(left[1], abs=0.1)


def test_views_lie_inside_their_own_image() -> None:
    images = [torch.rand(1, 40, 60), torch.rand(1, 50, 30)]
    views = draw_pairs(images, (8, 8), 0)
    for at in (views.map_one, views.map_two):
        x, y = cell_centres(at, (8, 8)).unbind(-1)
        assert (x.amax(1) < torch.tensor([60, 30])).all()
        assert (y.amax(1) < torch.tensor([40, 50])).all()
        assert min(x.min(), y.min()) > 0


def edges() -> nn.Sequential:
    """Gives patches of 4 x 4 pixels as they are: their pattern tells where they are."""
    net = chain(patches=nn.Conv2d(3, 48, 4, stride=4, bias=False))
    net.patches.weight.data = torch.eye(48).view(48, 3, 4, 4)
    return net


def found_in(net: nn.Module, images, seed: int = 0, **settings) -> Correspondence:
    """What a network finds of its patches in views of 32 x 32 pixels."""
    reader = Reader(net, None, 3, (32, 32))
    return measure_correspondence(reader, draw_pairs(images, (32, 32), seed), MEAN, STD, **settings)


def test_a_network_is_judged_in_eval_mode_by_batches_of_any_size() -> None:
    images = [torch.rand(3, 8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2) for _ in range(5)]
    net = edges()
    result = found_in(net, images)
    assert net.training
    # Blobs of colour: far more often found than by chance.
    assert result.hit1 > 2.5 * result.chance
    assert 0 < result.chance < result.chance_near < 1
    assert result.hit1 <= result.hit_near <= 1
    assert result.cells > 100
    assert found_in(net, images, batch=2) == pytest.approx(result)
    assert found_in(net, images, seed=1) != result


def test_views_without_a_common_cell_are_refused() -> None:
    images = [torch.rand(3, 64, 64)]
    views = draw_pairs(images, (32, 32), 0)
    disjoint = views._replace(map_one=maps((0, 0, 8, 8)), map_two=maps((40, 40, 48, 48)))
    with pytest.raises(ValueError, match="falls inside the other; use more images"):
        measure_correspondence(Reader(edges(), None, 3, (32, 32)), disjoint, MEAN, STD)
