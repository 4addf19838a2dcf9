"""The encoder: a backbone, two taps on it, and a projector behind each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import LIMITS, raise_together
from .feature_info import Survey, no_gradient
from .hooks import Tap, Taps, as_map, as_vector, can_learn, first_weight


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


def map_projector(channels: int, hidden: int, out: int) -> nn.Sequential:
    """From maps ``(b, channels, h, w)`` to ``(b, out, h, w)``: each channel of mean 0."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, out, 1, bias=False),
        nn.BatchNorm2d(out, affine=False),
    )


def vector_projector(channels: int, hidden: int, out: int) -> nn.Sequential:
    """The same from vectors ``(b, channels)`` to ``(b, out)``."""
    return nn.Sequential(
        nn.Linear(channels, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )


def predictor(size: int, hidden: int) -> nn.Sequential:
    """From what the online network says of an image to what the target will say of it."""
    return nn.Sequential(
        nn.Linear(size, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, size),
    )


HALVES = (torch.float16, torch.bfloat16)


class Target(Encoder):
    """The moving average of an encoder (arXiv:2011.10043, sec. 3.1).

    Runs without gradient and in train mode: its batch norm has statistics of its own. Its
    parameters are never held in less than float32, whatever the learner is cast to: in half
    precision a step of one per cent would round away.

    Args:
        online: The encoder to follow; the target begins as its copy.

    Raises:
        ValueError: Lazy layers have no weights yet.
    """

    def __init__(self, online: Encoder) -> None:
        if any(is_lazy(parameter) for parameter in online.parameters()):
            raise ValueError(
                f"{type(online.net).__name__} has lazy layers without weights yet: run it once on "
                "an image before handing it in"
            )
        super().__init__(
            copy.deepcopy(online.net),
            online.pixel_tap,
            online.instance_tap,
            copy.deepcopy(online.pixel_projector),
            copy.deepcopy(online.instance_projector),
        )
        self.requires_grad_(False)
        self.train()
        for module in self.modules():  # tensor by tensor, since `_apply` below keeps precision
            held: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in held:
                if tensor.dtype in HALVES:
                    tensor.data = tensor.float()
        self.compute_dtype = first_weight(online, torch.empty(0)).dtype

    @torch.no_grad()
    def forward(self, pixels: Tensor, branches: Branches = BOTH) -> Projections:
        half = self.compute_dtype in HALVES  # a learner cast to halves computes in halves
        kind = pixels.device.type
        with torch.autocast(kind, dtype=self.compute_dtype) if half else nullcontext():
            return super().forward(pixels, branches)

    @torch.no_grad()
    def follow(self, online: Encoder, decay: float) -> None:
        """Move every parameter of the target: ``decay`` of itself, the rest of the online one.

        Batch-norm buffers are the target's own and stay.

        Args:
            online: The encoder that is followed.
            decay: Share of itself that the target keeps, in [0, 1].

        Raises:
            ValueError: A decay outside [0, 1].
        """
        raise_together(LIMITS["moving_average_decay"]("decay", decay))
        pairs = list(zip(self.parameters(), online.parameters(), strict=True))
        moving = [(mine.detach(), other) for mine, other in pairs if can_learn(mine)]
        others = [other.detach().to(mine.dtype) for mine, other in moving]
        torch._foreach_lerp_([mine for mine, _ in moving], others, 1 - decay)

    @torch.no_grad()
    def reset(self, online: Encoder) -> None:
        """Make the target a copy of the online encoder again, buffers included."""
        for held in (nn.Module.parameters, nn.Module.buffers):
            for mine, other in zip(held(self), held(online), strict=True):
                mine.copy_(other)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as asked, but keep float32 where halves were asked for."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in HALVES else moved

        # A move keeps any precision and a cast none: ask what becomes of the present one.
        device = next(self.parameters()).device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self
