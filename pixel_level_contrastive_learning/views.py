"""Views: pixels and the map to where they came from. Drawing maps, cutting views out of images.

Maps are drawn on the CPU from torch's generator; the pixels are a function of image and map alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, log2
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from .geometry import cell_centres


class View(NamedTuple):
    """A view of each image of a batch, and where it lies in its image.

    It is a NamedTuple, so data loaders collate it and move it to a device as it is.

    Attributes:
        pixels: ``(b, c, h, w)`` float, ready for the network (cut, augmented, normalised).
        to_image: ``(b, 2, 3)`` float32 or float64 map from the view's unit square (``u`` to the
            right, ``v`` down, 0 to 1 from edge to edge) to source-image pixels ``(x, y)``.
    """

    pixels: Tensor
    to_image: Tensor


@dataclass(frozen=True)
class Placement:
    """How views are placed on their images, drawn for each image and each view.

    Attributes:
        ratio_range: Smallest and largest side of a crop as a fraction of the image's, in (0, 1].
            The crop keeps the image's aspect ratio.
        prob_hflip: Probability of a left-right flip.
        prob_vflip: Probability of an upside-down flip.
        max_rotation: Largest rotation in degrees, either way.
        area_range: Smallest and largest fraction of the image's *area*, in (0, 1], instead of
            ``ratio_range``; the aspect ratio is drawn too.
        aspect_range: Smallest and largest aspect ratio (width / height) of a crop whose area is
            drawn.
    """

    ratio_range: tuple[float, float] = (1.0, 1.0)
    prob_hflip: float = 0.0
    prob_vflip: float = 0.0
    max_rotation: float = 0.0
    area_range: tuple[float, float] | None = None
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3)


def draw_maps(count: int, image_size: tuple[int, int], placement: Placement) -> Tensor:
    """Random view maps, one per image: a crop, flipped and rotated.

    A crop whose corners would leave the image, because it is rotated or wider than the image, is
    shrunk until it fits, then placed uniformly where all four corners lie inside.

    Args:
        count: Images ``b``.
        image_size: Their ``(height, width)`` in pixels.
        placement: Ranges and probabilities.

    Returns:
        ``(b, 2, 3)`` float32 maps on the CPU, from the CPU's generator: six numbers per image, and
        a seventh for the aspect ratio if the area is drawn.

    >>> draw_maps(2, (40, 60), Placement(max_rotation=10)).shape
    torch.Size([2, 2, 3])
    """
    numbers = 6 if placement.area_range is None else 7
    drawn = torch.rand(numbers, count, dtype=torch.float32, device="cpu")
    return lay_maps(drawn, drawn.new_tensor(image_size[::-1]), placement)


def lay_maps(drawn: Tensor, size: Tensor, placement: Placement) -> Tensor:
    """The maps of `draw_maps` for random numbers ``(6 or 7, b)`` and sizes (width, height)."""
    angle = torch.deg2rad((2 * drawn[3] - 1) * placement.max_rotation)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()))
    turn = rearrange(turn, "(row column) b -> b row column", row=2)
    crop = crop_sides(drawn, size, placement)
    box = (turn.abs() * crop[:, None]).sum(dim=-1)  # the upright box around the turned crop
    shrink = (size / box).amin(dim=-1, keepdim=True).clamp(max=1)
    crop, box = crop * shrink, box * shrink
    centre = box / 2 + rearrange(drawn[1:3], "xy b -> b xy") * (size - box).clamp(min=0)
    probabilities = drawn.new_tensor((placement.prob_hflip, placement.prob_vflip))
    flipped = rearrange(drawn[4:6], "uv b -> b uv") < probabilities
    linear = turn * torch.where(flipped, -crop, crop)[:, None]  # columns: across u, down v
    return torch.cat((linear, (centre - linear.sum(dim=-1) / 2)[..., None]), dim=-1)


def crop_sides(drawn: Tensor, size: Tensor, placement: Placement) -> Tensor:
    """The sides ``(b, 2)`` of the crops in pixels, (width, height), before they are made to fit."""
    if placement.area_range is None:
        low, high = placement.ratio_range
        return (low + (high - low) * drawn[0])[:, None] * size
    low, high = placement.area_range
    area = (low + (high - low) * drawn[0]) * size.prod(dim=-1)
    narrow, wide = (log(aspect) for aspect in placement.aspect_range)
    aspect = torch.exp(narrow + (wide - narrow) * drawn[6])  # even in its logarithm
    return torch.stack((area * aspect, area / aspect), dim=-1).sqrt()


def cut_views(
    images: Tensor, to_image: Tensor, size: tuple[int, int], mode: str = "bilinear"
) -> Tensor:
    """The pixels of the views: images sampled at the centres of the views' pixels.

    Where a view's pixels cover at least two of the image's, the image is first averaged down by the
    largest power of two that keeps the view's resolution, so that nothing aliases.

    Args:
        images: ``(b, c, height, width)`` float.
        to_image: ``(b, 2, 3)`` float32 maps, on the CPU, so that nothing waits for the device.
        size: ``(h, w)`` of the views.
        mode: ``bilinear``, ``nearest`` or ``bicubic``.

    Returns:
        ``(b, c, h, w)``, in at least float32.

    >>> image = torch.arange(16.0).view(1, 1, 4, 4)
    >>> whole = torch.tensor([[[4.0, 0, 0], [0, 4, 0]]])
    >>> cut_views(image, whole, (2, 2))[0, 0].tolist()
    [[2.5, 4.5], [10.5, 12.5]]
    """
    images = images if images.dtype == torch.float64 else images.float()
    height, width = images.shape[-2:]
    extent = to_image.new_tensor((width, height))  # (x, y)
    where = to_device(to_image / rearrange(extent, "xy -> xy 1"), images.device)
    centres = cell_centres(where.to(images.dtype), size)  # 0..1 from edge to edge of the image
    grid = rearrange(2 * centres - 1, "b (h w) xy -> b h w xy", h=size[0])
    powers = reductions(to_image, size)

    def sample(images: Tensor, grid: Tensor, power: tuple[int, int]) -> Tensor:
        averaged = averaged_down(images, power)
        return functional.grid_sample(
            averaged, grid, mode, padding_mode="border", align_corners=False
        )

    if len(set(powers)) == 1:
        return sample(images, grid, powers[0])
    cut = images.new_empty(len(powers), images.shape[1], *size)
    for power in sorted(set(powers)):
        chosen = torch.tensor([i for i, other in enumerate(powers) if other == power], device="cpu")
        index = to_device(chosen, images.device)
        cut = cut.index_copy(0, index, sample(images[index], grid[index], power))
    return cut


def reductions(to_image: Tensor, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Powers of two ``(down, across)`` by which each image is averaged before its view is cut."""
    h, w = size
    cells = to_image[..., :2] / to_image.new_tensor((w, h))
    reach: Sequence[Sequence[float]] = torch.linalg.vector_norm(cells, dim=-1).tolist()  # (x, y)
    return [(power_below(y), power_below(x)) for x, y in reach]


def power_below(pixels: float) -> int:
    """The largest power of two that is at most ``pixels``, and at least 1."""
    return 2 ** int(log2(pixels)) if pixels >= 2 else 1


def averaged_down(images: Tensor, power: tuple[int, int]) -> Tensor:
    """The images averaged to ``1 / power`` of their height and width; edges stay edges."""
    if power == (1, 1):
        return images
    smaller = [-(-side // by) for side, by in zip(images.shape[-2:], power, strict=True)]
    return functional.interpolate(images, smaller, mode="area")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``, without waiting for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
