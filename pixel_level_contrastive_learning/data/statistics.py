"""What a data set is like, from a sample of it: channels, sizes, and how to scale its values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from statistics import median

import torch
from einops import rearrange
from numpy import percentile
from torch import Tensor

from ..augment import IMAGENET_MEAN, IMAGENET_STD
from .image import SCALES, DecodedImage, ImageError, LazyImage, tensor_of
from .sources import Source

PERCENTILES = (0.1, 99.9)
"""Which values of 16-bit and float data become 0 and 1; what lies beyond is clipped."""
MOST_VALUES = 2**15
"""Values of one image that are looked at."""
CHANGES = {(1, 3), (3, 1), (4, 3)}
"""Channels found and wanted that can be brought together: gray, RGB, RGB and a mask."""


@dataclass(frozen=True)
class Statistics:
    """What the loader and the network need to know of the data.

    Attributes:
        channels: Channels that every image is brought to.
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1].
        low: Per channel, the raw value that becomes 0; None for 8-bit data, divided by 255.
        high: Per channel, the raw value that becomes 1; None for 8-bit data.
        smallest: The smallest ``(height, width)`` seen, each for itself.
        median_size: The median ``(height, width)``.
        sampled: How many images were looked at.
    """

    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    smallest: tuple[int, int]
    median_size: tuple[int, int]
    sampled: int

    def accepts(self, opened: LazyImage) -> None:
        """Return if the image can be brought to this form.

        Raises:
            ImageError: It has other channels, or is deeper than the sample was.
        """
        if not fits(opened.channels, self.channels):
            raise ImageError(
                f"it has {opened.channels} channels where the others have {self.channels}; keep "
                "images of one kind in a folder"
            )
        if opened.deep and self.low is None:
            raise ImageError("it is 16-bit or float, where the images looked at were 8-bit")

    def form(self, pixels: Tensor) -> Tensor:
        """Pixels of an accepted image in the form of the run.

        Args:
            pixels: ``(c, h, w)`` uint8, or float32 raw values.

        Returns:
            ``(channels, h, w)``: uint8 where the data is 8-bit, else float32 in [0, 1].
        """
        found = len(pixels)
        if found == 3 and self.channels == 1:
            red, green, blue = pixels.float()
            gray = 0.299 * red + 0.587 * green + 0.114 * blue  # as Pillow does (ITU-R 601-2)
            pixels = (gray.round() if pixels.dtype == torch.uint8 else gray).to(pixels.dtype)[None]
        elif found != self.channels:
            pixels = pixels.expand(self.channels, -1, -1) if found == 1 else pixels[: self.channels]
        if self.low is None or self.high is None:
            return pixels
        if pixels.dtype == torch.uint8:
            return pixels / 255
        low = rearrange(torch.tensor(self.low), "c -> c 1 1")
        high = rearrange(torch.tensor(self.high), "c -> c 1 1")
        return ((pixels - low) / (high - low)).clamp(0, 1)


def measure(
    source: Source, *, channels: int | None = None, seed: int = 0, sample: int = 200
) -> Statistics:
    """Look at a sample of the images.

    Of 8-bit RGB images only the headers are read, and ImageNet's mean and standard deviation hold.
    Gray images among RGB ones become RGB. A fourth band of TIFFs that is nowhere but at its two
    extremes is taken for a mask and left out.

    Args:
        source: The images.
        channels: How many channels the network is to see; found from the data if None.
        seed: Which images are looked at.
        sample: How many.

    Raises:
        ValueError: Not one image can be used.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[tuple[int, LazyImage]] = []
    refused: list[str] = []
    for index in order:
        if len(found) == sample or len(refused) == max(5 * sample, 1000):
            break
        try:
            opened = source.open(index)
        except ImageError as error:
            refused.append(f"{source.name(index)}: {error}")
        else:
            # What it holds, without its bytes: two hundred files may be large.
            found.append((index, replace(opened, load=gone)))
    kinds = [kind for _, kind in found]
    heights, widths = ([kind.size[i] for kind in kinds] for i in (0, 1))
    wanted = channels or usual_channels(Counter(kind.channels for kind in kinds))
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    low = high = None
    if any(kind.deep or kind.channels != 3 for kind in kinds) or wanted != 3:
        looked = [look for look in (looked_at(source, i, refused) for i, _ in found) if look]
        if channels is None and wanted == 4 and all(is_mask(values) for values, _ in looked):
            wanted = 3
        fitting = [(brought(v, wanted), deep) for v, deep in looked if fits(len(v), wanted)]
        if fitting:
            mean, std, low, high = spread(fitting)
        found = found if fitting else []
    if not found:
        raise ValueError(unusable(source, refused, kinds, wanted))
    return Statistics(
        wanted,
        mean,
        std,
        low,
        high,
        smallest=(min(heights), min(widths)),
        median_size=(int(median(heights)), int(median(widths))),
        sampled=len(found),
    )


