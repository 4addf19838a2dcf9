"""The encoder: a backbone, some of its layers, and a projector behind each; its EMA target."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from traceback import walk_tb
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..checks import LIMITS, raise_together
from .hooks import (
    FeatureHook,
    FeatureHooks,
    NoGradientError,
    as_map,
    as_vector,
    can_learn,
    first_weight,
)

HALVES = (torch.float16, torch.bfloat16)


class Branches(NamedTuple):
    """Which of the two losses need projections."""

    pixel: bool = True
    instance: bool = True


BOTH = Branches()


class Projections(NamedTuple):
    """The projections of a view; none for a branch that was not asked for."""

    pixel: tuple[Tensor, ...]  # (b, d, h, w) each level, a vector for each cell of its layer's map
    instance: Tensor | None  # (b, d), a vector for the view


def grids_of(levels: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Cells ``(h, w)`` of each level; one level without cells if maps were not asked for."""
    return [(level.shape[2], level.shape[3]) for level in levels] or [(0, 0)]


def per_level(heads: Sequence[nn.Module]) -> nn.Module:
    """A head for each level as one module: alone it keeps the names of its weights."""
    return heads[0] if len(heads) == 1 else nn.ModuleList(heads)


def each_level(heads: nn.Module) -> list[nn.Module]:
    """The head of each level, out of `per_level`."""
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def relative_weights(weights: Sequence[float], levels: int) -> tuple[float, ...]:
    """Weights that add up to 1, one for each level; by default the same for all."""
    if weights and len(weights) != levels:
        raise ValueError(
            f"level_weights is {weights!r}; give {levels} numbers above 0, one per pixel layer"
        )
    given = tuple(weights) or (1.0,) * levels
    return tuple(weight / sum(given) for weight in given)


class Encoder(nn.Module):
    """A backbone read by hooks: maps of a view and its average, each through a projector."""

    def __init__(
        self,
        net: nn.Module,
        pixel_hooks: Sequence[FeatureHook],
        instance_hook: FeatureHook,
        pixel_projector: nn.Module,
        instance_projector: nn.Module,
    ) -> None:
        super().__init__()
        self.net = net
        self.pixel_hooks = tuple(pixel_hooks)
        self.instance_hook = instance_hook
        self.pixel_projector = pixel_projector
        self.instance_projector = instance_projector
        self.hooks = FeatureHooks(*pixel_hooks, instance_hook)

    @property
    def pixel_layer(self) -> str | tuple[str, ...]:
        """The pixel layer's name, or those of several, as settings and cards have it."""
        names = tuple(hook.name for hook in self.pixel_hooks)
        return names if len(names) > 1 else names[0]

    def forward(self, pixels: Tensor, branches: Branches = BOTH) -> Projections:
        """Project views ``(b, c, h, w)``; a branch that is not asked for is not computed."""
        outputs = self.hooks.run(self.net, pixels)
        maps: list[Tensor] = []
        instance = None
        if branches.pixel:
            size = (pixels.shape[2], pixels.shape[3])
            projectors = each_level(self.pixel_projector)
            for hook, projector in zip(self.pixel_hooks, projectors, strict=True):
                output = checked(outputs, "pixel", hook, len(pixels))
                maps.append(projector(as_map(output, hook.layout, size)))
        if branches.instance:
            output = checked(outputs, "instance", self.instance_hook, len(pixels))
            instance = self.instance_projector(as_vector(output, self.instance_hook.layout))
        return Projections(tuple(maps), instance)


def checked(outputs: dict[str, Any], kind: str, hook: FeatureHook, images: int) -> Tensor:
    """The output of one layer, once it is known to have the layout it had before."""
    if hook.name not in outputs:
        raise ValueError(
            f"the {kind} layer {hook.name!r} did not run in this forward pass; choose a layer that "
            "runs every time, and do not replace the layer's own forward"
        )
    output = outputs[hook.name]
    axes = hook.layout.axes.split()
    fits = isinstance(output, Tensor) and output.ndim == len(axes) and len(output) == images
    if not fits or output.shape[axes.index("c")] != hook.layout.channels:
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the {kind} layer {hook.name!r} gave {shown} for {images} images; when the learner "
            f"was built it was read as '{hook.layout.axes}' with c = {hook.layout.channels}: "
            "build a new learner after changing the network"
        )
    if torch.is_grad_enabled() and not output.requires_grad:
        raise NoGradientError(kind, hook.name)
    found: Tensor = output
    return found


def lacks_batch_statistics(error: ValueError) -> bool:
    """Whether a batch norm in train mode raised the error, given one value per channel."""
    for frame, _ in walk_tb(error.__traceback__):
        norm, given = ([*frame.f_locals.values()] + [None] * 2)[:2]
        if isinstance(norm, _BatchNorm) and norm.training and isinstance(given, Tensor):
            return given.numel() == given.shape[1]
    return False


def too_few_images(error: ValueError, images: int, branches: Branches) -> ValueError:
    """The error for a batch of which batch norm has no statistics."""
    skip = ", or set instance_weight=0" if branches.instance else ""
    return ValueError(
        f"batch norm in train mode cannot use a batch of {images} ({error}); pass at "
        f"least 2 images (drop_last=True in a data loader){skip}, or put batch norm into eval mode"
    )


