"""Layers: what each gave when a backbone was looked at, and which maps are worth a tap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .layouts import Reading

SAME_STRIDE = 1.5
"""Strides within this factor are equals: borders make a map a cell larger or smaller."""
ONE_BLOCK = 3.0
"""What makes a map coarser by more than this is no block, but a row of them."""


class Layer(NamedTuple):
    """What a layer of a backbone gave when it was looked at.

    Attributes:
        name: Its name in the backbone, such as ``layer4``.
        type_name: The name of its class.
        output: What it gives: a shape, or the type where it is no tensor.
        reading: How that can be read, or None.
        stride: Pixels of the image a cell covers, along the longer way.
        whole: Whether it is worth a tap that nobody asked for: neither what a block has worked out
            by half, see `halves`, nor scores of classes.
        output_id: The same number for layers that give the very same tensor.
        overwritten: Whether a later layer changes the output in place, be it in training alone.
        carries_gradient: Whether a loss on the output would reach weights.
    """

    name: str
    type_name: str
    output: str
    reading: Reading | None
    stride: float
    whole: bool
    output_id: int
    overwritten: bool
    carries_gradient: bool

    @property
    def is_map(self) -> bool:
        """Whether it has more than one cell, so that there is something to compare."""
        return self.reading is not None and max(self.reading.grid) > 1

    def __str__(self) -> str:
        reading = self.reading
        if reading is None or not self.is_map:
            return f"{self.name} {self.output}"
        h, w = reading.grid
        return f"{self.name} ({reading.channels} channels, {h}x{w} cells)"


def features(layers: Sequence[Layer]) -> list[Layer]:
    """The maps among layers that may be taken without being named.

    They are square, and neither attention nor full of holes. What is not whole is left out where
    there is anything else.
    """
    maps = [
        layer
        for layer in layers
        if layer.is_map
        and layer.reading is not None
        and layer.reading.is_square
        and not layer.type_name.startswith(("Dropout", "Softmax"))
    ]
    return [layer for layer in maps if layer.whole] or maps


def halves(strides: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names of layers in blocks that make a map coarser, as fine as that was before.

    Args:
        strides: By a layer's name, of the map that it is given and of the one that it gives.
    """
    return {
        name
        for name, (_, own) in strides.items()
        for outer in parents(name)
        for given, gives in [strides.get(outer, (0.0, 0.0))]
        if SAME_STRIDE * given < gives < ONE_BLOCK * given and own < SAME_STRIDE * given
    }


def parents(name: str) -> list[str]:
    """The names of the layers that a layer is part of: ``a`` and ``a.b`` of ``a.b.c``."""
    return [name[:end] for end, letter in enumerate(name) if letter == "."]


def stride(reading: Reading | None, size: tuple[int, int]) -> float:
    """Pixels of an image of this size that a cell covers along the longer way; 0 of no map."""
    if reading is None:
        return 0.0
    return max(side / cells for side, cells in zip(size, reading.grid, strict=True))
