"""Dense features: what layers of any backbone give for images, cell by cell, without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..augment import Normalise
from ..backbones.checkpoint import BackboneCard
from ..checks import raise_together, size_pair
from ..data.statistics import Statistics, can_convert
from ..modules.feature_info import FeatureInfo, duplicate, unfreeze
from ..modules.hooks import FeatureHooks, as_map, first_weight
from ..modules.layer import default_maps

Size = tuple[int, int]
FINEST_STRIDE = 3
"""Maps of a smaller stride than this are not read: they cost most and know least."""


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
        fast: Whether features are read in bfloat16 where the device has instructions for it.

    Raises:
        ValueError: A layer is not there or gives no map, or images of this size are refused.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[str] | None,
        channels: int,
        size: Size,
        *,
        fast: bool = False,
    ) -> None:
        # Frozen weights are read like others; feature info refuses hooks without gradient.
        info = FeatureInfo(unfreeze(duplicate(net)), channels, size)
        names = list(layers) if layers else info.default_pixels()
        hooks = [info.hook(name, pixel=True) for name in dict.fromkeys(names)]
        self.net, self.fast = net, fast
        self.layouts = {hook.name: hook.layout for hook in hooks}
        self.hooks = FeatureHooks(*hooks)

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return list(self.layouts)

    def channels(self, layers: Sequence[str] | None = None) -> int:
        """Channels of the features of some of the layers, by default of all."""
        return sum(self.layouts[name].channels for name in layers or self.layouts)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Each layer's map ``(b, c, h, w)``, with whatever gradient and mode the network is in."""
        outputs = self.hooks.run(self.net, pixels)
        size = pixels.shape[-2], pixels.shape[-1]
        return [as_map(outputs[name], reading, size) for name, reading in self.layouts.items()]

    def __call__(self, pixels: Tensor) -> Tensor:
        """The features of images in eval mode, modes restored afterwards.

        Args:
            pixels: ``(b, c, h, w)`` float, normalised, anywhere.

        Returns:
            ``(b, channels, h', w')`` float32 on the network's device.
        """
        (maps,) = in_parts(lambda some: list(self.read(some, [self.layers])), pixels)
        return maps

    @torch.no_grad()
    def read(self, pixels: Tensor, choices: Iterable[Sequence[str]]) -> Iterator[Tensor]:
        """The features of some choices of the layers, one after the other, of a single forward."""
        device = device_of(self.net)
        # Batch norms whose weights are in halves refuse what autocast makes of their input.
        fast = self.fast and first_weight(self.net, pixels).dtype == torch.float32
        with evaluating(self.net), autocast(device, enabled=fast):
            maps = dict(zip(self.layers, self.maps(pixels.to(device)), strict=True))
        for names in choices:
            chosen = [maps[name].float() for name in names]
            finest = max((tuple(layer_map.shape[-2:]) for layer_map in chosen), key=prod)
            yield torch.cat([resized(layer_map, finest) for layer_map in chosen], dim=1)


def in_parts(read: Callable[[Tensor], Sequence[Tensor]], pixels: Tensor) -> Sequence[Tensor]:
    """What is read of a batch of images; of its halves where the device has no room for all.

    Raises:
        OutOfMemoryError: The device has no room for a single image.
    """
    try:
        return read(pixels)
    except torch.OutOfMemoryError as error:
        if len(pixels) == 1:
            h, w = pixels.shape[-2:]
            raise torch.OutOfMemoryError(
                f"not enough memory on the device for an image at {h}x{w} pixels; give a smaller "
                "size (--size), or use device cpu"
            ) from error
    halves = [in_parts(read, half) for half in pixels.chunk(2)]
    return [torch.cat(parts) for parts in zip(*halves, strict=True)]