def fails_now(
    error: Exception, net: nn.Module, size: tuple[int, int], built_for: tuple[int, int]
) -> ValueError:
    """The error of a network that ran when the learner was built: in eval mode, on one size."""
    ran, fails, advice = [], [], []
    if size != built_for:
        was, given = (f"{height}x{width}" for height, width in (built_for, size))
        ran, fails = [f"on views of {was}"], [f"on views of {given}"]
        advice = [f"cut views to {was}, the image_size"]
    if net.training:
        ran, fails = [*ran, "in eval mode"], [*fails, "in train mode"]
        advice.append("pass the part without its losses, such as net.backbone")
    return ValueError(
        f"{type(net).__name__} runs {' '.join(ran)} but not {' '.join(fails)}: {error}; "
        f"{', or '.join(advice)}"
    )


def map_projector(channels: int, hidden: int, out: int) -> nn.Sequential:
    """From maps ``(b, channels, h, w)`` to ``(b, out, h, w)``: each channel with mean 0."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, out, 1, bias=False),
        nn.BatchNorm2d(out, affine=False),
    )


def vector_projector(channels: int, hidden: int, out: int) -> nn.Sequential:
    """From vectors ``(b, channels)`` to ``(b, out)``, likewise."""
    return nn.Sequential(
        nn.Linear(channels, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )


def predictor(size: int, hidden: int) -> nn.Sequential:
    """From the online projection of one view to the target's projection of the other."""
    return nn.Sequential(
        nn.Linear(size, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, size),
    )


class TargetEncoder(Encoder):
    """The moving average of an encoder, which starts as a copy (arXiv:2011.10043, sec. 3.1).

    Runs without gradient and in train mode: its batch norm has statistics of its own. Its
    parameters are held in at least float32, whatever the learner is cast to, since in half
    precision a step of one per cent would round away; it computes in the precision of the cast.
    """

    def __init__(self, online: Encoder) -> None:
        if any(is_lazy(parameter) for parameter in online.parameters()):
            raise ValueError(
                f"{type(online.net).__name__} has lazy layers without weights yet: run it once on "
                "an image before passing it"
            )
        super().__init__(
            copy.deepcopy(online.net),
            online.pixel_hooks,
            online.instance_hook,
            copy.deepcopy(online.pixel_projector),
            copy.deepcopy(online.instance_projector),
        )
        self.requires_grad_(False)
        self.train()
        self.widen()
        # A state that is assigned brings its own dtype.
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]  # untyped in torch
            TargetEncoder.widen
        )
        self.compute_dtype = first_weight(online, torch.empty(0)).dtype

    @torch.no_grad()
    def forward(self, pixels: Tensor, branches: Branches = BOTH) -> Projections:
        half = self.compute_dtype in HALVES
        kind = pixels.device.type
        with torch.autocast(kind, dtype=self.compute_dtype) if half else nullcontext():
            return super().forward(pixels, branches)

    @torch.no_grad()
    def update(self, online: Encoder, decay: float | Tensor) -> None:
        """Move every parameter, but no buffer: ``decay`` of itself plus the rest of the online."""
        if not isinstance(decay, Tensor):
            raise_together(LIMITS["moving_average_decay"]("decay", decay))
        pairs = self.paired(online, nn.Module.parameters)
        moving = [(target.detach(), other) for target, other in pairs if can_learn(target)]
        others = [other.detach().to(target.dtype) for target, other in moving]
        targets = [target for target, _ in moving]
        if isinstance(decay, Tensor):  # torch's lerp would read it on the host
            gaps = torch._foreach_sub(others, targets)
            torch._foreach_mul_(gaps, 1 - decay)
            torch._foreach_add_(targets, gaps)
        else:
            torch._foreach_lerp_(targets, others, 1 - decay)

    @torch.no_grad()
    def reset(self, online: Encoder) -> None:
        """Make the target a copy of the online encoder again, buffers included."""
        for tensors in (nn.Module.parameters, nn.Module.buffers):
            for target, other in self.paired(online, tensors):
                target.copy_(other)

    def paired(
        self, online: Encoder, tensors: Callable[[nn.Module], Iterable[Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """The parameters or buffers of the target, each with the one that it follows."""
        ours, theirs = list(tensors(self)), list(tensors(online))
        if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
            raise ValueError(
                f"{type(online.net).__name__} has other weights than when the learner was built "
                f"({len(theirs)} tensors; the target has {len(ours)}), and the target cannot "
                "follow it: build a new learner after changing the network"
            )
        return list(zip(ours, theirs, strict=True))

    def widen(self, _: object = None) -> None:
        """Hold every tensor in at least float32; one by one, since `_apply` changes no dtype."""
        for module in self.modules():
            tensors: list[Tensor] = [
                *module.parameters(recurse=False),
                *module.buffers(recurse=False),
            ]
            for tensor in tensors:
                if tensor.dtype in HALVES:
                    tensor.data = tensor.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as asked, but to float32 where a half precision is asked for."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in HALVES else moved

        # `fn` moves or casts: a tensor of the present dtype shows what it makes of it.
        device = next(self.parameters()).device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self
