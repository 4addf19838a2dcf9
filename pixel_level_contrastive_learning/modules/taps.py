"""Taps: reading inner layers of any backbone by forward hooks.

A tap's hook is on the backbone only while it runs, and its layer is looked up by name each time, so
that the backbone stays clean and may be wrapped, compiled or converted later.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layouts import Reading

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
