"""Preparation: from the pixels of a file to what a network is fed, at a size it can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..augment import Normalise
from ..backbones import default_image_size
from ..checks import raise_together, size_pair
from ..data.statistics import Statistics, fits
from ..modules.taps import first_weight
from ..weights import BackboneCard
from .features import evaluating

WHOLE_IMAGE = 1.4
"""Sides of a view that the shorter side of a whole image is fed with, unless a size is given: the
scale at which training saw it, on average, for views are crops. (Of area 0.08 to 1 a crop has 0.69
of the image's side in the mean.) Features judged at twice that scale are not those that were
trained: on street scenes random weights gain more from larger images than trained ones do."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Preparation:
    """What is done to every image before a network sees it.

    Attributes:
        statistics: The form its values take, and their mean and standard deviation.
        size: The shorter side in pixels, aspect kept; or exactly ``(height, width)``.
    """

    statistics: Statistics
    size: int | Size

    @classmethod
    def of(
        cls, card: BackboneCard, size: int | Size | None = None, net: nn.Module | None = None
    ) -> Self:
        """As a backbone's card says.

        Args:
            card: Of the backbone.
            size: See above. Default: `WHOLE_IMAGE` times the views it was trained on; the size of
                these views for networks that take no other.
            net: The backbone, which is asked whether it takes the default: networks of one's own
                say nowhere else that they have a fixed input size.

        Raises:
            ValueError: The size is none, or one that the network does not take.
        """
        raise_together(None if size is None else size_pair("size", size))
        if default_image_size(card.model) is not None:
            if size not in (None, card.image_size):
                h, w = card.image_size
                raise ValueError(
                    f"size is {size!r}, but {card.model} was built for images of {h}x{w} and takes "
                    f"no others; leave size out"
                )
            size = card.image_size
        elif size is None:
            size = round(WHOLE_IMAGE * min(card.image_size))
            if net is not None and not takes(net, card.channels, size):
                size = card.image_size
        elif net is not None and not takes(net, card.channels, size):
            h, w = card.image_size
            raise ValueError(
                f"size is {size!r}, which {card.model} refuses; give the {h} and {w} pixels of the "
                "views it was trained on, or leave size out"
            )
        form = card.channels, card.mean, card.std, card.low, card.high
        return cls(Statistics(*form, card.image_size, card.image_size, 0), size)

    def fitted(self, size: Size) -> Size:
        """The ``(height, width)`` at which an image of ``size`` is fed."""
        if isinstance(self.size, tuple):
            return self.size
        shorter = min(size)
        h, w = (round(side * self.size / shorter) for side in size)
        return h, w

    @property
    def shortest(self) -> int:
        """What the shorter side of an image should measure at least when it is decoded."""
        return max(self.size) if isinstance(self.size, tuple) else self.size

    def in_range(self, pixels: Tensor, name: str) -> Tensor:
        """Values as the network knows them before normalisation.

        Args:
            pixels: ``(c, h, w)`` uint8, or float32 raw values.
            name: The file's name, for complaints.

        Returns:
            ``(channels, h, w)`` float32 in [0, 1].

        Raises:
            ValueError: Other channels, or 16-bit or float values where the weights know 8-bit ones.
        """
        wanted = self.statistics.channels
        if not fits(len(pixels), wanted):
            raise ValueError(
                f"{name} has {len(pixels)} channels, but the network takes {wanted}; give images "
                f"of {wanted} channels, or weights that were trained on {len(pixels)}"
            )
        deep = pixels.dtype != torch.uint8
        if deep and self.statistics.low is None:
            raise ValueError(
                f"{name} holds 16-bit or float values, but these weights were trained on 8-bit "
                "images; give weights that were trained on such data, or write the images as 8-bit"
            )
        formed = self.statistics.form(pixels)
        return formed.float() / 255 if formed.dtype == torch.uint8 else formed

    def resized(self, pixels: Tensor, full: Size | None = None) -> Tensor:
        """Pixels at the size the network is fed, without aliasing.

        Args:
            pixels: ``(c, h, w)`` float.
            full: Size of the full image, where this was decoded smaller.
        """
        size = self.fitted(full or (pixels.shape[-2], pixels.shape[-1]))
        if size == tuple(pixels.shape[-2:]):
            return pixels
        return interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels ``(..., c, h, w)`` in [0, 1], each channel's mean and deviation taken out."""
        normal: Tensor = Normalise(self.statistics.mean, self.statistics.std)(pixels)
        return normal


def takes(net: nn.Module, channels: int, size: int | Size) -> bool:
    """Whether a network takes images of a size; of a shorter side, whether lying or upright."""
    longer = (1, WHOLE_IMAGE), (WHOLE_IMAGE, 1)
    shapes = (
        [size]
        if isinstance(size, tuple)
        else [(round(size * high), round(size * wide)) for high, wide in longer]
    )
    weight = first_weight(net, torch.empty(0))
    blank = torch.zeros((), device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad(), evaluating(net):
            for shape in shapes:
                net(blank.expand(1, channels, *shape))
    except Exception:  # whatever a network says: assertions, too
        return False
    return True
