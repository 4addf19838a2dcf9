"""The encoder: a backbone, two taps on it, and a projector behind each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layouts import as_map, as_vector
from .survey import Survey, no_gradient
from .taps import Tap, Taps


class Branches(NamedTuple):
    """Which of the two losses are asked for; what neither needs is not computed."""

    pixel: bool = True
    instance: bool = True


BOTH = Branches()


class Projections(NamedTuple):
    """What an encoder makes of a view; a branch that was not asked for is None.

    Attributes:
        pixel: ``(b, d, h, w)`` float, a vector for each cell of the tapped map.
        instance: ``(b, d)`` float, a vector for the view.
    """

    pixel: Tensor | None
    instance: Tensor | None

    @property
    def grid(self) -> tuple[int, int]:
        """Cells ``(h, w)`` of the map; none if it was not asked for."""
        return (0, 0) if self.pixel is None else (self.pixel.shape[2], self.pixel.shape[3])


class Encoder(nn.Module):
    """From a view to a projection of each of its pixels and one of the whole.

    Args:
        net: The backbone, kept as it is: no weight, mode or hook of it is changed here.
        pixel_tap: The layer whose map goes to the pixel projector.
        instance_tap: The layer whose average goes to the instance projector.
        pixel_projector: Maps ``(b, c, h, w)`` to ``(b, d, h, w)``.
        instance_projector: Maps ``(b, c)`` to ``(b, d)``.
    """

    def __init__(
        self,
        net: nn.Module,
        pixel_tap: Tap,
        instance_tap: Tap,
        pixel_projector: nn.Module,
        instance_projector: nn.Module,
    ) -> None:
        super().__init__()
        self.net = net
        self.pixel_tap = pixel_tap
        self.instance_tap = instance_tap
        self.pixel_projector = pixel_projector
        self.instance_projector = instance_projector
        self.taps = Taps(pixel_tap, instance_tap)

    def forward(self, pixels: Tensor, branches: Branches = BOTH) -> Projections:
        """Project a view.

        Args:
            pixels: ``(b, c, h, w)`` float, ready for the backbone.
            branches: What to compute.

        Raises:
            ValueError: A tapped layer did not run, or changed its shape, or gave an output without
                gradient while gradients are on.
        """
        outputs = self.taps.run(self.net, pixels)
        size = (pixels.shape[2], pixels.shape[3])
        pixel = instance = None
        if branches.pixel:
            output = self.tapped(outputs, self.pixel_tap, pixels)
            pixel = self.pixel_projector(as_map(output, self.pixel_tap.reading, size))
        if branches.instance:
            output = self.tapped(outputs, self.instance_tap, pixels)
            instance = self.instance_projector(as_vector(output, self.instance_tap.reading))
        return Projections(pixel, instance)

    def tapped(self, outputs: dict[str, Any], tap: Tap, pixels: Tensor) -> Tensor:
        """The output of one tap, once it was found to be what the survey saw."""
        kind = "pixel" if tap is self.pixel_tap else "instance"
        if tap.name not in outputs:
            raise ValueError(
                f"the {kind} layer {tap.name!r} did not run in this forward pass; tap a layer that "
                "runs every time, and do not replace the layer's own forward"
            )
        output = outputs[tap.name]
        layout = tap.reading.layout
        axes = layout.split()
        fits = (
            isinstance(output, Tensor) and output.ndim == len(axes) and len(output) == len(pixels)
        )
        if not fits or output.shape[axes.index("c")] != tap.reading.channels:
            shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the {kind} layer {tap.name!r} gave {shown} for {len(pixels)} images; when the "
                f"learner was built it was read as '{layout}' with c = {tap.reading.channels}: "
                "build a new learner after changing the network"
            )
        if torch.is_grad_enabled() and not output.requires_grad:
            size = (pixels.shape[2], pixels.shape[3])
            raise ValueError(no_gradient(kind, tap.name, self.instead(tap, pixels.shape[1], size)))
        found: Tensor = output
        return found

    def instead(self, tap: Tap, channels: int, size: tuple[int, int]) -> Any:
        """The first layer after the tap that carries gradient in the network's present state."""
        survey = Survey(self.net, channels, size, training=self.net.training)
        layer = survey.called(tap.name)
        return None if layer is None else survey.after(layer)
