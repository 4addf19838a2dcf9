"""Taps: reading inner layers of any backbone by forward hooks, and finding layers worth reading.

A tap's hook is on the backbone only while it runs, and its layer is looked up by name each time, so
that the backbone stays clean and may be wrapped, compiled or converted later.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from difflib import get_close_matches
from math import inf, log
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"}
"""Names that compiling, checkpointing, sharding and data parallelism put around a module."""

LARGEST_PREFIX = 16
"""Class and register tokens that a sequence of patch tokens may begin with, at most."""


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


class Layer(NamedTuple):
    """What a layer of a backbone gave when it was looked at.

    Attributes:
        name: Its name in the backbone, such as ``layer4``.
        type_name: The name of its class.
        output: What it gives: a shape, or the type where it is no tensor.
        reading: How that can be read, or None.
        stride: Pixels of the image a cell covers, along the longer way.
        output_id: The same number for layers that give the very same tensor.
        overwritten: Whether a later layer changed the output in place.
        carries_gradient: Whether a loss on the output would reach weights.
    """

    name: str
    type_name: str
    output: str
    reading: Reading | None
    stride: float
    output_id: int
    overwritten: bool
    carries_gradient: bool

    @property
    def is_map(self) -> bool:
        """Whether it has more than one cell, so that there is something to compare."""
        return self.reading is not None and max(self.reading.grid) > 1

    @property
    def is_square(self) -> bool:
        """Whether its cells are near enough to square to be taken without being named."""
        return self.reading is not None and self.reading.distortion < log(1.5)

    def __str__(self) -> str:
        reading = self.reading
        if reading is None or not self.is_map:
            return f"{self.name} {self.output}"
        h, w = reading.grid
        return f"{self.name} ({reading.channels} channels, {h}x{w} cells)"


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
    return best if best.distortion < log(1.5) else None


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
        """What each layer gave for ``pixels``; a layer that did not run has no entry."""
        handles = self.attach(net)
        try:
            net(pixels)
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


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """The submodule called ``name``, such as ``layer4``, whatever was wrapped around it.

    Raises:
        ValueError: There is none, where there was one when the learner was built.
    """
    layers: dict[str, nn.Module] = dict(net.named_modules())
    if name in layers:
        return layers[name]
    plain = {plain_name(own): layer for own, layer in reversed(layers.items())}
    if name in plain:
        return plain[name]
    raise ValueError(
        f"{type(net).__name__} no longer has the layer {name!r}; build a new learner after taking "
        "layers out of the network"
    )


class Survey:
    """Every layer of a backbone, looked at once, on a copy, without changing anything.

    The copy sees two blank images, in eval mode by default; the backbone keeps its weights,
    buffers, mode and hooks, and no random generator moves on.

    Args:
        net: The backbone.
        channels: Channels of its images.
        size: Their ``(height, width)``.
        training: Whether to look in train mode instead.

    Raises:
        ValueError: The backbone refuses images of this size.
    """

    def __init__(
        self, net: nn.Module, channels: int, size: tuple[int, int], *, training: bool = False
    ) -> None:
        self.size = size
        self.net_type = type(net).__name__
        self.children = [name for name, _ in net.named_children()]
        self.names = [plain_name(name) for name, _ in net.named_modules() if name]
        self.layers: list[Layer] = []
        self.outputs: list[object] = []  # kept alive, so that their ids stay distinct
        copied = copy.deepcopy(net).train(training)
        weight = next(copied.parameters(), torch.empty(0))
        images = torch.zeros(2, channels, *size, device=weight.device, dtype=weight.dtype)
        devices = [weight.device] if weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            self.look(copied, images)
        self.parameters = dict(copied.named_parameters())

    def look(self, net: nn.Module, images: Tensor) -> None:
        """Run the network with a hook on every layer, and note what each gave, in order."""
        fired: list[tuple[str, str, object, int]] = []

        def note(name: str) -> RemovableHandle:
            def hook(module: nn.Module, _: object, output: object) -> None:
                version = output._version if isinstance(output, Tensor) else 0
                fired.append((plain_name(name), type(module).__name__, output, version))

            return find_layer(net, name).register_forward_hook(hook)

        handles = [note(name) for name, _ in net.named_modules() if name]
        try:
            net(images)
        except Exception as error:
            raise ValueError(
                f"{self.net_type} cannot take images of shape {tuple(images.shape)}: {error}; give "
                "PixelCL the image_size and channels that the network is built for, or build the "
                "network for these"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        for name, type_name, output, version in fired:
            shown, overwritten, grows = type(output).__name__, False, False
            if isinstance(output, Tensor):
                shown = str(tuple(output.shape))
                overwritten, grows = output._version != version, output.requires_grad
            stride, reading = 0.0, read_output(output, self.size, len(images))
            if reading is not None:
                stride = max(
                    side / cells for side, cells in zip(self.size, reading.grid, strict=True)
                )
            seen = stride, id(output), overwritten, grows
            self.layers.append(Layer(name, type_name, shown, reading, *seen))
            self.outputs.append(output)

    def tap(self, wanted: str | int, *, pixel: bool) -> Tap:
        """The tap on a layer, once it was found to give what pixels or instances need.

        Args:
            wanted: Its name, or an index into the network's children.
            pixel: Whether a map is needed; otherwise a vector, a map or tokens will do.

        Raises:
            ValueError: There is no such layer, it did not run, or gives nothing that can be read.
        """
        kind = "pixel" if pixel else "instance"
        name = self.name_of(wanted, kind)
        found = [layer for layer in self.layers if layer.name == name]
        if not found:
            raise ValueError(
                f"the {kind} layer {name!r} did not run when {self.net_type} saw an image; "
                f"{self.advice(pixel)}"
            )
        layer = found[-1]
        if layer.reading is None:
            raise ValueError(
                f"the {kind} layer {name!r} gives {layer.output}, which cannot be read as "
                f"{'a map' if pixel else 'a vector'}; {self.advice(pixel)}"
            )
        if pixel and not layer.is_map:
            raise ValueError(
                f"the pixel layer {name!r} gives {layer.output}: a vector or a 1x1 map has no "
                f"pixels to compare. Use an earlier layer, or images larger than {self.size[0]}x"
                f"{self.size[1]}; {self.advice(pixel)}"
            )
        if not layer.carries_gradient:
            raise ValueError(no_gradient(kind, name, self.after(layer)))
        return Tap(layer.name, layer.reading, layer.overwritten)

    def name_of(self, wanted: str | int, kind: str) -> str:
        """The name of a layer given by name or by index, without what was wrapped around it."""
        advice = self.advice(pixel=kind == "pixel")
        if isinstance(wanted, str):
            name = plain_name(wanted)
            if name in self.names:
                return name
            near = get_close_matches(name, self.names, n=3)
            perhaps = f"perhaps {' or '.join(near)}; " if near else ""
            raise ValueError(
                f"{self.net_type} has no layer {wanted!r} for the {kind} level; {perhaps}{advice}"
            )
        count = len(self.children)
        if not -count <= wanted < count:
            raise ValueError(
                f"{self.net_type} has {count} children and no child {wanted} for the {kind} level; "
                f"give a number from {-count} to {count - 1}, or a name; {advice}"
            )
        return plain_name(self.children[wanted])

    def default_pixel(self) -> str:
        """The deepest map of at least 4 x 4 cells and a stride of at most 32.

        Deepest is the largest stride; among equals, the last to run.

        Raises:
            ValueError: There is none.
        """
        maps = [
            layer
            for layer in self.layers
            if layer.reading is not None
            and layer.is_square
            and min(layer.reading.grid) >= 4
            and layer.stride <= 32.5  # images that 32 does not divide
        ]
        if not maps:
            h, w = self.size
            raise ValueError(
                f"{self.net_type} has no map of at least 4x4 cells for images of {h}x{w}; use "
                f"larger images, or name a layer; {self.advice(pixel=True)}"
            )
        # Strides within a factor of 1.5 are equals: borders make a map a cell larger or smaller.
        largest = max(layer.stride for layer in maps)
        return [layer for layer in maps if layer.stride > largest / 1.5][-1].name

    def default_instance(self, pixel: str) -> str:
        """The pooled vector, which follows the last map; the pixel layer where there is none.

        What the last layer gives is taken for the network's answer, not for its features.
        """
        last_map = max(index for index, layer in enumerate(self.layers) if layer.is_map)
        answer = self.layers[-1].output_id
        vectors = [
            layer
            for layer in self.layers[last_map + 1 :]
            if layer.reading is not None and layer.output_id != answer
        ]
        pools = [layer.name for layer in vectors if "Pool" in layer.type_name]
        names = pools[-1:] or [layer.name for layer in vectors[:1]]
        return names[0] if names else pixel

    def after(self, layer: Layer) -> Layer | None:
        """The first layer to run after ``layer`` that can be read likewise and carries gradient."""
        later = self.layers[self.layers.index(layer) + 1 :]
        fit = (own for own in later if own.carries_gradient and own.is_map == layer.is_map)
        return next((own for own in fit if own.reading is not None), None)

    def advice(self, pixel: bool) -> str:
        """The layers that would do, one for each stride."""
        would_do: dict[float, Layer] = {}
        for layer in self.layers:
            if layer.is_map == pixel and layer.is_square:
                would_do[round(layer.stride)] = layer
        names = ", ".join(str(layer) for _, layer in sorted(would_do.items()))
        return f"layers that would do: {names or 'none at this image size'}"

    def unreached(self, *taps: Tap) -> list[str]:
        """The names of trainable parameters that no tap's output depends on."""
        names = {tap.name for tap in taps}
        outputs = (
            out for own, out in zip(self.layers, self.outputs, strict=True) if own.name in names
        )
        reached = set(leaves([out for out in outputs if isinstance(out, Tensor)]))
        trainable = ((n, p) for n, p in self.parameters.items() if p.requires_grad)
        return [name for name, parameter in trainable if id(parameter) not in reached]


def leaves(tensors: list[Tensor]) -> Iterator[int]:
    """The ids of the leaf tensors that a gradient of ``tensors`` would reach."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield id(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def no_gradient(kind: str, name: str, instead: Layer | None) -> str:
    """The complaint about a layer whose output carries no gradient."""
    there = f"; tap {instead} instead" if instead is not None else ""
    return (
        f"the {kind} layer {name!r} gives an output without gradient: it is frozen, or runs inside "
        f"re-entrant activation checkpointing{there}, unfreeze it, or checkpoint with "
        "use_reentrant=False"
    )
