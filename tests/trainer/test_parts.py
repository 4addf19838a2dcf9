"""A batch on its way to the learner: made ready, taken in parts."""

import pytest
import torch

from pixel_level_contrastive_learning.augment import (
    VIEW_ONE,
    VIEW_TWO,
    Factors,
    Normalise,
    change_colour,
)
from pixel_level_contrastive_learning.data.pairs import Pairs
from pixel_level_contrastive_learning.trainer.schedules import LearningRate, TargetMomentum
from pixel_level_contrastive_learning.trainer.task import Practice, PretrainTask, split


def batch(images: int) -> Pairs:
    each = torch.arange(images)
    factors = Factors(*(each for _ in Factors._fields))
    return Pairs(each, each, each, each, factors, factors, each)


@pytest.mark.parametrize(
    ("images", "parts", "sizes"),
    [
        (24, 4, [6, 6, 6, 6]),
        (25, 8, [3, 3, 3, 3, 3, 3, 3, 4]),
        (9, 5, [2, 2, 2, 3]),
        (7, 3, [2, 2, 3]),
        (5, 1, [5]),
        (3, 3, [3]),
        (1, 1, [1]),
    ],
)
def test_no_part_is_a_single_image(images, parts, sizes) -> None:
    made = list(split(batch(images), parts))
    assert [len(part.one) for part in made] == sizes
    assert torch.equal(torch.cat([part.index for part in made]), torch.arange(images))
    assert torch.equal(torch.cat([part.factors_two.hue for part in made]), torch.arange(images))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32], ids=str)
def test_each_view_has_the_colours_and_the_map_drawn_for_it(kind) -> None:
    raw = torch.randint(256, (2, 6, 3, 20, 16), dtype=torch.uint8)
    one, two = raw if kind == torch.uint8 else raw / 255
    maps = torch.rand(2, 6, 2, 3)
    factors = VIEW_ONE.draw(6), VIEW_TWO.draw(6)
    normalise = Normalise((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    practice = Practice(LearningRate(0.1, 9, 1, 0), TargetMomentum(0.9, 9), "sgd", 0, 0, 1, 0, 2.0)
    task = PretrainTask(torch.nn.Identity(), normalise, practice)
    made = task.views(Pairs(one, two, *maps, *factors, torch.arange(6)))
    for view, pixels, own, where in zip(made, raw, factors, maps, strict=True):
        assert torch.equal(view.to_image, where)
        expected = normalise(change_colour(pixels / 255, own, practice.largest_sigma))
        torch.testing.assert_close(view.pixels, expected, atol=1e-5, rtol=0)
        assert view.pixels.is_contiguous(memory_format=torch.channels_last)
