"""Dense features: what layers of any backbone give for images, cell by cell, without gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..augment import Normalise, statistics
from ..backbones.checkpoint import BackboneCard
from ..backbones.factory import default_image_size
from ..checks import raise_together, size_pair
from ..data.statistics import Statistics, can_convert
from ..modules.feature_info import FeatureInfo, duplicate, unfreeze
from ..modules.hooks import FeatureHooks, as_map, first_weight


class Reader:
    """Reads some layers of a network as one map.

    Several layers are resized to the finest of them and stacked. The network is looked at once, on
    a copy; it keeps its weights, modes and hooks.

    Args:
        net: The network.
        layers: Names of its layers, each giving a map or tokens; None takes the deepest map of at
            least 4x4 cells with a stride of at most 32.
        channels: Channels of its images.
        size: ``(height, width)`` of images it takes; others may be read as well.

    Raises:
        ValueError: A layer is not there or gives no map, or images of this size are refused.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[str] | None,
        channels: int,
        size: tuple[int, int],
    ) -> None:
        # Frozen weights are read like others; feature info refuses hooks without gradient.
        info = FeatureInfo(unfreeze(duplicate(net)), channels, size)
        names = list(layers) if layers else [info.default_pixel()]
        hooks = [info.hook(name, pixel=True) for name in dict.fromkeys(names)]
        self.net = net
        self.channels = sum(hook.layout.channels for hook in hooks)
        self.layouts = {hook.name: hook.layout for hook in hooks}
        self.hooks = FeatureHooks(*hooks)

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return list(self.layouts)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Each layer's map ``(b, c, h, w)``, with whatever gradient and mode the network is in."""
        outputs = self.hooks.run(self.net, pixels)
        size = pixels.shape[-2], pixels.shape[-1]
        return [as_map(outputs[name], reading, size) for name, reading in self.layouts.items()]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """The features of images in eval mode, modes restored afterwards.

        Args:
            pixels: ``(b, c, h, w)`` float, normalised, anywhere.

        Returns:
            ``(b, channels, h', w')`` float32 on the network's device.
        """
        device = device_of(self.net)
        with evaluating(self.net):
            maps = [own.float() for own in self.maps(pixels.to(device))]
        finest = max((tuple(own.shape[-2:]) for own in maps), key=lambda grid: grid[0] * grid[1])
        return torch.cat([resized(own, finest) for own in maps], dim=1)


def dense_features(
    net: nn.Module,
    images: Tensor | Iterable[Tensor],
    layers: Sequence[str] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch: int = 16,
) -> Tensor:
    """What layers give for images of one size. All of it is held: meant for some dozens of images.

    Args:
        net: The network, on whatever device; its modes are restored.
        images: ``(n, c, h, w)`` or images ``(c, h, w)`` one by one: float in [0, 1], or uint8.
        layers: Names of layers; several are resized to the finest of them and stacked. None takes
            the deepest map of at least 4x4 cells with a stride of at most 32.
        mean: Per-channel mean the images are normalised with. Default: ImageNet's for three
            channels, its average for any other count.
        std: Per-channel standard deviation, likewise.
        batch: Images that are run at once.

    Returns:
        ``(n, channels of the layers, h', w')`` float32 on the CPU.

    Raises:
        ValueError: No image; or a layer that is not there or gives no map.
    """
    reader: Reader | None = None
    normalise: nn.Module = nn.Identity()
    parts = []
    for pixels in batched(images, batch):
        if reader is None:
            channels, size = pixels.shape[1], (pixels.shape[2], pixels.shape[3])
            reader = Reader(net, layers, channels, size)
            normalise = Normalise(*statistics(channels, mean, std))
        unit = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        parts.append(reader(normalise(unit)).cpu())
    if not parts:
        raise ValueError("images is empty; give at least one image (c, h, w)")
    return torch.cat(parts)


def batched(images: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Images ``(c, h, w)`` stacked ``count`` at a time."""
    waiting = iter(images)
    while some := list(islice(waiting, count)):
        yield torch.stack(some)


def resized(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Maps ``(b, c, h, w)`` at another grid."""
    if tuple(maps.shape[-2:]) == grid:
        return maps
    return interpolate(maps, grid, mode="bilinear")


def chosen_device(name: str | None) -> torch.device:
    """The device of a name; of None a GPU if there is one, else the CPU.

    Raises:
        ValueError: There is no such device.
    """
    gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # by how far torch comes with it
        here = ", ".join(["cpu", *(f"cuda:{number}" for number in range(gpus))])
        raise ValueError(f"device is {name!r}, which is not here; here are {here}") from error
    return device


def device_of(net: nn.Module) -> torch.device:
    """Where the network's weights lie."""
    return next((weight.device for weight in net.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Have every module in eval mode for a while, then each in the mode it was in."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
        return cls(Statistics(*form, card.image_size), size)

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
        if not can_convert(len(pixels), wanted):
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
        formed = self.statistics.convert(pixels)
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
