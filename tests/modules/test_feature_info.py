"""Which maps of a backbone are whole, and which a block has worked out by half."""

import pytest
from torch import nn

from pixel_level_contrastive_learning.modules.feature_info import Survey, features, halves


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        # A block that halves the map: what is as fine as before is half done.
        ({"a.conv": (4, 4), "a.pool": (4, 8), "a": (4, 8)}, {"a.conv"}),
        # However deep it lies, and a border's cell more or less.
        ({"a.b.conv": (3.8, 3.8), "a.b": (4, 8), "a": (4, 8.2)}, {"a.b.conv"}),
        # A row of blocks is no block: what its first gives is whole.
        ({"all.0": (4, 4), "all.1": (4, 8), "all.2": (8, 16), "all": (4, 16)}, set()),
        # A block that keeps the map, one that makes it finer, one that is given none.
        ({"a.conv": (4, 4), "a": (4, 4)}, set()),
        ({"up.conv": (8, 8), "up": (8, 4)}, set()),
        ({"a.conv": (4, 4), "a": (0, 8)}, set()),
        # Names that only begin alike.
        ({"a": (4, 8), "ab.conv": (4, 4), "ab": (4, 4)}, set()),
    ],
)
def test_what_lies_in_a_coarsening_block_before_it_coarsens_is_half_done(strides, expected) -> None:
    assert halves(strides) == expected


def test_halves_are_taken_where_there_is_nothing_else() -> None:
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1))
    net = nn.Sequential(block, nn.AdaptiveAvgPool2d(1))
    layers = Survey(net, 3, (8, 8)).layers
    assert [(layer.name, layer.whole) for layer in layers if layer.is_map] == [
        ("0.0", False),
        ("0.1", True),
        ("0", True),
    ]
    assert [layer.name for layer in features(layers)] == ["0.1", "0"]
    assert [layer.name for layer in features(layers[:1])] == ["0.0"]