def gone(_: int) -> DecodedImage:
    """In place of a way to pixels that was let go."""
    raise AssertionError("only what the file holds was kept")


def usual_channels(counts: Counter[int]) -> int:
    """The channels that most images can be brought to: 3 where there is any colour."""
    if 3 in counts and set(counts) <= {1, 3, 4}:
        return 3
    return max(counts, key=lambda c: (counts[c], c), default=3)


def looked_at(source: Source, index: int, refused: list[str]) -> tuple[Tensor, bool] | None:
    """Some values ``(c, n)`` of an image, and whether it is deep; None where it is damaged.

    What was not measured is NaN.
    """
    try:
        opened = source.open(index)
        scale = max((s for s in SCALES if min(opened.size) >= 256 * s), default=1)
        pixels, _, known = opened.raster(scale)
    except ImageError as error:
        refused.append(f"{source.name(index)}: {error}")
        return None
    pixels = pixels if isinstance(pixels, Tensor) else tensor_of(pixels)
    pixels = pixels if known is None else pixels.where(known, torch.nan)
    values = rearrange(pixels, "c h w -> c (h w)")
    step = -(-values.numel() // MOST_VALUES) | 1  # odd, so that it does not keep to one column
    return values[:, ::step].clone(), opened.deep


def is_mask(values: Tensor) -> bool:
    """Whether the last band of ``(c, n)`` values is nowhere but at its two extremes."""
    ends = (0, 255) if values.dtype == torch.uint8 else (0, 65535)
    return len(values) == 4 and bool(((values[-1] == ends[0]) | (values[-1] == ends[1])).all())


def fits(found: int, wanted: int) -> bool:
    """Whether an image of so many channels can be used."""
    return found == wanted or (found, wanted) in CHANGES


def brought(values: Tensor, wanted: int) -> Tensor:
    """Values ``(c, n)`` of a fitting image as ``(wanted, n)``."""
    plain = Statistics(wanted, (), (), None, None, (0, 0), (0, 0), 0)
    return plain.form(values[..., None])[..., 0]


def spread(
    looked: list[tuple[Tensor, bool]],
) -> tuple[
    tuple[float, ...], tuple[float, ...], tuple[float, ...] | None, tuple[float, ...] | None
]:
    """Mean, standard deviation, and the raw values that become 0 and 1, of each channel.

    All of what was measured: NaNs are left out.
    """
    deep = [values for values, is_deep in looked if is_deep]
    shallow = [values / 255 for values, is_deep in looked if not is_deep]
    low = high = None
    if deep:
        values = torch.cat(deep, dim=1).double()
        both = [percentile(numbers_of(channel).numpy(), PERCENTILES) for channel in values]
        ends = torch.stack(list(map(torch.from_numpy, both)), dim=1)
        ends[1] = torch.where(ends[1] > ends[0], ends[1], ends[0] + 1)  # constant: no range
        low, high = (tuple(end.tolist()) for end in ends)
        start, stop = rearrange(ends, "end c -> end c 1")
        shallow.append(((values - start) / (stop - start)).clamp(0, 1))
    unit = torch.cat([values.double() for values in shallow], dim=1)
    channels = [numbers_of(channel) for channel in unit]
    mean = tuple(channel.mean().item() for channel in channels)
    std = tuple(channel.std(correction=0).clamp(min=1 / 255).item() for channel in channels)
    return mean, std, low, high


def numbers_of(values: Tensor) -> Tensor:
    """Those of some values ``(n,)`` that are numbers; a 0 where none is."""
    numbers = values[~values.isnan()]
    return numbers if len(numbers) else values.new_zeros(1)


def unusable(source: Source, refused: list[str], kinds: list[LazyImage], wanted: int) -> str:
    """The complaint about data of which nothing can be used."""
    if kinds and not refused:
        found = sorted({kind.channels for kind in kinds})
        return (
            f"channels is {wanted}, but the images have {', '.join(map(str, found))}; leave it "
            "out, or name data of that kind"
        )
    shown = "".join(f"\n  {line}" for line in refused[:5])
    return (
        f"none of the {len(refused)} images looked at (of {len(source)}) can be used; the first "
        f"of them:{shown}"
    )
