"""Layouts: how the output of a layer is read as a map, as tokens or as a vector."""

from __future__ import annotations

from math import inf, log
from typing import NamedTuple

from einops import rearrange, reduce
from torch import Tensor

LARGEST_PREFIX = 16
"""Class and register tokens that a sequence of patch tokens may begin with, at most."""
SQUARE = log(1.5)
"""Distortion from which on cells are no longer taken for square."""


class Reading(NamedTuple):
    """How the output of a layer is read.

    Attributes:
        layout: ``b c h w``, ``b h w c``, ``b n c`` (tokens) or ``b c`` (a vector).
        channels: Its channels ``c``.
        grid: Its cells ``(h, w)``; ``(1, 1)`` for a vector.
        prefix: Tokens before the first patch token.
        distortion: How far the cells are from covering as many pixels down as across, as a ratio's
            logarithm; 0 is square.
    """

    layout: str
    channels: int
    grid: tuple[int, int]
    prefix: int = 0
    distortion: float = 0.0

    @property
    def is_square(self) -> bool:
        """Whether cells are near enough to square to be taken without being named."""
        return self.distortion < SQUARE


def read_output(output: object, size: tuple[int, int], batch: int) -> Reading | None:
    """How a layer's output can be read, or None where it cannot.

    Args:
        output: Whatever the layer gave.
        size: ``(height, width)`` of the images that went in.
        batch: How many they were.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.ndim not in (2, 3, 4) or output.shape[0] != batch or 0 in output.shape:
        return None
    if output.ndim == 2:
        return Reading("b c", output.shape[1], (1, 1))
    if output.ndim == 3:
        return read_tokens(output.shape[1], output.shape[2], size)
    _, first, second, third = output.shape
    channels_first = Reading(
        "b c h w", first, (second, third), 0, distortion((second, third), size)
    )
    channels_last = Reading("b h w c", third, (first, second), 0, distortion((first, second), size))
    return min(channels_first, channels_last, key=lambda reading: reading.distortion)


def read_tokens(tokens: int, channels: int, size: tuple[int, int]) -> Reading | None:
    """Tokens as a map: the shortest prefix that leaves a grid of the images' aspect."""
    readings = [
        Reading("b n c", channels, grid, prefix, distortion(grid, size))
        for prefix in range(min(LARGEST_PREFIX, tokens - 1) + 1)
        for grid in [token_grid(tokens - prefix, size)]
    ]
    best = min(readings, key=lambda reading: (reading.distortion, reading.prefix))
    return best if best.is_square else None


def token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """The ``(h, w)`` with ``h * w`` tokens whose cells are nearest to square."""
    grids = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0]
    return min(grids, key=lambda grid: distortion(grid, size))


def distortion(grid: tuple[int, int], size: tuple[int, int]) -> float:
    """How far cells are from square, 0 for square; infinite for cells under half a pixel."""
    down, across = size[0] / grid[0], size[1] / grid[1]
    return abs(log(down / across)) if min(down, across) >= 0.5 else inf


def as_map(output: Tensor, reading: Reading, size: tuple[int, int]) -> Tensor:
    """The output as ``(b, c, h, w)``; tokens are laid out anew for each image size."""
    if reading.layout == "b n c":
        tokens = output[:, reading.prefix :]
        h, _ = token_grid(tokens.shape[1], size)
        return rearrange(tokens, "b (h w) c -> b c h w", h=h)
    if reading.layout == "b h w c":
        return rearrange(output, "b h w c -> b c h w")
    return output


def as_vector(output: Tensor, reading: Reading) -> Tensor:
    """The output as ``(b, c)``: maps and tokens averaged, prefix tokens included."""
    if reading.layout == "b c":
        return output
    return reduce(output, f"{reading.layout} -> b c", "mean")
