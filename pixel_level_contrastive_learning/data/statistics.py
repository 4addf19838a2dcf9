"""Statistics of a sample of the images: channels, sizes, and how values are scaled."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from einops import rearrange
from numpy import percentile, unique
from torch import Tensor

from ..augment import IMAGENET_MEAN, IMAGENET_STD
from ..checks import counted
from .image import ImageError, LazyImage, largest_scale, to_tensor
from .sources import Source

log = logging.getLogger(__name__)

PerChannel = tuple[float, ...]
Scaling = tuple[PerChannel, PerChannel, PerChannel | None, PerChannel | None]
"""Mean, deviation, and the raw values that become 0 and 1."""

PERCENTILES = (0.1, 99.9)
"""Which values of 16-bit and float data become 0 and 1; what lies beyond is clipped."""
LEAST_RANGE = 2.0**-20
"""Range of a constant band, at least 1, as a share of its value: float32 tells both ends apart."""
VALUES_PER_IMAGE = 2**15
"""Values of one image that are measured, at most."""
CONVERTIBLE = {(1, 3), (3, 1), (4, 3)}
"""Channels found and wanted that can be converted: gray, RGB, RGB and a mask."""


USUAL_NODATA = (0, -999, -9999, -99999, -32768, 32767, 65535)
"""Values that are often written where nothing was measured."""
FAR, FAR_USUAL = 10.0, 1.0
"""How many ranges of all other values a value lies away from them to be taken for no value: any,
and one of the usual ones. What is bright or dark is rarely that far."""
LEAST_SHARE = (100 - PERCENTILES[1]) / 100
"""Share of all values that such a value has at least: with less, it moves no percentile."""
LEAST_KINDS = 16
"""Different values that the others must have: a few kinds of values are classes, not a range."""


@dataclass(frozen=True)
class Statistics:
    """What the loader and the network need to know of the images.

    Attributes:
        channels: Channels that every image is converted to.
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1].
        low: Per channel, the raw value that becomes 0; None for 8-bit data, divided by 255.
        high: Per channel, the raw value that becomes 1; None for 8-bit data.
        median_size: The median ``(height, width)``.

    Example:
        >>> statistics = Statistics(1, (0.5,), (0.2,), (100.0,), (300.0,), (64, 64))
        >>> statistics.convert(torch.tensor([[[50.0, 150.0, 300.0]]]))
        tensor([[[0.0000, 0.2500, 1.0000]]])
    """

    channels: int
    mean: PerChannel
    std: PerChannel
    low: PerChannel | None
    high: PerChannel | None
    median_size: tuple[int, int]

    def check(self, image: LazyImage) -> None:
        """Refuse an image that cannot be converted.

        Raises:
            ImageError: It has other channels, or a higher bit depth than the sample had.
        """
        if not can_convert(image.channels, self.channels):
            raise ImageError(
                f"it has {counted(image.channels, 'channel')} where the others have "
                f"{self.channels}; keep images of one kind in a folder, or change how pages are "
                "read (--pages)"
            )
        if image.high_depth and self.low is None:
            raise ImageError("it is 16-bit or float, where the images looked at were 8-bit")

    def convert(self, pixels: Tensor) -> Tensor:
        """Pixels of an image that passed `check`, with the run's channels and range.

        Args:
            pixels: ``(c, h, w)`` uint8, or float32 raw values.

        Returns:
            ``(channels, h, w)``: uint8 where the data is 8-bit, else float32 in [0, 1].
        """
        pixels = convert_channels(pixels, self.channels)
        if self.low is None or self.high is None:
            return pixels
        if pixels.dtype == torch.uint8:
            return pixels / 255
        low = rearrange(torch.tensor(self.low), "c -> c 1 1")
        high = rearrange(torch.tensor(self.high), "c -> c 1 1")
        return ((pixels - low) / (high - low)).clamp(0, 1)


def read_image(
    source: Source,
    index: int,
    statistics: Statistics,
    at_least: int | tuple[int, int] | None = None,
) -> Tensor:
    """The upright pixels of an image that the statistics can convert; see `LazyImage.read`.

    Raises:
        ImageError: It cannot be read, or is of another kind.
    """
    image = source.open(index)
    statistics.check(image)
    return image.read(at_least)


def can_convert(found: int, wanted: int) -> bool:
    """Whether an image of so many channels can be used."""
    return found == wanted or (found, wanted) in CONVERTIBLE


def convert_channels(pixels: Tensor, wanted: int) -> Tensor:
    """Pixels ``(c, ...)`` as ``(wanted, ...)``, of the same type."""
    found = len(pixels)
    if found == wanted:
        return pixels
    if (found, wanted) == (3, 1):
        red, green, blue = pixels.float()
        gray: Tensor = 0.299 * red + 0.587 * green + 0.114 * blue  # as Pillow does (ITU-R 601-2)
        return (gray.round() if pixels.dtype == torch.uint8 else gray).to(pixels.dtype)[None]
    return pixels.expand(wanted, *pixels.shape[1:]) if found == 1 else pixels[:wanted]


class Header(NamedTuple):
    """What the header of an image says."""

    size: tuple[int, int]
    channels: int
    high_depth: bool


def measure(
    source: Source, *, channels: int | None = None, seed: int = 0, sample: int = 200
) -> Statistics:
    """Measure a sample of the images.

    Of 8-bit RGB images only the headers are read, and ImageNet's mean and standard deviation are
    used. Gray images among RGB ones become RGB. A fourth band of TIFFs that holds nothing but its
    two extremes is taken for a mask and left out.

    Args:
        source: The images.
        channels: How many channels the network is to see; found from the data if None.
        seed: Which images are measured.
        sample: How many.

    Raises:
        ValueError: Not one image can be used.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    headers: dict[int, Header] = {}
    refused: list[str] = []
    for index in order:
        if len(headers) == sample or len(refused) == max(5 * sample, 1000):
            break
        try:
            image = source.open(index)
        except ImageError as error:
            refused.append(f"{source.name(index)}: {error}")
        else:
            headers[index] = Header(image.size, image.channels, image.high_depth)
    found = headers.values()
    wanted = channels or usual_channels(Counter(header.channels for header in found))
    scaling: Scaling = (IMAGENET_MEAN, IMAGENET_STD, None, None)
    usable = len(headers) > 0
    if wanted != 3 or any(header.high_depth or header.channels != 3 for header in found):
        measured = [(sample_values(source, i, refused), headers[i].high_depth) for i in headers]
        values = [(values, deep) for values, deep in measured if values is not None]
        if channels is None and wanted == 4 and all(is_mask(*one) for one in values):
            wanted = 3
        elif channels is None and wanted == 3:
            warn_of_fourth(values)
        values = [
            (convert_channels(bands, wanted), deep)
            for bands, deep in values
            if can_convert(len(bands), wanted)
        ]
        usable = len(values) > 0
        if usable:
            few = torch.cat([bands.flatten()[::16].double() for bands, _ in values])
            if (kinds := len(unique(few.numpy()))) < LEAST_KINDS:
                log.warning(
                    "the images hold %d different values; check whether they are masks", kinds
                )
            scaling = channel_statistics(values)
    if not usable:
        raise ValueError(unusable_message(source, refused, headers, wanted))
    heights, widths = zip(*(header.size for header in found), strict=True)
    return Statistics(wanted, *scaling, (int(median(heights)), int(median(widths))))


