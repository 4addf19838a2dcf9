"""The explorer's cargo: feature maps so small that a page can carry them and compare them live."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, cat

from .matches import picture
from .pca import centred, components

if TYPE_CHECKING:
    from PIL.Image import Image

WHOLE = torch.eye(3)[:2]
"""The map of a view that is the whole image."""


class Sample(NamedTuple):
    """An image, or a view of one.

    Attributes:
        name: What it is called, for people.
        pixels: ``(c, h, w)`` float32 in [0, 1], all channels, at the size of the page.
        source: Number of the image it shows.
        to_source: ``(2, 3)`` map from its unit square to that of the whole image.
    """

    name: str
    pixels: Tensor
    source: int
    to_source: Tensor

    @property
    def whole(self) -> bool:
        """Whether it is the whole image."""
        return bool((self.to_source == WHOLE).all())

    @property
    def size(self) -> tuple[int, int]:
        """Its ``(height, width)`` on the page."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


def rgb(pixels: Tensor) -> Tensor:
    """Images ``(..., c, h, w)`` of any channels as three for the eye: the first ones, or gray."""
    if pixels.shape[-3] >= 3:
        return pixels[..., :3, :, :]
    return repeat(pixels[..., 0, :, :], "... h w -> ... rgb h w", rgb=3)


DIMENSIONS = 32
"""Numbers a cell: enough that cosines come out as of all channels, to a few hundredths."""


def packed(maps: Sequence[Tensor], dimensions: int = DIMENSIONS) -> list[dict[str, Any]]:
    """Maps as text, from which a page computes how alike any two cells are.

    The strongest principal components of features of length 1 are kept, less the mean over all
    cells, each as whole numbers from -127 to 127 of its own unit. A page that takes the mean of any
    two maps from both has what `centred` gives for them.

    Args:
        maps: ``(c, h, w)`` float each, of one layer.
        dimensions: How many components.

    Returns:
        For each map its ``h``, ``w``, ``units`` (one number a component), and ``data``: int8 in
        base64, a cell after the other, row by row.
    """
    directions = centred(*maps)
    cells = cat([rearrange(own, "c h w -> (h w) c") for own in directions])
    axes = components(cells, min(dimensions, cells.shape[1]))
    units = ((cells @ axes).abs().amax(dim=0) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    held = []
    for own in directions:
        numbers = (einsum(own, axes, "c h w, c d -> h w d") / units).round().to(torch.int8)
        h, w, _ = numbers.shape
        data = text(numbers.numpy().tobytes())
        held.append({"h": h, "w": w, "units": rounded(units), "data": data})
    return held


def rounded(numbers: Tensor) -> list[float]:
    """Numbers with the digits that matter."""
    return [float(f"{number:.4g}") for number in numbers.tolist()]


def cargo(samples: Sequence[Sample], networks: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """All that the explorer needs, as plain lists and texts.

    Args:
        samples: The images, and other views of them.
        networks: For each network, by its name for people, the maps ``(c, h, w)`` of all samples.
    """
    maps = [packed(own) for own in networks.values()]
    return {
        "networks": list(networks),
        "images": [
            {
                "name": sample.name,
                "whole": sample.whole,
                "source": sample.source,
                "map": sample.to_source.flatten().tolist(),
                "width": sample.size[1],
                "height": sample.size[0],
                "src": jpeg(picture(rgb(sample.pixels))),
                "maps": [own[number] for own in maps],
            }
            for number, sample in enumerate(samples)
        ],
    }


def jpeg(image: Image) -> str:
    """A photograph as a data URI."""
    held = BytesIO()
    image.convert("RGB").save(held, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{text(held.getvalue())}"


def webp(image: Image) -> str:
    """A photograph with transparent parts as a data URI."""
    held = BytesIO()
    image.save(held, "WEBP", quality=85)
    return f"data:image/webp;base64,{text(held.getvalue())}"


def text(content: bytes) -> str:
    """Bytes as base64."""
    return b64encode(content).decode("ascii")
