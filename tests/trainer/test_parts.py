"""A batch taken in parts."""

import pytest
import torch

from pixel_level_contrastive_learning.augment import Factors
from pixel_level_contrastive_learning.data.pairs import Pairs
from pixel_level_contrastive_learning.trainer.task import split


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
