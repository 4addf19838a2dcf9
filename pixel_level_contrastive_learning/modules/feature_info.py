"""Feature info: the layers of a backbone, found by running it, and which serve as features."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from .hooks import (
    ChannelsFirst,
    FeatureHook,
    FeatureHooks,
    Layout,
    NoGradientError,
    can_learn,
    first_weight,
    memory,
    patch_of,
    plain_name,
    tensor_in,
)
from .layer import (
    CORNER,
    SAME_STRIDE,
    Layer,
    check_patches,
    default_maps,
    graph,
    set_kinds,
    warn_of_unread,
    weights_in,
)


class FeatureInfo:
    """Every layer of a backbone, found by one forward pass of a copy.

    The copy takes an image of noise twice, in eval mode by default; the backbone keeps its weights,
    buffers, mode and hooks, and no random generator moves on.

    >>> info = FeatureInfo(nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()), 3, (64, 64))
    >>> print(info.layers[0], info.default_pixels())
    0 (8 channels, 8x8 cells) ['1']
    """

    def __init__(
        self, net: nn.Module, channels: int, size: tuple[int, int], *, training: bool = False
    ) -> None:
        self.size = size
        self.net_type = type(net).__name__
        inner: nn.Module = getattr(net, "_orig_mod", net)  # of a compiled network
        self.children = [name for name, _ in inner.named_children()]
        first = {layer: plain_name(name) for name, layer in net.named_modules()}
        named = net.named_modules(remove_duplicate=False)  # a shared layer has several names
        self.names = {plain_name(name): first[layer] for name, layer in named if plain_name(name)}
        self.net = duplicate(net).train(training)
        weight = first_weight(self.net, torch.empty(0))
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(1, channels, *size, generator=generator, device="cpu")
        self.patch = (1, 1)  # of a network that cuts images into patches
        self.images = noise.expand(2, -1, -1, -1).to(weight, copy=True)
        self.layers = self.look()

    def look(self) -> list[Layer]:
        """Run the copy: its layers in the order in which they last ran."""
        layers: dict[str, Layer] = {}
        used: list[object] = []  # what layers with weights were given; held, so that ids are unique
        passed: list[tuple[object, object]] = []  # what layers without weights were given, and gave
        order = ChannelsFirst()

        def layout_and_stride(output: object) -> tuple[Layout | None, float]:
            layout = order.layout(output, self.size, len(self.images))
            sides = zip(self.size, layout.grid, strict=True) if layout else [(0, 1)]
            return layout, max(side / cells for side, cells in sides)

        def hooks(name: str, layer: nn.Module) -> Iterator[RemovableHandle]:
            def ran(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
                if max(patch := patch_of(module)) > 1 and self.sees_image(inputs):
                    self.patch = patch
                if next(module.parameters(recurse=False), None) is not None:
                    used.extend(inputs)
                elif inputs and next(module.parameters(), None) is None:
                    passed.append((inputs[0], output))
                output = tensor_in(output)
                tensor = output if isinstance(output, Tensor) else torch.empty(0)
                first = inputs[0] if inputs else None
                order.see(first)
                order.see(output, first)
                _, given = layout_and_stride(first)
                gradient = tensor.grad_fn, tensor.requires_grad
                known = *layout_and_stride(output), given, tensor._version, *gradient
                layers.pop(name, None)  # a layer that runs again moves to the end
                layers[name] = Layer(name, module, output, *known)

            # Dropout in place does nothing in eval mode, but overwrites its input in training.
            def overwrites(_: nn.Module, inputs: tuple[object, ...]) -> None:
                taken = {memory(given) for given in inputs if isinstance(given, Tensor)}
                for earlier in layers.values():
                    earlier.overwritten |= (
                        isinstance(earlier.output, Tensor) and memory(earlier.output) in taken
                    )

            yield layer.register_forward_hook(ran)
            if getattr(layer, "inplace", False):
                yield layer.register_forward_pre_hook(overwrites)

        handles = [
            handle
            for name, layer in self.net.named_modules()
            if plain_name(name) and not isinstance(layer, torch.jit.ScriptModule)  # takes no hooks
            for handle in hooks(plain_name(name), layer)
        ]
        try:
            with self.isolated():
                self.net(self.images)
        except Exception as error:
            raise refusal(self.net_type, self.images, error) from error
        finally:
            for handle in handles:
                handle.remove()
        self.find_places(layers.values())
        set_kinds(layers, self.net, used, passed)
        for layer in layers.values():
            if isinstance(layer.output, Tensor):
                layer.overwritten |= layer.output._version != layer.version
                if not layer.overwritten:  # re-entrant checkpointing sets its gradient afterwards
                    layer.root = layer.output.grad_fn
                    layer.carries_gradient = layer.output.requires_grad
        return list(layers.values())

    def find_places(self, layers: Iterable[Layer]) -> None:
        """Find the layers whose tokens lie in their place, by an image with another corner."""
        tokens = [layer for layer in layers if layer.has_tokens]
        if not tokens:
            return
        images, (h, w) = self.images.clone(), self.size
        corner = images[1, :, h - h // CORNER :, w - w // CORNER :]
        corner.copy_(1 - corner)
        with ExitStack() as attached, self.isolated(), torch.no_grad():
            for layer in tokens:
                attached.enter_context(layer.module.register_forward_hook(layer.find_place))
            self.net(images)

    def sees_image(self, inputs: tuple[object, ...]) -> bool:
        """Whether a layer is given images of the full size, unpadded."""
        given = inputs[0] if inputs else None
        return isinstance(given, Tensor) and tuple(given.shape[-2:]) == self.size

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """A context with gradients: no random generator moves on, and nothing is compiled."""
        devices = [self.images.device] if self.images.device.type == "cuda" else []
        eager = torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng(devices), torch.enable_grad(), eager:
            yield

    def hook(self, wanted: str | int, *, pixel: bool) -> FeatureHook:
        """The hook for a layer, by its name or index, if its output serves as map or vector."""
        kind = "pixel" if pixel else "instance"
        name = self.name_of(wanted, kind)
        layer = self.get(name)
        if layer is None:
            raise ValueError(
                f"the {kind} layer {name!r} did not run when {self.net_type} was given an image; "
                f"{self.advice(pixel)}"
            )
        if layer.is_shuffled:
            raise ValueError(
                f"the {kind} layer {name!r} gives different tokens for the same image, as a masked "
                "autoencoder does, so they have no position; load the weights into the "
                "network without masks, such as transformers.ViTModel.from_pretrained(NAME)"
            )
        if layer.layout is None:
            raise ValueError(
                f"the {kind} layer {name!r} gives {layer.shape}, which cannot be read as "
                f"{'a map' if pixel else 'a vector'}; {self.advice(pixel)}"
            )
        if pixel and not layer.is_map:
            raise ValueError(
                f"the pixel layer {name!r} gives {layer.shape}: a vector or a 1x1 map has no "
                f"pixels to compare. Use an earlier layer, or images larger than {self.size[0]}x"
                f"{self.size[1]}; {self.advice(pixel)}"
            )
        if not layer.carries_gradient:
            raise NoGradientError(kind, name, self.alternative(name))
        return FeatureHook(layer.name, layer.layout, layer.overwritten)

    def pixel_hooks(
        self, wanted: str | int | Sequence[str | int] | None, levels: int
    ) -> list[FeatureHook]:
        """The hook of each layer of the pixel loss: of those named, or of so many by default."""
        if wanted is None:
            wanted = self.default_pixels(levels)
        names: list[Any] = list(wanted) if isinstance(wanted, (tuple, list)) else [wanted]
        hooks = [self.hook(name, pixel=True) for name in names]
        if len({hook.name for hook in hooks}) < max(1, len(hooks)):
            raise ValueError(
                f"hidden_layer_pixel is {wanted!r}; name at least one layer, each only once"
            )
        for hook in hooks:
            check_patches(self.net_type, self.size, self.patch, hook.layout.grid)
        if levels not in (1, len(hooks)):
            raise ValueError(
                f"pixel_levels is {levels}, but {len(hooks)} pixel layers are named; leave "
                "pixel_levels out, or name no layers and let it choose them"
            )
        return hooks

    def get(self, name: str) -> Layer | None:
        """The layer of that name, or None if it did not run."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def name_of(self, wanted: str | int, kind: str) -> str:
        """The plain name of a layer given by name or by index."""
        count = len(self.children)
        if isinstance(wanted, str) and plain_name(wanted) in self.names:
            return self.names[plain_name(wanted)]
        if isinstance(wanted, str) and wanted.removeprefix("-").isdecimal():  # of the command line
            wanted = int(wanted)
        if isinstance(wanted, int) and -count <= wanted < count:
            return plain_name(self.children[wanted])
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
                f"network's children{', or a list of these' * (kind == 'pixel')}"
            )
        raise ValueError(f"{found}; {self.advice(pixel=kind == 'pixel')}")

    def default_pixels(self, levels: int = 1) -> list[str]:
        """The first of `levels`.

        Raises:
            ValueError: There is none, or there are not so many strides.
        """
        found = list(islice(self.levels(), levels))
        read = [layer for layer in self.layers if layer.is_map and not layer.is_unread]
        unread = [layer for layer in self.layers if layer.is_unread]
        if read and unread:
            warn_of_unread(self.net_type, self.deepest(read), self.deepest(unread))
        if len(found) < levels:
            raise ValueError(
                f"pixel_levels is {levels}, but {self.net_type} has maps of {len(found)} "
                f"{'stride' if len(found) == 1 else 'strides'} at {self.size[0]}x{self.size[1]}: "
                f"{', '.join(map(str, found))}; give at most {len(found)}, or name the layers"
            )
        return [layer.name for layer in found]

    def levels(self) -> Iterator[Layer]:
        """The `deepest` map of the largest stride up to 32 and 4x4 cells, and the next finer ones.

        Raises:
            ValueError: There is none.
        """
        fit = [
            layer
            for layer in self.layers
            if layer.layout is not None
            and min(layer.layout.grid) >= 4
            and layer.stride <= 32.5  # images that 32 does not divide
        ]
        maps = default_maps(fit)
        if not maps:
            if not self.names:
                raise ValueError(
                    f"{self.net_type} has no inner layers whose output can be read; pass "
                    "nn.Sequential(net)"
                )
            h, w = self.size
            raise ValueError(
                f"{self.net_type} has no map of at least 4x4 cells for images of {h}x{w}; use "
                f"larger images, or name a layer; {self.advice(pixel=True)}"
            )
        return self.pyramid(maps)

    def pyramid(self, layers: Sequence[Layer]) -> Iterator[Layer]:
        """The `deepest` of the layers at each stride, the coarsest first."""
        while layers:
            finer = max(layer.stride for layer in layers) / SAME_STRIDE
            yield self.deepest([layer for layer in layers if layer.stride > finer])
            layers = [layer for layer in layers if layer.stride <= finer]

    def deepest(self, layers: Sequence[Layer]) -> Layer:
        """The layer that most weights lead to, since an auxiliary head may run last."""
        deepest, most, counted = layers[-1], -1, set[Any]()
        for layer in reversed(layers):
            if layer.root in counted:
                continue  # what was counted depends on it
            steps = set(graph(layer.root))
            weights = weights_in(steps)
            if weights > most:
                deepest, most = layer, weights
            counted |= steps
        return deepest

    def default_instance(self, pixel: str) -> str:
        """The pooled vector, which follows the last map; else the `deepest` map, the coarsest."""
        maps = [i for i, layer in enumerate(self.layers) if layer.is_map and not layer.is_scores]
        last_map = max(maps, default=-1)
        # The answer is no feature, unless the network ends there; dropout zeroes a share of it.
        answer = self.layers[-1].output
        vectors = [
            layer
            for layer in self.layers[last_map + 1 :]
            if layer.layout is not None
            and (layer.output is not answer or re.search("Pool|Norm", layer.type_name))
            and not layer.is_scores
            and not layer.type_name.startswith("Dropout")
        ]
        pools = [layer.name for layer in vectors if "Pool" in layer.type_name]
        names = pools[-1:] or [layer.name for layer in vectors[:1]]
        if names or not pixel:  # no map is asked for
            return names[0] if names else pixel
        whole = default_maps([layer for layer in self.layers if layer.carries_gradient])
        return next((layer.name for layer in self.pyramid(whole)), pixel)

    def alternative(self, name: str) -> Layer | None:
        """The first layer after the one of that name that serves as well and carries gradient."""
        layer = self.get(name)
        if layer is None:
            return None
        later = self.layers[self.layers.index(layer) + 1 :]
        fit = (other for other in later if other.carries_gradient and other.is_map == layer.is_map)
        return next((other for other in fit if other.layout is not None), None)

    def advice(self, pixel: bool) -> str:
        """The layers that would do: a map for each stride; for an instance a pooled vector too."""
        would_do = {round(layer.stride): layer for layer in default_maps(self.layers)}
        names = [str(layer) for _, layer in sorted(would_do.items())]
        pooled = self.default_instance(pixel="") if would_do and not pixel else ""
        names = [pooled, *names] if pooled else names
        return f"usable layers: {', '.join(names) or 'none at this image size'}"

    def unreached(self, hook: FeatureHook) -> list[str]:
        """The names of parameters, frozen ones too, that the hooked output does not depend on."""
        parameters = dict(self.net.named_parameters())
        if not all(parameter.requires_grad for parameter in parameters.values()):
            unfreeze(self.net)  # they may be unfrozen later
            self.layers = self.look()
        roots = [layer.root for layer in self.layers if layer.name == hook.name]
        walked = [node for root in roots for node in graph(root)]
        reached = {id(node.variable) for node in walked if hasattr(node, "variable")}
        if any(isinstance(node, BackwardCFunction) for node in walked):
            # Re-entrant checkpointing, or an autograd function of the network's own, hides what it
            # uses until it runs backward.
            self.net.zero_grad()
            with self.isolated():
                FeatureHooks(hook).run(self.net, self.images)[hook.name].sum().backward()
            reached = {id(weight) for weight in parameters.values() if weight.grad is not None}
        return [name for name, parameter in parameters.items() if id(parameter) not in reached]


