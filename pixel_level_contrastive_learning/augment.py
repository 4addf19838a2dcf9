"""Photometric augmentation by per-sample factors, normalisation, and two views of a batch.

Factors are drawn on the CPU, so that operations no sample needs are skipped without asking the
device; kornia's functional operations apply them on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, pi
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .blocks import full_precision
from .inputs import ValueWatch, check_images, check_views
from .views import Placement, View, cut_views, draw_maps, to_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DICE = 9
"""Random numbers that the factors of one sample take."""
ONE_BY_ONE = ("cpu",)
"""Kinds of device on which the views of a batch change colour one after the other."""
READ_AT_ONCE = ("cpu",)
"""Kinds of device whose factors are read to leave out what no sample needs: others would wait."""

Change = Callable[[Tensor], Tensor]
"""Views ``(b, c, h, w)`` to views of the same shape, every pixel in its place."""


class Factors(NamedTuple):
    """What happens to the colour of each sample: tensors ``(b,)``, on the CPU unless captured."""

    brightness: Tensor  # multiplies pixels
    contrast: Tensor  # multiplies the distance from the mean
    saturation: Tensor  # multiplies the distance from gray
    hue: Tensor  # turns the hue, in radians
    sigma: Tensor  # standard deviation of the blur in pixels
    solarise: Tensor  # bool, inverts values from 0.5 up


@dataclass(frozen=True)
class Photometry:
    """How strongly and how often colours are changed.

    Attributes:
        jitter: Strength of brightness, contrast, saturation (factors ``1 - s .. 1 + s``) and hue
            (shifts of ``-s .. s`` turns).
        prob_jitter: Probability of jitter.
        prob_gray: Probability of conversion to grayscale.
        prob_blur: Probability of blur.
        sigma: Smallest and largest standard deviation of the blur, in pixels.
        prob_solarise: Probability that the bright half is inverted, for three channels only.

    >>> Photometry(prob_solarise=1.0).draw(3).solarise
    tensor([True, True, True])
    """

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    prob_jitter: float = 0.8
    prob_gray: float = 0.2
    prob_blur: float = 1.0
    sigma: tuple[float, float] = (0.1, 2.0)
    prob_solarise: float = 0.0

    def draw(self, count: int, channels: int = 3) -> Factors:
        """Factors for ``count`` samples from the CPU's generator, `DICE` numbers per sample."""
        return self.factors(torch.rand(DICE, count, dtype=torch.float32, device="cpu"), channels)

    def factors(self, drawn: Tensor, channels: int = 3) -> Factors:
        """Factors ``(b,)`` for images of so many channels, from ``(9, b)`` floats in [0, 1)."""
        jittered = drawn[4] < self.prob_jitter
        brightness, contrast, saturation, hue = (
            strength * (2 * part - 1) * jittered
            for strength, part in zip(self.jitter, drawn[:4], strict=True)
        )
        low, high = self.sigma
        return Factors(
            brightness=1 + brightness,
            contrast=1 + contrast,
            saturation=torch.where(drawn[5] < self.prob_gray, 0.0, 1 + saturation),
            hue=2 * pi * hue,
            sigma=torch.where(drawn[6] < self.prob_blur, low + (high - low) * drawn[7], 0.0),
            solarise=(drawn[8] < self.prob_solarise) & (channels == 3),
        )


VIEW_ONE = Photometry()
VIEW_TWO = Photometry(prob_blur=0.1, prob_solarise=0.2)
"""The authors' views: the first is always blurred, the second seldom, but sometimes solarised."""


def blur_of(side: int) -> tuple[float, float]:
    """Smallest and largest blur in pixels of views of this side; the authors' have 224 pixels."""
    low, high = (sigma * side / 224 for sigma in VIEW_ONE.sigma)
    return low, high


