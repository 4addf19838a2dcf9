"""The survey of a backbone: which layers it has, what they give, and which are worth a tap."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from .hooks import Reading, Tap, Taps, can_learn, first_weight, plain_name, read_output

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


class Seen(NamedTuple):
    """A layer as it ran.

    Attributes:
        module: The layer.
        given: The stride of the map it was given; 0 if that was none.
        output: What it gave.
        overwritten: Whether that is changed in place later on, be it in training alone.
        root: The last step of the gradient of what a tap reads, which is a copy if it is changed.
        carries_gradient: Whether that has one.
        used: Whether a layer with weights of its own was given it.
    """

    module: nn.Module
    given: float
    output: object
    overwritten: bool = False
    root: Any = None
    carries_gradient: bool = False
    used: bool = False

    def read_from(self, tensor: Tensor) -> Self:
        """The same, read by its gradient as it is now."""
        return self._replace(root=tensor.grad_fn, carries_gradient=tensor.requires_grad)

    @property
    def is_score(self) -> bool:
        """Whether it is an answer: a convolution to fewer channels, after which no weights come."""
        own = self.module
        narrows = isinstance(own, nn.Conv2d) and own.out_channels < own.in_channels
        return narrows and not self.used


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
        ValueError: The backbone refuses images of this size, or to be copied.
    """

    def __init__(
        self, net: nn.Module, channels: int, size: tuple[int, int], *, training: bool = False
    ) -> None:
        self.size = size
        self.net_type = type(net).__name__
        self.children = [name for name, _ in net.named_children()]
        self.names = [plain_name(name) for name, _ in net.named_modules() if name]
        self.layers: list[Layer] = []
        self.net = duplicate(net).train(training)
        weight = first_weight(self.net, torch.empty(0))
        self.images = torch.zeros(2, channels, *size, device=weight.device, dtype=weight.dtype)
        seen = self.look()
        readings = {name: self.read(own.output) for name, own in seen.items()}
        strides = {name: stride(reading, size) for name, reading in readings.items()}
        half = halves({name: (own.given, strides[name]) for name, own in seen.items()})
        scores = {id(own.output) for own in seen.values() if own.is_score}
        for name, own in seen.items():
            output, type_name = own.output, type(own.module).__name__
            shown = (
                str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
            )
            whole = name not in half and id(output) not in scores
            known = readings[name], strides[name], whole, id(output), own.overwritten
            self.layers.append(Layer(name, type_name, shown, *known, own.carries_gradient))
        self.roots = {name: own.root for name, own in seen.items()}

    def read(self, output: object) -> Reading | None:
        """How what a layer gave, or was given, can be read."""
        return read_output(output, self.size, len(self.images))

    def look(self) -> dict[str, Seen]:
        """Run the copy: what each layer gave when it last ran, in the order of that."""
        fired: dict[str, tuple[Seen, int]] = {}
        changed: set[str] = set()
        used: set[int] = set()  # outputs that a layer with weights of its own was given

        def note(name: str, layer: nn.Module) -> Iterator[RemovableHandle]:
            def gave(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
                tensor = output if isinstance(output, Tensor) else torch.empty(0)
                given = stride(self.read(inputs[0]) if inputs else None, self.size)
                if next(module.parameters(recurse=False), None) is not None:
                    used.update(map(id, inputs))
                    used.discard(id(output))  # it may lie where a tensor lay that is gone
                fired.pop(name, None)  # a layer that runs again moves to the end
                changed.discard(name)
                seen = Seen(module, given, output).read_from(tensor)
                fired[name] = seen, tensor._version

            # Dropout in place, which is idle here, changes in training what it is given.
            def takes(_: nn.Module, inputs: tuple[object, ...]) -> None:
                taken = {memory(given) for given in inputs if isinstance(given, Tensor)}
                held = ((n, seen.output) for n, (seen, _) in fired.items())
                changed.update(
                    n for n, out in held if isinstance(out, Tensor) and memory(out) in taken
                )

            yield layer.register_forward_hook(gave)
            if getattr(layer, "inplace", False):
                yield layer.register_forward_pre_hook(takes)

        named = ((plain_name(name), layer) for name, layer in self.net.named_modules() if name)
        handles = [handle for name, layer in named for handle in note(name, layer)]
        try:
            with self.alone():
                self.net(self.images)
        except Exception as error:
            raise ValueError(
                f"{self.net_type} cannot take images of shape {tuple(self.images.shape)}: {error}; "
                "give PixelCL the image_size and channels that the network is built for, or build "
                "the network for these"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        found: dict[str, Seen] = {}
        for name, (seen, version) in fired.items():
            output = seen.output
            overwritten = name in changed
            if isinstance(output, Tensor):
                overwritten |= output._version != version
                if not overwritten:  # re-entrant checkpointing gives it its gradient afterwards
                    seen = seen.read_from(output)
            found[name] = seen._replace(overwritten=overwritten, used=id(output) in used)
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context with gradients, from which no random generator moves on."""
        devices = [self.images.device] if self.images.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield

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
        layer = self.called(name)
        if layer is None:
            raise ValueError(
                f"the {kind} layer {name!r} did not run when {self.net_type} saw an image; "
                f"{self.advice(pixel)}"
            )
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

    def called(self, name: str) -> Layer | None:
        """The layer of that name, or None if it did not run."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def name_of(self, wanted: str | int, kind: str) -> str:
        """The name of a layer given by name or by index, without what was wrapped around it."""
        count = len(self.children)
        if isinstance(wanted, int) and -count <= wanted < count:
            return plain_name(self.children[wanted])
        if isinstance(wanted, str) and plain_name(wanted) in self.names:
            return plain_name(wanted)
        if isinstance(wanted, str):
            near = get_close_matches(plain_name(wanted), self.names, n=3)
            perhaps = f"; perhaps {' or '.join(near)}" if near else ""
            found = f"{self.net_type} has no layer {wanted!r} for the {kind} level{perhaps}"
        elif isinstance(wanted, int):
            found = (
                f"{self.net_type} has {count} children and no child {wanted} for the {kind} level; "
                f"give a number from {-count} to {count - 1}, or a name"
            )
        else:
            found = (
                f"hidden_layer_{kind} is {wanted!r}; it must be a name or an index into the "
                "network's children"
            )
        raise ValueError(f"{found}; {self.advice(pixel=kind == 'pixel')}")

    def default_pixel(self) -> str:
        """The deepest map of at least 4 x 4 cells and a stride of at most 32.

        Deepest is the largest stride; among equals, what most weights lead to, since an auxiliary
        head may run last. What a block gives before it makes the map coarser is left out, and so
        are class scores, see `features`.

        Raises:
            ValueError: There is none.
        """
        fit = [
            layer
            for layer in self.layers
            if layer.reading is not None
            and min(layer.reading.grid) >= 4
            and layer.stride <= 32.5  # images that 32 does not divide
        ]
        maps = features(fit)
        if not maps:
            h, w = self.size
            raise ValueError(
                f"{self.net_type} has no map of at least 4x4 cells for images of {h}x{w}; use "
                f"larger images, or name a layer; {self.advice(pixel=True)}"
            )
        largest = max(layer.stride for layer in maps)
        return self.deepest([own for own in maps if own.stride > largest / SAME_STRIDE]).name

    def deepest(self, layers: Sequence[Layer]) -> Layer:
        """The layer that most weights lead to; among equals, the last to run."""
        deepest, most, counted = layers[-1], -1, set[Any]()
        for layer in reversed(layers):
            root = self.roots[layer.name]
            if root in counted:
                continue  # what was counted depends on it
            steps = set(graph(root))
            weights = sum(node.variable.numel() for node in steps if hasattr(node, "variable"))
            if weights > most:
                deepest, most = layer, weights
            counted |= steps
        return deepest

    def default_instance(self, pixel: str) -> str:
        """The pooled vector, which follows the last map; the pixel layer where there is none.

        What the last layer gives is taken for the network's answer, not for its features, and
        dropout zeroes a share of them.
        """
        last_map = max(index for index, layer in enumerate(self.layers) if layer.is_map)
        answer = self.layers[-1].output_id
        vectors = [
            layer
            for layer in self.layers[last_map + 1 :]
            if layer.reading is not None
            and layer.output_id != answer
            and not layer.type_name.startswith("Dropout")
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
        """The layers that would do: a map for each stride; for an instance a pooled vector too."""
        would_do: dict[float, Layer] = {}
        for layer in features(self.layers):
            would_do[round(layer.stride)] = layer
        names = [str(layer) for _, layer in sorted(would_do.items())]
        pooled = self.default_instance(pixel="") if would_do and not pixel else ""
        names = [pooled, *names] if pooled else names
        return f"layers that would do: {', '.join(names) or 'none at this image size'}"

    def unreached(self, tap: Tap) -> list[str]:
        """The names of parameters, frozen ones too, that the tap's output does not depend on."""
        parameters = dict(self.net.named_parameters())
        if not all(parameter.requires_grad for parameter in parameters.values()):
            thawed(self.net)  # as they may be later
            self.roots = {name: own.root for name, own in self.look().items()}
        walked = list(graph(self.roots[tap.name]))
        reached = {id(node.variable) for node in walked if hasattr(node, "variable")}
        if any(isinstance(node, BackwardCFunction) for node in walked):
            # What re-entrant checkpointing or a function of one's own does inside shows only when
            # it runs.
            self.net.zero_grad()
            with self.alone():
                Taps(tap).run(self.net, self.images)[tap.name].sum().backward()
            reached = {id(own) for own in parameters.values() if own.grad is not None}
        return [name for name, parameter in parameters.items() if id(parameter) not in reached]


def duplicate(net: nn.Module) -> nn.Module:
    """A copy of a network, or what to do where it cannot be copied."""
    try:
        return copy.deepcopy(net)
    except Exception as error:
        raise ValueError(
            f"{type(net).__name__} cannot be copied, as the target must be: {error}; in place of "
            "torch.nn.utils.spectral_norm or weight_norm use torch.nn.utils.parametrizations, and "
            "keep nothing in the network that copy.deepcopy refuses"
        ) from error


def thawed(net: nn.Module) -> nn.Module:
    """The network itself, all of its weights with a gradient; tables of indices have none."""
    for parameter in net.parameters():
        parameter.requires_grad_(can_learn(parameter))
    return net


def memory(tensor: Tensor) -> int:
    """Where a tensor's values lie: the same number for all that share them."""
    return tensor.untyped_storage().data_ptr()


def graph(root: Any) -> Iterator[Any]:
    """Every step that a gradient takes from its last step down to the leaves; None has none."""
    waiting: list[Any] = [root] if root is not None else []
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
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