def refusal(net_type: str, images: Tensor, error: Exception) -> ValueError:
    """The error for images that a network cannot take."""
    if is_too_small(error):
        advice = "give larger images (image_size)"
    elif isinstance(error, (TypeError, AttributeError, LookupError)):
        advice = (
            "it must run as net(images) on one tensor (b, c, h, w): wrap it in a module whose "
            "forward does"
        )
    else:
        advice = (
            "give PixelCL the image_size and channels that the network was built for, or build the "
            "network for these"
        )
    return ValueError(
        f"{net_type} cannot take images of shape {tuple(images.shape)}: {error}; {advice}"
    )


def is_too_small(error: Exception) -> bool:
    """Whether a convolution or a pool of torch found no room in its map."""
    return (
        re.search(r"Kernel size can't be greater|Output size is too small", str(error)) is not None
    )


def duplicate(net: nn.Module) -> nn.Module:
    """A copy of a network, or an error that tells how to make it one that can be copied."""
    if isinstance(net, torch.jit.ScriptModule):
        raise ValueError(
            f"{net.original_name} is a TorchScript network, whose layers cannot be read; build the "
            "network in Python and load its weights: net.load_state_dict(scripted.state_dict())"
        )
    try:
        return copy.deepcopy(net)
    except Exception as error:
        raise ValueError(
            f"{type(net).__name__} cannot be copied for the target: {error}; instead of "
            "torch.nn.utils.spectral_norm or weight_norm use torch.nn.utils.parametrizations, end "
            "pruning with torch.nn.utils.prune.remove, and keep nothing in the network that "
            "copy.deepcopy rejects"
        ) from error


def unfreeze(net: nn.Module) -> nn.Module:
    """The network itself, every parameter that can learn with a gradient."""
    for parameter in net.parameters():
        parameter.requires_grad_(can_learn(parameter))
    return net