def change_colour(pixels: Tensor, factors: Factors, largest_sigma: float = 2.0) -> Tensor:
    """Views ``(b, c, h, w)`` in [0, 1] with colours changed, in the order of `Factors`.

    Saturation and hue need three channels; a blur kernel is never larger than the view.
    ``largest_sigma`` sets its size, so that a sample does not depend on the others of its batch.
    """
    from kornia import enhance  # here and not above: it takes a second that no import should cost
    from kornia.filters import filter2d_separable, gaussian_blur2d, get_gaussian_kernel1d

    def blur(some: Tensor, sigma: Tensor) -> Tensor:
        size = 2 * ceil(3 * largest_sigma) + 1  # three deviations to either side: 99.7 %
        rows, columns = (min(size, side - 1 + side % 2) for side in some.shape[-2:])
        if sigma.device.type in READ_AT_ONCE:
            return gaussian_blur2d(some, (rows, columns), torch.stack((sigma, sigma), dim=-1))
        # The same without a look at the values of sigma.
        down, across = (get_gaussian_kernel1d(side, sigma[:, None]) for side in (rows, columns))
        blurred: Tensor = filter2d_separable(some, across, down)
        return blurred

    brightness, contrast = factors.brightness, factors.contrast
    adjust = enhance.adjust_brightness_accumulative, enhance.adjust_contrast_with_mean_subtraction
    pixels = on_some(pixels, brightness != 1, adjust[0], brightness)
    pixels = on_some(pixels, contrast != 1, adjust[1], contrast)
    if pixels.shape[1] == 3:
        saturate = enhance.adjust_saturation_with_gray_subtraction
        pixels = on_some(pixels, factors.saturation != 1, saturate, factors.saturation)
        # Without colour there is no hue to turn.
        turned = (factors.hue != 0) & (factors.saturation != 0)
        pixels = on_some(pixels, turned, enhance.adjust_hue, factors.hue)
    pixels = on_some(pixels, factors.sigma > 0, blur, factors.sigma)
    half = torch.full_like(factors.sigma, 0.5)
    return on_some(pixels, factors.solarise, enhance.solarize, half)


