"""Cards of small networks, and how their images are prepared, that tests share."""

from pixel_level_contrastive_learning.backbones.checkpoint import BackboneCard
from pixel_level_contrastive_learning.data.statistics import Statistics
from pixel_level_contrastive_learning.evaluation.features import Preparation


def small_card(model: str, **settings: object) -> BackboneCard:
    """The card of a network of three 8-bit channels on views of 32 x 32 pixels."""
    plain = {
        "channels": 3,
        "image_size": (32, 32),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "pixel_layer": "body",
        "instance_layer": "pool",
    }
    return BackboneCard(model=model, **plain | settings)


TWO_CHANNELS = small_card(
    "timm/test_resnet",
    channels=2,
    image_size=(64, 64),
    mean=(0.1, 0.2),
    std=(0.3, 0.4),
    pixel_layer="layer4",
    instance_layer="global_pool",
)
"""The card of a small network of timm."""


def preparation(size: int | tuple[int, int]) -> Preparation:
    """What is done to three 8-bit channels that are fed at a size: 0 becomes -2, 255 becomes 2."""
    return Preparation(Statistics(3, (0.5,) * 3, (0.25,) * 3, None, None, (1, 1)), size)
