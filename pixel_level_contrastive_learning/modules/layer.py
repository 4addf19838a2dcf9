"""A layer of a backbone as it ran: what it gave, and of what kind it is."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .hooks import Layout, tensor_in

SAME_STRIDE = 1.5
"""Strides within this factor are equal: borders make a map a cell larger or smaller."""
ONE_BLOCK = 3.0
"""A layer that multiplies the stride by more than this is a row of blocks, not one block."""
SHUFFLED = 0.5
"""Tokens of equal images that differ by more than this, relative to neighbours, have no place."""
CORNER = 4
"""How often the corner of an image that is another one fits along each side."""
LOCAL = 1.5
"""Tokens of that corner that differ no more than so many times what others do lie elsewhere."""


@dataclass(eq=False)
class Layer:
    """A layer of a backbone as it ran."""

    name: str  # in the backbone, such as layer4
    module: nn.Module
    output: object  # the same object for layers that give the very same tensor
    layout: Layout | None  # None for an output that is no map, tokens or vector
    stride: float  # pixels of the image a cell covers, along the longer way; 0 without a layout
    input_stride: float  # of the map it was given, likewise
    version: int  # of the output when the layer was done; later changes in place count it up
    root: Any  # the last step of the gradient of what a hook reads
    carries_gradient: bool
    overwritten: bool = False  # whether a later layer changes the output, be it in training alone
    is_default: bool = True  # neither the inside of a block, nor class scores, nor a gate
    has_place: bool = True  # what it gives for a place of the image lies there, see `find_place`
    is_scores: bool = False  # what a classifier gives for each class or cell, or a BERT-like pooler

    @property
    def type_name(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    @property
    def channels(self) -> int:
        """How many it gives; 0 without a layout."""
        return 0 if self.layout is None else self.layout.channels

    @property
    def is_map(self) -> bool:
        """Whether it has more than one cell, so that there is something to compare."""
        return self.layout is not None and max(self.layout.grid) > 1

    @property
    def has_tokens(self) -> bool:
        """Whether its cells are tokens."""
        return self.layout is not None and "n" in self.layout.axes and self.is_map

    @property
    def is_shuffled(self) -> bool:
        """Whether the tokens of two equal images differ as much as a token and its neighbour do."""
        if self.layout is None or not self.has_tokens or not isinstance(self.output, Tensor):
            return False
        one, two = tokens_in(self.output, self.layout)
        difference = (one - one.roll(1, dims=0)).abs().mean()
        return bool((one - two).abs().mean() > SHUFFLED * difference)

    def find_place(self, _: nn.Module, __: object, output: object) -> None:
        """Find out whether another corner of an image, as the second has, changes what lies there.

        Queries lie nowhere; and tokens behind those of the cells are taken for cells.
        """
        output = tensor_in(output)
        shape = getattr(self.output, "shape", None)  # a layer may run with others before
        if self.layout is None or not isinstance(output, Tensor) or output.shape != shape:
            return
        one, two = tokens_in(output, self.layout)
        changed = (one - two).abs().mean(dim=1).view(self.layout.grid)
        rows, columns = (max(1, cells // CORNER) for cells in self.layout.grid)
        there = changed[-rows:, -columns:].mean()
        changed[-rows:, -columns:] = 0
        elsewhere = changed.sum() / (changed.numel() - rows * columns)
        self.has_place = bool(there > LOCAL * elsewhere)

    @property
    def is_gate(self) -> bool:
        """Whether it gives one number a cell, such as a gate or a score."""
        return self.channels == 1

    @property
    def is_unread(self) -> bool:
        """Whether it gives tokens that are no map."""
        is_tokens = isinstance(self.output, Tensor) and self.output.ndim == 3
        return is_tokens and (self.layout is None or self.is_shuffled or not self.has_place)

    @property
    def shape(self) -> str:
        """The shape of its output, or the type where that is no tensor."""
        output = self.output
        if isinstance(output, (tuple, list)) and len(output) > 1:
            return f"{len(output)} values rather than one map (name a layer inside it)"
        return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__

    def __str__(self) -> str:
        if self.layout is None or not self.is_map:
            return f"{self.name} {self.shape}"
        h, w = self.layout.grid
        return f"{self.name} ({self.layout.channels} channels, {h}x{w} cells)"


def default_maps(layers: Sequence[Layer]) -> list[Layer]:
    """The maps that may be used unnamed; those that are no default only where there is no other.

    Of these those whose cells lie elsewhere come last.
    """
    maps = [
        layer
        for layer in layers
        if layer.is_map
        and layer.layout is not None
        and layer.layout.is_square
        and not layer.type_name.startswith(("Dropout", "Softmax"))
    ]
    placed = [layer for layer in maps if layer.has_place]
    return [layer for layer in placed if layer.is_default] or placed or maps


def set_kinds(
    layers: Mapping[str, Layer],
    net: nn.Module,
    used: Iterable[object],
    passed: Iterable[tuple[object, object]],
) -> None:
    """Find the layers that are scores, and which of the others are defaults.

    Args:
        layers: By name.
        net: The network.
        used: What layers with weights were given.
        passed: What layers without weights were given, and gave.
    """
    used_ids = set(map(id, used))
    strides = {name: (layer.input_stride, layer.stride) for name, layer in layers.items()}
    total = number_of_weights(net)
    small = {n for n, layer in layers.items() if 2 * number_of_weights(layer.module) < total}
    inside = inside_blocks(strides, small)
    narrowed = {id(layer.output) for layer in layers.values() if narrows(layer.module)} - used_ids
    classes = getattr(net, "num_classes", None) or -1  # timm, torchvision
    scores = {id(layer.output) for layer in layers.values() if width(layer.module) == classes}
    scores -= used_ids
    poolers = tuple(f"{name}." for name, layer in layers.items() if is_pooler(layer.module))
    scores |= {id(layer.output) for name, layer in layers.items() if f"{name}.".startswith(poolers)}
    for given, gave in passed:
        scores |= {id(gave)} if id(given) in scores else set()
    answers = scores | narrowed
    read = {layer.channels for layer in layers.values() if id(layer.output) in used_ids}
    heads = [layer for layer in layers.values() if id(layer.output) in answers]
    # What has the channels of features may be added to them.
    heads = [layer for layer in heads if layer.channels not in read]
    answers |= {id(layer.output) for layer in layers.values() if adds_up(layer, heads)} - used_ids
    unplaced = tuple(f"{name}." for name, layer in layers.items() if not layer.has_place)
    for name, layer in layers.items():
        layer.is_scores = id(layer.output) in scores
        no_feature = id(layer.output) in answers or layer.is_gate
        layer.is_default = not (no_feature or name in inside or name.startswith(unplaced))


def tokens_in(output: Tensor, layout: Layout) -> Tensor:
    """The tokens ``(b, n, c)`` of the cells, float."""
    tokens = output if layout.axes == "b n c" else output.mT
    return tokens.detach().float()[:, layout.prefix :]


def adds_up(layer: Layer, heads: Iterable[Layer]) -> bool:
    """Whether a layer may give the sum of several heads inside it: it has as many channels."""
    inside = (head for head in heads if head.name.startswith(f"{layer.name}."))
    return sum(head.channels == layer.channels for head in inside) > 1


def inside_blocks(strides: Mapping[str, tuple[float, float]], small: Collection[str]) -> set[str]:
    """The layers inside blocks that end at another stride, by strides of input and output.

    Those of a downsampling block before it gets coarser; and coarser ones of a small block that
    ends as fine as it began, such as a pyramid of pools. (A large one may be a whole U-Net.)
    """

    def is_passing(stride: float, block: str) -> bool:
        given, gives = strides.get(block, (0.0, 0.0))
        if gives > SAME_STRIDE * given:
            return gives < ONE_BLOCK * given and stride < SAME_STRIDE * given
        return block in small and 1 < given < stride / SAME_STRIDE and gives > 0

    return {
        name
        for name, (_, stride) in strides.items()
        if any(is_passing(stride, name[:end]) for end, letter in enumerate(name) if letter == ".")
    }


def check_patches(
    net_type: str, size: tuple[int, int], patch: tuple[int, int], grid: tuple[int, int]
) -> None:
    """Refuse images whose border falls out of the patches: cells are not where they seem.

    A few pixels pass: at most a quarter of a cell.
    """
    sides = tuple(zip(size, patch, grid, strict=True))
    if all(side % edge <= side / cells / 4 for side, edge, cells in sides):
        return
    less = "x".join(str(side // edge * edge) for side, edge, _ in sides)
    more = "x".join(str(-(-side // edge) * edge) for side, edge, _ in sides)
    raise ValueError(
        f"image_size is {size[0]}x{size[1]}, which is not a multiple of {net_type}'s patches of "
        f"{patch[0]}x{patch[1]} pixels, so that cells are misplaced; give {less} or {more}"
    )


def warn_of_unread(net_type: str, read: Layer, unread: Layer) -> None:
    """Warn where most of a network leads to tokens alone that are no map."""
    share = weights_in(graph(read.root)) / max(1, weights_in(graph(unread.root)))
    if share < 0.5:
        warnings.warn(
            f"{net_type} gives {unread.shape} in {unread.name!r}, which cannot be read as a map; "
            f"only the {share:.0%} of its weights before it would be trained. Wrap the network in "
            "a module that gives tokens as (b, n, c), in order, n a grid of cells after at most "
            "16 others",
            stacklevel=4,
        )


def narrows(layer: nn.Module) -> bool:
    """Whether a layer is a convolution to fewer channels: class scores, where no weights follow."""
    return isinstance(layer, nn.Conv2d) and layer.out_channels < layer.in_channels


def is_pooler(layer: nn.Module) -> bool:
    """Whether a layer is a pooler as of BERT: dense, behind no feature, and in few checkpoints."""
    dense = any(isinstance(module, nn.Linear) for module in layer.modules())
    return dense and type(layer).__name__.endswith("Pooler")


def number_of_weights(net: nn.Module) -> int:
    """How many numbers the parameters of a network hold; of lazy ones none."""
    return sum(parameter.numel() for parameter in net.parameters() if not is_lazy(parameter))


def width(layer: nn.Module) -> object:
    """How many channels a convolution or a linear layer gives; None for others."""
    return getattr(layer, "out_features", getattr(layer, "out_channels", None))


def graph(root: Any) -> Iterator[Any]:
    """Every step of a gradient, from its last step down to the leaves; nothing for None."""
    waiting: list[Any] = [root] if root is not None else []
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def weights_in(steps: Iterable[Any]) -> int:
    """How many numbers the parameters among the steps of a gradient hold."""
    return sum(node.variable.numel() for node in steps if hasattr(node, "variable"))