def usual_channels(counts: Counter[int]) -> int:
    """The channels that most images can be converted to: 3 where there is any colour."""
    if 3 in counts and set(counts) <= {1, 3, 4}:
        return 3
    return max(counts, key=lambda c: (counts[c], c), default=3)


def sample_values(source: Source, index: int, refused: list[str]) -> Tensor | None:
    """Some values ``(c, n)`` of an image, NaN where not measured; None where it is damaged."""
    try:
        image = source.open(index)
        pixels, _, _, known = image.decode(largest_scale(min(image.size) / 256))
    except ImageError as error:
        refused.append(f"{source.name(index)}: {error}")
        return None
    pixels = to_tensor(pixels)
    pixels = pixels if known is None else pixels.where(known, torch.nan)
    values = rearrange(pixels, "c h w -> c (h w)")
    step = -(-values.numel() // VALUES_PER_IMAGE) | 1  # odd, so that it does not keep to one column
    return values[:, ::step].clone()


def is_mask(values: Tensor, is_deep: bool) -> bool:
    """Whether the last of four bands of values ``(c, n)``, some NaN, holds only its extremes."""
    last, high = values[-1], 65535 if is_deep else 255
    return len(values) == 4 and bool(((last == 0) | (last == high) | last.isnan()).all())


def warn_of_fourth(values: Sequence[tuple[Tensor, bool]]) -> None:
    """Warn of four bands ``(4, n)`` that become three since other images have three."""
    if count := sum(len(bands) == 4 and not is_mask(bands, deep) for bands, deep in values):
        log.warning(
            "%d of %d images have a fourth channel that is no mask and is left out, since others "
            "have 3; keep images of one kind in a folder, or give --channels 4",
            count,
            len(values),
        )


def channel_statistics(values: list[tuple[Tensor, bool]]) -> Scaling:
    """The scaling that follows from each image's values ``(c, n)`` and whether they are raw."""
    deep = [channels for channels, is_deep in values if is_deep]
    unit = [channels / 255 for channels, is_deep in values if not is_deep]
    low = high = None
    if deep:
        raw = torch.cat(deep, dim=1).double()
        warn_of_nodata(raw, leave_out_far(raw))
        both = [percentile(measured_only(channel).numpy(), PERCENTILES) for channel in raw]
        ends = torch.stack(list(map(torch.from_numpy, both)), dim=1)
        least = ends[0] + (ends[0].abs() * LEAST_RANGE).clamp(min=1)
        ends[1] = torch.where(ends[1].float() > ends[0].float(), ends[1], least)  # constant
        low, high = (tuple(end.tolist()) for end in ends)
        start, stop = rearrange(ends, "end c -> end c 1")
        unit.append(((raw - start) / (stop - start)).clamp(0, 1))
    joined = torch.cat([channels.double() for channels in unit], dim=1)
    channels = [measured_only(channel) for channel in joined]
    mean = tuple(channel.mean().item() for channel in channels)
    std = tuple(channel.std(correction=0).clamp(min=1 / 255).item() for channel in channels)
    return mean, std, low, high


def leave_out_far(raw: Tensor) -> Counter[float]:
    """Values that stretch the range of a channel because they lie far from all others.

    They are replaced by NaN in place.

    Args:
        raw: ``(c, n)`` float64.

    Returns:
        How often each was there.
    """
    found: Counter[float] = Counter()
    for channel in raw:
        for _ in range(2):  # one below all others, and one above
            values = measured_only(channel)
            for value in (values.min(), values.max()):
                gone = channel == value
                others = measured_only(channel.where(~gone, torch.nan))
                count = int(gone.sum())
                if count < LEAST_SHARE * len(values) or len(unique(others.numpy())) < LEAST_KINDS:
                    continue
                low, high = percentile(others.numpy(), PERCENTILES)
                far = FAR_USUAL if value.item() in USUAL_NODATA else FAR
                if max(low - value, value - high) > far * (high - low):
                    channel[gone] = torch.nan
                    found[value.item()] += count
    return found


def warn_of_nodata(raw: Tensor, found: Counter[float]) -> None:
    """Warn of values that were left out, which perhaps mean that nothing was measured."""
    total = int((~raw.isnan()).sum()) + found.total()
    for value, count in found.items():
        log.warning(
            "%g fills %.2g %% of the values and lies far from all others: the range leaves it "
            "out. Give --nodata %g if it means that nothing was measured",
            value,
            100 * count / total,
            value,
        )


def measured_only(values: Tensor) -> Tensor:
    """Those of some values ``(n,)`` that are no NaN; a 0 where none is."""
    numbers = values[~values.isnan()]
    return numbers if len(numbers) else values.new_zeros(1)


def unusable_message(
    source: Source, refused: list[str], headers: dict[int, Header], wanted: int
) -> str:
    """The message about images of which none can be used."""
    found = sorted({header.channels for header in headers.values()})
    if found and not any(can_convert(channels, wanted) for channels in found):
        return (
            f"channels is {wanted}, but the images have {', '.join(map(str, found))}; leave it "
            "out, or give data of that kind"
        )
    shown = "".join(f"\n  {line}" for line in refused[:5])
    return (
        f"none of the {len(refused)} images looked at (of {len(source)}) can be used; the first "
        f"of them:{shown}"
    )
