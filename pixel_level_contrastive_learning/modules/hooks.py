"""Taps: reading inner layers of any backbone by forward hooks.

A tap's hook is on the backbone only while it runs, and its layer is looked up by name each time, so
that the backbone stays clean and may be wrapped, compiled or converted later.
"""

from __future__ import annotations

from math import inf, log
from typing import Any, NamedTuple

import torch
import torch._dynamo
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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


WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Names that compiling, checkpointing and sharding put around a module."""

# Compiled code takes no notice of hooks that come or go later unless it guards against them. Ours
# do just that: code compiled without them must not run in their place.
torch._dynamo.config.skip_nnmodule_hook_guards = False


class Tap(NamedTuple):
    """A layer to read: its name, how, and whether a later layer changes its output in place."""

    name: str
    reading: Reading
    overwritten: bool = False


class Taps:
    """Reads some layers of a network while it runs.

    The hooks are the same objects at every run, which lets a compiled network keep its code.

    Args:
        taps: The layers to read.
    """

    def __init__(self, *taps: Tap) -> None:
        self.overwritten = {tap.name: tap.overwritten for tap in taps}
        self.caught: dict[str, Any] = {}
        self.hooks = {name: Hook(self, name) for name in self.overwritten}

    # Hooks come and go outside of compiled code; the network between is compiled, hooks and all.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def run(self, net: nn.Module, pixels: Tensor) -> dict[str, Any]:
        """What each layer gave for ``pixels``; a layer that did not run has no entry.

        Pixels are brought to the precision of the network.
        """
        handles = self.attach(net)
        try:
            net(pixels.to(first_weight(net, pixels).dtype))
            return dict(self.caught)
        finally:
            self.caught.clear()
            for handle in handles:
                handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def attach(self, net: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on."""
        layers = [(find_layer(net, name), hook) for name, hook in self.hooks.items()]
        return [layer.register_forward_hook(hook) for layer, hook in layers]


class Hook:
    """Keeps what one layer gives; a copy, where a later layer would change it in place."""

    def __init__(self, taps: Taps, name: str) -> None:
        self.taps = taps
        self.name = name

    def __call__(self, module: nn.Module, inputs: object, output: Any) -> None:  # noqa: ARG002
        copied = isinstance(output, Tensor) and self.taps.overwritten[self.name]
        self.taps.caught[self.name] = output.clone() if copied else output


def plain_name(name: str) -> str:
    """A module's name without what was wrapped around it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def can_learn(parameter: Tensor) -> bool:
    """Whether a parameter can carry a gradient: a table of indices cannot."""
    return parameter.is_floating_point() or parameter.is_complex()


def first_weight(net: nn.Module, instead: Tensor) -> Tensor:
    """The first weight that is no table of indices: it tells where and how finely a network counts.

    Args:
        net: The network.
        instead: What is taken where there is none.
    """
    return next((weight for weight in net.parameters() if weight.is_floating_point()), instead)


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """The submodule called ``name``, such as ``layer4``, whatever was wrapped around it.

    Raises:
        ValueError: There is none, where there was one when the learner was built; or copies of it
            run on several devices, which one hook cannot tell apart.
    """
    if isinstance(net, nn.DataParallel) and len(net.device_ids) > 1:
        raise ValueError(
            f"the network is a DataParallel over {len(net.device_ids)} devices, whose copies "
            "cannot be tapped; hand in the network itself and wrap DistributedDataParallel around "
            "the learner"
        )
    layers: dict[str, nn.Module] = dict(net.named_modules())
    if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        layers |= dict(net.module.named_modules())
    if name in layers:
        return layers[name]
    plain = {plain_name(own): layer for own, layer in reversed(layers.items())}
    if name in plain:
        return plain[name]
    raise ValueError(
        f"{type(net).__name__} no longer has the layer {name!r}; build a new learner after taking "
        "layers out of the network"
    )
