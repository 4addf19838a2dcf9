"""Dense features: what layers of any backbone give for images, cell by cell, without gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..augment import Normalise, statistics
from ..modules.layouts import as_map
from ..modules.survey import Survey, duplicate, thawed
from ..modules.taps import Taps


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
        # Frozen weights may be read as well as others, but a survey refuses taps without gradient.
        survey = Survey(thawed(duplicate(net)), channels, size)
        names = list(layers) if layers else [survey.default_pixel()]
        taps = [survey.tap(name, pixel=True) for name in dict.fromkeys(names)]
        self.net = net
        self.channels = sum(tap.reading.channels for tap in taps)
        self.readings = {tap.name: tap.reading for tap in taps}
        self.taps = Taps(*taps)

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return list(self.readings)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Each layer's map ``(b, c, h, w)``, with whatever gradient and mode the network is in."""
        outputs = self.taps.run(self.net, pixels)
        size = pixels.shape[-2], pixels.shape[-1]
        return [as_map(outputs[name], reading, size) for name, reading in self.readings.items()]

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
