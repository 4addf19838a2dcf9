"""Read inner layers of any backbone by forward hooks.

Hooks are on the backbone only while it runs, and layers are looked up by name each time, so that
the backbone stays clean and may be wrapped, compiled or converted later.
"""

from __future__ import annotations

from contextlib import suppress
from math import inf, log
from threading import RLock
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LARGEST_PREFIX = 16
"""Class and register tokens that a sequence of patch tokens may begin with, at most."""
SQUARE = log(1.5)
"""Cells with a distortion below this count as square."""
LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""A lock for each network that was read: hooks see what any thread runs."""
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Names that compiling, checkpointing and sharding put around a module."""


class Layout(NamedTuple):
    """How the output of a layer is laid out."""

    axes: str  # "b c h w", "b h w c", "b n c" or "b c n" (tokens), "b c" (a vector; "b c n", n = 1)
    channels: int
    grid: tuple[int, int]  # cells (h, w); (1, 1) for a vector
    prefix: int = 0  # tokens before the first patch token
    distortion: float = 0.0  # |log| of a cell's height over its width in pixels; 0 is square

    @property
    def is_square(self) -> bool:
        """Whether cells are near enough to square for the layer to be a default."""
        return self.distortion < SQUARE


def memory(tensor: Tensor) -> int:
    """The address of a tensor's values: the same for all tensors that share them."""
    return tensor.untyped_storage().data_ptr()


class ChannelsFirst:
    """Tells tokens after their channels, ``(b, c, n)``, from ``(b, n, c)`` by where they come from.

    Shapes alone do not: they come of a flattened map ``(b, c, h, w)``, or of turned tokens.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}  # of these tensors, by id: tokens where they came from
        self.others: dict[int, Tensor] = {}  # of all others the last at each address
        self.seen: dict[int, Tensor] = {}  # by id; held, so that ids and addresses are unique

    def see(self, value: object, given: object = None) -> None:
        """Look at what a layer was given, or at what it gave from what it was given."""
        if not isinstance(value, Tensor) or value.ndim not in (3, 4) or id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if value.ndim == 3 and isinstance(given, Tensor) and id(given) in self.tokens:
            kept = value.shape[1] == given.shape[1] or value.shape[2] == given.shape[2]
            turned = memory(value) == memory(given) and value.stride() != given.stride()
            is_pooled = value.shape[2] == 1
            tokens = 0 if turned or is_pooled or not kept else self.tokens[id(given)]
        else:
            sources = given, self.others.get(memory(value))
            tokens = value.shape[2] if any(is_turned(value, source) for source in sources) else 0
        if tokens:
            self.tokens[id(value)] = tokens
        else:
            self.others[memory(value)] = value

    def layout(self, output: object, size: tuple[int, int], batch: int) -> Layout | None:
        """As `layout_of`; None for what mixes tokens in between, too."""
        if not isinstance(output, Tensor) or id(output) not in self.tokens:
            return layout_of(output, size, batch)
        layout = layout_of(output.mT, size, batch)
        same = layout and output.shape[2] == self.tokens[id(output)]
        return layout._replace(axes="b c n") if layout and same else None


def is_turned(value: Tensor, source: object) -> bool:
    """Whether a tensor of three axes is a map, flattened, or turned tokens."""
    if not isinstance(source, Tensor) or value.ndim != 3:
        return False
    if source.ndim == 4:
        flat = source.flatten(2)
        equal_sides = flat.shape[1] == flat.shape[2]
        return value.shape == flat.shape and (not equal_sides or value.stride() == flat.stride())
    shares = source.ndim == 3 and memory(value) == memory(source)
    return shares and (value.shape, value.stride()) == (source.mT.shape, source.mT.stride())


def layout_of(output: object, size: tuple[int, int], batch: int) -> Layout | None:
    """The layout of a layer's output for so many images of a size; None if it has none of these.

    Three axes are read as ``b n c``, see `ChannelsFirst`.

    >>> layout_of(torch.zeros(2, 25, 7), size=(64, 96), batch=2)[:4]
    ('b n c', 7, (4, 6), 1)
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.ndim not in (2, 3, 4) or output.shape[0] != batch or 0 in output.shape:
        return None
    if output.ndim == 2 or (output.ndim == 3 and output.shape[2] == 1):  # of a pool over tokens
        return Layout("b c" if output.ndim == 2 else "b c n", output.shape[1], (1, 1))
    if output.ndim == 3:
        _, tokens, channels = output.shape
        layouts = [
            Layout("b n c", channels, grid, prefix, distortion(grid, size))
            for prefix in range(min(LARGEST_PREFIX, tokens - 1) + 1)
            for grid in [token_grid(tokens - prefix, size)]
        ]
        best = min(layouts, key=lambda layout: (layout.distortion, layout.prefix))
        return best if best.is_square else None
    _, first, second, third = output.shape
    maps = ("b c h w", first, (second, third)), ("b h w c", third, (first, second))
    layouts = [Layout(*parts, distortion=distortion(parts[2], size)) for parts in maps]
    return min(layouts, key=lambda layout: layout.distortion)


def tensor_in(output: object) -> object:
    """The tensor of a layer that gives several values: the first, or the last hidden state.

    Of several maps, or a list of several tokens, none stands for the layer: they stay together. (A
    tuple of tokens has the layer's own first, as transformers gives them.)
    """
    if isinstance(output, (tuple, list)) and output:
        axes = (3, 4) if isinstance(output, list) else (4,)
        maps = {id(value) for value in output if isinstance(value, Tensor) and value.ndim in axes}
        return output if len(maps) > 1 else output[0]
    return getattr(output, "last_hidden_state", output)  # of transformers