def deepest_maps(net: nn.Module, channels: int, size: Size) -> list[str]:
    """The layers that give the deepest map of each stride from `FINEST_STRIDE`, the coarsest first.

    Raises:
        ValueError: There is none.
    """
    info = FeatureInfo(unfreeze(duplicate(net)), channels, size)
    fit = [
        layer for layer in info.layers if layer.carries_gradient and layer.stride >= FINEST_STRIDE
    ]
    maps = default_maps(fit)
    if not maps:
        raise ValueError(
            f"{info.net_type} has no map to decode with a stride of {FINEST_STRIDE} or "
            f"more; {info.advice(pixel=True)}"
        )
    return [layer.name for layer in info.pyramid(maps)]


def resized(maps: Tensor, grid: tuple[int, ...], *, antialias: bool = False) -> Tensor:
    """Maps ``(b, c, h, w)`` at another grid."""
    if tuple(maps.shape[-2:]) == grid:
        return maps
    return interpolate(maps, grid, mode="bilinear", antialias=antialias)


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
        raise ValueError(
            f"device is {name!r}, which is not available; choose from {here}"
        ) from error
    return device


def native_bfloat16(kind: str) -> bool:
    """Whether a kind of device has bfloat16 instructions."""
    if kind == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if kind != "cpu":
        return False
    queries = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # not public in torch
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in queries)


def autocast(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    """A context of bfloat16 where the device has instructions for it, else of float32."""
    enabled = enabled and native_bfloat16(device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


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
LONGEST = 16
"""Longer side over shorter side up to which an image is fed with the shorter side asked for; longer
ones are fed with as many pixels as that has, for memory grows with them."""


@dataclass(frozen=True)
class Preparation:
    """What is done to every image before a network sees it.

    Attributes:
        statistics: The form its values take, and their mean and standard deviation.
        size: The shorter side in pixels, aspect kept, less for strips (see `LONGEST`); or exactly
            ``(height, width)``.
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
        size = tuple(size) if isinstance(size, list) else size
        if card.fixed_size is not None:
            if size not in (None, card.fixed_size):
                h, w = card.fixed_size
                raise ValueError(
                    f"size is {size!r}, but {card.model} was built for images of {h}x{w} only; "
                    "leave size out"
                )
            size = card.fixed_size
        elif size is None:
            size = round(WHOLE_IMAGE * min(card.image_size))
            if net is not None and not takes(net, card.channels, size):
                size = card.image_size
        elif net is not None and not takes(net, card.channels, size):
            h, w = card.image_size
            raise ValueError(
                f"size is {size!r}, which {card.model} does not accept; give {h} {w}, the size "
                "of the views it was trained on, or leave size out"
            )
        form = card.channels, card.mean, card.std, card.low, card.high
        return cls(Statistics(*form, card.image_size), size)

    @property
    def form(self) -> tuple[object, ...]:
        """What decides the pixels of an image before they are normalised."""
        form = self.statistics
        return self.size, form.channels, form.low, form.high

    def fitted(self, size: Size) -> Size:
        """The ``(height, width)`` at which an image of ``size`` is fed."""
        if isinstance(self.size, tuple):
            return self.size
        shorter, longer = sorted(size)
        factor = self.size / shorter * min(1, (LONGEST * shorter / longer) ** 0.5)
        h, w = (max(1, round(side * factor)) for side in size)
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
        return resized(pixels[None], size, antialias=True)[0]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels ``(..., c, h, w)`` in [0, 1], each channel's mean and deviation taken out."""
        normal: Tensor = Normalise(self.statistics.mean, self.statistics.std)(pixels)
        return normal


def takes(net: nn.Module, channels: int, size: int | Size) -> bool:
    """Whether a network takes images of a size; of a shorter side, whether lying or upright."""
    if isinstance(size, tuple):
        shapes = [size]
    else:
        longer = round(size * WHOLE_IMAGE) | 1  # odd: sides of images are multiples of nothing
        shapes = [(size, longer), (longer, size)]
    weight = first_weight(net, torch.empty(0))
    blank = torch.zeros((), device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad(), evaluating(net):
            for shape in shapes:
                net(blank.expand(1, channels, *shape))
    except Exception:  # whatever a network says: assertions, too
        return False
    return True