def change_both(
    views: tuple[Tensor, Tensor], factors: tuple[Factors, Factors], largest_sigma: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Both views changed by `change_colour`."""
    one, two = views
    # A GPU needs half as many kernels for one batch of both; a CPU keeps each in its caches.
    if one.device.type in ONE_BY_ONE:
        first, second = factors
        return change_colour(one, first, largest_sigma), change_colour(two, second, largest_sigma)
    joined = Factors(*(torch.cat(both) for both in zip(*factors, strict=True)))
    changed = change_colour(torch.cat(views), joined, largest_sigma)
    return changed[: len(one)], changed[len(one) :]


def on_some(
    pixels: Tensor, chosen: Tensor, operation: Callable[[Tensor, Tensor], Tensor], factor: Tensor
) -> Tensor:
    """The batch with ``operation`` applied to the chosen samples alone."""
    if chosen.device.type not in READ_AT_ONCE:
        return torch.where(rearrange(chosen, "b -> b 1 1 1"), operation(pixels, factor), pixels)
    if not chosen.any():
        return pixels
    if chosen.all():
        return operation(pixels, factor)
    index = to_device(chosen.nonzero().squeeze(1), pixels.device)
    return pixels.index_copy(0, index, operation(pixels[index], factor[chosen]))


class Colour(nn.Module):
    """The default augmentation of one view: `Photometry`, drawn anew for each sample.

    Maps ``(b, channels, h, w)`` float in [0, 1] to the same.
    """

    def __init__(self, photometry: Photometry, channels: int) -> None:
        super().__init__()
        self.photometry = photometry
        self.channels = channels

    def forward(self, pixels: Tensor) -> Tensor:
        factors = self.photometry.draw(len(pixels), self.channels)
        return change_colour(pixels, factors, self.photometry.sigma[1])


def statistics(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel: those given, else ImageNet's or its average."""
    default_mean, default_std = (
        three if channels == 3 else (sum(three) / 3,) * channels
        for three in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (
        default_mean if mean is None else tuple(map(float, mean)),
        default_std if std is None else tuple(map(float, std)),
    )


class Normalise(nn.Module):
    """Values from [0, 1] to about zero mean and unit variance, channel by channel.

    Args:
        mean: One value per channel.
        std: One value per channel, above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean.to(pixels)) / self.std.to(pixels)


class Augmentation(nn.Module):
    """A photometric change of a view and, unless the change normalises too, normalisation."""

    def __init__(self, change: Change, normalise: Normalise | None) -> None:
        super().__init__()
        self.change = change
        self.normalise = normalise

    def forward(self, pixels: Tensor) -> Tensor:
        """Change views ``(b, c, h, w)``, float in [0, 1].

        Raises:
            ValueError: The change altered their shape, or did not return a float tensor.
        """
        changed = self.change(pixels)
        if not isinstance(changed, Tensor) or changed.shape != pixels.shape:
            into = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(
                f"augment_fn turned views {tuple(pixels.shape)} into {into}; it must keep the "
                "shape and the position of every pixel: change only colour there, and set geometry "
                "with cutout_ratio_range, prob_rand_hflip, prob_rand_vflip and max_rotation"
            )
        if not changed.is_floating_point():
            raise ValueError(
                f"augment_fn turned views of {pixels.dtype} into {changed.dtype}; it must return "
                "floats, of the range the network takes: divide by 255 after operations on bytes"
            )
        return self.normalised(changed)

    def normalised(self, changed: Tensor) -> Tensor:
        """Changed pixels as the network takes them."""
        return changed if self.normalise is None else self.normalise(changed)


class BothAugmentations(nn.Module):
    """The augmentations of both views, as one batch if both are `Colour` with the same kernels."""

    def __init__(self, one: Augmentation, two: Augmentation) -> None:
        super().__init__()
        self.one = one
        self.two = two

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        """Both views ``(b, c, h, w)``, float in [0, 1], changed."""
        ways = [twin.change for twin in (self.one, self.two) if type(twin.change) is Colour]
        if len({way.photometry.sigma for way in ways}) != 1 or len(ways) != 2:
            return self.one(one), self.two(two)
        first, second = (way.photometry.draw(len(one), way.channels) for way in ways)
        changed = change_both((one, two), (first, second), ways[0].photometry.sigma[1])
        return self.one.normalised(changed[0]), self.two.normalised(changed[1])


class TwoViews(nn.Module):
    """Makes two views of each image, or checks two that were made elsewhere.

    ``changes`` are the user's own of each view, the first alone for both, or None for the default
    colour; images must have at least ``smallest`` pixels a side; the rest is as `PixelCL` takes it.
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
        first, second = changes
        second = first if second is None else second
        self.size = size
        self.channels = channels
        self.placement = placement
        self.mode = mode
        self.smallest = smallest
        self.watch = ValueWatch()
        normalise = Normalise(*statistics(channels, mean, std))
        # The user's function normalises by itself unless statistics are given.
        after_own = None if mean is None and std is None else normalise
        self.augment = BothAugmentations(
            *(
                Augmentation(Colour(default, channels), normalise)
                if change is None
                else Augmentation(change, after_own)
                for change, default in ((first, VIEW_ONE), (second, VIEW_TWO))
            )
        )

    # Random and different from batch to batch: not worth compiling.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def forward(self, images: Tensor | Sequence[View]) -> tuple[View, View]:
        """The two views; all random numbers come from torch's CPU generator."""
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
            if self.mode == "bicubic":  # it overshoots beside edges, below 0 and above 1
                cut = [view.clamp(*images.detach().aminmax()) for view in cut]
            changed = self.augment(*cut)
        one, two = (
            View(pixels, to_device(to_image, images.device))
            for pixels, to_image in zip(changed, maps, strict=True)
        )
        return one, two