def token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """The ``(h, w)`` with ``h * w`` tokens whose cells are nearest to square."""
    grids = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0]
    return min(grids, key=lambda grid: distortion(grid, size))


def distortion(grid: tuple[int, int], size: tuple[int, int]) -> float:
    """How far cells are from square, 0 for square; infinite for cells under half a pixel."""
    down, across = size[0] / grid[0], size[1] / grid[1]
    return abs(log(down / across)) if min(down, across) >= 0.5 else inf


def as_map(output: Tensor, layout: Layout, size: tuple[int, int]) -> Tensor:
    """The output as ``(b, c, h, w)``; the grid of tokens follows from this image size."""
    if "n" in layout.axes:
        tokens = (output if layout.axes == "b n c" else output.mT)[:, layout.prefix :]
        h, _ = token_grid(tokens.shape[1], size)
        return rearrange(tokens, "b (h w) c -> b c h w", h=h)
    return rearrange(output, f"{layout.axes} -> b c h w")


def as_vector(output: Tensor, layout: Layout) -> Tensor:
    """The output as ``(b, c)``: maps and tokens averaged, prefix tokens included."""
    return output if layout.axes == "b c" else reduce(output, f"{layout.axes} -> b c", "mean")


class FeatureHook(NamedTuple):
    """A layer to read: its name, its layout, and whether a later layer overwrites its output."""

    name: str
    layout: Layout
    overwritten: bool = False

    def __str__(self) -> str:
        h, w = self.layout.grid
        return f"{self.name} ({h}x{w} cells)"


class FeatureHooks:
    """Reads some layers of a network while it runs, for one thread at a time.

    The hooks are the same objects at every run, which lets a compiled network keep its code. The
    first `FeatureHooks` of a process sets ``torch._dynamo.config.skip_nnmodule_hook_guards`` to
    False: without these guards, code compiled without our hooks would run in their place.
    """

    def __init__(self, *hooks: FeatureHook) -> None:
        self.outputs: dict[str, Any] = {}
        self.keepers = {hook.name: Keeper(self.outputs, hook) for hook in hooks}
        guard_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        guard_hooks()

    # Hooks come and go outside of compiled code; the network between is compiled, hooks and all.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def run(self, net: nn.Module, pixels: Tensor) -> dict[str, Any]:
        """The output of each layer that ran, for pixels cast to the dtype of the network."""
        with LOCKS.setdefault(net, RLock()):
            handles = self.attach(net)
            try:
                net(pixels.to(first_weight(net, pixels).dtype))
                return dict(self.outputs)
            finally:
                self.outputs.clear()
                for handle in handles:
                    handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def attach(self, net: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on."""
        layers = [(find_layer(net, name), keeper) for name, keeper in self.keepers.items()]
        return [layer.register_forward_hook(keeper) for layer, keeper in layers]


class Keeper:
    """Keeps what one layer gives; a copy, where a later layer overwrites it."""

    def __init__(self, outputs: dict[str, Any], hook: FeatureHook) -> None:
        self.outputs = outputs
        self.hook = hook

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:  # noqa: ARG002
        output = tensor_in(output)
        if isinstance(output, Tensor) and self.hook.overwritten:
            output = output.clone()
        self.outputs[self.hook.name] = output


def guard_hooks() -> None:
    """Make compiled code notice hooks that come and go."""
    from torch._dynamo import config

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()  # what is compiled already has no such guards


def plain_name(name: str) -> str:
    """A module's name without what was wrapped around it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def can_learn(parameter: Tensor) -> bool:
    """Whether a parameter can carry a gradient: a table of indices cannot."""
    return parameter.is_floating_point() or parameter.is_complex()


def patch_of(layer: nn.Module) -> tuple[int, int]:
    """Height and width of the patches that a convolution cuts a map into; 1 for other layers."""
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size != layer.stride:
        return 1, 1
    padded = layer.padding not in ("valid", (0, 0))
    return (1, 1) if padded else cast(tuple[int, int], layer.stride)


def first_weight(net: nn.Module, default: Tensor) -> Tensor:
    """The first floating-point weight, which tells device and dtype of a network, or a default."""
    return next((weight for weight in net.parameters() if weight.is_floating_point()), default)


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """The submodule called ``name``, such as ``layer4``, whatever was wrapped around it."""
    if isinstance(net, nn.DataParallel) and len(net.device_ids) > 1:
        raise ValueError(
            f"the network is a DataParallel over {len(net.device_ids)} devices, whose copies "
            "cannot be read by hooks; pass the network itself and wrap the learner in "
            "DistributedDataParallel"
        )
    parallel = isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = cast(nn.Module, net.module) if parallel else net
    for module in (inner, net):
        with suppress(AttributeError):
            return module.get_submodule(name)
    layers: dict[str, nn.Module] = dict(net.named_modules()) | dict(inner.named_modules())
    plain = {plain_name(path): layer for path, layer in reversed(layers.items())}
    if name in plain:
        return plain[name]
    raise ValueError(
        f"{type(net).__name__} no longer has the layer {name!r}; build a new learner after "
        "removing layers from the network"
    )


class NoGradientError(ValueError):
    """A layer's output carries no gradient; ``instead`` is a later layer whose output does."""

    def __init__(self, kind: str, name: str, instead: object = None) -> None:
        there = f"use {instead} instead, " if instead is not None else ""
        super().__init__(
            f"the {kind} layer {name!r} has an output without gradient: it is frozen, or runs "
            f"inside re-entrant activation checkpointing; {there}unfreeze it, or checkpoint with "
            "use_reentrant=False"
        )
        self.kind, self.name = kind, name
