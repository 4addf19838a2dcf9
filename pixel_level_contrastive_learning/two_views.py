"""From a batch of images to two views of each: drawn, cut, changed in colour and normalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .augment import (
    VIEW_ONE,
    VIEW_TWO,
    Augmentation,
    BothAugmentations,
    Change,
    Colour,
    Normalise,
    statistics,
)
from .blocks import full_precision
from .inputs import ValueWatch, check_images, check_views
from .views import Placement, View, cut_views, draw_maps, to_device


class TwoViews(nn.Module):
    """Makes two views of each image, or looks through two that were made elsewhere.

    Args:
        size: ``(height, width)`` of the views.
        channels: Channels of the images.
        changes: The user's own photometric change of each view, or None for the default.
        placement: How the views are laid over their images.
        mode: How they are sampled.
        mean: Per-channel mean, or None for the default.
        std: Per-channel standard deviation, or None for the default.
        smallest: Height and width that images must at least have.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        changes: tuple[Change | None, Change | None],
        placement: Placement,
        *,
        mode: str,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        smallest: int,
    ) -> None:
        super().__init__()
        self.size = size
        self.channels = channels
        self.placement = placement
        self.mode = mode
        self.smallest = smallest
        self.watch = ValueWatch()
        normalise = Normalise(*statistics(channels, mean, std))
        # A function of the user's is taken to normalise by itself unless statistics are given.
        after_own = None if mean is None and std is None else normalise
        self.augment = BothAugmentations(
            *(
                Augmentation(Colour(default, channels), normalise)
                if change is None
                else Augmentation(change, after_own)
                for change, default in zip(changes, (VIEW_ONE, VIEW_TWO), strict=True)
            )
        )

    # Random, and different from batch to batch: nothing here is worth compiling.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def forward(self, images: Tensor | Sequence[View]) -> tuple[View, View]:
        """The two views; all random numbers come from torch's CPU generator.

        Args:
            images: ``(b, channels, height, width)`` float in [0, 1], or two views.

        Raises:
            ValueError: Neither, or values that no image has.
        """
        if isinstance(images, (tuple, list)):
            one, two = check_views(images, self.channels)
            self.watch(one.pixels, in_unit_range=False)
            self.watch(two.pixels, in_unit_range=False)
            return one, two
        images = check_images(images, self.channels, self.smallest)
        self.watch(images, in_unit_range=True)
        shape = images.shape[2], images.shape[3]
        maps = [draw_maps(len(images), shape, self.placement) for _ in "12"]
        with full_precision(images):  # autocast would round what the blur's convolution gives
            cut = [cut_views(images, to_image, self.size, self.mode) for to_image in maps]
            changed = self.augment(*cut)
        one, two = (
            View(pixels, to_device(to_image, images.device))
            for pixels, to_image in zip(changed, maps, strict=True)
        )
        return one, two
